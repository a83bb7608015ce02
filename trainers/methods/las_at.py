"""LAS-AT, adversarial training with a learnable attack strategy (Jia et al. 2022), with AWP: the paper's "LAS-AWP".

A strategy network looks at each image and draws its attack: epsilon, number of steps and step size, each from a list.
The target network is trained as in AT-AWP on the images so attacked, clipped back into the ball of the threat model. Every
`interval` steps the strategy network takes a REINFORCE step on the reward

    CE(f(x_adv), y) + robust_reward * robust accuracy + clean_reward * clean accuracy

the accuracies being those of a copy of the target after one update on these images, the first under PGD-10 of two starts.
Source: the paper's Algorithm 1 and its released LAS_AWP_train_cifar10.py and _cifar100.py.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.attacks.awp import perturbed
from gkl.attacks.pgd import pgd, project, random_start
from gkl.data.batches import Batch
from gkl.distributed import all_reduce, all_reduce_, broadcast_
from gkl.models.batch_norm import eval_mode, frozen_parameters, frozen_statistics
from gkl.models.own import check_answers
from gkl.rng import sample_keys, uniform
from trainers.loop.training import Training
from trainers.methods.pgd_at import PGDTraining
from trainers.methods.robust import awp_share

RESTARTS, REWARD_STEPS = 2, 10


class StrategyNetwork(nn.Module):
    """A backbone and one linear layer for each thing to choose."""

    def __init__(self, backbone: Any, choices: Sequence[int]) -> None:
        """backbone: with timm's forward_features, forward_head and num_features. choices: how many of each."""
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList([nn.Linear(backbone.num_features, count) for count in choices])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> logits (B, choices) of each head."""
        backbone: Any = self.backbone
        features = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
        return [head(features) for head in self.heads]


@dataclass(kw_only=True)
class LASAT(PGDTraining):
    """AT-AWP whose attack is drawn for each image by a strategy network.

    epsilons, step_sizes: in eighths of the threat model's epsilon (8/255: in levels of 255). interval: steps between two updates
    of the strategy network. label_smoothing: of the copy's update, torch's convention.
    """

    strategy_model: Callable[..., nn.Module]
    strategy_optimizer: Callable[..., torch.optim.Optimizer]
    epsilons: Sequence[int]
    steps: Sequence[int]
    step_sizes: Sequence[int]
    interval: int
    robust_reward: float
    clean_reward: float
    label_smoothing: float
    clip_gradient: float

    def bind(self, training: Training) -> None:
        """The strategy network and its optimizer. Raises ValueError for settings of an attack that is drawn here."""
        super().bind(training)
        attack = self.attack
        if (attack.mode, attack.phases, attack.start_std) != ("eval", "ten", None):
            raise ValueError(
                "LAS-AT draws each picture's steps and step size (method.steps, method.step_sizes) in eval mode from anywhere in the ball: leave "
                f"attack.mode=eval attack.phases=ten attack.start_std=null, got {attack.mode}, {attack.phases}, {attack.start_std}"
            )
        eighth = self.attack.epsilon / 8
        tables = (
            [e * eighth for e in self.epsilons],
            [float(s) for s in self.steps],
            [s * eighth for s in self.step_sizes],
        )
        self.tables = [torch.tensor(t, device=self.device, dtype=self.dtype) for t in tables]
        backbone = self.strategy_model(num_classes=self.data.num_classes)
        check_answers(backbone, self.data.image_size, trained=True)
        self.strategy = training.compute.to_device(StrategyNetwork(backbone, [len(t) for t in tables]))
        self.optimizer = self.strategy_optimizer(self.strategy)
        self.strategy_lr = self.optimizer.param_groups[0]["lr"]

    def networks(self) -> tuple[nn.Module, ...]:
        """Both networks."""
        return self.model, self.strategy

    def start_epoch(self, epoch: int) -> None:
        """The strategy's learning rate falls with the target's."""
        super().start_epoch(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.strategy_lr * self.training.setup.schedule(epoch, self.training.epochs)

    def unrecordable(self) -> str:
        """What a step does follows from what the strategy network says."""
        return "in LAS-AT a network says how many steps an attack takes"

    def inputs(self, batch: Batch, epoch: int, step: int) -> tuple[Tensor, ...]:
        """As for AT; which pictures and which step it is, too, for the strategy's draws."""
        self.step, self.index = step, batch.sample
        return super().inputs(batch, epoch, step)

    def adversarial(self, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        """Improve the strategy if it is time to, draw each image's attack, attack."""
        epoch, step, index = self.epoch, self.step, self.index
        if ((epoch - 1) * self.training.steps_per_epoch + step + 1) % self.interval == 0:
            self._improve(x, y, epoch, step, index)
        with torch.no_grad(), eval_mode(self.strategy):
            drawn = self._draw(self.strategy(x), epoch, index, "las_train")
        with eval_mode(self.model), frozen_parameters(self.model):
            x_adv = self._attack(x, y, drawn, epoch, index, "las_train_start")
        return project(x_adv, x, norm=self.attack.norm, epsilon=self.attack.epsilon)

    def _draw(self, logits: list[Tensor], epoch: int, index: Tensor, stream: str) -> list[Tensor]:
        """A choice (b,) from each head's distribution."""
        keys = sample_keys(self.training.seed, epoch, index, stream).to(self.device, non_blocking=True)
        chance = uniform(keys, len(logits)).to(self.dtype)
        cumulative = [F.softmax(z.detach(), dim=-1).cumsum(-1) for z in logits]
        return [(chance[:, [k]] >= c).sum(-1).clamp_max(c.shape[1] - 1) for k, c in enumerate(cumulative)]

    def _attack(
        self, x: Tensor, y: Tensor, drawn: list[Tensor], epoch: int, index: Tensor, stream: str
    ) -> Tensor:
        """Each image attacked with its own epsilon, steps and step size, from anywhere in the threat model's ball."""
        epsilon, steps, step_size = (
            table[choice].view(-1, 1, 1, 1) for table, choice in zip(self.tables, drawn, strict=True)
        )
        keys = sample_keys(self.training.seed, epoch, index, stream).to(x.device, non_blocking=True)
        return pgd(
            self.logits,
            x,
            lambda z: F.cross_entropy(z, y, reduction="none"),
            norm=self.attack.norm,
            epsilon=epsilon,
            steps=steps,
            step_size=step_size,
            start=random_start(x, keys, norm=self.attack.norm, epsilon=self.attack.epsilon),
            validate=False,
        )

    def _improve(self, x: Tensor, y: Tensor, epoch: int, step: int, index: Tensor) -> None:
        """One REINFORCE step of the strategy network."""
        items = self.samples
        self.strategy.train()
        logits = self.strategy(x)
        drawn = self._draw(logits, epoch, index, "las_strategy")
        reward = self._reward(x, y, drawn, epoch, step, index)
        chosen = [
            F.cross_entropy(z, choice, reduction="sum") for z, choice in zip(logits, drawn, strict=True)
        ]
        loss = reward * torch.stack(chosen).sum() / items  # -log of the probability of what was drawn
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        all_reduce_(p.grad for p in self.strategy.parameters() if p.grad is not None)
        nn.utils.clip_grad_norm_(self.strategy.parameters(), self.clip_gradient)
        self.optimizer.step()
        broadcast_(self.strategy.buffers())

    def _reward(
        self, x: Tensor, y: Tensor, drawn: list[Tensor], epoch: int, step: int, index: Tensor
    ) -> Tensor:
        """What the drawn strategies are worth: one number for the whole batch."""
        items = self.samples
        with eval_mode(self.model), frozen_parameters(self.model):
            x_adv = self._attack(x, y, drawn, epoch, index, "las_reward_start")
            with torch.no_grad():
                difficulty = all_reduce(F.cross_entropy(self.logits(x_adv), y, reduction="sum")) / items
        updated = self._updated_copy(x_adv, y, items, epoch).requires_grad_(False)
        starts = []
        for restart in range(RESTARTS):
            keys = sample_keys(
                self.training.seed, epoch, index.to(x.device, non_blocking=True), f"las_restart/{restart}"
            )
            starts.append(
                pgd(
                    lambda z: self.logits(z, updated),
                    x,
                    lambda z: F.cross_entropy(z, y, reduction="none"),
                    norm=self.attack.norm,
                    epsilon=self.attack.epsilon,
                    steps=REWARD_STEPS,
                    step_size=self.attack.epsilon / 4,
                    start=random_start(x, keys, norm=self.attack.norm, epsilon=self.attack.epsilon),
                    validate=False,
                )
            )
        with torch.no_grad():
            worst, highest = starts[0], torch.zeros_like(y, dtype=self.dtype)
            for start in starts:
                values = F.cross_entropy(self.logits(start, updated), y, reduction="none")
                worst = torch.where((values >= highest).view(-1, 1, 1, 1), start, worst)
                highest = torch.maximum(values, highest)
            broadcast_(updated.buffers())
            updated.eval()
            right = [(self.logits(images, updated).argmax(-1) == y).sum() for images in (worst, x)]
            robust, clean = all_reduce(torch.stack(right).to(self.dtype)) / items
        return (
            difficulty.clamp(0, 10)
            + (self.robust_reward * robust).clamp(-10, 10)
            + (self.clean_reward * clean).clamp(-10, 10)
        )

    def _updated_copy(self, x_adv: Tensor, y: Tensor, items: int, epoch: int) -> nn.Module:
        """The target network after one step on x_adv, as it will be trained; left in training mode."""
        network = copy.deepcopy(self.model)
        network.train()
        group = self.training.optimizer.param_groups[0]

        def worst_case() -> Tensor:
            with frozen_statistics(network):
                return F.cross_entropy(self.logits(x_adv, network), y, reduction="sum") / items

        optimizer = torch.optim.SGD(
            network.parameters(), lr=float(group["lr"]), weight_decay=group["weight_decay"]
        )  # one step: momentum has nothing to remember
        if self.awp_gamma > 0 and epoch >= self.awp_start_epoch:
            with perturbed(network, worst_case, self.awp_gamma):
                self._copy_step(network, optimizer, x_adv, y, items)
        else:
            self._copy_step(network, optimizer, x_adv, y, items)
        return network

    def _copy_step(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, x_adv: Tensor, y: Tensor, items: int
    ) -> None:
        logits = self.logits(x_adv, network)
        self.optimizer_step(
            F.cross_entropy(logits, y, reduction="sum", label_smoothing=self.label_smoothing) / items,
            optimizer,
        )

    @staticmethod
    def forwards(config: Mapping[str, Any], epoch: int, steps: int) -> dict[str, float]:
        """As AT-AWP with the longest strategy's steps, which a batch takes; the strategy's own part every `interval` steps."""
        method = config["method"]
        longest, awp = max(method["steps"]), 3 * awp_share(config, epoch)
        reward = 2 * longest + 1 + awp + 3 + RESTARTS * (2 * REWARD_STEPS + 1) + 2
        return {
            "model": 2 * longest + awp + 4 + reward / method["interval"],
            "strategy_model": 1 + 3 / method["interval"],
        }

    def state_dict(self) -> dict[str, Any]:
        """The strategy network and its optimizer, too."""
        return {
            **super().state_dict(),
            "strategy": self.strategy.state_dict(),
            "strategy_optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        super().load_state_dict(state)
        self.strategy.load_state_dict(state["strategy"])
        self.optimizer.load_state_dict(state["strategy_optimizer"])
