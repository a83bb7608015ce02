"""Which epoch's weights a run keeps: the last, or the most robust ones on a set of images.

best = MostRobust(images="test", loss="ce", steps=10)
best.after_epoch(epoch, score, state)
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass
class MostRobust:
    """The weights with the highest robust accuracy after an epoch, under PGD in the training's epsilon-ball.

    images: test (Rice et al., AT-AWP and LAS-AT choose on the test set, and so must who reproduces them) or held_out.
    weights: last, or the name of an average. loss: ce (PGD) or cw. step_size: share of epsilon. ties: which of equals.
    """

    images: Literal["test", "held_out"]
    loss: Literal["ce", "cw"]
    steps: int
    step_size: float = 0.25
    weights: str = "last"
    ties: Literal["first", "last"] = "first"
    best: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("images", self.images, ("test", "held_out")),
            ("loss", self.loss, ("ce", "cw")),
            ("ties", self.ties, ("first", "last")),
        ):
            if value not in known:
                raise ValueError(f"selection.{name} must be {' or '.join(known)}, got {value!r}")

    def after_epoch(self, epoch: int, robust: float, state: dict[str, Tensor]) -> None:
        """Keep a copy of `state` if its robust accuracy (percent) is the best so far."""
        before = self.best.get("robust", -1.0)
        if robust > before or (robust == before and self.ties == "last"):
            copied = {key: value.detach().clone() for key, value in state.items()}
            self.best = {"epoch": epoch, "robust": robust, "state": copied}

    def load_state_dict(self, best: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint's best."""
        self.best = best
        if best:
            self.best = {**best, "state": {key: value.to(device) for key, value in best["state"].items()}}
