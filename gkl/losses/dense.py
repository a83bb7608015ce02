"""Divergences of dense predictions, pixel by pixel: what APD asks of two networks' logits (B, C, H, W), and GKL in its place (Table XXIII).

    term = GKL()
    loss = term(student, teacher).mean()        # (B, H, W) values

Each is divided by C, as APD's mean over pictures, classes and pixels divides its KL. Nothing goes to the teacher.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from gkl.distributed import world_size
from gkl.losses.closed_form import gkl_loss
from gkl.losses.objectives import mean_over_batch


@dataclass(frozen=True)
class KL:
    """KL(softmax(teacher) || softmax(student)) / C at each pixel. Source: CriterionKD of dvlab-research/APD."""

    def __call__(self, student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
        """(B, H, W). student, teacher: (B, C, H, W). counted: (B, H, W) bool, where it is 0 otherwise; None for everywhere."""
        each = F.kl_div(student.log_softmax(1), teacher.detach().softmax(1), reduction="none").mean(1)
        return each if counted is None else each.where(counted, 0.0)


@dataclass(frozen=True)
class GKL:
    """GKL / C at each pixel (Eq. 13), sample-wise: w = softmax(teacher)^gamma, W^2 averaged over the pixels that count, of all processes.

    alpha, beta, gamma and the division are our choice: the paper says no more than that GKL takes the KL's place.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.3

    def __call__(self, student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
        """As KL."""
        each = gkl_loss(
            student,
            teacher.detach(),
            None,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            pair_weight=None if world_size() == 1 else partial(mean_over_batch, group_size=0),
            counted=counted,
            reduction="none",
        )
        return each / student.shape[1]


Divergence = KL | GKL


def labelled_cross_entropy(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Mean over the labelled pixels, in nats. logits: (B, C, H, W). labels: (B, H, W), `ignored` where there is none."""
    each = F.cross_entropy(
        logits, labels, ignore_index=ignored, reduction="none"
    )  # torch's sum changes its order on a GPU
    return each.sum() / (labels != ignored).sum()
