"""Knowledge distillation: a student learns from labels and from a fixed teacher's taps (Tables XVII, XVIII).

What is lost between the two is a method of gkl.distillation; without a teacher this is plain supervised training, the
vanilla teachers and students of the tables.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gkl.augment import Views
from gkl.counter import sample_keys
from gkl.distillation import Context, Distiller
from gkl.distributed import rank, world_size
from gkl.evaluation.shots import accuracy_by_shots
from gkl.imagenet import ImageFiles
from gkl.mixing import Mixing
from gkl.models.batch_norm import eval_mode, folded, frozen_statistics
from gkl.models.classifier import TappedClassifier, Taps
from gkl.models.timm_network import set_sample_keys
from gkl.objectives import CrossEntropy, LabelLoss
from trainers.report import Console
from trainers.robustness import clean_accuracy, correct_flags
from trainers.teacher import LogitsCache, Teacher, unlike
from trainers.training import HALF, Training


class Distillation(Training):
    """CE(student, labels) + whatever the distiller adds."""

    def __init__(
        self,
        *,
        distiller: Callable[[Context], Distiller],
        teacher: Teacher | None = None,
        label_loss: LabelLoss | None = None,
        mixing: Mixing | None = None,
        **common: Any,
    ) -> None:
        """label_loss: between logits and labels, cross-entropy if None. mixing: of the pictures of a batch. common: see Training."""
        self.make_method, self.source = distiller, teacher
        self.label_loss, self.mixing = label_loss or CrossEntropy(), mixing
        super().__init__(**common)
        if self.accumulate > 1 and self.method.whole_batch:
            raise ValueError(
                f"accumulate={self.accumulate} cannot split the batch of {type(self.method).__name__} here: a picture's loss depends "
                "on the whole batch; set accumulate=1 and use more devices"
            )
        self.best: dict[str, Any] = {}

    def prepare(self) -> None:
        """Load the teacher and make the method, whose own layers are trained with the student."""
        self.teacher: TappedClassifier | None = None
        self.origin: dict[str, Any] = {}
        tapped(self.model)
        if self.source is not None:
            loaded, self.origin = self.source.load(self.data.num_classes)
            self.teacher = tapped(self.placed(loaded).eval().requires_grad_(False))
        sees_stages = not getattr(getattr(self.make_method, "func", None), "logits_alone", True)
        side = self.data.image_size
        few = torch.zeros(2, 3, side, side, device=self.device, dtype=self.dtype)
        self.answering = self.teacher  # the teacher where its logits are all that is wanted
        if self.teacher is not None and not sees_stages and self.precision not in HALF:
            self.answering = tapped(folded(self.teacher, few))
        for network in (self.model, self.answering):
            if self.compiled and network is not None:
                compiled: Any = torch.compile(cast(TappedClassifier, network).forward_taps)
                network.forward_taps = compiled
        with torch.no_grad(), eval_mode(self.model):
            context = Context(
                student=self.taps(few, self.model),
                teacher=None if self.teacher is None else self.taps(few, self.teacher),
                network=self.teacher,
                train_labels=self.data.train_labels,
                num_classes=self.data.num_classes,
                seed=self.seed,
            )
        if sees_stages and not (context.student.after and context.teacher and context.teacher.after):
            raise ValueError(
                f"{self.make_method.func.__name__} needs the stages of both networks, and one of them shows its logits alone; "  # type: ignore[attr-defined]
                "choose networks of this package, or a method of logits (kd, dkd, dist, jsd, ikl, gkl)"
            )
        self.method = cast(Distiller, self.placed(self.make_method(context)))
        self.turn = self.turn_size(
            len(self.mine(self.training.batch_size)), self.group_size(self.training.batch_size)
        )
        self.cache: LogitsCache | None = None
        if self.source is not None and self.source.cache and self.method.logits_alone:
            self.cache = self.logits_cache(Path(self.source.cache))

    def logits_cache(self, folder: Path) -> LogitsCache:
        """Where the teacher's logits are kept. Raises ValueError when a picture's views cannot be counted."""
        augment, data = self.augment, self.data
        count = (
            augment.count
            if isinstance(augment, Views) and self.mixing is None and not self.training.generated
            else None
        )
        if count is None or not isinstance(augment, Views) or isinstance(data, ImageFiles):
            raise ValueError(
                "teacher.cache keeps the teacher's logits on each view of a picture, and here a picture has more than can be "
                "counted (crop_flip alone has few, without mixing or generated pictures); set teacher.cache=null"
            )
        key = {
            "teacher": self.origin["sha256"],
            "data": data.sha256,
            "held_out": self.training.held_out.tolist(),
            "views": [augment.padding, augment.border],
            # A network's bits depend on how many pictures it sees at once, and not on which: see taught_logits.
            "computed": [self.turn, str(self.dtype), self.precision, str(self.memory_format), self.device.type, self.compiled],
            "machine": [
                torch.__version__,
                torch.get_num_threads(),
                torch.cuda.get_device_name(self.device)
                if self.device.type == "cuda"
                else torch.backends.cpu.get_cpu_capability(),
            ],
        }  # fmt: skip
        size = {"pictures": len(self.training.labels), "views": count, "classes": data.num_classes}
        return LogitsCache(folder, key, **size, dtype=self.dtype)

    def compiled_model(self) -> nn.Module:
        """The model: `prepare` compiles what gives its taps, whole, since stages call parts of their blocks."""
        return self.model

    def trained(self) -> nn.Module:
        """The student and the method's own layers."""
        return nn.ModuleList([self.model, self.method])

    def networks(self) -> Iterable[nn.Module]:
        """The networks whose batch norm follows the batch."""
        return (self.model, self.method, *([self.teacher] if self.teacher is not None else []))

    def taps(self, x: Tensor, network: nn.Module) -> Taps:
        """A network's taps in float32 or better, whatever precision it computes in."""
        with self.autocast():
            after, before, pooled, logits = network.forward_taps(
                x.contiguous(memory_format=self.memory_format)
            )  # type: ignore[operator]
        return Taps(
            [t.to(self.dtype) for t in after],
            [t.to(self.dtype) for t in before],
            pooled.to(self.dtype),
            logits.to(self.dtype),
        )

    def taught(self, x: Tensor, kept: Tensor | None) -> Taps | None:
        """The teacher's taps of images, without gradient; logits alone for a method that sees nothing else. kept: they, if kept."""
        if self.teacher is None:
            return None
        if not self.method.logits_alone:
            with torch.no_grad(), self.teacher_mode():
                return self.taps(x, self.teacher)
        logits = self.taught_logits(x) if kept is None else kept
        return Taps([], [], logits[:, :0], logits)

    def kept_logits(self, x: Callable[[], Tensor], epoch: int, view: Tensor, index: Tensor) -> Tensor | None:
        """The teacher's logits on views of pictures as they are kept, None where none are; those missing are computed and kept.

        x: makes the views.
        """
        if self.cache is None:
            return None
        assert isinstance(self.augment, Views)
        drawn = self.augment.numbers(seed=self.seed, epoch=epoch, index=index)
        number = torch.stack(drawn)[view, torch.arange(len(index))]
        kept, there = self.cache.get(index, number)
        logits = kept.to(self.device, non_blocking=True)
        if not there.all():
            missing = (~there).nonzero().squeeze(1)
            here = missing.to(self.device, non_blocking=True)
            logits[here] = fresh = self.taught_logits(x()[here])
            self.cache.put(index[missing], number[missing], fresh)
        return logits

    def taught_logits(self, x: Tensor) -> Tensor:
        """The teacher's logits, from batches of `turn` images each, the last one filled up.

        In batches of one size an image's logits are the same bits in whatever company, so those kept are those of any step.
        """
        assert self.answering is not None
        found = []
        with torch.no_grad(), eval_mode(self.answering):
            for few in x.split(self.turn):
                whole = (
                    few if len(few) == self.turn else few[torch.arange(self.turn, device=x.device) % len(few)]
                )
                found.append(self.taps(whole, self.answering).logits[: len(few)])
        return torch.cat(found)

    def teacher_mode(self) -> AbstractContextManager[None]:
        """The mode in which the method wants the teacher; its running statistics never change."""
        assert self.teacher is not None
        if self.method.teacher_mode == "eval":
            return eval_mode(self.teacher)
        self.teacher.train()
        return frozen_statistics(self.teacher)

    def inputs(self, epoch: int, step: int) -> tuple[Tensor | None, ...]:
        """Pictures, what their views draw from, labels, view numbers, sample indices, the keys of draws inside the networks; the
        labels' distributions where pictures are mixed, and the teacher's logits where they are kept.
        """
        drawn = images, y, view, index, draws = self.drawn(epoch, step)
        images, there, draws = self.viewable(*drawn)
        items = self.training.samples(step) * len(self.augment.views)
        target: Tensor | None = None
        if self.mixing is not None:
            images, target = self.mixing(
                self.seen(images, there, draws), y, num_classes=self.data.num_classes, draw=(self.seed, epoch, step),
                group_size=self.group_size(items), first_group=rank() * self.bn_groups // world_size(),
            )  # fmt: skip
            y, draws = target.argmax(1), draws[:0]
        place = step * self.training.batch_size + self.mine(items)
        keys = sample_keys(self.seed, epoch, place.to(self.device, non_blocking=True), "inside_the_network")
        kept = self.kept_logits(lambda: self.seen(images, there, draws), epoch, view, index)
        return images, draws, y, there, index.to(self.device, non_blocking=True), keys, target, kept

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """What the method takes from the epoch, too."""
        return (self.method.constant(epoch), *super().constants(epoch))

    def update(
        self,
        images: Tensor,
        draws: Tensor,
        y: Tensor,
        view: Tensor,
        index: Tensor,
        keys: Tensor,
        target: Tensor | None,
        kept: Tensor | None,
    ) -> dict[str, Tensor]:
        """One update; every term is this process's share of its mean over the global batch."""
        x = self.seen(images, view, draws)
        items = self.samples * len(self.augment.views)
        group_size = self.method.group_size = self.group_size(items)
        self.model.train()
        self.method.train()
        shares: dict[str, Tensor] = {}

        def parts() -> Iterator[Tensor]:
            """Each turn's share of the loss; the first alone reaches the running statistics, as one turn would."""
            own = self.turn_size(len(x), group_size)
            for number, first in enumerate(range(0, len(x), own)):
                part = slice(first, first + own)
                teacher = self.taught(x[part], None if kept is None else kept[part])
                set_sample_keys(self.model, keys[part])
                with frozen_statistics(self.model) if number else nullcontext():
                    student = self.taps(x[part], self.model)
                with frozen_statistics(self.method) if number else nullcontext():
                    terms = self.method(student, teacher, y[part], epoch=self.epoch, index=index[part])
                labels = self.label_loss(student.logits, y[part] if target is None else target[part])
                terms = {"labels": self.method.label_weight * labels, **terms}
                losses = {f"loss/{name}": values.sum() / items for name, values in terms.items()}
                correct = (student.logits.detach().argmax(-1) == y[part]).sum() * (100.0 / items)
                for name, value in {**losses, "train/top1": correct}.items():
                    shares[name] = shares.get(name, 0.0) + value.detach()
                yield torch.stack(list(losses.values())).sum()

        self.descend(parts())
        self.after_step()
        return shares

    def turn_size(self, images: int, group_size: int) -> int:
        """Images in a turn, where this process takes `images` of a batch: whole batch-norm groups, at least one."""
        return max(1, math.ceil(images / group_size / self.accumulate)) * group_size

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """The student's step 3, the teacher's forward 1."""
        return {"model": 3.0, **({"teacher.network": 1.0} if config.get("teacher") else {})}

    def end_of_method_epoch(self) -> None:
        """What the method does between epochs."""
        self.method.end_epoch()

    def measured(self, epoch: int) -> dict[str, float]:
        """Test accuracy; the weights of the best epoch are kept."""
        found = self.accuracies(self.model)
        if not self.best or found["top1"] > self.best["metrics"]["top1"]:
            state = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "metrics": found, "state": state}
        return {f"test/{name}": value for name, value in found.items()}

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """On the test pictures, percent: `top1`; of a long-tailed data set also `many`, `medium`, `few`, `all`, means over classes."""
        correct = correct_flags(model, self.data, self.device, self.workers)
        found = {"top1": 100.0 * correct.double().mean().item()}
        if isinstance(self.data, ImageFiles) and self.data.shots:
            counts = torch.bincount(self.data.train_labels, minlength=self.data.num_classes)
            by_shots = accuracy_by_shots(correct, self.data.test_labels, counts, self.data.shots)
            found |= {name: value for name, value in by_shots.items() if value is not None}
        return found

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with: `last`, `best` on the test images, each average by its name."""
        return {**super().weights(), **({"best": self.best["state"]} if self.best else {})}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`top1`, of the headline's weights, and `top1_best`, the best epoch's on the test images, and so on, in percent."""
        self.model.load_state_dict(self.weights()[headline])
        found = self.accuracies(self.model)
        if self.teacher is not None:
            self.origin["top1"] = clean_accuracy(self.teacher, self.data, self.device, self.workers)
        details = {"weights": headline, "best_epoch": self.best["epoch"]}
        return found | {f"{name}_best": value for name, value in self.best["metrics"].items()}, details

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
