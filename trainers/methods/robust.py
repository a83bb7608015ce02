"""What every adversarial training shares: the attack, adversarial weight perturbation, selection, AutoAttack at the end.

A method is a dataclass in a file of its own with `update` and `forwards`; it reads like its paper's algorithm and calls `see`,
`perturb`, `awp` and `optimizer_step` for the rest. Every loss it hands over is this process's share.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkl.attacks.awp import perturbed
from gkl.attacks.pgd import PGD, pgd
from gkl.data.batches import Batch
from gkl.distributed import rank
from gkl.losses.objectives import Objective
from gkl.losses.prior import ClassPrior
from gkl.models.batch_norm import eval_mode, frozen_parameters, frozen_statistics
from gkl.models.timm_network import set_sample_keys
from gkl.optim.selection import MostRobust
from gkl.rng import sample_keys
from trainers.loop.accuracy import autoattack, clean_accuracy, pgd_accuracy
from trainers.loop.compute import cast
from trainers.loop.console import Console
from trainers.loop.method import Method
from trainers.loop.training import Training

# What batch norm does while the network is attacked: see gkl.attacks.pgd.PGD.
ATTACK_MODES: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "eval": eval_mode,
    "frozen": frozen_statistics,
    "train": nullcontext,
}


@dataclass(kw_only=True)
class RobustMethod(Method):
    """Base of the adversarial methods. Pictures are in memory: AutoAttack takes them whole.

    awp_gamma: size of the weight perturbation, relative to the weights; 0 trains without. selection: keeps the most robust epoch
    as the weights called best.
    """

    groups_reach_over_devices = True

    attack: PGD
    awp_gamma: float
    awp_start_epoch: int
    selection: MostRobust | None = None

    def bind(self, training: Training) -> None:
        """The attack's radius and step size lie on the device, where a recorded step reads them."""
        super().bind(training)
        self.data: Any = training.data
        if not self.data.in_memory:
            raise ValueError(
                f"adversarial training needs a data set in memory (cifar100, image_folder, ...), got {self.data.name}"
            )
        self.epsilon, self.step_size = torch.zeros(2, device=self.device, dtype=self.dtype)
        if (
            self.selection is not None
            and self.selection.images == "held_out"
            and not len(training.batches.held_out)
        ):
            raise ValueError(
                "selection.images=held_out needs held_out, the share of training images kept for it"
            )

    # --- a step -------------------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, ...]:
        """Pictures, what their views draw from, labels, view numbers, and the keys of the attack's random starts."""
        images, draws, y, view, index = batch
        return images, draws, y, view, self.start_keys(epoch, index) + view

    def start_keys(self, epoch: int, index: Tensor) -> Tensor:
        """The keys (b,) of pictures' random starts in an epoch, on the device; + view for a view's."""
        keys = sample_keys(self.training.seed, epoch, index, "attack_start")
        return keys.to(self.device, non_blocking=True)

    def draw_paths(self, keys: Tensor) -> None:
        """Stochastic depth in every network follows from the pictures' keys (b,) in this update, the same in each forward of it."""
        for network in self.networks():
            set_sample_keys(network, ~keys)  # other numbers than the attack's start draws

    def perturb(self, x: Tensor, loss_fn: Callable[[Tensor], Tensor], keys: Tensor) -> Tensor:
        """x moved within the epoch's budget so that loss_fn(logits) rises; the network in the attack's mode. keys: its start's."""
        with self.attack_mode():
            return pgd(
                self.logits, x, loss_fn, norm=self.attack.norm, start=self.attack.start(x, keys), validate=False,
                steps=self.budget["steps"], epsilon=self.epsilon, step_size=self.step_size,
            )  # fmt: skip

    @contextmanager
    def attack_mode(self) -> Iterator[None]:
        """Inside, the network is as the attack wants it, and its parameters need no gradient."""
        if self.attack.mode != "eval":
            self.model.train()
        with (
            frozen_parameters(self.model),
            ATTACK_MODES[self.attack.mode](self.model),
            cast(self.model, self.training.compute.half),
        ):
            yield

    def awp(self, loss_fn: Callable[[], Tensor]) -> AbstractContextManager[None]:
        """From awp_start_epoch on, weights moved where loss_fn is worst; loss_fn runs with batch statistics and leaves no trace."""

        def worst_case() -> Tensor:
            with frozen_statistics(self.model):
                return loss_fn()

        active = self.awp_gamma > 0 and self.epoch >= self.awp_start_epoch
        return perturbed(self.model, worst_case, self.awp_gamma) if active else nullcontext()

    def constants(self, epoch: int) -> tuple[Any, ...]:
        """Whether weights are perturbed, and the attack's steps."""
        return epoch >= self.awp_start_epoch, self.budget["steps"]

    def start_epoch(self, epoch: int) -> None:
        """The attack's budget."""
        self.budget = self.attack.budget(epoch, self.training.epochs)
        self.epsilon.fill_(self.budget["epsilon"])
        self.step_size.fill_(self.budget["step_size"])

    # --- what is measured ---------------------------------------------------------------------------------------------

    def epoch_metrics(self, epoch: int) -> dict[str, float]:
        """The attack's radius, clean test accuracy, and the robust accuracy that a selection goes by."""
        row = {
            "epsilon": self.budget["epsilon"],
            "test/clean": clean_accuracy(self.model, self.data, self.device),
        }
        if self.selection is not None and (robust := self._select(epoch, self.selection)) is not None:
            row["selection/robust"] = robust
        return row

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """`best`, if an epoch is chosen."""
        return {"best": self.selection.best["state"]} if self.selection and self.selection.best else {}

    def evaluate(
        self, *, headline: str, settings: Mapping[str, Any], folder: Path, console: Console
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Final metrics in percent and their details: clean accuracy of all weights, the attack on the headline's."""
        metrics = {}
        for name, state in sorted(
            self.training.weights().items(), key=lambda item: item[0] == headline
        ):  # the headline last
            self.model.load_state_dict(state)
            clean = clean_accuracy(self.model, self.data, self.device)
            metrics["clean" if name == headline else f"clean_{name}"] = clean
        robust, details = autoattack(
            self.model.float(), self.data, settings, folder=folder / "autoattack", device=self.device, console=console
        )  # fmt: skip
        if headline == "best" and self.selection:
            details["epoch"] = self.selection.best["epoch"]
        return {**metrics, **robust}, {"weights": headline, **details}

    def parts(self) -> Sequence["TwoViews"]:
        """What of the method is renewed with each epoch and kept in checkpoints."""
        return ()

    def end_epoch(self) -> None:
        """The next epoch is weighed by what this one has seen."""
        for part in self.parts():
            part.renew()

    def state_dict(self) -> dict[str, Any]:
        """The weights of the best epoch so far, and the priors."""
        state: dict[str, Any] = {"selection": self.selection.best if self.selection else {}}
        for part in self.parts():
            state |= part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        if self.selection:
            self.selection.load_state_dict(state["selection"], self.device)
        for part in self.parts():
            part.load_state_dict(state)

    def _select(self, epoch: int, selection: MostRobust) -> float | None:
        """Robust accuracy of the selection's images after this epoch, percent; its weights kept if they are the best. None before its
        average has begun."""
        state = self.model.state_dict()
        if selection.weights != "last":
            state = self.training.averages[selection.weights].state
            if not state:
                return None
        images, labels = self.data.test_images, self.data.test_labels
        if selection.images == "held_out":
            held_out = self.training.batches.held_out
            images, labels = self.data.train_images[held_out], self.data.train_labels[held_out]

        def logits(x: Tensor) -> Tensor:
            inputs = x.to(self.dtype).contiguous(memory_format=self.training.compute.memory_format)
            return torch.func.functional_call(self.model, state, (inputs,))

        with eval_mode(self.model):
            robust = pgd_accuracy(
                logits, images, labels, epsilon=self.attack.epsilon, steps=selection.steps,
                step_size=selection.step_size * self.attack.epsilon, norm=self.attack.norm, loss=selection.loss,
                seed=epoch, device=self.device,
            )  # fmt: skip
        selection.after_epoch(epoch, robust, state)
        return robust


class TwoViews:
    """A loss between clean and adversarial view weighed by the class prior, and the attack that raises it: KL in TRADES and its kin,
    or GKL in its place."""

    def __init__(
        self, method: RobustMethod, loss: Objective, attack_loss: Objective, prior: Callable[..., ClassPrior]
    ) -> None:
        """loss: of the training, its weight included. attack_loss: what the inner maximisation climbs."""
        self.method, self.loss_fn, self.attack_loss = method, loss, attack_loss
        self.prior = prior(num_classes=method.training.data.num_classes).to(device=method.device)
        self.prior.probs = self.prior.probs.to(method.dtype)

    def loss(self, adversarial: Tensor, clean: Tensor, y: Tensor) -> Tensor:
        """(b,) values between logits (b, C) of the two views."""
        return self.loss_fn(adversarial, clean, y, self.prior)

    def adversarial(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """x moved so that attack_loss to the clean prediction rises."""
        with torch.no_grad(), self.method.attack_mode():
            reference = self.method.logits(x)  # constant during the attack: the reference point does not move
        return self.method.perturb(x, lambda z: self.attack_loss(z, reference, y, self.prior), keys)

    def update(self, clean: Tensor, y: Tensor, counted: Tensor | None = None) -> None:
        """Count predictions (b, C) for the next epoch's prior. counted: (b,) bool, which of them; None all."""
        self.prior.update(clean.detach(), y, counted=counted)

    def renew(self) -> None:
        """The next epoch is weighed by what this one has seen."""
        self.prior.renew()

    def state_dict(self) -> dict[str, Any]:
        """The prior, with the running sums of all processes."""
        self.prior.merge()
        return {"prior": self.prior.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
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
