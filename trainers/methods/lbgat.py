"""LBGAT, learnable boundary guided adversarial training (Cui et al. 2021), alone or with AWP.

    CE(g(x), y) + MSE(f(x_adv), g(x)) + beta * KL(f(x) || f(x_adv))

g, the natural network, is trained along with the robust one f and guides its boundary; the attack is TRADES' on f.
Source: the paper's Eq. 2 and its released train_lbgat_cifar100.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.losses.objectives import Objective
from gkl.losses.prior import ClassPrior
from gkl.models.own import check_answers
from trainers.loop.training import Training
from trainers.methods.robust import RobustMethod, TwoViews, awp_share


@dataclass(kw_only=True)
class LBGAT(RobustMethod):
    """The robust network `model` and its guide `natural_model`, one optimizer. loss: KL with weight beta."""

    natural_model: Callable[..., nn.Module]
    loss: Objective
    attack_loss: Objective
    prior: Callable[..., ClassPrior]

    def bind(self, training: Training) -> None:
        """The guide, and the loss between the views."""
        super().bind(training)
        views = training.setup.augment.views
        if len(views) != 1:
            raise ValueError(f"LBGAT trains on one view, got augment.views={list(views)}")
        guide = self.natural_model(num_classes=self.data.num_classes)
        check_answers(guide, self.data.image_size, trained=True)
        self.guide = training.compute.to_device(guide)
        self.views = TwoViews(self, self.loss, self.attack_loss, self.prior)

    def trained_module(self) -> nn.Module:
        """Both networks."""
        return nn.ModuleList([self.model, self.guide])

    def networks(self) -> tuple[nn.Module, ...]:
        """Both networks."""
        return self.model, self.guide

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update of both networks; losses are this process's shares of means over the global batch."""
        self.draw_paths(keys)
        x = self.see(images, view, draws)  # (b, 3, H, W)
        x_adv = self.views.adversarial(x, y, keys)
        self.model.train()
        self.guide.train()
        boundary = self.logits(x, self.guide)  # (b, C)
        natural = F.cross_entropy(boundary, y, reduction="sum") / self.items

        def robust_loss(boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            adversarial, clean = self.logits(x_adv), self.logits(x)
            distance = F.mse_loss(adversarial, boundary, reduction="sum") / (self.items * boundary.shape[1])
            robust = distance + self.views.loss(adversarial, clean, y).sum() / self.items
            return robust, adversarial, clean

        with self.awp(lambda: robust_loss(boundary.detach())[0]):
            robust, adversarial, clean = robust_loss(boundary)
            self.optimizer_step(natural + robust)
        self.views.update(clean, y)
        self.after_step()
        correct = (adversarial.detach().argmax(-1) == y).sum() * (100.0 / self.items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """The robust network as in TRADES; the natural one forward and backward once."""
        return {"model": 2 * steps + 1 + 6 * awp_share(config, epoch) + 6, "natural_model": 3}

    def parts(self) -> Sequence[TwoViews]:
        """The loss between the views, with its prior."""
        return (self.views,)

    def state_dict(self) -> dict[str, Any]:
        """The guide, too."""
        return {"natural_model": self.guide.state_dict(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.guide.load_state_dict(state["natural_model"])
        super().load_state_dict(state)
