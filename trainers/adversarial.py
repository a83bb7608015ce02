"""Adversarial training with a loss between clean and adversarial view: TRADES+AWP (KL), ACAT, DM-AT and GKL-AT are its settings.

A step reads like the paper's: attack, perturb the weights, both views forward, backward, step, restore.
Source: arXiv 2503.08038 Sec. 4.1; order of things as in the authors' training script. TRADES: Zhang et al. 2019; AWP:
Wu et al. 2020; ACAT: Addepalli et al. 2022; DM-AT: Wang et al. 2023.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.robust import TwoViewTraining, awp_share, view_count


class AdversarialTraining(TwoViewTraining):
    """CE(clean) + loss(adversarial || clean), with AWP and class prior."""

    def __init__(
        self,
        *,
        view_weights: Sequence[float],
        label_smoothing: float | None = None,
        clean_first: bool | None = None,
        first_statistics: bool | None = None,
        **common: Any,
    ) -> None:
        """view_weights: weight of `loss` on each of augment's views. label_smoothing: of the step's CE, torch's convention.

        clean_first: which view goes forward first, and so reaches the running statistics first. first_statistics: the
        first step's batch statistics become the running ones, whatever batch norm's momentum (DM-AT).
        common: see TwoViewTraining and RobustTraining.
        """
        super().__init__(**common)
        if len(view_weights) != len(self.augment.views):
            raise ValueError(
                f"method.view_weights needs one weight per view, got {list(view_weights)} for {list(self.augment.views)}"
            )
        self.view_weights = torch.tensor(view_weights, device=self.device, dtype=self.dtype)
        self.label_smoothing, self.clean_first = label_smoothing or 0.0, bool(clean_first)
        self.first_statistics = bool(first_statistics)

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update; every loss is this process's share of the mean over the global batch of all views."""
        x = self.seen(images, view, draws)
        batch = self.samples
        items = batch * len(self.view_weights)

        x_adv = self.adversarial(x, y, keys)
        self.model.train()

        def worst_case() -> Tensor:
            clean, adversarial = self.logits(x), self.logits(x_adv)
            robust = self.loss(adversarial, clean, y, self.prior)
            return (F.cross_entropy(clean, y, reduction="sum") + robust.sum()) / items

        first = full_momentum(self.model, self.first_statistics and self.first_step)
        with first, self.awp(worst_case, self.awp_gamma, active=self.epoch >= self.awp_start_epoch):
            if self.clean_first:
                clean, adversarial = self.logits(x), self.logits(x_adv)
            else:
                adversarial, clean = self.logits(x_adv), self.logits(x)
            natural = F.cross_entropy(clean, y, reduction="sum", label_smoothing=self.label_smoothing) / items
            robust = (self.view_weights[view] * self.loss(adversarial, clean, y, self.prior)).sum() / batch
            self.descend(natural + robust)

        self.prior.update(clean.detach(), y, counted=None if len(self.view_weights) == 1 else view == 0)
        self.after_step()
        correct = (adversarial.detach().argmax(-1) == y).sum() * (100.0 / items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """Attack 2K + 1, AWP 6, the step 6, for each view."""
        return {"model": view_count(config) * (2 * steps + 1 + 6 * awp_share(config, epoch) + 6)}


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
