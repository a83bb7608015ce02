"""Optimizers as the recipes use them."""

import torch
from torch import nn


def sgd(
    model: nn.Module, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False
) -> torch.optim.Optimizer:
    """SGD on all parameters; weight decay reaches biases and batch norm too, as in the published runs."""
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
    )
