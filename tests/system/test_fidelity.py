"""Whole GKL-AT steps of the trainer against a slow straight-line restatement of the recipe, in float64.

The restatement shares with the trainer the input pixels and the attack's starting noise, and nothing else: no gkl
function computes anything in it. It follows the published loop: attack in eval mode with the clean logits computed
anew in every step, AWP through a proxy network and its own SGD step, batch norm in four parts as DataParallel has it,
SGD written out, prior by one-hot products, average over epochs.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.digits import digits
from gkl.rng import normal, sample_keys
from trainers.runs.compose import choices, completed_by, compose
from trainers.runs.settings import build

EPOCHS = (119, 120)  # a renewed prior in the second; AWP on, intended budget in its third phase
STEPS = 2


class TinyNet(nn.Module):
    """Two convolutions with batch norm: every kind of parameter a WideResNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv1(x)))
        return self.fc(F.silu(self.bn2(self.conv2(x))).mean((2, 3)))


def scattered(model: nn.Module, x: Tensor, replicas: int) -> Tensor:
    """DataParallel by hand: copies share the parameters, the first one's batch-norm buffers are the model's."""
    outputs = []
    for number, part in enumerate(x.chunk(replicas)):
        buffers = {k: b if number == 0 else b.clone() for k, b in model.named_buffers()}
        outputs.append(
            torch.func.functional_call(model, {**dict(model.named_parameters()), **buffers}, (part,))
        )
    return torch.cat(outputs)


def algorithm1(
    student: Tensor, teacher: Tensor, rows: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """The paper's Algorithm 1 with all (B, C, C) pairs."""
    delta_m = teacher[:, :, None] - teacher[:, None, :]
    delta_n = student[:, :, None] - student[:, None, :]
    weight = rows**gamma
    pairs = weight[:, :, None] * weight[:, None, :]
    wmse = 0.25 * (pairs * (delta_m - delta_n) ** 2).sum() / pairs.sum()
    ce = -(F.softmax(teacher, 1).detach() * F.log_softmax(student, 1)).sum(1).mean()
    return beta * ce + alpha * wmse


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student logits, teacher logits, rows of the prior


def gkl(beta: float, gamma: float) -> Loss:
    return lambda student, teacher, rows: algorithm1(student, teacher, rows, 20.0, beta, gamma)


def kl(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    target = F.softmax(teacher, 1)
    return (target * (target.log() - F.log_softmax(student, 1))).sum(1).mean()


def attack_100(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    return algorithm1(student, teacher, rows, 1.0, 1.0, 1.0)


def attack_10(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    return algorithm1(student, teacher, rows, 0.0, 1.0, 1.0)


@dataclass
class Recipe:
    """What an experiment is, from the authors' commands and the paper's text."""

    loss: Loss
    attack: Loss = attack_100
    tau: float = 1.0
    tau_in_the_text: float | None = None
    view_weights: tuple[float, ...] = (1.0,)
    baseline: bool = False


RECIPES = {
    "at/c100_basic_gkl": Recipe(gkl(4.0, 0.4)),
    "at/c100_basic_conf": Recipe(gkl(4.0, 1.0), tau=4.0),
    "at/c100_basic_paper": Recipe(gkl(5.0, 0.4)),
    "at/c100_autoaug": Recipe(gkl(4.0, 1.0), tau=4.0, view_weights=(1.0, 0.5)),
    "at/c100_basic_kl": Recipe(lambda s, t, rows: 9.0 * kl(s, t, rows), attack=kl, baseline=True),
    "at/c10_basic_gkl": Recipe(gkl(4.0, 0.2), attack=attack_10, tau=4.0, tau_in_the_text=1.0),
    "at/c10_basic_conf": Recipe(gkl(4.0, 1.0), attack=attack_10, tau=4.0),
    "at/c10_autoaug": Recipe(gkl(4.0, 1.0), attack=attack_10, tau=4.0, view_weights=(1.0, 0.5)),
    "at/c10_basic_kl": Recipe(lambda s, t, rows: 9.0 * kl(s, t, rows), attack=kl, baseline=True),
}


class Restatement:
    """The recipe, one line after the other."""

    def __init__(
        self, model: nn.Module, protocol: str, recipe: Recipe, classes: int = 10, replicas: int = 4
    ) -> None:
        self.model, self.protocol, self.recipe = model, protocol, recipe
        self.classes, self.replicas = classes, replicas
        self.tau = recipe.tau
        if protocol == "paper" and recipe.tau_in_the_text is not None:
            self.tau = recipe.tau_in_the_text
        self.momentum = {name: None for name, _ in model.named_parameters()}
        like = next(model.parameters())
        self.prior = torch.full((classes, classes), 1 / classes, dtype=like.dtype, device=like.device)
        self.average: dict[str, Tensor] = {}

    def epoch(self, epoch: int, batches: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        lr = 0.2 * 0.5 * (1 + math.cos(math.pi * epoch / 201))
        if self.recipe.baseline and self.protocol == "official":
            lr = 0.2 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / 200))
        epsilon = 0.15 * epoch / 200
        if self.protocol == "official":
            steps, step_size = 5, epsilon / 2
        else:  # epochs 101..150
            steps, step_size = 4, epsilon / 2
        matrix = torch.zeros_like(self.prior)
        for x, y, noise in batches:
            matrix += self.step(x, y, noise, lr, epsilon, steps, step_size)
        self.prior = matrix / matrix.sum(1, keepdim=True)
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        if not self.average:
            self.average = state
        else:
            self.average = {k: 0.1 * v + 0.9 * self.average[k] for k, v in state.items()}

    def step(self, x, y, noise, lr, epsilon, steps, step_size):
        onehot = F.one_hot(y, self.classes).to(x.dtype)
        model, rows, replicas = self.model, onehot @ self.prior, self.replicas
        model.eval()
        x_adv = x + 0.001 * noise
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            loss = self.recipe.attack(model(x_adv), model(x), rows)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + step_size * gradient.sign()
            x_adv = torch.minimum(torch.maximum(x_adv, x - epsilon), x + epsilon).clamp(0, 1)

        proxy = copy.deepcopy(model).train()
        proxy_clean, proxy_adv = scattered(proxy, x, replicas), scattered(proxy, x_adv, replicas)
        ascent = -(F.cross_entropy(proxy_clean, y) + self.recipe.loss(proxy_adv, proxy_clean, rows))
        proxy.zero_grad()
        ascent.backward()
        torch.optim.SGD(proxy.parameters(), lr=0.2).step()
        difference = {}
        for (name, old), new in zip(model.state_dict().items(), proxy.state_dict().values(), strict=True):
            if old.ndim > 1 and "weight" in name:
                move = new - old
                difference[name] = (old.norm() / (move.norm() + 1e-20) * move).clone()
        parameters = dict(model.named_parameters())
        for name, move in difference.items():
            parameters[name].data.add_(0.005 * move)

        model.train()
        adversarial, clean = scattered(model, x_adv, replicas), scattered(model, x, replicas)
        loss, weights = F.cross_entropy(clean, y), self.recipe.view_weights
        parts = [z.chunk(len(weights)) for z in (adversarial, clean, rows)]
        for weight, *view in zip(weights, *parts, strict=True):
            loss = loss + weight * self.recipe.loss(*view)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
            gradient = gradient + 5e-4 * weight.data
            before = self.momentum[name]
            self.momentum[name] = gradient.clone() if before is None else 0.9 * before + gradient
            weight.data.sub_(lr * self.momentum[name])
        for name, move in difference.items():
            parameters[name].data.sub_(0.005 * move)
        basic = len(y) // len(weights)
        return onehot[:basic].T @ F.softmax(clean[:basic].detach() / self.tau, 1)


@pytest.mark.parametrize("protocol", ["official", "paper"])
@pytest.mark.parametrize("experiment", RECIPES)
def test_steps_equal_the_recipe(experiment: str, protocol: str) -> None:
    overrides = ["epochs=200", "batch_size=32", "precision=float64"]
    config = compose("train", [f"experiment={experiment}", f"protocol={protocol}", "scale=smoke", *overrides])
    torch.manual_seed(3)
    model = TinyNet().double()
    restated = Restatement(copy.deepcopy(model), protocol, RECIPES[experiment])
    data = digits()
    task = build(config, data=data, model=model, device=torch.device("cpu"))
    for average in task.averages.values():
        average.start_epoch = EPOCHS[0]
    for epoch in EPOCHS:
        task.start_epoch(epoch)
        batches = []
        for step in range(STEPS):
            images, draws, y, view, index = task.batch(epoch, step)
            keys = sample_keys(config["seed"], epoch, index, "attack_start") + view
            batches.append((task.see(images, view, draws), y, normal(keys, (3, 8, 8), torch.float64)))
            task.train_step(epoch, step)
        task.end_epoch(epoch)
        restated.epoch(epoch, batches)

    for name, value in task.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, restated.model.state_dict()[name], rtol=0, atol=1e-12, msg=name)
            torch.testing.assert_close(
                task.averages["swa"].state[name], restated.average[name], rtol=0, atol=1e-12, msg=name
            )
    torch.testing.assert_close(task.method.views.prior.probs, restated.prior, rtol=0, atol=1e-12)


def test_every_experiment_has_its_restatement() -> None:
    """Here, or by name in test_adversarial.py; the experiments with generated pictures share one recipe on two data sets.

    Distillation's are in test_distillation.py and test_features.py, a method each.
    """
    folder = Path(__file__).parents[1] / "trainers/methods"
    kinds = ("adversarial", "semi_supervised", "segmentation", "clip", "llava")
    others = "".join((folder / f"test_{kind}.py").read_text() for kind in kinds)
    missing = {
        name
        for name in choices("experiment")
        if name not in RECIPES
        and not completed_by(name)
        and f'"{re.sub("^(ssl|seg|clip|llava)/", "", name)}"' not in others
    }
    assert missing == {"at/c10_dm", "at/c10_dm_gkl", "ssl/denoising"}  # the last is no method of the paper's
