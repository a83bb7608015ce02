"""Adversarial training with a loss between clean and adversarial view: TRADES+AWP (KL), ACAT, DM-AT and GKL-AT are its settings.

A step reads like the paper's: attack, perturb the weights, both views forward, backward, step, restore.
Source: arXiv 2503.08038 Sec. 4.1; order of things as in the authors' training script. TRADES: Zhang et al. 2019; AWP:
Wu et al. 2020; ACAT: Addepalli et al. 2022; DM-AT: Wang et al. 2023.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.losses.objectives import Objective
from gkl.losses.prior import ClassPrior
from trainers.loop.training import Training
from trainers.methods.robust import RobustMethod, TwoViews, awp_share, view_count


@dataclass(kw_only=True)
class AdversarialTraining(RobustMethod):
    """CE(clean) + loss(adversarial || clean), with AWP and class prior.

    view_weights: weight of `loss` on each of augment's views. label_smoothing: of the step's CE, torch's convention.
    clean_first: whether the clean view goes forward first, and so reaches the running statistics first. first_statistics: the
    first step's batch statistics become the running ones, whatever batch norm's momentum (DM-AT). clean_twice: the clean view goes
    forward once more, for batch norm's running statistics alone, as in a script that computes its logits anew for each term.
    """

    loss: Objective
    attack_loss: Objective
    prior: Callable[..., ClassPrior]
    view_weights: Sequence[float]
    label_smoothing: float = 0.0
    clean_first: bool = False
    first_statistics: bool = False
    clean_twice: bool = False

    def bind(self, training: Training) -> None:
        """The loss between the views, with its prior."""
        super().bind(training)
        views = training.setup.augment.views
        if len(self.view_weights) != len(views):
            raise ValueError(
                f"method.view_weights needs one weight per view, got {list(self.view_weights)} for {list(views)}"
            )
        self.weight_of_view = torch.tensor(self.view_weights, device=self.device, dtype=self.dtype)
        self.views = TwoViews(self, self.loss, self.attack_loss, self.prior)

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update; every loss is this process's share of the mean over the global batch of all views."""
        self.draw_paths(keys)
        x = self.see(images, view, draws)  # (b, 3, H, W)
        x_adv = self.views.adversarial(x, y, keys)
        self.model.train()

        def worst_case() -> Tensor:
            clean, adversarial = self.logits(x), self.logits(x_adv)  # (b, C)
            robust = self.views.loss(adversarial, clean, y)
            return (F.cross_entropy(clean, y, reduction="sum") + robust.sum()) / self.items

        with (
            full_momentum(self.model, self.first_statistics and self.training.first_step),
            self.awp(worst_case),
        ):
            if self.clean_first:
                clean, adversarial = self.logits(x), self.logits(x_adv)
            else:
                adversarial, clean = self.logits(x_adv), self.logits(x)
            if self.clean_twice:
                with torch.no_grad():
                    self.logits(x)
            natural = (
                F.cross_entropy(clean, y, reduction="sum", label_smoothing=self.label_smoothing) / self.items
            )
            robust = (self.weight_of_view[view] * self.views.loss(adversarial, clean, y)).sum() / self.samples
            self.optimizer_step(natural + robust)

        self.views.update(clean, y, counted=None if len(self.view_weights) == 1 else view == 0)
        self.after_step()
        correct = (adversarial.detach().argmax(-1) == y).sum() * (100.0 / self.items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Attack 2K + 1, AWP 6, the step 6, for each view; where the clean view goes forward twice, 1."""
        step = 6 + int(config["method"].get("clean_twice", False))
        return {"model": view_count(config) * (2 * steps + 1 + 6 * awp_share(config, epoch) + step)}

    def parts(self) -> Sequence[TwoViews]:
        """The loss between the views, with its prior."""
        return (self.views,)


@contextmanager
def full_momentum(model: nn.Module, active: bool) -> Iterator[None]:
    """Inside, if active, batch norm's running statistics are replaced by those of each batch."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] if active else []
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 1.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
