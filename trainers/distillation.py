"""Knowledge distillation: a student learns from labels and from a fixed teacher's taps (Tables XVII, XVIII).

What is lost between the two is a method of gkl.distillation; without a teacher this is plain supervised training, the
vanilla teachers and students of the tables.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gkl.distillation import Context, Distiller
from gkl.models.batch_norm import eval_mode, frozen_statistics
from gkl.models.classifier import TappedClassifier, Taps
from trainers.report import Console
from trainers.robustness import clean_accuracy
from trainers.teacher import LogitsCache, Teacher, unlike
from trainers.training import Training


class Distillation(Training):
    """CE(student, labels) + whatever the distiller adds."""

    def __init__(
        self, *, distiller: Callable[[Context], Distiller], teacher: Teacher | None = None, **common: Any
    ) -> None:
        """common: see Training."""
        self.make_method, self.source = distiller, teacher
        super().__init__(**common)
        self.best: dict[str, Any] = {}

    def prepare(self) -> None:
        """Load the teacher and make the method, whose own layers are trained with the student."""
        self.teacher: TappedClassifier | None = None
        self.origin: dict[str, Any] = {}
        tapped(self.model)
        if self.source is not None:
            loaded, self.origin = self.source.load(self.data.num_classes)
            self.teacher = tapped(self.placed(loaded).eval().requires_grad_(False))
        for network in (self.model, self.teacher):
            if self.compiled and network is not None:
                compiled: Any = torch.compile(cast(TappedClassifier, network).forward_taps)
                network.forward_taps = compiled
        side = self.data.train_images.shape[-1]
        few = torch.zeros(2, 3, side, side, device=self.device, dtype=self.dtype)
        with torch.no_grad(), eval_mode(self.model):
            context = Context(
                student=self.taps(few, self.model),
                teacher=None if self.teacher is None else self.taps(few, self.teacher),
                network=self.teacher,
                train_labels=self.data.train_labels,
                num_classes=self.data.num_classes,
                seed=self.seed,
            )
        self.method = cast(Distiller, self.placed(self.make_method(context)))
        self.cache: LogitsCache | None = None
        if self.source is not None and self.source.cache and self.method.logits_alone:
            self.cache = LogitsCache(Path(self.source.cache), self.cache_key())

    def cache_key(self) -> dict[str, Any]:
        """All that the teacher's logits on this training's batches depend on."""
        return {
            "teacher": self.origin["sha256"],
            "data": self.data.sha256,
            "views": [vars(self.augment)[name] for name in sorted(vars(self.augment))],
            "batches": [self.seed, self.training.batch_size, self.steps_per_epoch, self.bn_groups],
            "computed": [str(self.dtype), self.precision, str(self.memory_format), self.device.type],
            "machine": [
                torch.__version__,
                torch.get_num_threads(),
                torch.cuda.get_device_name(self.device)
                if self.device.type == "cuda"
                else torch.backends.cpu.get_cpu_capability(),
            ],
        }

    def trained(self) -> nn.Module:
        """The student and the method's own layers."""
        return nn.ModuleList([self.model, self.method])

    def networks(self) -> Iterable[nn.Module]:
        """The networks whose batch norm follows the batch."""
        return (self.model, self.method, *([self.teacher] if self.teacher is not None else []))

    def taps(self, x: Tensor, network: nn.Module) -> Taps:
        """A network's taps in float32 or better, whatever precision it computes in."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            after, before, pooled, logits = network.forward_taps(
                x.contiguous(memory_format=self.memory_format)
            )  # type: ignore[operator]
        return Taps(
            [t.to(self.dtype) for t in after],
            [t.to(self.dtype) for t in before],
            pooled.to(self.dtype),
            logits.to(self.dtype),
        )

    def taught(self, x: Tensor, step: int) -> Taps | None:
        """The teacher's taps of a step's images, without gradient; its logits alone where they are kept."""
        if self.teacher is None:
            return None
        if self.cache is not None and (kept := self.cache.get(step)) is not None:
            logits = kept.to(self.device)
            return Taps([], [], logits[:, :0], logits)
        with torch.no_grad(), self.teacher_mode():
            taps = self.taps(x, self.teacher)
        if self.cache is not None:
            self.cache.put(step, taps.logits)
        return taps

    def teacher_mode(self) -> AbstractContextManager[None]:
        """The mode in which the method wants the teacher; its running statistics never change."""
        assert self.teacher is not None
        if self.method.teacher_mode == "eval":
            return eval_mode(self.teacher)
        self.teacher.train()
        return frozen_statistics(self.teacher)

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update; every term is this process's share of its mean over the global batch."""
        x, y, _, index = self.batch(epoch, step)
        items = self.training.samples(step) * len(self.augment.views)
        self.model.train()
        self.method.train()
        teacher = self.taught(x, step)
        student = self.taps(x, self.model)
        terms = self.method(student, teacher, y, epoch=epoch, index=index)
        shares = {f"loss/{name}": values.sum() / items for name, values in terms.items()}
        self.descend(torch.stack(list(shares.values())).sum())
        self.after_step(epoch)
        correct = (student.logits.detach().argmax(-1) == y).sum() * (100.0 / items)
        return {**shares, "train/top1": correct}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """The student's step 3, the teacher's forward 1."""
        return {"model": 3.0, **({"teacher.network": 1.0} if config.get("teacher") else {})}

    def start_epoch(self, epoch: int) -> None:
        """The teacher's kept logits, too."""
        super().start_epoch(epoch)
        if self.cache is not None:
            self.cache.start_epoch(epoch)

    def end_of_method_epoch(self) -> None:
        """What the method does between epochs."""
        self.method.end_epoch()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Keep the teacher's logits, measure."""
        if self.cache is not None:
            self.cache.end_epoch(epoch, self.steps_per_epoch)
        return super().end_epoch(epoch)

    def measured(self, epoch: int) -> dict[str, float]:
        """Test accuracy; the weights of the best epoch are kept."""
        top1 = clean_accuracy(self.model, self.data, self.device)
        if not self.best or top1 > self.best["top1"]:
            state = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "top1": top1, "state": state}
        return {"test/top1": top1}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with: `last`, `best` on the test images, each average by its name."""
        return {**super().weights(), **({"best": self.best["state"]} if self.best else {})}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`top1`, of the headline's weights, and `top1_best`, the best epoch's on the test images, in percent."""
        self.model.load_state_dict(self.weights()[headline])
        top1 = clean_accuracy(self.model, self.data, self.device)
        if self.teacher is not None:
            self.origin["top1"] = clean_accuracy(self.teacher, self.data, self.device)
        details = {"weights": headline, "best_epoch": self.best["epoch"]}
        return {"top1": top1, "top1_best": self.best["top1"]}, details

    def origins(self) -> dict[str, Any]:
        """The teacher: its run or file, its weights' sha256, its own accuracy."""
        return {"teacher": self.origin} if self.origin else {}

    def method_state(self) -> dict[str, Any]:
        """The method's layers and buffers, the best weights, and which teacher it was."""
        self.method.merge()
        return {"method": self.method.state_dict(), "best": self.best, "teacher": self.origin}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Inverse of method_state."""
        unlike(state["teacher"], self.origin)
        self.method.load_state_dict(state["method"])
        self.method.after_load()
        self.best = dict(state["best"])


def tapped(network: nn.Module) -> TappedClassifier:
    """The network, if a distillation method can see its stages. Raises ValueError for others."""
    if not isinstance(network, TappedClassifier):
        raise ValueError(
            f"distillation needs a network with taps (configs/model says which: resnet_8x4, vgg_8, ...), got {type(network).__name__}"
        )
    return network
