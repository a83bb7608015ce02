"""Knowledge distillation: a student learns from labels and from a fixed teacher's taps (Tables V, VI, XVII, XVIII).

What is lost between the two is a method of gkl.distillation; without a teacher this is plain supervised training, the
vanilla teachers and students of the tables.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from gkl.data.batches import Batch
from gkl.data.mixing import Mixing
from gkl.distillation import Context, Distiller
from gkl.distributed import rank, world_size
from gkl.evaluation.kept import fingerprint
from gkl.evaluation.shots import accuracy_by_shots
from gkl.losses.objectives import CrossEntropy, LabelLoss
from gkl.models.batch_norm import eval_mode, frozen_statistics
from gkl.models.classifier import TappedClassifier, Taps
from gkl.models.folding import folded
from gkl.models.own import check_answers
from gkl.models.timm_network import set_sample_keys
from gkl.rng import sample_keys
from trainers.loop.accuracy import clean_accuracy, correct_flags
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training
from trainers.methods.source import Source, check_same_teacher
from trainers.methods.teacher_logits import TeacherLogits


@dataclass(kw_only=True)
class Distillation(Method):
    """CE(student, labels) + whatever the distiller adds.

    label_loss: between logits and labels, cross-entropy if None. mixing: of the pictures of a batch.
    """

    distiller: Callable[[Context], Distiller]
    teacher: Source | None = None
    label_loss: LabelLoss | None = None
    mixing: Mixing | None = None
    keeps_best: ClassVar[bool] = True
    takes_turns: ClassVar[bool] = True

    def bind(self, training: Training) -> None:
        """Load the teacher and make the distiller, whose own layers are trained with the student."""
        super().bind(training)
        self.data: Any = training.data
        self.label_term = self.label_loss or CrossEntropy()
        self.taught_by: TappedClassifier | None = None
        self.best, self.origin = dict[str, Any](), dict[str, Any]()
        tapped(self.model)
        if self.teacher is not None:
            loaded, self.origin = self.teacher.load(self.data.num_classes)
            check_answers(loaded, self.data.image_size)
            self.taught_by = tapped(training.compute.to_device(loaded).eval().requires_grad_(False))
        sees_stages = not getattr(getattr(self.distiller, "func", None), "logits_alone", True)
        few = torch.zeros(2, 3, *2 * (self.data.image_size,), device=self.device, dtype=self.dtype)
        answering = self.taught_by  # the teacher where its logits are all that is wanted
        if self.taught_by is not None and not sees_stages and training.compute.half is None:
            answering = tapped(folded(self.taught_by, few))
        for network in (self.model, answering):
            if training.setup.compile and network is not None:
                cast(Any, network).forward_taps = torch.compile(network.forward_taps)  # type: ignore[arg-type]
        self.term = self._distiller(few, sees_stages)
        if training.setup.accumulate > 1 and self.term.whole_batch:
            raise ValueError(
                f"accumulate={training.setup.accumulate} cannot split the batch of {type(self.term).__name__} here: a picture's loss "
                "depends on the whole batch; set accumulate=1 and use more devices"
            )
        self.teacher_logits: TeacherLogits | None = None
        if self.teacher is not None and answering is not None:
            batch_size, shard = training.setup.batch_size, training.shard
            size = training.micro_batch(len(shard.mine(batch_size)), shard.group_size(batch_size))
            self.teacher_logits = TeacherLogits(training, answering, size)
            if self.teacher.cache and self.term.logits_alone:
                cache = Path(self.teacher.cache)
                self.teacher_logits.keep(cache, fingerprint(answering), mixed=self.mixing is not None)

    def _distiller(self, few: Tensor, sees_stages: bool) -> Distiller:
        """The distiller, made for what the networks show of a few pictures."""
        with torch.no_grad(), eval_mode(self.model):
            context = Context(
                student=self.taps(few, self.model),
                teacher=None if self.taught_by is None else self.taps(few, self.taught_by),
                network=self.taught_by,
                train_labels=self.data.train_labels,
                num_classes=self.data.num_classes,
                seed=self.training.seed,
            )
        if sees_stages and not (context.student.features and context.teacher and context.teacher.features):
            raise ValueError(
                f"{self.distiller.func.__name__} needs the stages of both networks, and one of them shows its logits alone; "  # type: ignore[attr-defined]
                "choose networks of this package, or a method of logits (kd, dkd, dist, jsd, ikl, gkl)"
            )
        return cast(Distiller, self.training.compute.to_device(self.distiller(context)))

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model: `bind` compiles what gives its taps, whole, since stages call parts of their blocks."""
        return model

    def trained_module(self) -> nn.Module:
        """The student and the distiller's own layers."""
        return nn.ModuleList([self.model, self.term])

    def networks(self) -> Iterable[nn.Module]:
        """The networks whose batch norm follows the batch."""
        return (self.model, self.term, *([self.taught_by] if self.taught_by is not None else []))

    # --- a step -------------------------------------------------------------------------------------------------------

    def taps(self, x: Tensor, network: nn.Module) -> Taps:
        """A network's taps in float32 or better, whatever precision it computes in."""
        compute = self.training.compute
        with compute.autocast():
            after, before, pooled, logits = network.forward_taps(  # type: ignore[operator]
                x.contiguous(memory_format=compute.memory_format)
            )
        return Taps(
            [t.to(self.dtype) for t in after],
            [t.to(self.dtype) for t in before],
            pooled.to(self.dtype),
            logits.to(self.dtype),
        )

    def teacher_outputs(self, x: Tensor, kept: Tensor | None) -> Taps | None:
        """The teacher's taps of images, without gradient; logits alone for a method that sees nothing else. kept: they, if kept."""
        if self.taught_by is None or self.teacher_logits is None:
            return None
        if not self.term.logits_alone:
            with torch.no_grad(), self.teacher_mode(self.taught_by):
                return self.taps(x, self.taught_by)
        logits = self.teacher_logits.of(x) if kept is None else kept
        return Taps([], [], logits[:, :0], logits)

    def teacher_mode(self, teacher: nn.Module) -> AbstractContextManager[None]:
        """The mode in which the method wants the teacher; its running statistics never change."""
        if self.term.teacher_mode == "eval":
            return eval_mode(teacher)
        teacher.train()
        return frozen_statistics(teacher)

    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor | None, ...]:
        """Pictures, what their views draw from, labels, view numbers, sample numbers, the keys of draws inside the networks; the
        labels' distributions where pictures are mixed, and the teacher's logits where they are kept.
        """
        images, draws, y, view, index = batch
        seed, shard, batches = self.training.seed, self.training.shard, self.training.batches
        items = batches.items(step)
        target: Tensor | None = None
        if self.mixing is not None:
            images, target = self.mixing(
                self.see(images, view, draws), y, num_classes=self.data.num_classes, draw=(seed, epoch, step),
                group_size=shard.group_size(items), first_group=rank() * shard.groups // world_size(),
            )  # fmt: skip
            y, draws = target.argmax(1), draws[:0]
        place = step * self.training.setup.batch_size + shard.mine(items)
        keys = sample_keys(seed, epoch, place.to(self.device, non_blocking=True), "inside_the_network")
        kept = None
        if self.teacher_logits is not None:
            kept = self.teacher_logits.kept(lambda: self.see(images, view, draws), epoch, step, index)
        return images, draws, y, view, index.to(self.device, non_blocking=True), keys, target, kept

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
        x = self.see(images, view, draws)  # (b, 3, H, W)
        self.term.group_size = self.training.group_size
        self.model.train()
        self.term.train()
        shares: dict[str, Tensor] = {}

        def losses() -> Iterator[Tensor]:
            """Each micro-batch's share of the loss; the first alone reaches the running statistics."""
            for part in self.training.micro_batches(len(x)):
                teacher = self.teacher_outputs(x[part], None if kept is None else kept[part])
                set_sample_keys(self.model, keys[part])
                with frozen_statistics(self.model) if part.start else nullcontext():
                    student = self.taps(x[part], self.model)
                with frozen_statistics(self.term) if part.start else nullcontext():
                    terms = self.term(student, teacher, y[part], epoch=self.epoch, index=index[part])
                labels = self.label_term(student.logits, y[part] if target is None else target[part])
                terms = {"labels": self.term.label_weight * labels, **terms}
                found = {f"loss/{name}": values.sum() / self.items for name, values in terms.items()}
                correct = (student.logits.detach().argmax(-1) == y[part]).sum() * (100.0 / self.items)
                for name, value in {**found, "train/top1": correct}.items():
                    shares[name] = shares.get(name, 0.0) + value.detach()
                yield torch.stack(list(found.values())).sum()

        self.optimizer_step(losses())
        self.after_step()
        return shares

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """What the distiller takes from the epoch."""
        return (self.term.constant(epoch),)

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """The student's step 3, the teacher's forward 1."""
        return {"model": 3.0, **({"teacher.network": 1.0} if config.get("teacher") else {})}

    # --- what is measured and kept ------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """What the distiller does between epochs."""
        self.term.end_epoch()

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """Test accuracy; the weights of the best epoch are kept."""
        found = self.accuracies(self.model)
        if not self.best or found["top1"] > self.best["metrics"]["top1"]:
            state = {key: value.clone() for key, value in self.model.state_dict().items()}
            self.best = {"epoch": epoch, "metrics": found, "state": state}
        return {f"test/{name}": value for name, value in found.items()}

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """On the test pictures, percent: `top1`; of a long-tailed data set also `many`, `medium`, `few`, `all`, means over classes."""
        correct = correct_flags(model, self.data, self.device, self.training.workers)
        found = {"top1": 100.0 * correct.double().mean().item()}
        if self.data.shots:
            counts = torch.bincount(self.data.train_labels, minlength=self.data.num_classes)
            by_shots = accuracy_by_shots(correct, self.data.test_labels, counts, self.data.shots)
            found |= {name: value for name, value in by_shots.items() if value is not None}
        return found

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """`best` on the test images."""
        return {"best": self.best["state"]} if self.best else {}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """`top1`, of the headline's weights, and `top1_best`, the best epoch's on the test images, and so on, in percent."""
        self.model.load_state_dict(self.training.weights()[headline])
        found = self.accuracies(self.model)
        if self.taught_by is not None:
            self.origin["top1"] = clean_accuracy(
                self.taught_by, self.data, self.device, self.training.workers
            )
        details = {"weights": headline, "best_epoch": self.best["epoch"]}
        return found | {f"{name}_best": value for name, value in self.best["metrics"].items()}, details

    def origins(self) -> dict[str, Any]:
        """The teacher: its run or file, its weights' sha256, its own accuracy."""
        return {"teacher": self.origin} if self.origin else {}

    def state_dict(self) -> dict[str, Any]:
        """The distiller's layers and buffers, the best weights, and which teacher it was."""
        self.term.merge()
        return {"method": self.term.state_dict(), "best": self.best, "teacher": self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict. Raises ConfigError for a checkpoint that was trained with another teacher."""
        check_same_teacher(state["teacher"], self.origin)
        self.term.load_state_dict(state["method"])
        self.term.after_load()
        self.best = dict(state["best"])


def tapped(network: nn.Module) -> TappedClassifier:
    """The network, if a distillation method can see its stages. Raises ValueError for others."""
    if not isinstance(network, TappedClassifier):
        raise ValueError(
            f"distillation needs a network with taps (configs/model says which: resnet_8x4, vgg_8, ...), got {type(network).__name__}"
        )
    return network
