"""What every training shares: data and its views, networks on the device, the update, averages, checkpoints.

A kind of training is a subclass that says what a step computes and what is measured at the end: `inputs` brings this process's
part of the global batch to the device, `update` computes with nothing else and hands its share of the loss to `descend`. On a
GPU an update is recorded as a CUDA graph and replayed (`gkl.graphs`).
"""

import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkl.augment import Views, to_float
from gkl.averaging import Average
from gkl.crops import ResizedCrop
from gkl.data import ImageData
from gkl.distributed import broadcast_, rank, world_size, world_sum_
from gkl.generated import Generated
from gkl.graphs import Replayed
from gkl.imagenet import ImageFiles
from gkl.models.batch_norm import eval_mode, group_batch_norm, set_group_size
from trainers.batches import FileTrainingSet, TrainingSet
from trainers.report import Console

Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def cast(network: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, convolutions and linear layers hold their parameters in dtype, cast once and not at each call as autocast does where
    no gradient is wanted; None leaves them."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)] if dtype else []
    parameters = [(p, p.data) for layer in layers for p in layer.parameters()]
    for p, data in parameters:
        p.data = data.to(dtype)
    try:
        yield
    finally:
        for p, data in parameters:
            p.data = data


def compiled(network: nn.Module) -> Any:
    """The network by torch.compile: block by block where it repeats one, so that a block is compiled once for each of its shapes.

    Each mode and shape has a graph of its own: an epoch's shorter last batch would otherwise make every graph one of any shape,
    and slower.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    blocks = repeated_blocks(network)
    for block in blocks:
        block.compile(dynamic=False)
    return network if blocks else torch.compile(network, dynamic=False)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return (
        int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if "torch._dynamo.utils" in sys.modules
        else 0
    )


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules of the class that occurs most often of those that hold convolutions or linear layers; none if none occurs twice."""
    kinds: dict[type, list[nn.Module]] = {}
    for module in network.modules():
        if any(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules() if part is not module):
            kinds.setdefault(type(module), []).append(module)
    own = [same for kind, same in kinds.items() if not issubclass(kind, nn.Sequential | nn.ModuleList)]
    most = max(own, key=len, default=[])
    return most if len(most) > 1 else []


class Training(ABC):
    """Base of all trainings. A `trainers.engine.Task`."""

    data: Any  # ImageData, or ImageFiles; with them go
    training: Any  # TrainingSet, or FileTrainingSet; and
    augment: Any  # Views, or ResizedCrop

    def __init__(
        self,
        *,
        data: ImageData | ImageFiles,
        model: nn.Module,
        augment: Views | ResizedCrop,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        momentum: Callable[[int, int], float] | None = None,
        averages: Mapping[str, Average],
        generated: Callable[..., Generated] | None = None,
        generated_share: float | None = None,
        held_out: float | None = None,
        held_out_by_class: bool | None = None,
        accumulate: int = 1,
        workers: int | Literal["auto"] = 0,
        seed: int,
        epochs: int,
        batch_size: int,
        drop_last: bool,
        bn_groups: int,
        precision: Precision,
        channels_last: bool,
        compile: bool,
        graph: bool | Literal["auto"] = "auto",
        device: torch.device,
    ) -> None:
        """model: takes images in [0, 1]. momentum: the optimizer's, by epoch; None leaves it as it is.

        generated: called with `data`, gives pictures that make up generated_share of each batch; an epoch is then
        len(training images) / batch_size steps. held_out: share of the training images that are not trained on, the
        first ones, or with held_out_by_class the first of each class.
        bn_groups: batch norm sees the batch in so many parts (4 cards: 4).
        accumulate: each process takes its part of a batch in so many turns, whole batch-norm groups in each. workers:
        processes that read and decode, where pictures stay in their files. Neither changes what is computed.
        precision: of the networks alone; losses and averages are float32 (float64 in tests). fp16 scales the loss.
        graph: record updates as CUDA graphs and replay them; auto: on a GPU. What is computed stays the same to the bit.
        """
        if graph is True and device.type != "cuda":
            raise ValueError(
                f"graph=true records a GPU's work, and this run is on {device.type}; use graph=auto"
            )
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False  # losses may multiply matrices
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.deterministic = True
        self.data, self.device, self.precision = data, device, precision
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.bn_groups, self.accumulate = bn_groups, accumulate
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine
        self.workers = min(8, (os.cpu_count() or 1) // local) if workers == "auto" else workers
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.model = self.placed(model)
        self.compiled = compile
        self.network: Callable[[Tensor], Tensor] = self.compiled_model() if compile else self.model
        self.augment = augment
        self.seed, self.epochs = seed, epochs
        shared: dict[str, Any] = {"batch_size": batch_size, "drop_last": drop_last, "seed": seed}
        if isinstance(data, ImageFiles) and isinstance(augment, ResizedCrop):
            if generated or held_out:
                raise ValueError(
                    f"{data.name} stays in its files: no generated pictures, none held out; leave both out"
                )
            self.training = FileTrainingSet(
                data, device, augment=augment, workers=self.workers, mine=self.mine, **shared
            )
        elif isinstance(data, ImageData) and isinstance(augment, Views):
            self.training = TrainingSet(
                data, device, generated=generated(data) if generated else None, generated_share=generated_share,
                held_out=held_out, held_out_by_class=bool(held_out_by_class), **shared,
            )  # fmt: skip
        else:
            wanted = "resized_crop" if isinstance(data, ImageFiles) else "basic or autoaug"
            raise ValueError(f"{data.name} needs augment={wanted}, got {type(augment).__name__}")
        self.steps_per_epoch = self.training.steps_per_epoch
        self.prepare()
        self.optimizer, self.schedule, self.momentum = optimizer(self.trained()), schedule, momentum
        self.base_lr = self.optimizer.param_groups[0]["lr"]
        self.settle()
        self.say: Callable[[str], None] = lambda line: print(
            line, file=sys.stderr
        )  # where the run tells of itself
        self.replayed: Replayed | None = None
        if graph is not False and device.type == "cuda":
            self.replayed = Replayed(device, warn=lambda line: self.say(f"warning: {line}"))
        self.averages = averages
        for average in averages.values():
            average.prepare(epochs * self.steps_per_epoch)

    # --- what a training gives ----------------------------------------------------------------------------------------

    @abstractmethod
    def inputs(self, epoch: int, step: int) -> tuple[Tensor | None, ...]:
        """What an update computes with, on the device: this process's part of the step, of equal shapes but for the last step's."""

    @abstractmethod
    def update(self, *inputs: Any) -> dict[str, Tensor]:
        """One update from `inputs`; returns this process's shares of what is logged, whose sum over processes is the value.

        Of epoch and step it may use what `constants` tells, self.samples, the pictures of the global batch, and self.first_step.
        """

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """Numbers of an epoch that updates hold and Python keeps: one recording serves the epochs that agree in them."""
        groups = [
            (g.get("momentum"), None if isinstance(g["lr"], Tensor) else g["lr"])
            for g in self.optimizer.param_groups
        ]
        return (*groups, *(average.phase(epoch) for average in self.averages.values() if average.recordable))

    def unrecordable(self) -> str | None:
        """Why updates cannot be recorded as CUDA graphs, None if they can."""
        if self.scaler.is_enabled():
            return "precision=fp16 asks after each backward pass whether the gradients are finite"
        if not isinstance(self.optimizer, torch.optim.SGD):
            return f"{type(self.optimizer).__name__} counts its steps in Python"
        return None

    @staticmethod
    @abstractmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Forward-equivalents a training image costs in an epoch of `steps` attack steps, by network of the configuration.

        A forward counts 1, a backward to the image 1, to image and parameters 2.
        """

    @abstractmethod
    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Final metrics in percent and their details. headline: whose weights give the run's numbers.

        settings: the configs/evaluation file; empty where there is none.
        """

    def prepare(self) -> None:  # noqa: B027  (an optional hook)
        """Make what is trained beside the model, before the optimizer is made."""

    def compiled_model(self) -> Any:
        """What `logits` calls in the model's place where networks are compiled."""
        return compiled(self.model)

    def trained(self) -> nn.Module:
        """What the optimizer changes."""
        return self.model

    def end_of_method_epoch(self) -> None:  # noqa: B027
        """What the method itself does after the last step."""

    @abstractmethod
    def measured(self, epoch: int) -> dict[str, float]:
        """What is measured after an epoch, for its line of the history."""

    def method_state(self) -> dict[str, Any]:
        """The method's own part of a checkpoint."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Inverse of method_state."""

    def origins(self) -> dict[str, Any]:
        """What a record must say of where this training's ingredients come from, beside its data."""
        return {}

    # --- a step ---------------------------------------------------------------------------------------------------------

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update; returns this process's shares of what is logged."""
        self.samples, self.first_step = self.training.samples(step), (epoch, step) == (1, 0)
        if self.replayed is not None and (reason := self.unrecordable()):
            self.say(f"warning: steps are not recorded as CUDA graphs, which is slower: {reason}")
            self.replayed = None
        graphs, started = compiled_graphs(), time.monotonic()
        inputs = self.inputs(epoch, step)
        if self.replayed is None:
            shares = self.update(*inputs)
        else:
            key = self.samples, self.first_step, self.constants(epoch)
            shares = self.replayed(key, self.update, inputs)
        for average in self.averages.values():
            if not average.recordable:
                average.after_step(self.model, epoch)
        if (new := compiled_graphs() - graphs) > 0:
            self.say(f"{new} parts of the networks compiled in {time.monotonic() - started:.0f} s")
        return shares

    def settle(self) -> None:
        """On a GPU: the update as one kernel that reads its learning rate from the device, where each epoch writes it.

        Elsewhere as torch has it, also after a checkpoint that a GPU has written.
        """
        on_card = self.device.type == "cuda" and isinstance(self.optimizer, torch.optim.SGD)
        for group in self.optimizer.param_groups:
            if on_card:
                lr = torch.as_tensor(group["lr"], dtype=torch.float32)
                group.update(lr=lr.to(self.device), fused=True, foreach=False)
            elif isinstance(group["lr"], Tensor):
                group.update(lr=float(group["lr"]), fused=None, foreach=None)

    # --- building blocks ----------------------------------------------------------------------------------------------

    def placed(self, model: nn.Module) -> nn.Module:
        """A network on the device, its batch norm in groups."""
        group_batch_norm(model, self.bn_groups)
        if self.dtype == torch.float64:  # else as it is: float32, but for sums that are kept in float64
            model = model.to(self.dtype)
        return model.to(self.device).to(memory_format=self.memory_format)

    def logits(self, x: Tensor, network: nn.Module | None = None) -> Tensor:
        """Network output in float32 or better, whatever precision the network computes in."""
        run = self.network if network is None else network
        with self.autocast():
            return run(x.contiguous(memory_format=self.memory_format)).to(self.dtype)

    def autocast(self) -> torch.autocast:
        """Inside, networks compute in the run's precision."""
        return torch.autocast(self.device.type, HALF.get(self.precision), enabled=self.precision in HALF)

    def share(self, items: int) -> Tensor:
        """Which of a batch's items are this process's; tells batch norm where to cut them."""
        for network in self.networks():
            set_group_size(network, self.group_size(items))
        return self.mine(items)

    def group_size(self, items: int) -> int:
        """Items of a batch-norm group, where a batch has `items`."""
        return math.ceil(items / self.bn_groups)

    def mine(self, items: int) -> Tensor:
        """Which of a batch's items are this process's: contiguous batch-norm groups, as DataParallel scatters them."""
        mine = self.bn_groups // world_size()  # batch-norm groups a process holds
        groups = torch.arange(items).split(self.group_size(items))[rank() * mine : (rank() + 1) * mine]
        return torch.cat(groups) if groups else torch.arange(0)

    def networks(self) -> Iterable[nn.Module]:
        """The networks whose batch norm follows the batch."""
        return (self.model,)

    def drawn(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a step before its views are made: images (b, 3, H, W) uint8 and labels on the device; view
        numbers and sample indices (b,), and what the views draw from, (operations, b), on the CPU.

        The batch's views stand one after the other. Pictures from files come as their one view, and draw nothing.
        """
        if isinstance(self.training, FileTrainingSet):
            self.share(self.training.samples(step))
            images, y, index = self.training.views(epoch, step)
            return images, y, torch.zeros_like(index), index, index.new_zeros(0, len(index))
        assert isinstance(self.augment, Views)
        index = self.training.drawn(epoch, step)
        item = self.share(len(self.augment.views) * len(index))
        view, index = item // len(index), index[item % len(index)]
        images, y = self.training.pictures(index)
        return images, y, view, index, self.augment.draws(seed=self.seed, epoch=epoch, index=index)

    def seen(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """The views (b, 3, H, W) in [0, 1] of pictures as drawn; of what are views already, themselves."""
        if images.is_floating_point():
            return images
        if isinstance(self.augment, Views):
            views = self.augment.seen(images, draws)
            images = (
                views[0]
                if len(views) == 1
                else torch.stack(views)[view, torch.arange(len(view), device=view.device)]
            )
        return to_float(images).to(self.dtype)

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a step: images (b, 3, H, W) in [0, 1], labels; view numbers and sample indices (b,) on the CPU."""
        images, y, view, index, draws = self.drawn(epoch, step)
        return self.seen(images, view.to(self.device, non_blocking=True), draws), y, view, index

    def viewable(
        self, images: Tensor, y: Tensor, view: Tensor, index: Tensor, draws: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, view numbers and draws as an update takes them that calls `seen` itself, on the device.

        Arguments: as `drawn`. Where views ask for their draws' values, the views stand in the pictures' place and no draws are left.
        """
        there = view.to(self.device, non_blocking=True)
        if isinstance(self.augment, Views) and not self.augment.recordable:
            images, draws = self.seen(images, there, draws), draws[:0]
        return images, there, draws.to(self.device, non_blocking=True)

    def descend(
        self, loss: Tensor | Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """A step of the optimizer on the sum of all processes' shares of the loss.

        loss: or its parts, each carried back before the next is computed.
        """
        optimizer = optimizer or self.optimizer
        optimizer.zero_grad(set_to_none=True)
        for part in [loss] if isinstance(loss, Tensor) else loss:
            self.scaler.scale(part).backward()
        world_sum_(p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
        self.scaler.step(optimizer)
        self.scaler.update()

    def after_step(self) -> None:
        """Buffers and averages after an update."""
        norms = [m for network in self.networks() for m in network.modules() if isinstance(m, _BatchNorm)]
        broadcast_(b for norm in norms for b in norm.buffers())  # process 0 holds the statistics that count
        for average in self.averages.values():
            if average.recordable:
                average.after_step(self.model, self.epoch)

    # --- the engine's task --------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Learning rate and order of the samples."""
        self.epoch = epoch
        for group in self.optimizer.param_groups:
            lr = self.base_lr * self.schedule(epoch, self.epochs)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if self.momentum is not None:
                group["momentum"] = self.momentum(epoch, self.epochs)
        self.training.shuffle(epoch)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Average the weights, measure."""
        self.end_of_method_epoch()
        for average in self.averages.values():
            average.after_epoch(self.model, epoch)
        return {"lr": self.base_lr * self.schedule(epoch, self.epochs), **self.measured(epoch)}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with, as state dicts: `last` and each average by its name."""
        last = {key: value.clone() for key, value in self.model.state_dict().items()}
        return {"last": last, **{name: a.state for name, a in self.averages.items() if a.state}}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            **self.method_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of processes."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.settle()
        if self.replayed is not None:
            self.replayed.forget()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name], self.device)
        self.load_method_state(state)

    def describe_batch(self, epoch: int, step: int) -> dict[str, Any]:
        """The sample indices of a step, its images as they were seen, and the logits they give now."""
        x, y, view, index = self.batch(epoch, step)
        with torch.no_grad(), eval_mode(self.model):
            return {"index": index, "view": view, "labels": y, "images": x, "logits": self.logits(x)}
