"""GKL as a module, for trainings that keep their losses among their modules.

criterion = GKLLoss(num_classes=100, alpha=20.0, beta=4.0, gamma=0.4)
for epoch in ...:
    for x, y in ...:
        loss = F.cross_entropy(clean, y) + criterion(adversarial, clean, y)
    criterion.renew()                # epoch e uses what epoch e - 1 has seen
"""

import sys
import warnings

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from gkl.losses.closed_form import Reduction, gkl_loss
from gkl.losses.inputs import checked_labels, positions_of
from gkl.losses.prior import ClassPrior


class GKLLoss(nn.Module):
    """`gkl_loss` with class-wise weights, and the prior they come from: a submodule, so it moves and is saved with this one.

    In training mode each call adds the teacher's predictions to the prior's sums. `eval()` leaves them as they are, and so do a call
    without gradients (a validation whose criterion nobody put into eval mode) and the second forward of an activation checkpoint.
    The steps of an attack that maximises this loss do add theirs: put it into eval mode for the attack.
    """

    # Whether the teacher of this epoch's last counted call had no gradient; None before the first.
    _fixed: bool | None = None

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float,
        beta: float,
        gamma: float,
        temperature: float = 1.0,
        prior_temperature: float = 1.0,
        ignore_index: int | None = None,
        reduction: Reduction = "mean",
        create_graph: bool = False,
    ) -> None:
        """alpha, beta, gamma, temperature, reduction, create_graph: as `gkl_loss`. num_classes, prior_temperature: as `ClassPrior`.

        ignore_index: the label of positions that do not count, 255 or -100; None where every label is a class.
        """
        super().__init__()
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature
        self.ignore_index, self.reduction, self.create_graph = ignore_index, reduction, create_graph
        self.prior = ClassPrior(num_classes, prior_temperature)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, counted: Tensor | None = None
    ) -> Tensor:
        """The mean over what counts, or each (B,) or (B, *) for reduction="none", with gradient to both logits (B, C) or (B, C, *). labels: (B,) or (B, *) classes.

        counted: as `gkl_loss`, beside ignore_index.
        """
        if self.ignore_index is not None:
            # As int64: torch compares uint8's 156 with -100 as equal.
            labels = checked_labels(labels, teacher_logits).long().view(positions_of(teacher_logits))
            known = labels != self.ignore_index
            counted = known if counted is None else known & counted
        loss = gkl_loss(
            student_logits,
            teacher_logits,
            self.prior.at(labels),
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            counted=counted,
            reduction=self.reduction,
            create_graph=self.create_graph,
        )
        if self.training and _counts():
            self._warn_of_attacks(teacher_logits)
            self.prior.update(teacher_logits, labels, counted)
        return loss

    def renew(self) -> None:
        """End of an epoch: what it has seen becomes the prior."""
        self._fixed = None
        self.prior.renew()

    def _warn_of_attacks(self, teacher_logits: Tensor) -> None:
        """Where one epoch's teacher has a gradient in some calls and none in others, the latter are likely an attack's."""
        if torch.compiler.is_compiling():
            return
        fixed = not teacher_logits.requires_grad
        if self._fixed is not None and self._fixed != fixed:
            warnings.warn(
                "GKLLoss in training mode was called with a teacher that has a gradient and with one that has none, and both count in the "
                "class prior; where an attack maximises this loss, call eval() on it before the attack and train() after it",
                stacklevel=5,
            )
        self._fixed = fixed

    def extra_repr(self) -> str:
        """The weights, in `print(module)`."""
        return f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"


def _counts() -> bool:
    """Whether a call is the one of its step that counts: with gradients, and of an activation checkpoint's two the first that has them."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    if torch._C._current_graph_task_id() == -1:
        return torch.is_grad_enabled()
    # Inside a backward pass: a reentrant checkpoint's first forward had none, another's had them.
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is CheckpointFunction.backward.__code__:
            return torch.is_grad_enabled()
    return False
