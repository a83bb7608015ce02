"""Contrastive representation distillation (Tian et al. 2020): a picture's student feature against its own teacher feature."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distillation.base import Context, Distiller, Terms, teacher_taps
from gkl.distributed import all_gather, all_reduce
from gkl.models.classifier import Taps
from gkl.rng import choose, sample_keys

EPSILON = 1e-7


class CRD(Distiller):
    """weight * (NCE of the student's features among stored teacher features + the other way round).

    Every training picture has a stored feature of each network, a running mean on the unit sphere; the negatives of a step
    are those of pictures of other classes. Source: Eq. 10 and 17 to 19 of the paper, in RepDistiller's form.
    """

    whole_batch = True
    memory_student: Tensor
    memory_teacher: Tensor
    constants: Tensor

    def __init__(
        self,
        context: Context,
        *,
        dim: int = 128,
        negatives: int = 16384,
        momentum: float = 0.5,
        temperature: float = 0.07,
        weight: float = 0.8,
        label_weight: float = 1.0,
    ) -> None:
        """dim: of the embeddings. negatives: per picture. momentum: of the stored features."""
        super().__init__(context, label_weight=label_weight)
        self.negatives, self.momentum, self.temperature = negatives, momentum, temperature
        self.weight, self.seed = weight, context.seed
        largest = int(torch.bincount(context.train_labels).max())
        self.enough = len(context.train_labels) - largest >= negatives
        self.embed_student = nn.Linear(context.student.pooled.shape[1], dim)
        self.embed_teacher = nn.Linear(teacher_taps(context.teacher).pooled.shape[1], dim)
        generator = torch.Generator().manual_seed(context.seed)
        bound = 1.0 / math.sqrt(dim / 3)
        for name in ("student", "teacher"):
            stored = torch.rand(len(context.train_labels), dim, generator=generator)
            self.register_buffer(f"memory_{name}", (2.0 * stored - 1.0) * bound)
        self.register_buffer(
            "constants", torch.zeros(2)
        )  # Z of the student's and teacher's scores; 0: not set yet
        self.register_buffer("train_labels", context.train_labels, persistent=False)

    def forward(
        self, student: Taps, teacher: Taps | None, labels: Tensor, *, epoch: int, index: Tensor
    ) -> Terms:
        """The loss terms of this process's part of a batch; in training the stored features move on."""
        index = index.to(labels.device, non_blocking=True)
        mine = F.normalize(self.embed_student(student.pooled))
        theirs = F.normalize(self.embed_teacher(teacher_taps(teacher).pooled))
        chosen = torch.cat([index[:, None], self.drawn(epoch, index, labels)], dim=1)
        losses = self.contrast(mine, self.memory_teacher, chosen, 0) + self.contrast(
            theirs, self.memory_student, chosen, 1
        )
        if self.training:
            self.store(mine.detach(), theirs.detach(), index)
        return {"distillation": self.weight * losses}

    def drawn(self, epoch: int, index: Tensor, labels: Tensor) -> Tensor:
        """Numbers of the training pictures that are a picture's negatives in this epoch, (b, negatives)."""
        keys = sample_keys(self.seed, epoch, index, "crd_negatives")
        every: Tensor = self.train_labels  # type: ignore[assignment]
        return choose(keys, every[None] != labels[:, None], self.negatives, enough=self.enough)

    def contrast(self, features: Tensor, memory: Tensor, chosen: Tensor, side: int) -> Tensor:
        """NCE loss of (b, dim) features against the stored ones, whose first choice is the positive, (b,)."""
        scores = (memory[chosen] @ features[:, :, None]).squeeze(2).div(self.temperature).exp()
        mean = all_reduce(torch.stack([scores.sum(), scores.new_full((), scores.numel())]))
        first = mean[0] / mean[1] * len(memory)
        constant = torch.where(self.constants[side] > 0, self.constants[side], first)
        self.constants[side] = constant
        p = scores / constant
        noise = self.negatives / len(memory)  # expected negatives among uniform draws
        positive = torch.log(p[:, 0] / (p[:, 0] + noise + EPSILON))
        negative = torch.log(noise / (p[:, 1:] + noise + EPSILON))
        return -(positive + negative.sum(1))

    @torch.no_grad()
    def store(self, mine: Tensor, theirs: Tensor, index: Tensor) -> None:
        """Move the stored features of the whole batch's pictures, the same on every process."""
        index = all_gather(index[:, None].double()).long().squeeze(1)
        for memory, fresh in ((self.memory_student, mine), (self.memory_teacher, theirs)):
            moved = self.momentum * memory[index] + (1.0 - self.momentum) * all_gather(fresh)
            memory[index] = F.normalize(moved)
