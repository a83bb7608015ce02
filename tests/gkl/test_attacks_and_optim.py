"""Attack, weight perturbation, averages, schedules: each against its definition."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gkl.attacks.awp import perturbable, perturbed
from gkl.attacks.pgd import PGD, pgd, project
from gkl.models import create
from gkl.optim.averaging import Average, RampedAverage
from gkl.optim.optimizers import adamw, sgd
from gkl.optim.schedules import cosine, multi_step, one_cycle

EPSILON = 8 / 255


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).double()


def batch(seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(count, 3, 8, 8, dtype=torch.float64, generator=generator),
        torch.randint(5, (count,), generator=generator),
    )


# --- PGD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "told"), [
    ({"x": 255.0}, r"images must be float in \[0, 1\], got .* from 0.* to 25.*; divide those of 0 to 255 by 255"),
    ({"x": -1.0}, r"images must be float in \[0, 1\], got .* from -0.* put a normalisation into the network"),
    ({"x": math.nan}, r"images must be float in \[0, 1\], got .* from nan"),
    ({"x": None}, r"images must be float in \[0, 1\], got torch.uint8 from 0 to 25"),
    ({"epsilon": 8}, r"epsilon must be above 0 and at most 1, .* got 8; 8 levels of 255 are 0.03137"),
    ({"epsilon": -EPSILON}, r"epsilon must be above 0"),
    ({"epsilon": 128, "norm": "l2"}, r"epsilon must be above 0 and at most 13.86, .*; 128 levels of 255 are 0.502"),
])  # fmt: skip
def test_what_would_be_clamped_in_the_place_of_an_attack_is_refused(
    change: dict[str, Any], told: str
) -> None:
    """Once normalised pictures, and an epsilon of 8, gave an image that was clamped to [0, 1] and no word."""
    model, (x, y) = network().eval(), batch()
    factor = change.pop("x", 1.0)
    x = (255 * x).byte() if factor is None else x * factor
    settings = {"norm": "linf", "epsilon": EPSILON, "step_size": 0.01, "steps": 1} | change
    with pytest.raises(ValueError, match=told) as caught:
        pgd(model, x, lambda z: F.cross_entropy(z, y), start=x, **settings)
    assert "\n" not in str(caught.value)


def test_logits_without_a_gradient_are_one_line() -> None:
    model, (x, y) = network().eval(), batch()
    settings: dict[str, Any] = {"norm": "linf", "epsilon": EPSILON, "step_size": 0.01, "steps": 1, "start": x}
    with pytest.raises(ValueError, match="the loss has no gradient to the images: leave out no_grad"):
        pgd(lambda z: model(z).detach(), x, lambda z: F.cross_entropy(z, y), **settings)
    with torch.inference_mode(), pytest.raises(ValueError, match="leave out no_grad, inference_mode"):
        pgd(model, x, lambda z: F.cross_entropy(z, y), **settings)


def test_pictures_normalised_and_back_are_pictures() -> None:
    model, (x, y) = network().float().eval(), batch()
    x = ((x.float() - 0.4914) / 0.2471) * 0.2471 + 0.4914
    x[0, 0, 0, :2] = torch.tensor([-1e-6, 1 + 1e-6])
    x_adv = pgd(
        model, x, lambda z: F.cross_entropy(z, y), norm="linf", epsilon=0.0, step_size=0.0, steps=1, start=x
    )
    assert torch.equal(x_adv, x.clamp(0, 1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_its_definition_image_by_image(norm: str) -> None:
    model, (x, y) = network().eval(), batch()
    start = x + 0.001 * torch.randn_like(x)
    epsilon, size = (EPSILON, 2 / 255) if norm == "linf" else (0.5, 0.1)
    ours = pgd(
        model, x, lambda z: F.cross_entropy(z, y, reduction="none"), norm=norm, epsilon=epsilon, step_size=size,
        steps=4, start=start,
    )  # fmt: skip
    for i in range(len(x)):
        z = start[i].clone()
        for _ in range(4):
            z.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(z[None]), y[i : i + 1]), z)
            z = z.detach()
            if norm == "linf":
                for c in range(3):
                    z[c] = z[c] + size * g[c].sign()
                z = torch.min(torch.max(z, x[i] - epsilon), x[i] + epsilon).clamp(0, 1)
            else:
                z = (z + size * g / g.square().sum().sqrt()).clamp(0, 1)
                length = (z - x[i]).square().sum().sqrt()
                if length > epsilon:
                    z = x[i] + (z - x[i]) * epsilon / length
        torch.testing.assert_close(ours[i], z, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["linf", "l2"]), st.floats(1e-3, 2.0), st.integers(0, 99), st.floats(0.01, 5.0))
def test_projection_lands_in_the_ball_and_the_box_and_stays(
    norm: str, epsilon: float, seed: int, far: float
) -> None:
    x, _ = batch(seed)
    moved = project(x + far * torch.randn_like(x), x, norm=norm, epsilon=epsilon)
    delta = (moved - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= epsilon * (1 + 1e-12) and moved.min() >= 0 and moved.max() <= 1
    torch.testing.assert_close(project(moved, x, norm=norm, epsilon=epsilon), moved, rtol=0, atol=1e-14)
    assert project(x, x, norm=norm, epsilon=epsilon).equal(x)


def test_an_attack_leaves_the_model_as_it_found_it() -> None:
    model, (x, y) = network(), batch()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    adversarial = pgd(
        model,
        x,
        lambda z: F.cross_entropy(z, y),
        norm="linf",
        epsilon=EPSILON,
        step_size=0.01,
        steps=3,
        start=x,
    )
    assert all(before[k].equal(v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model.training
    assert not adversarial.requires_grad
    before_loss, after_loss = (F.cross_entropy(model(z), y) for z in (x, adversarial))
    assert after_loss > before_loss + 0.01


def test_attack_errors() -> None:
    x, _ = batch()
    with pytest.raises(ValueError, match="norm must be linf or l2, got 'l1'"):
        project(x, x, norm="l1", epsilon=1.0)
    with pytest.raises(ValueError, match=r"attack.norm must be linf or l2, got 'l0'"):
        PGD(norm="l0", epsilon=EPSILON, ramp=True, phases="executed")
    with pytest.raises(
        ValueError, match="attack.phases must be one of executed, intended, low, ten, lbgat, got 'high'"
    ):
        PGD(norm="linf", epsilon=EPSILON, ramp=True, phases="high")


def published_budget(epoch: int, epochs: int, chain: bool) -> tuple[int, float]:
    """The authors' "high" budget with its conditions as `if`s (as it runs) or as a chain (as it is meant)."""
    steps, divisor, matched = 0, 0.0, False
    for share, n, d in ((0.25, 2, 1.0), (0.5, 3, 1.5), (0.75, 4, 2.0), (1.0, 5, 2.0)):
        if epoch <= int(share * epochs) and not (chain and matched):
            steps, divisor, matched = n, d, True
    return steps, divisor


@pytest.mark.parametrize("epochs", [20, 110, 200])
@pytest.mark.parametrize(("phases", "chain"), [("executed", False), ("intended", True)])
def test_budget_of_every_epoch(phases: str, chain: bool, epochs: int) -> None:
    attack = PGD(norm="linf", epsilon=EPSILON, ramp=True, phases=phases)
    for epoch in range(1, epochs + 1):
        steps, divisor = published_budget(epoch, epochs, chain)
        budget = attack.budget(epoch, epochs)
        assert budget["steps"] == steps
        assert math.isclose(budget["epsilon"], EPSILON * epoch / epochs)
        assert math.isclose(budget["step_size"], budget["epsilon"] / divisor)
    steps = [attack.budget(e, 200)["steps"] for e in range(1, 201)]
    assert sum(steps) / 200 == (3.5 if chain else 5)
    flat = PGD(norm="linf", epsilon=EPSILON, ramp=False, phases="low").budget(1, 200)
    assert flat == {"epsilon": EPSILON, "step_size": EPSILON, "steps": 2}


# --- AWP --------------------------------------------------------------------------------------------------------------


def test_awp_moves_each_layer_by_gamma_of_its_norm_along_the_gradient() -> None:
    model, (x, y) = network(), batch()
    names = [n for n, p in model.named_parameters() if any(p is q for q in perturbable(model))]
    assert names == ["0.weight", "4.weight"]  # no bias, no batch norm
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = dict(
        zip(names, torch.autograd.grad(F.cross_entropy(model(x), y), perturbable(model)), strict=True)
    )
    with perturbed(model, lambda: F.cross_entropy(model(x), y), gamma=0.005):
        for name, p in model.named_parameters():
            if name in grads:
                w, g = before[name], grads[name]
                torch.testing.assert_close(
                    p.detach(), w + 0.005 * w.norm() * g / g.norm(), rtol=1e-12, atol=1e-14
                )
            else:
                assert p.equal(before[name])
    assert all(p.equal(before[n]) for n, p in model.named_parameters())  # bit for bit


def test_awp_keeps_what_the_optimizer_did_and_takes_itself_off() -> None:
    model, (x, y) = network(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with perturbed(model, lambda: F.cross_entropy(model(x), y), gamma=0.05):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps = {n: -0.1 * p.grad for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] + steps[name], rtol=1e-12, atol=1e-14)


def test_awp_restores_the_weights_when_the_step_raises() -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(KeyboardInterrupt),
        perturbed(model, lambda: F.cross_entropy(model.eval()(x), y), gamma=0.05),
    ):
        for p in perturbable(model):
            p.grad = torch.ones_like(p)
        optimizer.step()
        raise KeyboardInterrupt
    assert all(before[k].equal(v) for k, v in model.state_dict().items())


# --- averages ---------------------------------------------------------------------------------------------------------


def test_epoch_average_is_the_published_average_over_a_folder_of_epoch_files() -> None:
    """decay 0.9 over the files of epochs 1..n, batch-norm buffers with the weights, integer buffers the last."""
    model, swa = network(), Average(decay=0.9, every="epoch")
    files = []
    for epoch in range(1, 6):
        model(batch(epoch)[0])  # moves the running statistics
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        swa.after_step(model, epoch)
        swa.after_epoch(model, epoch)
        files.append(copy.deepcopy(model.state_dict()))
    for key, value in swa.state.items():
        if value.is_floating_point():
            expected = files[0][key].clone()
            for file in files[1:]:
                expected = 0.9 * expected + 0.1 * file[key]
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        else:
            assert value.equal(files[-1][key])
    assert not any(swa.state[k].data_ptr() == v.data_ptr() for k, v in model.state_dict().items())


def test_step_average_starts_at_its_epoch_as_a_copy_of_each_step() -> None:
    model, ema = nn.Linear(1, 1, bias=False), Average(decay=0.5, every="step", start_epoch=2)
    values = {1: [1.0, 2.0], 2: [3.0, 4.0], 3: [5.0, 6.0]}
    for epoch, steps in values.items():
        for value in steps:
            nn.init.constant_(model.weight, value)
            ema.after_step(model, epoch)
        ema.after_epoch(model, epoch)
    # a copy throughout epoch 2 (4.0 at its end), then 0.5 * 4 + 0.5 * 5 = 4.5, 0.5 * 4.5 + 0.5 * 6 = 5.25
    assert ema.state["weight"].item() == 5.25
    copied = Average(decay=0.5, every="step", start_epoch=2)
    copied.load_state_dict(ema.state_dict(), torch.device("cpu"))
    assert copied.state["weight"].equal(ema.state["weight"])


def test_average_errors() -> None:
    with pytest.raises(ValueError, match="decay in \\[0, 1\\) and every=epoch|step"):
        Average(decay=1.0, every="epoch")
    with pytest.raises(ValueError, match="every=epoch|step, got 0.9 and 'year'"):
        Average(decay=0.9, every="year")


# --- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_to_the_digit() -> None:
    """The two formulas of the authors' scripts, written out for lr 0.2 and 200 epochs."""
    for epoch in range(1, 201):
        gkl_run = 0.2 * 0.5 * (1 + math.cos(epoch / 201 * math.pi))
        baseline = 0.2 * 0.5 * (1 + math.cos((epoch - 1) / 200 * math.pi))
        assert math.isclose(0.2 * cosine(epoch, 200, offset=0, length=1), gkl_run, rel_tol=1e-12)
        assert math.isclose(0.2 * cosine(epoch, 200, offset=1, length=0), baseline, rel_tol=1e-12)
    assert cosine(1, 200, offset=1) == 1.0
    assert math.isclose(0.2 * cosine(200, 200, length=1), 1.2214e-5, rel_tol=1e-3)


def test_one_cycle_is_torchs() -> None:
    """Learning rate and, by its default, momentum of OneCycleLR stepped once an epoch."""
    for epochs in (80, 400, 1600):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.2, pct_start=0.025, total_steps=epochs
        )
        for epoch in range(1, epochs + 1):
            group = optimizer.param_groups[0]
            lr = 0.2 * one_cycle(epoch, epochs, start=1 / 25, peak=1.0, end=4e-6)
            momentum = one_cycle(epoch, epochs, start=0.95, peak=0.85, end=0.95)
            assert lr == pytest.approx(group["lr"], rel=1e-9) and momentum == pytest.approx(
                group["momentum"], rel=1e-9
            )
            optimizer.step()
            if epoch < epochs:
                scheduler.step()
    assert one_cycle(1, 10, start=0.1, peak=1.0, end=0.0) > 0.9  # too short to rise: it begins near the peak


def test_multi_step_drops_where_the_recipes_do() -> None:
    trades = [0.1 * multi_step(e, 200, drops=[100, 150], of=200) for e in (1, 99, 100, 149, 150, 200)]
    assert trades == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    lbgat = [0.1 * multi_step(e, 100, drops=[76, 91], of=100, first=0.2) for e in (1, 2, 75, 76, 90, 91, 100)]
    assert lbgat == pytest.approx([0.02, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    shorter = [multi_step(e, 20, drops=[101, 151], of=200) for e in (10, 11, 15, 16)]
    assert shorter == pytest.approx([1.0, 0.1, 0.1, 0.01])  # the same shares of a shorter training


def test_ramped_average_is_gowals() -> None:
    """ema_update and update_bn of DM-AT's trainer, line by line, warm-up of 2.5 % of 80 steps included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    average = RampedAverage(decay=0.5, warmup=0.025)
    average.prepare(80, model)
    wanted = [p.detach().clone() for p in model.parameters()]
    for step in range(1, 9):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(5, 3, dtype=torch.float64))
        average.after_step(model, epoch=1)
        since = step - 0.025 * 80
        decay = min(0.5, (1.0 + since) / (10.0 + since)) * int(step >= 0.025 * 80)
        for mine, p in zip(wanted, model.parameters(), strict=True):
            mine.mul_(decay).add_(p.detach() * (1 - decay))
    average.after_epoch(model, epoch=1)
    names = dict(model.named_parameters())
    for name, mine in zip(names, wanted, strict=True):
        torch.testing.assert_close(average.state[name], mine, rtol=1e-12, atol=1e-14)
    assert torch.equal(average.state["1.running_mean"], model[1].running_mean)
    resumed = RampedAverage(decay=0.5, warmup=0.025)
    resumed.prepare(80, model)
    resumed.load_state_dict(copy.deepcopy(average.state_dict()), torch.device("cpu"))
    for one in (average, resumed):
        one.after_step(model, epoch=2)
    assert all(torch.equal(average.state[k], resumed.state[k]) for k in average.state)


def test_each_image_its_own_budget() -> None:
    """PGD with budgets as tensors equals PGD of each image alone."""
    torch.manual_seed(0)
    weight = torch.randn(10, 12, dtype=torch.float64)
    x = torch.rand(6, 3, 2, 2, dtype=torch.float64)
    y = torch.arange(6)

    def logits(z):
        return torch.tanh(z.flatten(1)) @ weight.T

    epsilons, sizes, steps = (
        [0.1, 0.05, 0.2, 0.1, 0.3, 0.0],
        [0.02, 0.01, 0.1, 0.3, 0.05, 0.1],
        [3, 7, 1, 0, 5, 2],
    )
    start = (x + 0.02).clamp(0, 1)
    shaped = [torch.tensor(v, dtype=torch.float64).view(-1, 1, 1, 1) for v in (epsilons, sizes, steps)]
    together = pgd(logits, x, lambda z: F.cross_entropy(z, y, reduction="none"), norm="linf", start=start,
                   epsilon=shaped[0], step_size=shaped[1], steps=shaped[2])  # fmt: skip
    for i in range(6):
        alone = pgd(logits, x[i : i + 1], lambda z, i=i: F.cross_entropy(z, y[i : i + 1], reduction="none"), norm="linf",
                    start=start[i : i + 1], epsilon=epsilons[i], step_size=sizes[i], steps=steps[i])  # fmt: skip
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-15)


def test_batch_norm_without_weight_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = sgd(model, lr=0.1, weight_decay=0.5, decay_batch_norm=False)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.5, 0.5, 0.0, 0.0]
    assert len(sgd(model, lr=0.1).param_groups) == 1


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_r_s16_p8_224", "wrn_10_1"])
def test_adamw_takes_any_network_each_parameter_once(name: str) -> None:
    """timm's convolutional ones name no parameters without decay, and its hybrids hold another network."""
    model = create(name, 10)
    groups = adamw(model, lr=0.1, weight_decay=0.5, layer_decay=0.5).param_groups
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    head = model.get_classifier().weight  # type: ignore[operator]
    assert rates[id(head)] == 0.1 and (min(rates.values()) < 0.1) == (name != "wrn_10_1")


def test_an_average_from_the_initial_weights() -> None:
    """Mean-Teacher's: start_epoch 0; every step counts, the first one too."""
    torch.manual_seed(0)
    model = nn.Linear(2, 2).double()
    wanted = model.weight.detach().clone()
    average = Average(0.9, "step", start_epoch=0)
    average.prepare(3, model)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.after_step(model, epoch=1)
        wanted = 0.9 * wanted + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.state["weight"], wanted, rtol=1e-12, atol=1e-14)
