"""Learning rates as a function of the epoch, to the digit of the published code.

A schedule is a function (epoch 1..epochs, epochs) -> factor of the base learning rate.
"""

import math


def cosine(epoch: int, epochs: int, *, offset: int = 0, length: int = 0) -> float:
    """0.5 (1 + cos(pi (epoch - offset) / (epochs + length))).

    GKL's runs: offset 0, length 1 (epoch / 201). The KL baseline's: offset 1, length 0 ((epoch - 1) / 200).
    Source: the learning-rate functions of the authors' two training scripts.
    """
    return 0.5 * (1.0 + math.cos(math.pi * (epoch - offset) / (epochs + length)))
