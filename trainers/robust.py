"""What every adversarial training shares: batches, attack, batch norm, averages, selection, checkpoints, final numbers.

A method is a subclass in a file of its own with `train_step` and `forwards`; it reads like its paper's algorithm and
calls `batch`, `attacked`, `awp` and `descend` for the rest. Every loss it hands over is this process's share.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gkl.attacks import PGD, pgd
from gkl.augment import Views, to_float
from gkl.averaging import Average
from gkl.awp import perturbed
from gkl.counter import sample_keys
from gkl.data import ImageData
from gkl.distributed import broadcast_, rank, world_size, world_sum_
from gkl.generated import Generated
from gkl.models.batch_norm import eval_mode, frozen_statistics, group_batch_norm, set_group_size
from gkl.objectives import Objective
from gkl.prior import ClassPrior
from gkl.selection import MostRobust
from trainers.batches import TrainingSet
from trainers.report import Console
from trainers.robustness import autoattack, clean_accuracy, pgd_accuracy

Precision = Literal["float32", "tf32", "bf16", "float64"]


class RobustTraining(ABC):
    """Base of the methods. A `trainers.engine.Task`."""

    def __init__(
        self,
        *,
        data: ImageData,
        model: nn.Module,
        attack: PGD,
        augment: Views,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        momentum: Callable[[int, int], float] | None = None,
        averages: Mapping[str, Average],
        selection: MostRobust | None = None,
        generated: Callable[..., Generated] | None = None,
        generated_share: float | None = None,
        held_out: float | None = None,
        held_out_by_class: bool | None = None,
        seed: int,
        epochs: int,
        batch_size: int,
        drop_last: bool,
        bn_groups: int,
        precision: Precision,
        channels_last: bool,
        compile: bool,
        device: torch.device,
    ) -> None:
        """model: takes images in [0, 1]. momentum: the optimizer's, by epoch; None leaves it as it is.

        generated: called with `data`, gives pictures that make up generated_share of each batch; an epoch is then
        len(training images) / batch_size steps. held_out: share of the training images kept for `selection` and not
        trained on, the first ones, or with held_out_by_class the first of each class.
        bn_groups: batch norm sees the batch in so many parts (4 cards: 4).
        precision: of the network alone; losses, attack steps and averages are float32 (float64 in tests).
        """
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.deterministic = True
        self.data, self.device, self.precision = data, device, precision
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.bn_groups = bn_groups
        self.model = self.placed(model)
        self.network: Callable[[Tensor], Tensor] = torch.compile(self.model) if compile else self.model
        self.attack, self.augment = attack, augment
        self.optimizer, self.schedule, self.momentum = optimizer(self.trained()), schedule, momentum
        self.base_lr = self.optimizer.param_groups[0]["lr"]
        self.averages, self.selection = averages, selection
        self.seed, self.epochs = seed, epochs
        self.training = TrainingSet(
            data, device, batch_size=batch_size, drop_last=drop_last, seed=seed,
            generated=generated(data) if generated else None, generated_share=generated_share,
            held_out=held_out, held_out_by_class=bool(held_out_by_class),
        )  # fmt: skip
        if selection is not None and selection.images == "held_out" and not len(self.training.held_out):
            raise ValueError(
                "selection.images=held_out needs held_out, the share of training images kept for it"
            )
        self.steps_per_epoch = self.training.steps_per_epoch
        for average in averages.values():
            average.prepare(epochs * self.steps_per_epoch)

    # --- what a method gives ------------------------------------------------------------------------------------------

    @abstractmethod
    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update; returns this process's shares of what is logged."""

    @staticmethod
    @abstractmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Forward-equivalents a training image costs in an epoch of `steps` attack steps, by network of the configuration.

        A forward counts 1, a backward to the image 1, to image and parameters 2.
        """

    def trained(self) -> nn.Module:
        """What the optimizer changes."""
        return self.model

    def end_of_method_epoch(self) -> None:  # noqa: B027  (an optional hook)
        """What the method itself does after the last step."""

    def method_state(self) -> dict[str, Any]:
        """The method's own part of a checkpoint."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Inverse of method_state."""

    # --- building blocks ----------------------------------------------------------------------------------------------

    def placed(self, model: nn.Module) -> nn.Module:
        """A network on the device, its batch norm in groups."""
        group_batch_norm(model, self.bn_groups)
        return model.to(self.device, self.dtype).to(memory_format=self.memory_format)

    def logits(self, x: Tensor, network: nn.Module | None = None) -> Tensor:
        """Network output in float32 or better, whatever precision the network computes in."""
        run = self.network if network is None else network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return run(x.contiguous(memory_format=self.memory_format)).to(self.dtype)

    def share(self, items: int) -> Tensor:
        """Which of a batch's items are this process's: contiguous batch-norm groups, as DataParallel scatters them."""
        group_size = math.ceil(items / self.bn_groups)
        for network in self.networks():
            set_group_size(network, group_size)
        mine = self.bn_groups // world_size()  # batch-norm groups a process holds
        return torch.cat(torch.arange(items).split(group_size)[rank() * mine : (rank() + 1) * mine])

    def networks(self) -> Iterable[nn.Module]:
        """The networks whose batch norm follows the batch."""
        return (self.model,)

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a step: images (b, 3, H, W) in [0, 1], labels, view numbers, sample indices (b,).

        The batch's views stand one after the other.
        """
        index = self.training.drawn(epoch, step)
        item = self.share(len(self.augment.views) * len(index))
        view, index = item // len(index), index[item % len(index)]
        images, y = self.training.pictures(index)
        view, index = view.to(self.device), index.to(self.device)
        views = self.augment(images, seed=self.seed, epoch=epoch, index=index)
        x = torch.stack(views)[view, torch.arange(len(index), device=self.device)]
        return to_float(x).to(self.dtype), y, view, index

    def attacked(
        self,
        x: Tensor,
        loss_fn: Callable[[Tensor], Tensor],
        epoch: int,
        index: Tensor,
        view: Tensor | int = 0,
    ) -> Tensor:
        """x moved within the epoch's budget so that loss_fn(logits) rises; the network in the attack's mode."""
        keys = sample_keys(self.seed, epoch, index, "attack_start") + view
        with self.attack_mode():
            return pgd(
                self.logits,
                x,
                loss_fn,
                norm=self.attack.norm,
                start=self.attack.start(x, keys),
                **self.budget,
            )

    def attack_mode(self) -> AbstractContextManager[None]:
        """The network's mode while it is attacked."""
        if self.attack.mode == "eval":
            return eval_mode(self.model)
        self.model.train()
        return frozen_statistics(self.model) if self.attack.mode == "frozen" else nullcontext()

    def awp(self, loss_fn: Callable[[], Tensor], gamma: float, active: bool) -> AbstractContextManager[None]:
        """Weights moved where loss_fn is worst, if active; loss_fn runs with batch statistics and leaves no trace."""

        def worst_case() -> Tensor:
            with frozen_statistics(self.model):
                return loss_fn()

        return perturbed(self.model, worst_case, gamma) if active and gamma > 0 else nullcontext()

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """A step of the optimizer on the sum of all processes' shares of the loss."""
        optimizer = optimizer or self.optimizer
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        world_sum_(p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
        optimizer.step()

    def after_step(self, epoch: int) -> None:
        """Buffers and averages after an update."""
        for network in self.networks():
            broadcast_(network.buffers())  # process 0 holds the batch-norm statistics that count
        for average in self.averages.values():
            average.after_step(self.model, epoch)

    # --- the engine's task --------------------------------------------------------------------------------------------

    def start_epoch(self, epoch: int) -> None:
        """Learning rate, attack budget and order of the samples."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_lr * self.schedule(epoch, self.epochs)
            if self.momentum is not None:
                group["momentum"] = self.momentum(epoch, self.epochs)
        self.budget = self.attack.budget(epoch, self.epochs)
        self.training.shuffle(epoch)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Average the weights, choose among them, measure clean test accuracy."""
        self.end_of_method_epoch()
        for average in self.averages.values():
            average.after_epoch(self.model, epoch)
        row = {
            "lr": self.optimizer.param_groups[0]["lr"],
            "epsilon": self.budget["epsilon"],
            "test/clean": clean_accuracy(self.model, self.data, self.device),
        }
        if self.selection is not None:
            row["selection/robust"] = self._select(epoch, self.selection)
        return row

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with, as state dicts: `last`, each average by its name, and `best` if one is chosen."""
        last = {key: value.clone() for key, value in self.model.state_dict().items()}
        best = {"best": self.selection.best["state"]} if self.selection and self.selection.best else {}
        return {"last": last, **{name: a.state for name, a in self.averages.items() if a.state}, **best}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Final metrics in percent and their details: clean accuracy of all weights, the attack on the headline's."""
        metrics = {}
        for name, state in sorted(
            self.weights().items(), key=lambda item: item[0] == headline
        ):  # the headline last
            self.model.load_state_dict(state)
            metrics["clean" if name == headline else f"clean_{name}"] = clean_accuracy(
                self.model, self.data, self.device
            )
        robust, details = autoattack(
            self.model.float(),
            self.data,
            settings,
            folder=folder / "autoattack",
            device=self.device,
            console=console,
        )
        if headline == "best" and self.selection:
            details["epoch"] = self.selection.best["epoch"]
        return {**metrics, **robust}, {"weights": headline, **details}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": {name: average.state_dict() for name, average in self.averages.items()},
            "selection": self.selection.best if self.selection else {},
            **self.method_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of processes."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name], self.device)
        if self.selection:
            self.selection.load_state_dict(state["selection"], self.device)
        self.load_method_state(state)

    def describe_batch(self, epoch: int, step: int) -> dict[str, Any]:
        """The sample indices of a step, its images as they were seen, and the logits they give now."""
        x, y, view, index = self.batch(epoch, step)
        with torch.no_grad(), eval_mode(self.model):
            return {"index": index, "view": view, "labels": y, "images": x, "logits": self.logits(x)}

    def _select(self, epoch: int, selection: MostRobust) -> float:
        """Robust accuracy of the selection's images after this epoch, percent; its weights kept if they are the best."""
        state = self.model.state_dict()
        if selection.weights != "last":
            state = self.averages[selection.weights].state
        images, labels = self.data.test_images, self.data.test_labels
        if selection.images == "held_out":
            held_out = self.training.held_out
            images, labels = self.data.train_images[held_out], self.data.train_labels[held_out]

        def logits(x: Tensor) -> Tensor:
            inputs = x.to(self.dtype).contiguous(memory_format=self.memory_format)
            return torch.func.functional_call(self.model, state, (inputs,))

        with eval_mode(self.model):
            robust = pgd_accuracy(
                logits,
                images,
                labels,
                epsilon=self.attack.epsilon,
                steps=selection.steps,
                step_size=selection.step_size * self.attack.epsilon,
                norm=self.attack.norm,
                loss=selection.loss,
                seed=epoch,
                device=self.device,
            )
        selection.after_epoch(epoch, robust, state)
        return robust


class TwoViewTraining(RobustTraining):
    """Base of the methods with a loss between clean and adversarial view: KL in TRADES and its kin, or GKL in its place."""

    def __init__(
        self,
        *,
        loss: Objective,
        attack_loss: Objective,
        prior: Callable[..., ClassPrior],
        awp_gamma: float,
        awp_start_epoch: int,
        **common: Any,
    ) -> None:
        """loss: of the training, its weight included. attack_loss: what the inner maximisation climbs.

        awp_gamma: 0 trains without AWP. common: see RobustTraining.
        """
        super().__init__(**common)
        self.loss, self.attack_loss = loss, attack_loss
        self.prior = prior(num_classes=self.data.num_classes).to(device=self.device)
        self.prior.probs = self.prior.probs.to(self.dtype)
        self.awp_gamma, self.awp_start_epoch = awp_gamma, awp_start_epoch

    def adversarial(self, x: Tensor, y: Tensor, epoch: int, index: Tensor, view: Tensor | int = 0) -> Tensor:
        """x moved so that attack_loss to the clean prediction rises."""
        with torch.no_grad(), self.attack_mode():
            reference = self.logits(x)  # constant during the attack: the reference point does not move

        def divergence(logits: Tensor) -> Tensor:
            return self.attack_loss(logits, reference, y, self.prior)

        return self.attacked(x, divergence, epoch, index, view)

    def end_of_method_epoch(self) -> None:
        """The next epoch is weighed by what this one has seen."""
        self.prior.renew()

    def method_state(self) -> dict[str, Any]:
        """The prior, with the running sums of all processes."""
        self.prior.merge()
        return {"prior": self.prior.state_dict()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Inverse of method_state."""
        self.prior.load_state_dict(state["prior"])
        if rank() != 0:  # the checkpoint's running sums are those of all processes
            self.prior.sums.zero_()
            self.prior.counts.zero_()


def view_count(config: Mapping[str, Any]) -> int:
    """Views of each image in a configuration."""
    views: Sequence[str] = config["augment"]["views"]
    return len(views)


def awp_share(config: Mapping[str, Any], epoch: int) -> int:
    """1 in epochs with adversarial weight perturbation, 0 in others."""
    method = config["method"]
    return int(method["awp_gamma"] > 0 and epoch >= method["awp_start_epoch"])
