"""What every training shares: data, networks on the device, the update, averages, checkpoints; what a step computes is its method's.

    training = Training(Setup(data=data, model=model, ...), AdversarialTraining(attack=attack, loss=loss, ...))
    fit(training, epochs=200, ...)

On a GPU an update is recorded as a CUDA graph and replayed (gkl.graphs).
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gkl.data.augment import to_float
from gkl.data.batches import Batches
from gkl.data.stores import PictureError
from gkl.distributed import Shard, all_reduce_, broadcast_, first_said, rank
from gkl.graphs import Replayed
from gkl.models.batch_norm import set_group_size
from gkl.rng import draw_seed
from trainers.errors import NotBegun, RunError
from trainers.loop.compute import Compute, compiled_graphs
from trainers.loop.method import Method
from trainers.loop.setup import Setup, check_batches, check_momentum

FUSED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
)  # whose updates a GPU makes without asking Python


class Training:
    """A method at work on a setup. A `trainers.loop.engine.Task`."""

    def __init__(self, setup: Setup, method: Method) -> None:
        self.setup, self.method = setup, method
        self.data, self.seed, self.epochs = setup.data, setup.seed, setup.epochs
        self.workers = setup.worker_processes
        self.compute = Compute(
            setup.device, setup.precision, channels_last=setup.channels_last, bn_groups=setup.bn_groups
        )
        self.device, self.shard = setup.device, Shard(setup.bn_groups)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=setup.precision == "fp16")
        self.model = self.compute.to_device(method.adapt(setup.model))
        self.network = method.compiled(self.model) if setup.compile else self.model
        self.batches: Batches = self.data.batches(
            augment=setup.augment, device=self.device, shard=self.shard, batch_size=setup.batch_size,
            drop_last=setup.drop_last, seed=setup.seed, workers=self.workers, views_together=method.views_together,
            generated=setup.generated(self.data) if setup.generated else None, generated_share=setup.generated_share,
            held_out=setup.held_out, held_out_by_class=setup.held_out_by_class,
        )  # fmt: skip
        check_batches(self.batches, setup.batch_size, self.shard)
        method.bind(self)
        if not any(p.requires_grad for p in method.trained_module().parameters()):
            raise ValueError(
                "the network has no weights to train; leave some unfrozen (requires_grad), or measure it as it is: scripts/evaluate.py"
            )
        self.optimizer = setup.optimizer(method.trained_module())
        if setup.momentum is not None:
            check_momentum(self.optimizer)
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.fuse_optimizer()
        self.say: Callable[[str], None] = lambda line: print(
            line, file=sys.stderr
        )  # where the run tells of itself
        self.replayed: Replayed | None = None
        if setup.graph is not False and self.device.type == "cuda":
            self.replayed = Replayed(self.device, warn=lambda line: self.say(f"warning: {line}"))
        self.averages = setup.averages
        for average in self.averages.values():
            average.prepare(sum(map(self.steps_in, range(1, self.epochs + 1))), self.model)

    # --- a step -------------------------------------------------------------------------------------------------------

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update; returns this process's shares of what is logged."""
        self.samples, self.first_step = self.batches.samples(step), (epoch, step) == (1, 0)
        if self.replayed is not None and (reason := self.unrecordable()):
            self.say(f"warning: steps are not recorded as CUDA graphs, which is slower: {reason}")
            self.replayed = None
        if self.setup.schedule_every == "step":
            (first, last), steps = self.method.span(epoch), self.steps_in(epoch)
            self._set_rates(self.setup.schedule((epoch - first) * steps + step, (last - first + 1) * steps))
        # For what draws from torch's own generator, dropout: the same after a restart, other numbers on each process.
        torch.manual_seed(draw_seed(self.seed, epoch, step, rank()))
        graphs, started = compiled_graphs(), time.monotonic()
        inputs = self.method.inputs(self.batch(epoch, step), epoch, step)
        if self.replayed is None:
            shares = self.method.update(*inputs)
        else:
            shares = self.replayed(
                (self.samples, self.first_step, self.constants(epoch)), self.method.update, inputs
            )
        for average in self.averages.values():
            if not average.recordable:
                average.after_step(self.model, epoch)
        if (new := compiled_graphs() - graphs) > 0:
            self.say(f"{new} parts of the networks compiled in {time.monotonic() - started:.0f} s")
        return shares

    def batch(self, epoch: int, step: int) -> Any:
        """This process's part of a step; batch norm is told where to cut it."""
        self.group_size = self.shard.group_size(self.batches.items(step))
        for network in self.method.networks():
            set_group_size(network, self.group_size)
        batch, cause = None, None
        try:
            batch = self.batches.batch(epoch, step)
        except PictureError as error:
            cause = error
        words = str(cause) if cause else None
        # All processes stop before the same step, so that those before it can be saved. What lies in memory is whole.
        if words := words if self.data.in_memory else first_said(words):
            raise NotBegun(words) from cause
        return batch

    def see(self, images: Tensor, view: Tensor, draws: Tensor) -> Tensor:
        """The views (b, 3, H, W) in [0, 1] of pictures as a batch holds them; of what are views in [0, 1] already, themselves."""
        if images.is_floating_point():
            return images
        return to_float(self.batches.see(images, view, draws)).to(self.compute.dtype)

    def optimizer_step(
        self, loss: Tensor | Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """A step of the optimizer on the sum of all processes' shares of the loss.

        loss: or its parts, each carried back before the next is computed.
        """
        optimizer = optimizer or self.optimizer
        optimizer.zero_grad(set_to_none=True)
        for part in [loss] if isinstance(loss, Tensor) else loss:
            self.scaler.scale(part).backward()
        all_reduce_(p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
        self.scaler.step(optimizer)
        self.scaler.update()

    def micro_batch(self, size: int, group_size: int) -> int:
        """Items that a process takes at once of its `size`: whole batch-norm groups, at least one."""
        return max(1, math.ceil(size / group_size / self.setup.accumulate)) * group_size

    def micro_batches(self, size: int) -> Iterator[slice]:
        """This process's part of a batch, `size` items, in turns. The first alone may reach batch norm's running statistics, as the
        whole would."""
        own = self.micro_batch(size, self.group_size)
        return (slice(first, first + own) for first in range(0, size, own))

    def after_step(self) -> None:
        """Buffers and averages after an update."""
        norms = [
            m for network in self.method.networks() for m in network.modules() if isinstance(m, _BatchNorm)
        ]
        broadcast_(b for norm in norms for b in norm.buffers())  # process 0 holds the statistics that count
        for average in self.averages.values():
            if average.recordable:
                average.after_step(self.model, self.epoch)

    # --- a recorded step ----------------------------------------------------------------------------------------------

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """Numbers of an epoch that updates hold and Python keeps: one recording serves the epochs that agree in them."""
        groups = [
            (g.get("momentum"), None if isinstance(g["lr"], Tensor) else g["lr"])
            for g in self.optimizer.param_groups
        ]
        phases = [average.phase(epoch) for average in self.averages.values() if average.recordable]
        return (*self.method.constants(epoch), *groups, *phases)

    def unrecordable(self) -> str | None:
        """Why updates cannot be recorded as CUDA graphs, None if they can."""
        if reason := self.method.unrecordable():
            return reason
        if self.scaler.is_enabled():
            return "precision=fp16 asks after each backward pass whether the gradients are finite"
        if not isinstance(self.optimizer, FUSED):
            return f"{type(self.optimizer).__name__} counts its steps in Python"
        return None

    def fuse_optimizer(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """On a GPU: an update, the training's unless told, as one kernel that reads its learning rate, and Adam's count of its steps,
        from the device, where each epoch writes it.

        Elsewhere as torch has it, also after a checkpoint that a GPU has written.
        """
        optimizer = optimizer or self.optimizer
        on_card = self.device.type == "cuda" and isinstance(optimizer, FUSED)
        for group in optimizer.param_groups:
            counts = {"capturable": on_card} if "capturable" in group else {}
            if on_card:
                lr = torch.as_tensor(group["lr"], dtype=torch.float32)
                group.update(lr=lr.to(self.device), fused=True, foreach=False, **counts)
            elif isinstance(group["lr"], Tensor):
                group.update(lr=float(group["lr"]), fused=None, foreach=None, **counts)
        for state in optimizer.state.values() if on_card else ():
            if "step" in state:  # of a checkpoint from a CPU
                state["step"] = state["step"].to(self.device, torch.float32)

    # --- the engine's task --------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Of the epoch that has begun."""
        return self.batches.steps_per_epoch

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch."""
        return self.method.steps_in(epoch)

    def start_epoch(self, epoch: int) -> None:
        """Learning rate, order of the samples, and what the method sets."""
        self.epoch = epoch
        if self.setup.schedule_every == "epoch":
            self._set_rates(self.setup.schedule(epoch, self.epochs))
        if self.setup.momentum is not None:
            for group in self.optimizer.param_groups:
                group["momentum"] = self.setup.momentum(epoch, self.epochs)
        self.batches.start_epoch(epoch)
        self.method.start_epoch(epoch)

    def _set_rates(self, factor: float) -> None:
        """Each group's learning rate, a factor of its own base."""
        self.lr = max(self.base_lrs) * factor
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Average the weights, measure."""
        self.method.end_epoch()
        for average in self.averages.values():
            average.after_epoch(self.model, epoch)
        return {"lr": self.lr, **self.method.epoch_metrics(epoch)}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with, as state dicts: `last`, each average by its name, and the method's own."""
        last = {key: value.clone() for key, value in self.model.state_dict().items()}
        averages = {name: a.state for name, a in self.averages.items() if a.state}
        return {"last": last, **averages, **self.method.weights()}

    @property
    def trained_on(self) -> str:
        """Digest of the data, without the tests where they can be told apart."""
        return str(getattr(self.data, "trained_on", self.data.sha256))

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "data": self.trained_on,
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            **self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of processes. Raises RunError where it was trained on other data."""
        before = state.get("data", self.trained_on)
        if before not in (self.trained_on, self.data.sha256):
            raise RunError(
                f"{self.data.name} is no longer the data that this run was trained on (sha256 {before[:12]}, now "
                f"{self.trained_on[:12]}); nothing was changed. Bring that back, or move the run's folder away to train anew"
            )
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.fuse_optimizer()
        if self.replayed is not None:
            self.replayed.forget()
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name], self.device)
        self.method.load_state_dict(state)

    def describe_batch(self, epoch: int, step: int) -> dict[str, Any]:
        """A step's batch, and what the network makes of it now."""
        return self.method.describe(self.batch(epoch, step))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raises ValueError for the state of other parameters or another optimizer, which torch would find within a step."""
    settings = [group.keys() for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for own, group in zip(settings, optimizer.param_groups, strict=True):
        if missing := sorted(own - group.keys()):
            raise ValueError(f"its optimizer has no {', '.join(missing)}")
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)}, its parameter {tuple(parameter.shape)}"
                    raise ValueError(f"its optimizer's {name} has shape {shapes}")
