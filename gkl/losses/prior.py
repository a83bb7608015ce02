"""Class-wise mean predictions, the paper's s-bar_y, that weigh wMSE.

prior = ClassPrior(num_classes=100, temperature=1.0)
for epoch in ...:
    for x, y in ...:
        loss = gkl_loss(student, teacher, prior[y], ...)
        prior.update(teacher.detach(), y)
    prior.renew()                    # epoch e uses what epoch e - 1 has seen
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distributed import all_reduce, rank
from gkl.losses.closed_form import ClassRows, smooth


class ClassPrior(nn.Module):
    """Mean prediction of each class over the last whole epoch; uniform 1/C before the first one.

    Row y of `probs` (C, C) is the mean of softmax(logits / temperature) over the epoch's samples of class y. A class
    that an epoch has not shown keeps its row, so no subset or dropped batch can bring in a NaN.
    Predictions are those seen in training (augmented, perturbed weights), not the clean expectation the paper writes.
    Source: arXiv 2503.08038, Eq. 12; the update rule is the authors' code's.
    """

    probs: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, temperature: float = 1.0) -> None:
        """num_classes: C >= 2. temperature: tau > 0, softens each prediction before it is averaged."""
        super().__init__()
        if num_classes < 2 or temperature <= 0:
            raise ValueError(
                f"a class prior needs at least 2 classes and a temperature above 0, got {num_classes} and {temperature}"
            )
        self.temperature = temperature
        self.register_buffer("probs", torch.full((num_classes, num_classes), 1.0 / num_classes))
        # Double sums: adding in another order, as several processes do, then changes no digit of the float32 mean.
        self.register_buffer("sums", torch.zeros(num_classes, num_classes, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.float64))
        # Renewed in place, as the buffers are: a captured CUDA graph goes on reading these very tensors.
        self._smoothed: dict[float, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, labels: Tensor) -> Tensor:
        """Rows of the prior for labels (B,): (B, C) probabilities without gradient."""
        return self.rows(labels, gamma=1.0)

    def at(self, labels: Tensor) -> ClassRows:
        """The weights prior[labels] for `gkl`, which raises them to its gamma; on a GPU no (B, C) tensor is made of them."""
        return ClassRows(self, labels)

    def rows(self, labels: Tensor, gamma: float) -> Tensor:
        """prior[labels] ** gamma, (B, C); the power is taken once an epoch over the (C, C) table."""
        try:
            # A plain index would take a label of -1 for the last class.
            return self.table(gamma)[0].index_select(0, labels)
        except IndexError:
            self._check(labels)
            raise

    def totals(self, labels: Tensor, gamma: float) -> Tensor:
        """The sums of those rows, (B,): W of each example."""
        return self.table(gamma)[1].index_select(0, labels)

    def table(self, gamma: float) -> tuple[Tensor, Tensor]:
        """probs ** gamma (C, C) and its rows' sums (C,), taken anew when probs changes."""
        kept = self._smoothed.get(gamma)
        if kept is None or kept[0].device != self.probs.device or kept[0].dtype != self.probs.dtype:
            table = smooth(self.probs, gamma, validate=False)
            kept = self._smoothed[gamma] = table, table.sum(-1)
        return kept

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> None:
        """Add predictions to the running sums. logits: (B, C). labels: (B,). counted: (B,) bool, which of them; None for all."""
        self._check(labels)
        if logits.shape != (labels.shape[0], self.probs.shape[0]):
            raise ValueError(
                f"the class prior needs logits ({labels.shape[0]}, {self.probs.shape[0]}), got {tuple(logits.shape)}"
            )
        probs = F.softmax(logits.to(self.probs.dtype) / self.temperature, dim=-1).double()
        # Neither a choice of rows nor bincount: both read values back and so wait for a GPU.
        each = (
            torch.ones_like(labels, dtype=self.counts.dtype)
            if counted is None
            else counted.to(self.counts.dtype)
        )
        self.sums.index_add_(0, labels, probs if counted is None else probs * each.unsqueeze(-1))
        self.counts.index_add_(0, labels, each)

    @torch.no_grad()
    def renew(self) -> None:
        """End of an epoch: the means of all processes become the prior, the sums start from zero."""
        sums, counts = all_reduce(self.sums), all_reduce(self.counts)
        means = (sums / counts.clamp(min=1.0).unsqueeze(-1)).to(self.probs.dtype)
        self.probs.copy_(torch.where((counts > 0).unsqueeze(-1), means, self.probs))
        self.sums.zero_()
        self.counts.zero_()
        self._smooth_anew()

    @torch.no_grad()
    def merge(self) -> None:
        """Bring the processes' running sums together in process 0, so that its state is the whole state."""
        for buffer in (self.sums, self.counts):
            buffer.copy_(all_reduce(buffer) if rank() == 0 else all_reduce(buffer).zero_())

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._smooth_anew()

    @torch.no_grad()
    def _smooth_anew(self) -> None:
        """Every kept table and its sums from probs as it is now, in place."""
        for gamma, (table, sums) in self._smoothed.items():
            table.copy_(smooth(self.probs, gamma, validate=False))
            sums.copy_(table.sum(-1))

    def _check(self, labels: Tensor) -> None:
        # On a GPU reading the labels back would stall every step; data sets are checked when they are loaded.
        if labels.device.type == "cpu" and labels.numel():
            low, high = (int(value) for value in labels.aminmax())
            if low < 0 or high >= self.probs.shape[0]:
                raise ValueError(f"labels must lie in 0..{self.probs.shape[0] - 1}, got {low}..{high}")
