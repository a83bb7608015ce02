"""What accuracies are measured of: a network in eval mode, pictures as they are, classes; each checked in one line.

Labels of another count, or pictures that are normalised before the network, would give a number, and a wrong one.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def checked(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The labels (N,) as int64, of images (N, 3, H, W), uint8 or float in [0, 1].

    Raises ValueError for others, and for a module in training mode, which would normalise by the batch and move its statistics.
    """
    leaves = network.modules() if isinstance(network, nn.Module) else ()
    if any(module.training for module in leaves if not list(module.children())):
        raise ValueError("the network is in training mode; call model.eval() first")
    known = images.dtype == torch.uint8 or images.is_floating_point()
    low, high = (float(x) for x in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not known or (images.dtype != torch.uint8 and not (0.0 <= low and high <= 1.0)):  # NaN, too
        raise ValueError(
            f"images must be uint8, or float in [0, 1], got {images.dtype} from {low:g} to {high:g}; a normalisation belongs into the network"
        )
    integers = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    )
    if not integers or labels.shape != images.shape[:1]:
        got = (
            f"{tuple(labels.shape)} of {labels.dtype}"
            if isinstance(labels, Tensor)
            else type(labels).__name__
        )
        raise ValueError(
            f"labels must be ({len(images)},) of an integer dtype, one for each image, got {got}"
        )
    return labels.long()


def check_classes(labels: Tensor, logits: Tensor) -> None:
    """Raises ValueError for labels that are no classes of logits (B, C)."""
    low, high = (int(x) for x in labels.aminmax()) if labels.numel() else (0, 0)
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"labels must be classes of the network's {logits.shape[-1]}, 0 to {logits.shape[-1] - 1}, got {low} to {high}"
        )
