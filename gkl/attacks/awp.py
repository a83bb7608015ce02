"""Adversarial weight perturbation: a training step taken at the weights that are worst nearby.

with awp.perturbed(model, lambda: loss(model)):     # gradient ascent, layer by layer, gamma of each layer's norm
    loss(model).backward()
    optimizer.step()
# the step is kept, the perturbation is gone
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gkl.distributed import all_reduce_


def perturbable(model: nn.Module) -> list[Tensor]:
    """The parameters AWP moves: trained tensors of at least 2 dimensions called weight, so no bias and no batch norm."""
    return [
        p
        for name, p in model.named_parameters()
        if p.ndim >= 2 and p.requires_grad and name.rsplit(".", 1)[-1] == "weight"
    ]


@contextmanager
def perturbed(model: nn.Module, loss_fn: Callable[[], Tensor], gamma: float) -> Iterator[None]:
    """Inside, each weight w is w + gamma * ||w|| / ||g|| * g, with g the gradient of loss_fn at w.

    loss_fn: no arguments, this process's share of the loss to raise; shares are summed over processes, so all move
    alike. What an optimizer changes inside is kept and the perturbation taken off again; without a change, and also
    when the body raises, the weights come back bit for bit.
    gamma: size of the move relative to each layer's norm (0.005 in the paper's runs).
    Source: Wu et al. 2020, Eq. 10; the authors' proxy network with its own SGD step gives the same direction, since
    the learning rate cancels in the normalisation.
    """
    weights = perturbable(model)
    found = torch.autograd.grad(loss_fn(), weights, allow_unused=True)
    weights = [w for w, g in zip(weights, found, strict=True) if g is not None]  # those the loss depends on
    ascent = [g for g in found if g is not None]
    del found
    with torch.no_grad():
        all_reduce_(ascent)
        norms = torch._foreach_norm(weights)
        scales = [gamma * w / (g + 1e-20) for w, g in zip(norms, torch._foreach_norm(ascent), strict=True)]
        original = [w.detach().clone() for w in weights]
        torch._foreach_add_(weights, torch._foreach_mul(ascent, scales))
        moved = [w.detach().clone() for w in weights]
        del ascent
    try:
        yield
    except BaseException:
        with torch.no_grad():
            torch._foreach_copy_(weights, original)
        raise
    with torch.no_grad():
        # original + (now - moved) instead of now - perturbation: exact where nothing was changed.
        torch._foreach_sub_(weights, moved)
        torch._foreach_add_(weights, original)
