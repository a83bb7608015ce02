"""Whole steps of every method against slow straight-line restatements of its published loop, in float64.

A restatement shares with the trainer the input pixels, the random starts and (LAS-AT) the drawn actions' random numbers, and
nothing else of gkl computes anything in it. GKL-AT and its KL baseline have their own in test_fidelity.py.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.data.digits import digits
from gkl.distributed import Shard
from gkl.models import create
from gkl.rng import normal, sample_keys, uniform
from tests.system.test_fidelity import TinyNet, algorithm1
from trainers.errors import RunError
from trainers.loop.console import Console
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build, check
from trainers.runs.targets import instantiate

EPSILON = 0.15


def task_of(
    experiment: str, *overrides: str, model: nn.Module | None = None, device: str = "cpu"
) -> tuple[dict, Training]:
    ramp = compose("train", [f"experiment={experiment}"])["attack"]["ramp"]
    config = compose("train", [f"experiment={experiment}", "scale=smoke", "precision=float64", "batch_size=32",
                               "channels_last=false", f"attack.ramp={ramp}", *overrides])  # fmt: skip
    check(config, 1)
    torch.manual_seed(3)
    model = (model or TinyNet()).double()
    if "generated" in config:
        config["generated"]["images"] = 200
    return config, build(config, data=digits(), model=model, device=torch.device(device))


def published_epochs(experiment: str) -> str:
    return f"epochs={compose('train', [f'experiment={experiment}'])['epochs']}"


def start_in_ball(x: Tensor, index: Tensor, epoch: int, stream: str = "attack_start") -> Tensor:
    noise = 2 * uniform(sample_keys(0, epoch, index, stream), x[0].numel()).view_as(x).double() - 1
    return (x + EPSILON * noise).clamp(0, 1)


def gaussian_start(x: Tensor, index: Tensor, epoch: int, view: int = 0) -> Tensor:
    keys = sample_keys(0, epoch, index, "attack_start") + view
    return x + 0.001 * normal(keys, tuple(x.shape[1:]), torch.float64)


def ascend(model, x, start, loss_fn, epsilon, step_size, steps):
    delta = start - x
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(model(x + delta)), delta)
        delta = torch.clamp(delta.detach() + step_size * gradient.sign(), -epsilon, epsilon)
        delta = torch.max(torch.min(delta, 1 - x), 0 - x)
    return (x + delta).detach()


def proxy_move(model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], gamma: float) -> dict[str, Tensor]:
    """AWP by a proxy network and its own SGD step, as published."""
    proxy = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer.zero_grad()
    (-loss_fn(proxy)).backward()
    optimizer.step()
    moves = {}
    for (name, old), new in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if old.ndim > 1 and "weight" in name:
            difference = (new - old).detach()
            moves[name] = gamma * old.detach().norm() / (difference.norm() + 1e-20) * difference
    return moves


def add_(model: nn.Module, moves: dict[str, Tensor], sign: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in moves:
                parameter.add_(sign * moves[name])


def step_on(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def assert_same(ours: nn.Module, restated: nn.Module) -> None:
    theirs = restated.state_dict()
    for name, value in ours.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(
                value, theirs[name], rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


def run_steps(task: Training, epoch: int, restated: Callable[..., None], steps: int = 2) -> None:
    task.start_epoch(epoch)
    for step in range(steps):
        images, draws, y, view, index = task.batch(epoch, step)
        task.train_step(epoch, step)
        restated(task.see(images, view, draws), y, view, index)


# --- PGD adversarial training: Rice et al., AT-AWP ---------------------------------------------------------------------


@pytest.mark.parametrize(("experiment", "gamma"), [("at/c10_rice", 0.0), ("at/c100_awp", 0.01)])
@pytest.mark.parametrize(("epoch", "lr"), [(100, 0.1), (101, 0.01), (151, 0.001)])
def test_pgd_training(experiment: str, gamma: float, epoch: int, lr: float) -> None:
    _, task = task_of(experiment, "epochs=200", "model.normalisation=null")
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    def restated(x, y, view, index):
        model.train()
        x_adv = ascend(
            model,
            x,
            start_in_ball(x, index, epoch),
            lambda z: F.cross_entropy(z, y),
            EPSILON,
            EPSILON / 4,
            10,
        )
        moves = proxy_move(model, lambda m: F.cross_entropy(m(x_adv), y), gamma) if gamma else {}
        add_(model, moves, 1.0)
        step_on(F.cross_entropy(model(x_adv), y), optimizer)
        add_(model, moves, -1.0)
        with torch.no_grad():
            model(x)

    run_steps(task, epoch, restated)
    assert_same(task.model, model)


def test_the_best_epoch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Early stopping as Rice et al.: the first epoch of the highest robust test accuracy, found by PGD-10 on all test images."""
    _, task = task_of("at/c10_rice", "model.normalisation=null")
    scores = iter([30.0, 50.0, 50.0, 40.0])
    monkeypatch.setattr("trainers.methods.robust.pgd_accuracy", lambda *a, **k: next(scores))
    states = []
    for epoch in range(1, 5):
        task.start_epoch(epoch)
        task.train_step(epoch, 0)
        assert task.end_epoch(epoch)["selection/robust"] == [30.0, 50.0, 50.0, 40.0][epoch - 1]
        states.append({k: v.clone() for k, v in task.model.state_dict().items()})
    assert task.method.selection.best["epoch"] == 2
    for name, value in task.weights()["best"].items():
        assert torch.equal(value, states[1][name])
    saved = copy.deepcopy(task.state_dict())
    _, resumed = task_of("at/c10_rice", "model.normalisation=null")
    resumed.load_state_dict(saved)
    assert resumed.method.selection.best["robust"] == 50.0 and resumed.weights().keys() == {"last", "best"}


def test_no_epoch_is_chosen_before_its_average_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the network itself was measured, and no weights were kept."""
    words = ["selection=most_robust", "selection.images=test", "selection.loss=ce", "selection.steps=1"]
    _, task = task_of(
        "at/c100_basic_gkl", *words, "+selection.weights=ema", "evaluate=best", "averages.ema.start_epoch=3"
    )
    scores = iter([30.0, 20.0])
    monkeypatch.setattr("trainers.methods.robust.pgd_accuracy", lambda *a, **k: next(scores))
    rows = []
    for epoch in range(1, 5):
        task.start_epoch(epoch)
        task.train_step(epoch, 0)
        rows.append(task.end_epoch(epoch).get("selection/robust"))
    assert rows == [None, None, 30.0, 20.0]
    assert task.method.selection.best["epoch"] == 3 and task.weights()["best"]


# --- TRADES and what its trainer also is: TRADES-AWP, ACAT, DM-AT, DKL -------------------------------------------------


def trades_step(model, optimizer, x, y, start, *, loss, attack_loss, budget, gamma, smoothing=0.0, clean_first=False, clean_twice=False, mode="eval"):  # fmt: skip
    """x_adv by attack_loss from `start`, AWP by a proxy, CE(clean) + loss(adv, clean), the clean logits anew for each if clean_twice."""
    model.train(mode != "eval")
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    with torch.no_grad():
        reference = model(x)
    epsilon, step_size, steps = budget
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(attack_loss(model(x_adv), reference), x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
    if mode == "frozen":  # what track_bn_stats(False) keeps from changing
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    x_adv = x_adv.detach()
    moves = (
        proxy_move(model, lambda m: F.cross_entropy(m(x), y) + loss(m(x_adv), m(x)), gamma) if gamma else {}
    )
    model.train()
    add_(model, moves, 1.0)
    if clean_first:
        clean, adversarial = model(x), model(x_adv)
    else:
        adversarial, clean = model(x_adv), model(x)
    labelled = model(x) if clean_twice else clean
    step_on(F.cross_entropy(labelled, y, label_smoothing=smoothing) + loss(adversarial, clean), optimizer)
    add_(model, moves, -1.0)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")


@pytest.mark.parametrize(("epoch", "lr", "awp"), [(9, 0.1, False), (100, 0.01, True)])
def test_trades_awp(epoch: int, lr: float, awp: bool) -> None:
    _, task = task_of("at/c10_trades_awp", "epochs=200")
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    run_steps(task, epoch, lambda x, y, view, index: trades_step(
        model, optimizer, x, y, gaussian_start(x, index, epoch), loss=lambda s, t: 6.0 * kl(s, t), attack_loss=kl,
        budget=(EPSILON, EPSILON / 4, 10), gamma=0.005 if awp else 0.0, clean_twice=True,
    ))  # fmt: skip
    assert_same(task.model, model)


@pytest.mark.parametrize(
    ("experiment", "weight", "smoothing", "held_out"),
    [("at/c100_acat", 9.0, 0.1 * 100 / 99, 0.02), ("at/c10_acat", 10.0, 0.0, 0.002)],
)
def test_acat(experiment: str, weight: float, smoothing: float, held_out: float) -> None:
    epoch, epochs = 60, 110
    _, task = task_of(experiment, "epochs=110")
    model = copy.deepcopy(task.model)
    lr = 0.2 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    epsilon = EPSILON * epoch / epochs
    run_steps(task, epoch, lambda x, y, view, index: trades_step(
        model, optimizer, x, y, gaussian_start(x, index, epoch), loss=lambda s, t: weight * kl(s, t), attack_loss=kl,
        budget=(epsilon, epsilon, 2), gamma=0.005, smoothing=smoothing, clean_first=True,
    ))  # fmt: skip
    assert_same(task.model, model)
    assert len(task.batches.labels) == 1437 - round(1437 * held_out)
    assert task.averages["ema"].start_epoch == 82 and not task.averages["ema"].state  # 150 * 110 // 200


@pytest.mark.parametrize("generalized", [False, True])
def test_dm_at(generalized: bool, tmp_path) -> None:
    """The first steps: batch statistics taken over whole, EMA still the model; then EMA behind it, buffers copied."""
    experiment, epochs, epoch = "at/c100_dm_gkl" if generalized else "at/c100_dm", 400, 1
    _, task = task_of(experiment, f"epochs={epochs}", f"generated.root={tmp_path}")
    model = copy.deepcopy(task.model)
    schedule = torch.optim.SGD([torch.zeros(1)], lr=0.2, momentum=0.9, nesterov=True)
    torch.optim.lr_scheduler.OneCycleLR(schedule, max_lr=0.2, pct_start=0.025, total_steps=epochs)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "bn" not in n]},
        {"params": [p for n, p in model.named_parameters() if "bn" in n], "weight_decay": 0.0},
    ]
    state = schedule.param_groups[0]
    optimizer = torch.optim.SGD(
        groups, lr=state["lr"], momentum=state["momentum"], weight_decay=5e-4, nesterov=True
    )
    loss = (lambda s, t: algorithm1(s, t, torch.full_like(s, 0.1), 12.0, 5.0, 0.4)) if generalized else (lambda s, t: 5.0 * kl(s, t))  # fmt: skip

    def restated(x, y, view, index):
        layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        first = restated.count == 0
        for layer in layers:
            layer.momentum = 1.0 if first else 0.1
        trades_step(
            model, optimizer, x, y, start_in_ball(x, index, epoch), loss=loss, attack_loss=kl, mode="frozen",
            budget=(EPSILON, EPSILON / 4, 10), gamma=0.0, smoothing=0.1, clean_first=True,
        )  # fmt: skip
        restated.count += 1

    restated.count = 0
    run_steps(task, epoch, restated)
    assert_same(task.model, model)
    assert task.steps_per_epoch == math.ceil(1437 / 32) and len(task.batches.labels) == 1437 - 29
    assert_close_states(task.averages["ema"].state, dict(model.named_parameters()))


def assert_close_states(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-11)


def test_generated_pictures_fill_their_share_of_each_batch(tmp_path) -> None:
    _, task = task_of("at/c100_dm", f"generated.root={tmp_path}")
    task.start_epoch(1)
    indices = [task.batches.drawn(1, step) for step in range(task.steps_per_epoch)]
    for index in indices:
        assert len(index) == 32 and int((index >= len(task.batches.labels)).sum()) == int(32 * 0.7)
    real = torch.cat([i[i < len(task.batches.labels)] for i in indices])
    assert len(real.unique()) == len(real)  # no picture twice before all were seen once
    assert torch.equal(task.batches.drawn(1, 5), indices[5]) and not torch.equal(
        task.batches.drawn(2, 5), indices[5]
    )
    images, labels = task.batches.pictures(indices[0])
    for image, label, number in zip(images, labels, indices[0].tolist(), strict=True):
        if number < len(task.batches.labels):
            assert torch.equal(image, task.batches.images[number]) and label == task.batches.labels[number]
        else:
            drawn, wanted = task.batches.generated.take(torch.tensor([number - len(task.batches.labels)]))
            assert torch.equal(image, drawn[0]) and label == wanted[0]


def test_theorem_1_in_training() -> None:
    """Table I, rows (a) and (b): KL and DKL end in the same weights after 20 steps at equal schedule and batches."""
    ended = []
    for experiment in ("at/c100_basic_kl", "at/c100_dkl"):
        _, task = task_of(experiment, "protocol=official", "epochs=200", "channels_last=false")
        task.start_epoch(120)  # AWP is on
        for step in range(20):
            task.train_step(120, step)
        ended.append(task.model.state_dict())
    for name, value in ended[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, ended[1][name], rtol=0, atol=1e-9)
    _, moved = task_of("at/c100_dkl", "epochs=200", "loss.break_asymmetry=true")
    moved.start_epoch(120)
    for step in range(2):
        moved.train_step(120, step)
    assert not torch.allclose(ended[0]["conv1.weight"], moved.model.state_dict()["conv1.weight"], atol=1e-4)


GKL_IN_PLACE = {
    "at/c100_acat": 9.0,
    "at/c100_dajat": 9.0,
    "at/c100_lbgat": 6.0,
    "at/c100_dm": 5.0,
    "at/c10_trades_awp": 6.0,
}


@pytest.mark.parametrize("experiment", GKL_IN_PLACE)
def test_gkl_takes_the_kls_place_in_every_method(experiment: str, tmp_path) -> None:
    """As typed on the command line. With DKL's settings the step is the KL's own (Theorem 1), with GKL's another."""
    ended = []
    weight = GKL_IN_PLACE[experiment]
    for overrides in (
        [],
        ["loss=gkl", "~loss.weight", f"loss.alpha={weight}", f"loss.beta={weight}", "loss.gamma=1",
         "loss.weights=sample", "loss.break_asymmetry=false"],
        ["loss=gkl", "~loss.weight", "loss.alpha=20", "loss.beta=4", "loss.gamma=0.4"],
    ):  # fmt: skip
        if experiment == "at/c100_dm":
            overrides = [*overrides, f"generated.root={tmp_path}"]
        _, task = task_of(experiment, *overrides)
        task.start_epoch(6)
        for step in range(2):
            task.train_step(6, step)
        ended.append(task.model.state_dict()["conv1.weight"])
    torch.testing.assert_close(ended[0], ended[1], rtol=0, atol=1e-10)
    assert not torch.allclose(ended[0], ended[2], atol=1e-5)


# --- LBGAT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "beta", "epsilon", "step_size", "gamma"),
    [
        ("at/c100_lbgat", 6.0, EPSILON, EPSILON * 0.007 / 0.031, 0.0),
        ("at/c10_lbgat", 0.0, EPSILON, EPSILON * 0.007 / 0.031, 0.0),
        ("at/c100_lbgat_awp", 9.0, EPSILON, EPSILON / 4, 0.005),
    ],
)
@pytest.mark.parametrize(("epoch", "lr"), [(1, 0.02), (75, 0.1), (76, 0.01), (91, 0.001)])
def test_lbgat(experiment: str, beta: float, epsilon: float, step_size: float, gamma: float, epoch: int, lr: float) -> None:  # fmt: skip
    _, task = task_of(experiment, "epochs=100")
    model, natural = copy.deepcopy(task.model), copy.deepcopy(task.method.guide)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *natural.parameters()], lr=lr, momentum=0.9, weight_decay=2e-4
    )

    def restated(x, y, view, index):
        model.eval()
        with torch.no_grad():
            reference = model(x)
        x_adv = gaussian_start(x, index, epoch)
        for _ in range(10):
            x_adv = x_adv.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(kl(model(x_adv), reference), x_adv)
            x_adv = x_adv.detach() + step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        x_adv = x_adv.detach()
        model.train()
        natural.train()
        guide = natural(x)
        fixed = guide.detach()
        moves = (
            proxy_move(model, lambda m: F.mse_loss(m(x_adv), fixed) + beta * kl(m(x_adv), m(x)), gamma)
            if gamma and epoch >= 10
            else {}
        )
        add_(model, moves, 1.0)
        adversarial, clean = model(x_adv), model(x)
        loss = F.mse_loss(adversarial, guide) + F.cross_entropy(guide, y) + beta * kl(adversarial, clean)
        step_on(loss, optimizer)
        add_(model, moves, -1.0)

    run_steps(task, epoch, restated)
    assert_same(task.model, model)
    assert_same(task.method.guide, natural)


# --- DAJAT ------------------------------------------------------------------------------------------------------------


class TwoNorms(nn.Module):
    """A TinyNet with two sets of batch norm, written out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = net.conv1, net.conv2, net.fc
        self.bn1, self.bn2 = self._plain(net.bn1), self._plain(net.bn2)
        self.auto1, self.auto2 = self._plain(net.bn1.auxiliary), self._plain(net.bn2.auxiliary)

    @staticmethod
    def _plain(norm: nn.Module) -> nn.BatchNorm2d:
        plain = nn.BatchNorm2d(norm.num_features).double()
        plain.load_state_dict({k: v for k, v in norm.state_dict().items() if "auxiliary" not in k})
        return plain

    def forward(self, x: Tensor, strong: bool) -> Tensor:
        x = self.conv1(x)
        x = self.conv2(F.silu(self.auto1(x) if strong else self.bn1(x)))
        return self.fc(F.silu(self.auto2(x) if strong else self.bn2(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("experiment", "weight", "js_weight", "smoothing", "strong_views", "epochs", "steps"),
    [
        ("at/c100_dajat", 9.0, 2.0, 0.1 * 100 / 99, 2, 110, (1.0, 2)),
        ("at/c10_dajat", 10.0, 3.0, 0.0, 3, 110, (1.0, 2)),
        ("at/c100_dajat_200", 9.0, 2.0, 0.1 * 100 / 99, 2, 200, (0.5, 5)),
    ],
)
def test_dajat(experiment, weight, js_weight, smoothing, strong_views, epochs, steps) -> None:
    epoch = 60
    _, task = task_of(experiment, f"epochs={epochs}")
    model = TwoNorms(copy.deepcopy(task.model))
    lr = 0.2 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    epsilon = EPSILON * epoch / epochs
    task.start_epoch(epoch)
    for step in range(2):
        index = task.batches.drawn(epoch, step)
        views = task.batches.augment(task.batches.images[index], seed=0, epoch=epoch, index=index)
        views = [(v.float() / 255).double() for v in views]
        y = task.batches.labels[index]
        task.train_step(epoch, step)
        assert len(views) == 1 + strong_views

        model.eval()
        attacked = []
        for number, x in enumerate(views):
            with torch.no_grad():
                reference = model(x, number > 0)
            x_adv = gaussian_start(x, index, epoch, number)
            for _ in range(steps[1]):
                x_adv = x_adv.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(kl(model(x_adv, number > 0), reference), x_adv)
                x_adv = x_adv.detach() + steps[0] * epsilon * gradient.sign()
                x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
            attacked.append(x_adv.detach())
        base, base_adv = views[0], attacked[0]

        def basic_loss(m, x=base, x_adv=base_adv, y=y):
            return F.cross_entropy(m(x, False), y) + weight * kl(m(x_adv, False), m(x, False))

        moves = proxy_move(model, basic_loss, 0.005)
        model.train()
        add_(model, moves, 1.0)
        total, probs = 0.0, []
        for number, (x, x_adv) in enumerate(zip(views, attacked, strict=True)):
            clean, adversarial = model(x, number > 0), model(x_adv, number > 0)
            total = (
                total + F.cross_entropy(clean, y, label_smoothing=smoothing) + weight * kl(adversarial, clean)
            )
            probs.append(F.softmax(clean, 1))
        mixture = torch.clamp(sum(probs) / len(probs), 1e-7, 1).log()
        js = sum(F.kl_div(mixture, p, reduction="batchmean") for p in probs) / len(probs)
        step_on(total / len(views) + js_weight * js, optimizer)
        add_(model, moves, -1.0)

    wanted = model.state_dict()
    for name, value in task.model.state_dict().items():
        if value.is_floating_point():
            other = name.replace("bn1.auxiliary", "auto1").replace("bn2.auxiliary", "auto2")
            torch.testing.assert_close(value, wanted[other], rtol=0, atol=1e-11)


# --- LAS-AT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experiment", "rewards", "interval", "classes"),
    [("at/c100_las_at", (4.0, 2.0), 10, 100), ("at/c10_las_at", (1.0, 1.0), 1, 10)],
)
def test_las_at(experiment: str, rewards: tuple[float, float], interval: int, classes: int) -> None:
    epoch = 120
    config, task = task_of(experiment, "epochs=200", "model.normalisation=null", "method.interval=1")
    published = compose("train", [f"experiment={experiment}"])["method"]
    assert published["interval"] == interval
    torch.testing.assert_close(published["label_smoothing"] * (classes - 1) / classes, 0.3)  # factor 0.7
    model, strategy = copy.deepcopy(task.model), copy.deepcopy(task.method.strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    learner = config["strategy_optimizer"]
    policy = torch.optim.SGD(strategy.parameters(), lr=learner["lr"] / 10, momentum=learner["momentum"],
                             weight_decay=learner["weight_decay"])  # fmt: skip
    epsilons, iterations, sizes = published["epsilons"], published["steps"], published["step_sizes"]
    level = EPSILON / 8

    def drawn(logits, index, stream):
        chances = uniform(sample_keys(0, epoch, index, stream), 3).double()
        actions = []
        for k, z in enumerate(logits):
            cumulative = torch.cumsum(F.softmax(z, -1), -1)
            actions.append(torch.tensor(
                [min(int((c >= edges).sum()), len(edges) - 1) for c, edges in zip(chances[:, k], cumulative, strict=True)]
            ))  # fmt: skip
        return actions

    def attack_by_policy(x, y, actions, index, stream):
        """One image after the other, each with its own budget."""
        model.eval()
        start = start_in_ball(x, index, epoch, stream)
        out = []
        for i in range(len(x)):
            epsilon, alpha = epsilons[actions[0][i]] * level, sizes[actions[2][i]] * level
            out.append(ascend(model, x[i : i + 1], start[i : i + 1], lambda z, i=i: F.cross_entropy(z, y[i : i + 1]),
                              epsilon, alpha, iterations[actions[1][i]]))  # fmt: skip
        return torch.cat(out)

    def reward_of(x, y, actions, index):
        x_adv = attack_by_policy(x, y, actions, index, "las_reward_start")
        with torch.no_grad():
            first = F.cross_entropy(model(x_adv), y).clamp(0, 10)
        trial = copy.deepcopy(model).train()
        moves = proxy_move(trial, lambda m: F.cross_entropy(m(x_adv), y), 0.01)
        add_(trial, moves, 1.0)
        target = torch.full((len(y), 10), published["label_smoothing"] / 10, dtype=torch.float64)
        target[range(len(y)), y] += 1 - published["label_smoothing"]
        one = torch.optim.SGD(trial.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        step_on((-target * F.log_softmax(trial(x_adv), -1)).sum(-1).mean(), one)
        add_(trial, moves, -1.0)
        worst, highest, ends = x.clone(), torch.zeros(len(x), dtype=torch.float64), []
        for restart in range(2):
            start = start_in_ball(x, index, epoch, f"las_restart/{restart}")
            ends.append(ascend(trial, x, start, lambda z: F.cross_entropy(z, y), EPSILON, EPSILON / 4, 10))
        for end in ends:
            with torch.no_grad():
                values = F.cross_entropy(trial(end), y, reduction="none")
            worst[values >= highest] = end[values >= highest]
            highest = torch.max(highest, values)
        trial.eval()
        with torch.no_grad():
            robust = (trial(worst).argmax(1) == y).double().mean()
            clean = (trial(x).argmax(1) == y).double().mean()
        return first + rewards[0] * robust + rewards[1] * clean

    def restated(x, y, view, index):
        strategy.train()
        logits = strategy(x)
        actions = drawn([z.detach() for z in logits], index, "las_strategy")
        reward = reward_of(x, y, actions, index)
        policy_loss = 0.0
        for z, action in zip(logits, actions, strict=True):
            log_probs = torch.distributions.Categorical(F.softmax(z, -1)).log_prob(action)
            policy_loss = policy_loss + (-log_probs * reward).mean()
        policy.zero_grad()
        policy_loss.backward()
        torch.nn.utils.clip_grad_norm_(strategy.parameters(), 1.0)
        policy.step()
        strategy.eval()
        with torch.no_grad():
            actions = drawn(strategy(x), index, "las_train")
        x_adv = attack_by_policy(x, y, actions, index, "las_train_start")
        x_adv = (x + (x_adv - x).clamp(-EPSILON, EPSILON)).clamp(0, 1)
        model.train()
        moves = proxy_move(model, lambda m: F.cross_entropy(m(x_adv), y), 0.01)
        add_(model, moves, 1.0)
        step_on(F.cross_entropy(model(x_adv), y), optimizer)
        add_(model, moves, -1.0)
        with torch.no_grad():
            model(x)

    run_steps(task, epoch, restated)
    assert_same(task.model, model)
    assert_same(task.method.strategy, strategy)


def test_a_method_refuses_what_it_does_not_take() -> None:
    from trainers.errors import ConfigError

    for experiment, override, message in (
        (
            "at/c100_awp",
            "+loss={_target_: gkl.losses.objectives.KL, weight: 1.0}",
            "takes no loss; leave it out",
        ),
        ("at/c100_dm", "generated_share=0.0", "generated_share in"),
        ("at/c100_dm", "generated_share=0.001", "generated_share=0.001 of a batch of .* is no picture"),
        ("at/c100_dm", "held_out=0.0", "selection.images=held_out needs held_out"),
        ("at/c100_dajat", "augment.views=[crop_flip]", "at least one strong view"),
        ("at/c100_lbgat", "augment.views=[crop_flip,autoaugment]", "LBGAT trains on one view"),
        ("at/c100_awp", "+selection.weights=ema", "unknown selection.weights 'ema'"),
        ("at/c100_awp", "selection.loss=fgsm", "selection.loss must be"),
        ("at/c100_awp", "attack.mode=nonsense", "attack.mode must be"),
    ):
        with pytest.raises((ConfigError, ValueError), match=message):
            config = compose("train", [f"experiment={experiment}", "scale=smoke", override])
            check(config, 1)
            if "generated" in config:
                config["generated"]["images"] = 50
            build(
                config,
                data=digits(),
                model=instantiate(config["model"], num_classes=10),
                device=torch.device("cpu"),
            )


@pytest.mark.parametrize("row", ["c100_basic_gkl", "c100_dajat", "c100_lbgat", "c10_rice"])
def test_stochastic_depth_drops_paths_of_its_own_pictures(row: str) -> None:
    """It once dropped none in adversarial training, whatever its rate."""

    def after_a_step(rate: float) -> Tensor:
        torch.manual_seed(0)
        model = create("resnet10t", 10, timm_options={"drop_path_rate": rate})
        _, task = task_of(f"at/{row}", "model=resnet10t", model=model)
        task.start_epoch(1)
        task.train_step(1, 0)
        return torch.cat([p.detach().flatten() for p in task.model.parameters()])

    assert after_a_step(0.5).equal(after_a_step(0.5)) and not after_a_step(0.5).equal(after_a_step(0.0))


class Dropping(TinyNet):
    """Draws from torch's own generator."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def test_dropout_is_the_same_after_a_restart() -> None:
    def make() -> Training:
        task = task_of("at/c100_basic_gkl", model=Dropping())[1]
        task.start_epoch(1)
        return task

    whole = make()
    for step in range(3):
        if step == 2:
            state = copy.deepcopy(whole.state_dict())
        whole.train_step(1, step)
    again = make()
    again.load_state_dict(state)
    again.train_step(1, 2)
    for name, tensor in whole.model.state_dict().items():
        assert again.model.state_dict()[name].equal(tensor), name


def test_a_network_without_weights_to_train_is_one_line() -> None:
    with pytest.raises(ValueError, match="the network has no weights to train; leave some unfrozen"):
        task_of("at/c100_basic_gkl", model=TinyNet().requires_grad_(False))


def test_micro_batches_are_not_passed_over() -> None:
    with pytest.raises(
        ValueError, match="accumulate=2 has no effect on AdversarialTraining, .* use more devices"
    ):
        task_of("at/c100_basic_gkl", "accumulate=2")


def test_a_momentum_is_a_schedule_of_sgd_s() -> None:
    _, task = task_of("at/c100_basic_gkl")
    made = {
        "optimizer": lambda module: torch.optim.AdamW(module.parameters()),
        "momentum": lambda epoch, epochs: 0.9,
    }
    with pytest.raises(
        ValueError, match="momentum=... is a schedule of SGD's, and AdamW has none .* momentum=null"
    ):
        Training(dataclasses.replace(task.setup, **made), task.method)
    Training(dataclasses.replace(task.setup, **made | {"momentum": None}), task.method)


@pytest.mark.parametrize("word", ["attack.mode=train", "attack.phases=low", "attack.start_std=0.001"])
def test_an_attack_that_is_drawn_takes_no_other_settings(word: str) -> None:
    with pytest.raises(ValueError, match="LAS-AT draws each picture's steps .* leave attack.mode=eval"):
        task_of("at/c100_las_at", word)


def test_every_process_has_some_of_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run once ended within its epoch, where one of two had none of one picture."""
    monkeypatch.setattr("gkl.distributed.world_size", lambda: 2)
    with pytest.raises(ValueError, match="the last batch of an epoch has 1 pictures, .* drop_last=true"):
        task_of("at/c100_basic_gkl", "batch_size=1436", "bn_groups=2", "drop_last=false")
    for groups, items in itertools.product((2, 4, 8), range(1, 20)):
        each = []
        for process in (0, 1):
            monkeypatch.setattr("gkl.distributed.rank", lambda process=process: process)
            each.append(len(Shard(groups).mine(items)))
        assert Shard(groups).reaches_all(items) == all(each), (groups, items)


def test_weights_that_a_training_made_constant_are_one_line(tmp_path: Path) -> None:
    """It once ended in a traceback, the training over."""
    config, task = task_of("at/c100_basic_gkl", "evaluation=screen", "evaluation.images=8")
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
    with pytest.raises(
        RunError, match=r"cannot measure these weights: the network gives every .*lower its learning"
    ):
        task.method.evaluate(
            headline="last",
            settings=config["evaluation"],
            folder=tmp_path,
            console=Console("a run", enabled=False),
        )
