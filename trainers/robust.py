"""What every adversarial training shares: the attack, adversarial weight perturbation, selection, AutoAttack at the end.

A method is a subclass in a file of its own with `update` and `forwards`; it reads like its paper's algorithm and
calls `seen`, `attacked`, `awp` and `descend` for the rest. Every loss it hands over is this process's share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkl.attacks import PGD, pgd
from gkl.augment import Views
from gkl.awp import perturbed
from gkl.counter import sample_keys
from gkl.data import ImageData
from gkl.distributed import rank
from gkl.models.batch_norm import eval_mode, frozen_parameters, frozen_statistics
from gkl.objectives import Objective
from gkl.prior import ClassPrior
from gkl.selection import MostRobust
from trainers.batches import TrainingSet
from trainers.report import Console
from trainers.robustness import autoattack, clean_accuracy, pgd_accuracy
from trainers.training import HALF, Training, cast

# What batch norm does while the network is attacked: see gkl.attacks.PGD.
ATTACK_MODES: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "eval": eval_mode,
    "frozen": frozen_statistics,
    "train": nullcontext,
}


class RobustTraining(Training):
    """Base of the methods. Pictures are in memory: AutoAttack takes them whole."""

    data: ImageData
    training: TrainingSet
    augment: Views

    def __init__(
        self, *, data: ImageData, attack: PGD, selection: MostRobust | None = None, **common: Any
    ) -> None:
        """selection: keeps the most robust epoch as the weights called best. common: see Training."""
        if not isinstance(data, ImageData):
            raise ValueError(
                f"adversarial training needs a data set in memory (cifar100, image_folder, ...), got {data.name}"
            )
        super().__init__(data=data, **common)
        self.attack, self.selection = attack, selection
        self.epsilon, self.step_size = torch.zeros(2, device=self.device, dtype=self.dtype)
        if selection is not None and selection.images == "held_out" and not len(self.training.held_out):
            raise ValueError(
                "selection.images=held_out needs held_out, the share of training images kept for it"
            )

    def inputs(self, epoch: int, step: int) -> tuple[Tensor, ...]:
        """Pictures, what their views draw from, labels, view numbers, and the keys of the attack's random starts."""
        drawn = images, y, view, index, draws = self.drawn(epoch, step)
        images, view, draws = self.viewable(*drawn)
        return images, draws, y, view, self.start_keys(epoch, index) + view

    def start_keys(self, epoch: int, index: Tensor) -> Tensor:
        """The keys (b,) of pictures' random starts in an epoch, on the device; + view for a view's."""
        return sample_keys(self.seed, epoch, index, "attack_start").to(self.device, non_blocking=True)

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """The attack's steps, too; its radius and step size lie on the device."""
        return (self.budget["steps"], *super().constants(epoch))

    def attacked(self, x: Tensor, loss_fn: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        """x moved within the epoch's budget so that loss_fn(logits) rises; the network in the attack's mode. keys: its start's."""
        with self.attack_mode():
            return pgd(
                self.logits,
                x,
                loss_fn,
                norm=self.attack.norm,
                start=self.attack.start(x, keys),
                steps=self.budget["steps"],
                epsilon=self.epsilon,
                step_size=self.step_size,
            )

    @contextmanager
    def attack_mode(self) -> Iterator[None]:
        """Inside, the network is as the attack wants it, and its parameters need no gradient."""
        if self.attack.mode != "eval":
            self.model.train()
        half = HALF.get(self.precision)
        with (
            frozen_parameters(self.model),
            ATTACK_MODES[self.attack.mode](self.model),
            cast(self.model, half),
        ):
            yield

    def awp(self, loss_fn: Callable[[], Tensor], gamma: float, active: bool) -> AbstractContextManager[None]:
        """Weights moved where loss_fn is worst, if active; loss_fn runs with batch statistics and leaves no trace."""

        def worst_case() -> Tensor:
            with frozen_statistics(self.model):
                return loss_fn()

        return perturbed(self.model, worst_case, gamma) if active and gamma > 0 else nullcontext()

    def start_epoch(self, epoch: int) -> None:
        """The attack's budget, too."""
        super().start_epoch(epoch)
        self.budget = self.attack.budget(epoch, self.epochs)
        # On the device, where a recorded step reads them.
        self.epsilon.fill_(self.budget["epsilon"])
        self.step_size.fill_(self.budget["step_size"])

    def measured(self, epoch: int) -> dict[str, float]:
        """The attack's radius, clean test accuracy, and the robust accuracy that a selection goes by."""
        row = {
            "epsilon": self.budget["epsilon"],
            "test/clean": clean_accuracy(self.model, self.data, self.device),
        }
        if self.selection is not None:
            row["selection/robust"] = self._select(epoch, self.selection)
        return row

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The networks a run ends with, as state dicts: `last`, each average by its name, and `best` if one is chosen."""
        best = {"best": self.selection.best["state"]} if self.selection and self.selection.best else {}
        return {**super().weights(), **best}

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
        return {**super().state_dict(), "selection": self.selection.best if self.selection else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, on any number of processes."""
        super().load_state_dict(state)
        if self.selection:
            self.selection.load_state_dict(state["selection"], self.device)

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

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """Whether weights are perturbed, too."""
        return (epoch >= self.awp_start_epoch, *super().constants(epoch))

    def adversarial(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """x moved so that attack_loss to the clean prediction rises."""
        with torch.no_grad(), self.attack_mode():
            reference = self.logits(x)  # constant during the attack: the reference point does not move

        def divergence(logits: Tensor) -> Tensor:
            return self.attack_loss(logits, reference, y, self.prior)

        return self.attacked(x, divergence, keys)

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
