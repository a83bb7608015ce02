"""Adversarial training with a loss between clean and adversarial view: TRADES+AWP (KL), ACAT, DM-AT and GKL-AT are its settings.

A step reads like the paper's: attack, perturb the weights, both views forward, backward, step, restore.
Source: arXiv 2503.08038 Sec. 4.1; order of things as in the authors' training script. TRADES: Zhang et al. 2019; AWP:
Wu et al. 2020; ACAT: Addepalli et al. 2022; DM-AT: Wang et al. 2023.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distributed import rank
from gkl.objectives import Objective
from gkl.prior import ClassPrior
from trainers.robust import RobustTraining, awp_share, view_count


class AdversarialTraining(RobustTraining):
    """CE(clean) + loss(adversarial || clean), with AWP and class prior."""

    def __init__(
        self,
        *,
        loss: Objective,
        attack_loss: Objective,
        prior: Callable[..., ClassPrior],
        awp_gamma: float,
        awp_start_epoch: int,
        view_weights: Sequence[float],
        label_smoothing: float | None = None,
        clean_first: bool | None = None,
        first_statistics: bool | None = None,
        **common: Any,
    ) -> None:
        """view_weights: weight of `loss` on each of augment's views. awp_gamma: 0 trains without AWP.

        label_smoothing: of the step's cross-entropy, torch's convention. clean_first: which view goes forward first, and
        so reaches the running statistics first. first_statistics: the first step's batch statistics become the running
        ones, whatever batch norm's momentum (DM-AT). common: see RobustTraining.
        """
        super().__init__(**common)
        if len(view_weights) != len(self.augment.views):
            raise ValueError(
                f"method.view_weights needs one weight per view, got {list(view_weights)} for {list(self.augment.views)}"
            )
        self.loss, self.attack_loss = loss, attack_loss
        self.prior = make_prior(prior, self.data.num_classes, self.device, self.dtype)
        self.awp_gamma, self.awp_start_epoch = awp_gamma, awp_start_epoch
        self.view_weights = torch.tensor(view_weights, device=self.device, dtype=self.dtype)
        self.label_smoothing, self.clean_first = label_smoothing or 0.0, bool(clean_first)
        self.first_statistics = bool(first_statistics)

    def train_step(self, epoch: int, step: int) -> dict[str, Tensor]:
        """One update; every loss is this process's share of the mean over the global batch of all views."""
        x, y, view, index = self.batch(epoch, step)
        batch = self.samples(step)
        items = batch * len(self.view_weights)

        with torch.no_grad(), self.attack_mode():
            reference = self.logits(x)  # constant during the attack: the reference point does not move
        x_adv = self.attacked(
            x, lambda logits: self.attack_loss(logits, reference, y, self.prior), epoch, index, view
        )
        self.model.train()

        def worst_case() -> Tensor:
            clean, adversarial = self.logits(x), self.logits(x_adv)
            robust = self.loss(adversarial, clean, y, self.prior)
            return (F.cross_entropy(clean, y, reduction="sum") + robust.sum()) / items

        if self.first_statistics and (epoch, step) == (1, 0):
            restore = _full_momentum(self.model)
        with self.awp(worst_case, self.awp_gamma, active=epoch >= self.awp_start_epoch):
            if self.clean_first:
                clean, adversarial = self.logits(x), self.logits(x_adv)
            else:
                adversarial, clean = self.logits(x_adv), self.logits(x)
            natural = F.cross_entropy(clean, y, reduction="sum", label_smoothing=self.label_smoothing) / items
            robust = (self.view_weights[view] * self.loss(adversarial, clean, y, self.prior)).sum() / batch
            self.descend(natural + robust)
        if self.first_statistics and (epoch, step) == (1, 0):
            restore()

        basic = view == 0
        self.prior.update(clean.detach()[basic], y[basic])
        self.after_step(epoch)
        correct = (adversarial.detach().argmax(-1) == y).sum() * (100.0 / items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Attack 2K + 1, AWP 6, the step 6, for each view."""
        return {"model": view_count(config) * (2 * steps + 1 + 6 * awp_share(config, epoch) + 6)}

    def end_of_method_epoch(self) -> None:
        """The next epoch is weighed by what this one has seen."""
        self.prior.renew()

    def method_state(self) -> dict[str, Any]:
        """The prior, the processes' running sums brought together."""
        return prior_state(self.prior)

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Inverse of method_state."""
        load_prior(self.prior, state)


def make_prior(
    prior: Callable[..., ClassPrior], num_classes: int, device: torch.device, dtype: torch.dtype
) -> ClassPrior:
    """A class prior on the device, its probabilities in the training's precision."""
    made = prior(num_classes=num_classes).to(device=device)
    made.probs = made.probs.to(dtype)
    return made


def prior_state(prior: ClassPrior) -> dict[str, Any]:
    """The prior's part of a checkpoint, with the running sums of all processes."""
    prior.merge()
    return {"prior": prior.state_dict()}


def load_prior(prior: ClassPrior, state: dict[str, Any]) -> None:
    """Inverse of prior_state."""
    prior.load_state_dict(state["prior"])
    if rank() != 0:  # the checkpoint's running sums are those of all processes
        prior.sums.zero_()
        prior.counts.zero_()


def _full_momentum(model: nn.Module) -> Callable[[], None]:
    """Batch norm takes over the next batch's statistics whole, until the function returned is called."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in layers]
    for layer in layers:
        layer.momentum = 1.0

    def restore() -> None:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum

    return restore
