"""LBGAT, learnable boundary guided adversarial training (Cui et al. 2021), alone or with AWP.

    CE(g(x), y) + MSE(f(x_adv), g(x)) + beta * KL(f(x) || f(x_adv))

g, the natural network, is trained along with the robust one f and guides its boundary; the attack is TRADES' on f.
Source: the paper's Eq. 2 and its released train_lbgat_cifar100.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from trainers.robust import TwoViewTraining, awp_share


class LBGAT(TwoViewTraining):
    """The robust network `model` and its guide `natural_model`, one optimizer."""

    def __init__(self, *, natural_model: Callable[..., nn.Module], **common: Any) -> None:
        """natural_model: makes the guide. common: see TwoViewTraining (`loss` is KL with weight beta) and RobustTraining."""
        self._make_natural = natural_model
        super().__init__(**common)
        if len(self.augment.views) != 1:
            raise ValueError(f"LBGAT trains on one view, got augment.views={list(self.augment.views)}")

    def trained(self) -> nn.Module:
        """Both networks."""
        self.natural_model = self.placed(self._make_natural(num_classes=self.data.num_classes))
        return nn.ModuleList([self.model, self.natural_model])

    def networks(self) -> tuple[nn.Module, ...]:
        """Both networks."""
        return self.model, self.natural_model

    def update(
        self, images: Tensor, draws: Tensor, y: Tensor, view: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """One update of both networks; losses are this process's shares of means over the global batch."""
        x = self.seen(images, view, draws)
        items = self.samples
        x_adv = self.adversarial(x, y, keys)
        self.model.train()
        self.natural_model.train()
        guide = self.logits(x, self.natural_model)
        natural = F.cross_entropy(guide, y, reduction="sum") / items

        def robust_loss(boundary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            adversarial, clean = self.logits(x_adv), self.logits(x)
            distance = F.mse_loss(adversarial, boundary, reduction="sum") / (items * boundary.shape[1])
            robust = distance + self.loss(adversarial, clean, y, self.prior).sum() / items
            return robust, adversarial, clean

        with self.awp(
            lambda: robust_loss(guide.detach())[0], self.awp_gamma, active=self.epoch >= self.awp_start_epoch
        ):
            robust, adversarial, clean = robust_loss(guide)
            self.descend(natural + robust)
        self.prior.update(clean.detach(), y)
        self.after_step()
        correct = (adversarial.detach().argmax(-1) == y).sum() * (100.0 / items)
        return {"loss/natural": natural, "loss/robust": robust, "train/robust_accuracy": correct}

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """The robust network as in TRADES; the natural one forward and backward once."""
        return {"model": 2 * steps + 1 + 6 * awp_share(config, epoch) + 6, "natural_model": 3}

    def method_state(self) -> dict[str, Any]:
        """The natural network and the prior."""
        return {"natural_model": self.natural_model.state_dict(), **super().method_state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Inverse of method_state."""
        self.natural_model.load_state_dict(state["natural_model"])
        super().load_method_state(state)
