"""Class-wise mean predictions, the paper's s-bar_y, that weigh wMSE.

prior = ClassPrior(num_classes=100, temperature=1.0)
for epoch in ...:
    for x, y in ...:
        loss = gkl_loss(student, teacher, prior[y], ...)
        prior.update(teacher.detach(), y)
    prior.renew()                    # epoch e uses what epoch e - 1 has seen
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distributed import all_reduce, rank
from gkl.losses.closed_form import ClassRows, smooth
from gkl.losses.inputs import (
    as_rows,
    at_least_float32,
    checked_classes,
    checked_counted,
    checked_kind,
    checked_labels,
    checked_range,
    positions_of,
    transformed,
)
from gkl.losses.parts import parts, positions

RUNNING = ("sums", "counts")
KEPT = 8  # gammas whose tables are kept: one that is ramped has another in each step


class Smoothed(NamedTuple):
    """probs ** gamma (C, C) and its rows' sums (C,), and of which probs in which state."""

    table: Tensor
    totals: Tensor
    source: Tensor
    version: int


class ClassPrior(nn.Module):
    """Mean prediction of each class over the last whole epoch; uniform 1/C before the first one.

    Row y of `probs` (C, C) is the mean of softmax(logits / temperature) over the epoch's samples of class y. A class
    that an epoch has not shown keeps its row, so no subset or dropped batch can bring in a NaN.
    Predictions are those seen in training (augmented, perturbed weights), not the clean expectation the paper writes.

    As a submodule it goes where its module goes and is saved with it, but its numbers stay as precise as they are: `half()` and
    its kin leave `probs` in float32 or float64 and the running sums in float64. The sums are this process's own, so they are no
    buffers, which DistributedDataParallel would overwrite with process 0's at every forward.
    Source: arXiv 2503.08038, Eq. 12; the update rule is the authors' code's.
    """

    probs: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, temperature: float = 1.0) -> None:
        """num_classes: C >= 2. temperature: tau > 0, softens each prediction before it is averaged."""
        super().__init__()
        if not hasattr(num_classes, "__index__"):
            raise ValueError(f"num_classes must be an integer, got {num_classes!r}")
        if num_classes < 2 or not 0.0 < temperature < math.inf:
            raise ValueError(
                f"a class prior needs at least 2 classes and a temperature above 0, got {num_classes} and {temperature}"
            )
        self.temperature = temperature
        with torch.inference_mode(False):  # they are written in place, wherever the prior was made
            self.register_buffer("probs", torch.full((num_classes, num_classes), 1.0 / num_classes))
            # Double sums: adding in another order, as several processes do, then changes no digit of the float32 mean.
            self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)
            self.counts = torch.zeros(num_classes, dtype=torch.float64)
        # Renewed in place, as the buffers are: a captured CUDA graph goes on reading these very tensors.
        self._smoothed: dict[float, Smoothed] = {}

    def __getitem__(self, labels: Tensor) -> Tensor:
        """Rows of the prior for labels (B,): (B, C) probabilities without gradient."""
        return self.rows(checked_classes(labels), gamma=1.0)

    def at(self, labels: Tensor) -> ClassRows:
        """The weights prior[labels] for `gkl_loss`, which raises them to its gamma; no (B, C) tensor is made of them.

        labels: (B,), or (B, *) of logits (B, C, *).
        """
        return ClassRows(self, labels)

    def rows(self, labels: Tensor, gamma: float) -> Tensor:
        """prior[labels] ** gamma, (B, C); the power is taken once an epoch over the (C, C) table."""
        if self.is_read_anew():
            return smooth(at_least_float32(self._looked_up(self.probs, labels)), gamma, validate=False)
        return self._looked_up(self.table(gamma)[0], labels)

    def totals(self, labels: Tensor, gamma: float) -> Tensor:
        """The sums of those rows, (B,): W of each example."""
        if self.is_read_anew():
            return self.rows(labels, gamma).sum(-1)
        return self._looked_up(self.table(gamma)[1], labels)

    def table(self, gamma: float) -> tuple[Tensor, Tensor]:
        """probs ** gamma (C, C) and its rows' sums (C,), kept until probs changes, whoever changes it."""
        gamma = float(gamma)  # a tensor may hold another number the next time
        kept = self._smoothed.get(gamma)
        if kept is None or kept.source is not self.probs or kept.version != _version(self.probs):
            kept = self._smooth(gamma)
        return kept.table, kept.totals

    @staticmethod
    def is_read_anew() -> bool:
        """Whether probs is read at each use: a graph of torch.compile outlives the table, and torch.func puts others in its place."""
        return torch.compiler.is_compiling() or transformed()

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> None:
        """Add predictions to the running sums. logits: (B, C) or (B, C, *). labels: (B,) or (B, *). counted: bool, which of them;
        None for all. What is not counted may hold anything.

        Raises ValueError for other shapes, and on a CPU for labels outside 0..C-1; RuntimeError under torch.func.
        """
        if transformed():
            raise RuntimeError(
                "the class prior's sums cannot be changed under torch.func or forward-mode differentiation: call update outside "
                "of it, or have a GKLLoss in eval mode"
            )
        checked_kind("the class prior's", logits)
        shape = positions_of(logits)
        if isinstance(labels, Tensor) and labels.ndim:
            shape = labels.shape
        wanted = (*shape[:1], len(self.probs), *shape[1:])
        if logits.ndim < 2 or tuple(logits.shape[:2]) != wanted[:2]:
            raise ValueError(f"the class prior needs logits {wanted}, got {tuple(logits.shape)}")
        labels, counted = checked_labels(labels, logits), checked_counted(counted, logits)
        if counted is not None:
            labels = torch.where(counted, labels, 0)
        self._check(labels)
        # Moved as FSDP does, buffer by buffer. DataParallel's replicas add to the one module's sums.
        if self.sums.device != self.probs.device and not getattr(self, "_is_replica", False):
            self.sums, self.counts = (x.to(self.probs.device) for x in (self.sums, self.counts))
        if logits.ndim == 2:
            self._add(logits, labels, counted)
            return
        logits = logits.flatten(2)
        shape = len(logits), -1
        for part in parts(logits):  # of a map a little at a time
            here = positions(part)
            known = None if counted is None else counted.view(shape)[here].flatten()
            self._add(as_rows(logits[part]), labels.view(shape)[here].flatten(), known)

    def _add(self, logits: Tensor, labels: Tensor, counted: Tensor | None) -> None:
        dtype = torch.float64 if self.probs.dtype == torch.float64 else torch.float32
        probs = F.softmax(logits.to(dtype) / self.temperature, dim=-1).double()
        # Neither a choice of rows nor bincount: both read values back and so wait for a GPU.
        if counted is None:
            each = torch.ones_like(labels, dtype=self.counts.dtype)
        else:
            each = counted.to(self.counts.dtype)
            probs = torch.where(counted.unsqueeze(-1), probs, 0.0)  # not a product: NaN times 0 is NaN
        labels, probs, each = (x.to(self.sums.device) for x in (labels, probs, each))
        self.sums.index_add_(0, labels, probs)
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
        for running in (self.sums, self.counts):
            running.copy_(all_reduce(running) if rank() == 0 else all_reduce(running).zero_())

    @contextmanager
    def _running_as_buffers(self) -> Iterator[None]:
        """Inside, what torch does to buffers reaches the running sums too."""
        self._buffers.update({name: self.__dict__.pop(name) for name in RUNNING})
        try:
            yield
        finally:
            self.__dict__.update({name: self._buffers.pop(name) for name in RUNNING})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ClassPrior":
        """`to`, `half`, `cuda` and the like: their device, and their dtype where it holds no less than float32."""
        before = {name: getattr(self, name) for name in ("probs", *RUNNING)}
        with self._running_as_buffers():
            super()._apply(fn, recurse)
        for name, was in before.items():
            now = getattr(self, name)
            dtype = (
                now.dtype if name == "probs" and now.dtype in (torch.float32, torch.float64) else was.dtype
            )
            if was.is_meta and not now.is_meta:  # to_empty: no values that could come along
                start = 1.0 / len(was) if name == "probs" else 0.0
                now = torch.full(was.shape, start, dtype=dtype, device=now.device)
            else:
                now = was.to(now.device, dtype)
            setattr(self, name, now)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._running_as_buffers():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        """What is loaded is all processes' together: process 0 goes on with its sums, the others from zero, given them or not (as
        where torch sends process 0's parameters and buffers to the others)."""
        if rank() != 0 and prefix + "probs" in state:
            state = state | {f"{prefix}{name}": torch.zeros_like(getattr(self, name)) for name in RUNNING}
        with self._running_as_buffers():
            super()._load_from_state_dict(state, prefix, metadata, *rest)
        if metadata.get(
            "assign_to_params_buffers"
        ):  # then these are the state's own tensors, of whatever dtype
            self.sums, self.counts = (x.to(torch.float64, copy=True) for x in (self.sums, self.counts))
            self.probs = self.probs if self.probs.dtype == torch.float64 else self.probs.float()
        self._smooth_anew()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is kept of probs."""
        return self.__dict__ | {"_smoothed": {}}

    def _smooth_anew(self) -> None:
        """Every kept table and its sums from probs as it is now, in place."""
        for gamma in self._smoothed:
            self._smooth(gamma)

    @torch.no_grad()
    def _smooth(self, gamma: float) -> Smoothed:
        """The table and its sums from probs as it is now, in the tensors of the kept ones where these fit."""
        kept = self._smoothed.get(gamma)
        with torch.inference_mode(False):  # an evaluation may be the first to ask, a training the next
            table = smooth(at_least_float32(self.probs), gamma, validate=False)
            totals = table.sum(-1)
            if kept and (kept.totals.device, kept.totals.dtype) == (totals.device, totals.dtype):
                totals = kept.totals.copy_(totals)
                if table is not self.probs and kept.table is not kept.source:
                    table = kept.table.copy_(table)
        made = Smoothed(table, totals, self.probs, _version(self.probs))
        if kept or len(self._smoothed) < KEPT:
            self._smoothed[gamma] = made
        return made

    def _looked_up(self, table: Tensor, labels: Tensor) -> Tensor:
        """Entries of a table for labels (b,)."""
        if torch.compiler.is_compiling():
            self._check(labels)
        try:
            # A plain index would take a label of -1 for the last class.
            return table.index_select(0, labels)
        except IndexError:
            self._check(labels)
            raise

    def _check(self, labels: Tensor) -> None:
        checked_range(labels, len(self.probs))


def _version(tensor: Tensor) -> int:
    """How often a tensor was written, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version
