"""Shift and scale of the input channels, inside a network: what goes in is always a picture in [0, 1]."""

import torch
from torch import Tensor, nn

STATISTICS = {  # mean and standard deviation of the training pictures' channels
    # as DM-AT has them
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    # as RepDistiller and mdistiller have them
    "cifar100_kd": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # as torchvision has them, and everyone after it
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Normalise(nn.Module):
    """Shift and scale of the channels; no part of the state dict, since published files do not hold them."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: str) -> None:
        """statistics: a name in STATISTICS."""
        super().__init__()
        if statistics not in STATISTICS:
            raise ValueError(f"normalisation must be one of {', '.join(STATISTICS)}, got {statistics}")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS[statistics])
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1] -> the same shape."""
        return (x - self.mean) / self.std


def normaliser(statistics: str | None) -> nn.Module:
    """The layer that a network begins with; None takes pictures as they are."""
    return Normalise(statistics) if statistics else nn.Identity()
