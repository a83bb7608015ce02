"""Weights that torch computes from others: pruned, and by weight or spectral normalisation. In a file they lie as what they come of.

tensors, names = folded(state_dict)     # conv.weight in the place of conv.weight_orig and conv.weight_mask; ("conv.weight",)
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def folded(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors, parts of a weight replaced by what it is in eval mode; and the names of the weights. Others as they are."""
    found, names = dict(tensors), list[str]()
    for key in tensors:
        for weight in (w for w in _weights(key) if w not in tensors):
            stem, dot, name = weight.rpartition(".")
            for parts, computed in WAYS:
                keys = [part.format(stem + dot, name) for part in parts]
                if keys[0] != key or not all(k in found for k in keys):
                    continue
                if (made := computed(*(found[k] for k in keys))) is not None:
                    for k in keys:
                        del found[k]
                    found[weight] = made
                    names.append(weight)
    return found, tuple(names)


def _weights(key: str) -> list[str]:
    """Of which weight a tensor of this name may be the first part."""
    stem, dot, name = key.rpartition(".")
    if name in ("original", "original0"):
        module, _, weight = stem.rpartition(".")
        outer = module.removesuffix("parametrizations")
        return [outer + weight] if outer != module else []
    return [stem + dot + name.removesuffix(end) for end in ("_orig", "_g") if name.endswith(end)]


def _pruned(weight: Tensor, mask: Tensor) -> Tensor | None:
    return weight * mask.to(weight.dtype) if weight.shape == mask.shape else None


def _weight_normed(size: Tensor, direction: Tensor) -> Tensor | None:
    """Of each slice its own length, where `size` has one; of all of them one where it is a number."""
    if size.ndim == 0:
        return direction * (size / direction.norm())
    if size.ndim != direction.ndim or not direction.is_floating_point():
        return None
    over = [n for n in range(size.ndim) if size.shape[n] == 1]
    length = torch.linalg.vector_norm(direction, dim=over, keepdim=True) if over else direction.abs()
    return direction * (size / length)


def _spectral(weight: Tensor, u: Tensor, v: Tensor) -> Tensor | None:
    """Divided by u^T W v, the rows of W being the output channels: the first dimension, or the second of a transposed convolution."""
    for rows in (weight, weight.transpose(0, 1)) if weight.ndim > 1 else ():
        matrix = rows.flatten(1)
        if u.shape == matrix.shape[:1] and v.shape == matrix.shape[1:]:
            return weight / torch.dot(u, matrix @ v)
    return None


# What a weight's parts are called behind its module's name: torch.nn.utils' functions, then torch.nn.utils.parametrizations.
WAYS: list[tuple[tuple[str, ...], Callable[..., Tensor | None]]] = [
    (("{0}{1}_orig", "{0}{1}_mask"), _pruned),
    (("{0}{1}_g", "{0}{1}_v"), _weight_normed),
    (("{0}parametrizations.{1}.original0", "{0}parametrizations.{1}.original1"), _weight_normed),
    (("{0}{1}_orig", "{0}{1}_u", "{0}{1}_v"), _spectral),
    (
        ("{0}parametrizations.{1}.original", "{0}parametrizations.{1}.0._u", "{0}parametrizations.{1}.0._v"),
        _spectral,
    ),
]
