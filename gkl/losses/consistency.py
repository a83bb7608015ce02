"""What semi-supervised learning asks of a network's two opinions on one picture, (B,) of logits (B, C): the terms of Table XXII.

term = GKL(alpha=0.1, beta=1.0)
loss = (term(strong, weak) * mask).mean()
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gkl.losses.closed_form import smooth


@dataclass(frozen=True)
class HardLabel:
    """Cross-entropy with the class that the target names (FixMatch; Sohn et al. 2020, Eq. 4)."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,). logits, target: (B, C)."""
        return F.cross_entropy(logits, target.detach().argmax(-1), reduction="none")


@dataclass(frozen=True)
class SoftLabel:
    """Cross-entropy with the target's probabilities, whose gradient is KL's."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,). logits, target: (B, C)."""
        return -(target.detach().softmax(-1) * logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class MeanSquare:
    """Mean square over the classes of the difference of probabilities (Mean-Teacher; Tarvainen & Valpola 2017)."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,). logits, target: (B, C)."""
        return (logits.softmax(-1) - target.detach().softmax(-1)).square().mean(-1)


@dataclass(frozen=True)
class GKL:
    """alpha / 4 sum_jk w_j w_k (d_j - d_k)^2 + beta CE(softmax(target), logits), d = target - logits: Eq. 13 picture by picture.

    w = softmax(target / temperature)^gamma is not divided by its batch's mean, as the released code does not. Where the target has a
    gradient, d hands it on (the break of asymmetry). weights_gradient: w as well, as in the released code; Eq. 5 holds it fixed.
    """

    alpha: float
    beta: float
    gamma: float = 1.0
    temperature: float = 1.0
    weights_gradient: bool = False

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B,). logits, target: (B, C)."""
        given = target if self.weights_gradient else target.detach()
        weights = smooth((given / self.temperature).softmax(-1), self.gamma, validate=False)  # (B, C)
        difference = _centred(target) - _centred(
            logits
        )  # d_j - d_k knows no offset, and loses no digit to one
        total = weights.sum(-1)
        # 1/4 sum_jk w_j w_k (d_j - d_k)^2 = 1/2 (sum w sum w d^2 - (sum w d)^2), in C operations instead of C^2
        spread = total * (weights * difference.square()).sum(-1) - (weights * difference).sum(-1).square()
        agreement = -(target.detach().softmax(-1) * logits.log_softmax(-1)).sum(-1)
        return self.alpha * 0.5 * spread + self.beta * agreement


def _centred(logits: Tensor) -> Tensor:
    """Rows less a number near their mean."""
    return logits - logits.detach().mean(-1, keepdim=True)


Consistency = HardLabel | SoftLabel | MeanSquare | GKL
__all__ = ["GKL", "Consistency", "HardLabel", "MeanSquare", "SoftLabel"]
