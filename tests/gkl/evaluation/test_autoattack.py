"""Accuracy under attack: against slow definitions, and AutoAttack against the package as it comes."""

import copy
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack, fab_projections
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gkl import evaluation
from gkl.data.batches import first_of_each_class
from gkl.data.digits import digits
from gkl.evaluation import accuracy, autoattack, evaluate, pgd_robust
from gkl.evaluation.projection import projection_linf_in
from gkl.evaluation.recorded import Recorded
from tests.pretended import DEVICE, Pretended, pretended
from tests.tape import Taped

__all__ = ["pretended"]  # a fixture
CPU = torch.device("cpu")
IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """Averages of the scans and a little noise: right on most digits, wrong on some, robust on some."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        data = digits()
        x = data.train_images.float() / 255
        means = torch.stack([x[data.train_labels == c].mean(0).flatten() for c in range(classes)])
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.mean = nn.Linear(192, classes)
        with torch.no_grad():
            self.mean.weight.copy_(8 * means / 3)
            self.mean.bias.copy_(-4 * means.square().sum(1) / 3)
        self.head = nn.Linear(6 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(x.flatten(1)) + 0.1 * self.head(F.relu(self.conv(x)).flatten(1))


def scans(count: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    data = digits()
    keep = data.test_labels < classes
    return data.test_images[keep][:count], data.test_labels[keep][:count]


def replays(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[Taped]:
    """Has a module record and replay where it would on a GPU; what was recorded and replayed, call by call."""
    taped: list[Taped] = []

    @contextmanager
    def recordings(device: torch.device, graph: bool = True) -> Iterator[Taped | None]:
        if graph:
            taped.append(Taped(kept=12))
        yield taped[-1] if graph else None
        if graph:
            taped[-1].forget()

    monkeypatch.setattr(module, "recordings", recordings)
    return taped


def floats(images: Tensor) -> Tensor:
    return images.float() / 255


# --- accuracy and PGD -------------------------------------------------------------------------------------------------


def test_accuracy_counts_every_image_once() -> None:
    model, (images, labels) = Classifier().eval(), scans(37)
    with torch.no_grad():
        expected = model(floats(images)).argmax(-1) == labels
    for batch_size in (1, 10, 37, 100):
        assert accuracy(model, images, labels, batch_size=batch_size, device=CPU).equal(expected)
    assert accuracy(model, images[:0], labels[:0], batch_size=5, device=CPU).shape == (0,)
    assert 25 < expected.sum() < 37


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.8)])
def test_pgd_robust_flags_do_not_depend_on_the_batches(loss: str, norm: str, epsilon: float) -> None:
    model, (images, labels) = Classifier().eval(), scans(60)
    options = {
        "norm": norm,
        "epsilon": epsilon,
        "steps": 10,
        "step_size": epsilon / 4,
        "loss": loss,
        "device": CPU,
    }
    whole = pgd_robust(model, images, labels, batch_size=60, **options)
    assert pgd_robust(model, images, labels, batch_size=7, **options).equal(whole)
    clean = accuracy(model, images, labels, batch_size=60, device=CPU)
    assert (whole & ~clean).sum() == 0 and 0 < whole.sum() < clean.sum()
    longer = pgd_robust(model, images, labels, batch_size=60, **{**options, "steps": 40})
    assert longer.sum() <= whole.sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_s_steps_may_be_replayed(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = Classifier().eval(), scans(50)
    options = {"norm": norm, "epsilon": 0.1 if norm == "linf" else 0.8, "step_size": 0.05, "steps": 7}
    options |= {"batch_size": 20, "device": CPU}
    taped = replays(monkeypatch, evaluation)
    for loss in ("ce", "cw"):
        found = pgd_robust(model, images, labels, loss=loss, **options)
        assert found.equal(pgd_robust(model, images, labels, loss=loss, graph=False, **options))
    assert len(taped) == 2 and all((t.recorded, t.replayed) == (2, 19) and not t.known for t in taped)


def test_the_margin_is_cw_s() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    slow = [
        max(z for k, z in enumerate(row) if k != y) - row[y]
        for row, y in zip(logits.tolist(), labels, strict=True)
    ]
    torch.testing.assert_close(evaluation._margin(logits, labels), torch.tensor(slow))


def test_a_subset_is_even_over_the_classes() -> None:
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 50)
    chosen = first_of_each_class(labels, 20)
    assert labels[chosen].bincount().tolist() == [9, 3, 8] and chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen[:9].tolist() == list(range(9))
    assert first_of_each_class(labels, None).equal(torch.arange(103))
    assert first_of_each_class(labels, 500).equal(torch.arange(103))


# --- AutoAttack -------------------------------------------------------------------------------------------------------


class Short(AutoAttack):
    """The package's AutoAttack for five classes, with fewer iterations."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.fab.n_iter, self.square.n_queries = 15, 150
        self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 4


@pytest.mark.parametrize(
    ("norm", "epsilon"), [("linf", 0.15), pytest.param("l2", 1.2, marks=pytest.mark.long)]
)
def test_every_verdict_and_image_is_the_package_s_own(
    norm: str, epsilon: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches packed anew from the survivors of each attack: bit for bit the same images in the package's layout and
    with its projection, and the same verdicts in channels_last and with ours."""
    monkeypatch.setattr(autoattack, "AutoAttack", Short)
    model, (images, labels) = Classifier(classes=5).eval(), scans(14, classes=5)
    stock = Short(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=3, version="standard", device=CPU
    )
    x_adv, predicted = stock.run_standard_evaluation(floats(images), labels, batch_size=5)
    options = {"epsilon": epsilon, "norm": norm, "device": CPU, "batch_size": 5, "seed": 3}
    result = evaluate(model, images, labels, folder=tmp_path / "channels_last", **options)
    assert result.robust_flags.equal(predicted == labels) and 0 < result.robust < result.clean
    assert result.n == 14 and result.robust == 100 * result.robust_flags.double().mean().item()
    assert (
        list(result.after) == ["apgd-ce", "apgd-t", "fab-t", "square"] and "pyautoattack" in result.versions
    )
    assert list(result.after.values()) == sorted(result.after.values(), reverse=True)
    assert result.after["square"] == result.robust
    monkeypatch.setattr(autoattack, "LAYOUT", {})
    monkeypatch.setattr(autoattack, "projection_linf", fab_projections.projection_linf)
    plain = evaluate(model, images, labels, folder=tmp_path / "plain", **options)
    left, ours = 14, floats(images)
    for attack, after in zip(("clean", *plain.after), (plain.clean, *plain.after.values()), strict=True):
        parts = [np.load(path) for path in sorted(tmp_path.glob(f"plain/*/{attack}_*.npz"))]
        assert [len(part["points"]) for part in parts] == [min(5, left - n) for n in range(0, left, 5)]
        for part in parts if attack != "clean" else []:
            ours[part["points"][~part["robust"]]] = torch.from_numpy(part["x_adv"])
        left = round(14 * after / 100)
    assert ours.equal(x_adv) and not ours.equal(floats(images)) and left > 5


@pytest.mark.parametrize(
    ("norm", "epsilon"), [("linf", 0.2), pytest.param("l2", 1.8, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("order", [("square", "apgd-ce"), ("apgd-t",), ("fab-t",)])
def test_replayed_attacks_are_the_package_s_image_by_image(
    order: tuple[str, ...], norm: str, epsilon: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations replayed, sizes of batches shrinking between them: every image and verdict, bit for bit."""
    monkeypatch.setattr(autoattack, "AutoAttack", Short)
    monkeypatch.setattr(autoattack, "ATTACKS", {"standard": order})
    taped = replays(monkeypatch, autoattack)
    options = {"epsilon": epsilon, "norm": norm, "device": CPU, "batch_size": 12, "seed": 3}
    data = scans(24, classes=5)
    model, kinds = Classifier(classes=5).eval(), ("plain", "replayed")
    for weights in range(2):
        with torch.no_grad():
            model.head.weight.mul_(1 + weights)
        plain, ours = (
            evaluate(model, *data, folder=tmp_path / f"{kind} {weights}", graph=kind == "replayed", **options)
            for kind in kinds
        )
        assert ours.robust_flags.equal(plain.robust_flags) and ours.after == plain.after
        assert ours.warnings == plain.warnings and 0 < ours.robust <= ours.after[order[0]] < ours.clean
        files = (sorted(tmp_path.glob(f"{kind} {weights}/*/*.npz")) for kind in kinds)
        for one, other in zip(*files, strict=True):
            a, b = np.load(one), np.load(other)
            assert all(np.array_equal(a[k], b[k]) for k in ("points", "robust", "x_adv", "warnings")), (
                one.name
            )
    assert len(taped) == 2 and all(t.replayed > 5 * t.recorded > 20 and not t.failed for t in taped)


def test_a_network_that_cannot_be_recorded_is_attacked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Reading(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if float(x.detach().sum()) > 0 else 2.0)

    taped = replays(monkeypatch, autoattack)
    options = {"epsilon": 0.08, "version": "screen", "device": CPU, "batch_size": 5}
    found, plain = (
        evaluate(Reading().eval(), *scans(10), folder=tmp_path / str(graph), graph=graph, **options)
        for graph in (True, False)
    )
    assert found.robust_flags.equal(plain.robust_flags) and found.warnings == plain.warnings
    assert taped[0].failed and capsys.readouterr().out.count("cannot be recorded as a CUDA graph") == 1


def test_fab_makes_more_passes_where_its_first_do_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Recorded.__init__

    def hasty(self: Recorded, *arguments: Any) -> None:
        init(self, *arguments)
        self.passes = 1

    enough = single_runs(Taped(), CPU, "linf")[-1]
    monkeypatch.setattr(Recorded, "__init__", hasty)
    assert single_runs(Taped(), CPU, "linf")[-1].equal(enough)


def single_runs(replayed: Any, device: torch.device, norm: str) -> list[Tensor]:
    """What the four attacks' own loops, recorded, return for six scans."""
    images, labels = scans(6, classes=5)
    adapted = autoattack._Adapter(Classifier(classes=5).eval().to(device), device, replayed)
    x, y = floats(images).to(device), labels.to(device)
    adversary = autoattack.attacker(adapted, 5, epsilon=0.2, norm=norm, seed=0, device=device)
    Recorded(adapted.network, replayed).take_over(adversary)
    adversary.apgd.loss, adversary.apgd_targeted.y_target = "ce", (y + 1) % 5
    adversary.fab.target_class, adversary.fab.n_iter, adversary.square.n_queries = 2, 10, 20
    runs = []
    for attack in (adversary.apgd, adversary.apgd_targeted, adversary.square, adversary.fab):
        torch.manual_seed(0)
        of_fab = attack is adversary.fab
        if not of_fab:
            attack.n_iter = 30
            attack.init_hyperparam(x)
        with torch.no_grad():
            out = attack.attack_single_run(x, y, **({"is_targeted": True} if of_fab else {}))
        runs.append(out if of_fab else out[-1])
    return runs


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.long)])
def test_what_is_recorded_waits_for_nothing(
    norm: str, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph cannot hold a value read back."""
    monkeypatch.setattr(autoattack, "LAYOUT", {})
    inside: list[str] = []

    class Watched(Taped):
        def __call__(self, key: Any, function: Any, inputs: Any) -> Any:
            before = len(pretended.waits)
            out = function(*inputs)
            inside.extend(pretended.waits[before:])
            return out

    with pretended:
        there = [x.cpu() for x in single_runs(Watched(), DEVICE, norm)]
    assert inside == [] and pretended.strays == []
    here = single_runs(Taped(), CPU, norm)
    assert all(a.equal(b) for a, b in zip(there, here, strict=True))


def test_the_projection_is_the_package_s_without_its_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    points, normals = torch.rand(2, 60, 300, dtype=torch.float64, generator=generator)
    normals = normals - 0.5
    points[:, :30], points[:, 30:60], normals[:, ::7] = 0.0, 1.0, 0.0
    gaps = torch.logspace(-3, 2, 60, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(30)
    offsets = (normals * points).sum(1) + gaps
    step = autoattack.projection_linf(points, normals, offsets)
    torch.testing.assert_close(
        step, fab_projections.projection_linf(points, normals, offsets), rtol=0, atol=1e-13
    )
    whole, more = projection_linf_in(12, points, normals, offsets)
    assert whole.equal(step) and not more and projection_linf_in(2, points, normals, offsets)[1]
    landed = ((normals * (points + step)).sum(1) - offsets).abs() < 1e-10
    assert 30 < landed.sum() < 60, "some planes are reached, some are not"
    assert (points + step).min() >= 0 and (points + step).max() <= 1


def test_each_attack_has_the_package_s_standard_settings() -> None:
    stock = AutoAttack(Classifier(), norm="Linf", eps=0.1, seed=3, version="standard", device=CPU)
    ours = autoattack.attacker(Classifier(), 10, epsilon=0.1, norm="linf", seed=3, device=CPU)
    for name in ("apgd", "apgd_targeted", "fab", "square"):
        pair = [
            {k: v for k, v in vars(getattr(a, name)).items() if k not in ("model", "predict")}
            for a in (stock, ours)
        ]
        assert pair[0] == pair[1] and len(pair[0]) > 10, name
    assert stock.attacks_to_run == list(autoattack.ATTACKS["standard"])
    few = autoattack.attacker(Classifier(), 5, epsilon=0.1, norm="linf", seed=3, device=CPU)
    assert few.apgd_targeted.n_target_classes == few.fab.n_target_classes == 4


def attacker(folder: Path, **options: object) -> subprocess.Popen[bytes]:
    """A process of its own that screens 30 scans in batches of 6."""
    code = (
        f"import sys, torch\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parents[3])!r})\n"
        f"from {__name__} import SCREEN, Classifier, scans\nfrom gkl.evaluation import evaluate\n"
        f"torch.set_num_threads(1)\nevaluate(Classifier().eval(), *scans(30), folder=Path({str(folder)!r}), **SCREEN, **{options})"
    )
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})


SCREEN = {"epsilon": 0.08, "version": "screen", "batch_size": 6, "device": CPU}


@pytest.mark.long  # processes of their own
def test_processes_share_each_attack_and_end_with_one_result(tmp_path: Path) -> None:
    model, data = Classifier().eval(), scans(30)
    one = evaluate(model, *data, folder=tmp_path / "one", **SCREEN)
    other = attacker(tmp_path / "two", rank=0, world_size=2)
    calls: list[tuple[str, float]] = []
    two = evaluate(
        model,
        *data,
        folder=tmp_path / "two",
        rank=1,
        world_size=2,
        on_progress=lambda *a: calls.append(a),
        **SCREEN,
    )
    assert other.wait(60) == 0
    assert two.robust_flags.equal(one.robust_flags) and two.after == one.after and 0 < one.robust < one.clean
    assert [where for where, _ in calls[:4]] == [
        "clean, batch 2 of 5", "clean, batch 4 of 5", "apgd-ce, batch 2 of 5", "apgd-ce, batch 4 of 5"
    ]  # fmt: skip
    assert (
        calls[-1][0].startswith("apgd-t, batch")
        and calls[-1][1] == 0.0
        and all(left > 0 for _, left in calls[:-1])
    )
    again: list[tuple[str, float]] = []
    evaluate(model, *data, folder=tmp_path / "two", on_progress=lambda *a: again.append(a), **SCREEN)
    assert not again, "all was there"


@pytest.mark.long  # processes of their own
def test_a_killed_evaluation_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    process = attacker(tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/*/apgd-ce_*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(tmp_path.glob("killed/*/[!.]*.npz"))
    stamps = {path: path.stat().st_mtime_ns for path in done}
    model, data = Classifier().eval(), scans(30)
    whole = evaluate(model, *data, folder=tmp_path / "whole", **SCREEN)
    assert 5 < len(done) < len(list(tmp_path.glob("whole/*/*.npz")))
    resumed = evaluate(model, *data, folder=tmp_path / "killed", **SCREEN)
    assert resumed.robust_flags.equal(whole.robust_flags) and resumed.after == whole.after
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())  # finished ones are kept


def test_finished_batches_are_used_only_for_the_same_question(tmp_path: Path) -> None:
    model, (images, labels) = Classifier().eval(), scans(10)
    options = {"version": "screen", "folder": tmp_path, "device": CPU, "batch_size": 10}
    weak = evaluate(model, images, labels, epsilon=0.02, **options)
    strong = evaluate(model, images, labels, epsilon=0.2, **options)
    assert weak is not None and strong is not None and strong.robust < weak.robust
    with torch.no_grad():
        model.mean.weight.mul_(-1)
    other = evaluate(model, images, labels, epsilon=0.02, **options)
    assert (
        other is not None
        and other.clean < weak.clean
        and sum(path.is_dir() for path in tmp_path.iterdir()) == 3
    )


def test_a_damaged_batch_is_attacked_again(tmp_path: Path) -> None:
    model, (images, labels) = Classifier().eval(), scans(10)
    options = {"epsilon": 0.08, "version": "screen", "folder": tmp_path, "device": CPU, "batch_size": 5}
    first = evaluate(model, images, labels, **options)
    (path,) = tmp_path.glob("*/apgd-ce_00001.npz")
    path.write_bytes(path.read_bytes()[:200])
    (other,) = tmp_path.glob("*/apgd-ce_00000.npz")
    strange = {**np.load(other), "points": np.arange(5) + 3, "robust": np.zeros(5, dtype=bool)}
    np.savez(other, **strange)  # of other images
    again = evaluate(model, images, labels, **options)
    assert again.robust_flags.equal(first.robust_flags) and again.after == first.after


def test_the_package_s_traps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fewer than ten classes, channels_last gradients, a removed tracer, its printing, the global random state."""
    model, (images, labels) = Classifier(classes=5).eval(), scans(12, classes=5)
    options = {"epsilon": 0.08, "version": "screen", "device": CPU, "batch_size": 12}
    expected = evaluate(model, images, labels, folder=tmp_path / "plain", **options)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    random_before = torch.get_rng_state()
    seen: list[str] = []

    def tracer(frame: object, event: str, argument: object) -> None:
        seen.append(event)

    logging.getLogger("auto-attack").handlers.clear()
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        last = evaluate(
            model.to(memory_format=torch.channels_last), images, labels, folder=tmp_path / "last", **options
        )
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert last is not None and expected is not None and last.robust_flags.equal(expected.robust_flags)
    assert torch.get_rng_state().equal(random_before)
    assert all(state[k].equal(v) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags and not model.training
    out, err = capfd.readouterr()
    assert "accuracy" not in out + err


def test_what_the_package_warns_of_is_kept(tmp_path: Path) -> None:
    class Probabilities(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    images, labels = scans(10)
    result = evaluate(
        Probabilities().eval(), images, labels, epsilon=0.01, version="screen", folder=tmp_path, device=CPU
    )
    assert result is not None and result.warnings and any("prob" in w.lower() for w in result.warnings)


def test_results_are_looked_at_and_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = Classifier().eval(), scans(6)
    options = {"epsilon": 0.01, "version": "screen", "folder": tmp_path, "device": CPU}
    honest = autoattack.AutoAttack.run_standard_evaluation

    def lying(change):
        def run(self, x, y, **keywords):
            return change(x, *honest(self, x, y, **keywords))

        return run

    for change, message in (
        (lambda x, adv, said: ((adv + 0.05).clamp(0, 1), said), "an image 0.0[56].* away, epsilon is 0.01"),
        (lambda x, adv, said: (torch.where(x > 0.99, x + 0.005, x), said), "pixels outside"),
        (lambda x, adv, said: (adv * float("nan"), said), "away|outside"),
        (lambda x, adv, said: (x, (said + 1) % 10), "counts 0 robust images of 5, its own images give 5"),
    ):
        monkeypatch.setattr(autoattack.AutoAttack, "run_standard_evaluation", lying(change))
        with pytest.raises(RuntimeError, match=message):
            evaluate(model, images, labels, **options)
    assert not list(tmp_path.glob("*/apgd*.npz"))


def test_autoattack_errors(tmp_path: Path) -> None:
    model, (images, labels) = Classifier(), scans(4)
    options = {"epsilon": 0.01, "folder": tmp_path, "device": CPU}
    with pytest.raises(ValueError, match=r"the network is in training mode; call model.eval\(\)"):
        evaluate(model.train(), images, labels, **options)
    with pytest.raises(
        ValueError, match="version must be standard or screen and norm linf or l2, got 'fast'"
    ):
        evaluate(model.eval(), images, labels, version="fast", **options)
    three = scans(4, classes=3)
    with pytest.raises(ValueError, match=r"at least 4 classes, got \(\d+, 3\)"):
        evaluate(Classifier(classes=3).eval(), *three, **options)


class Looked(nn.Module):
    """A classifier in eval mode whose features, (B, 3), are made as told."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "features, message",
    [
        (lambda x: F.dropout(x.mean((2, 3)), 0.5), "something else of the same images at a second look"),
        (lambda x: x.mean((2, 3)) - x.mean((0, 2, 3)), "something else of the same images at a second look"),
        (lambda x: x.detach().mean((2, 3)), "logits have no gradient to its images .no_grad or detach"),
        (
            lambda x: checkpoint(lambda x: x.mean((2, 3)), x, use_reentrant=True),
            "no gradient to its images .When use_reentrant=True",
        ),
    ],
    ids=["dropout", "statistics of the batch", "detached", "reentrant"],
)
def test_networks_that_no_attack_measures_are_refused(
    features: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    """Once a number came of the first two without a word, and a traceback of the third."""
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 4, 4), torch.arange(8) % 5
    place = {"folder": tmp_path, "device": torch.device("cpu"), "epsilon": 0.03, "version": "screen"}
    with pytest.raises(ValueError, match=message):
        evaluate(Looked(features).eval(), images, labels, **place)  # type: ignore[arg-type]
    evaluate(Looked(lambda x: x.mean((2, 3))).eval(), images, labels, **place)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": 255 * IMAGES}, r"images must be uint8, or float in \[0, 1\], got torch.float32 from .* a normalisation belongs into"),
        ({"images": (IMAGES - 0.5) / 0.25}, r"images must be uint8, or float in \[0, 1\]"),
        ({"images": (255 * IMAGES).long()}, "images must be uint8, .* got torch.int64"),
        ({"images": IMAGES / 0.0}, r"images must be uint8, or float in \[0, 1\]"),
        ({"epsilon": 8.0}, "epsilon must be above 0 and at most 1, .* in linf, got 8; 8 levels of 255 are 0.03137"),
        ({"epsilon": 128.0, "norm": "l2"}, "epsilon must be above 0 and at most 13.86, .* in l2, got 128"),
        ({"labels": torch.arange(3)}, r"labels must be \(4,\) of an integer dtype, one for each image, got \(3,\) of torch.int64"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, r"labels must be \(4,\) .* got \(4, 1\)"),
        ({"labels": torch.zeros(4)}, r"labels must be \(4,\) of an integer dtype, .* got \(4,\) of torch.float32"),
        ({"labels": torch.arange(4) + 8}, "labels must be classes of the network's 10, 0 to 9, got 8 to 11"),
        ({"labels": torch.arange(4) - 1}, "labels must be classes of the network's 10, 0 to 9, got -1 to 2"),
        ({"mode": True}, "the network is in training mode; call model.eval\\(\\) first"),
        ({"epsilon": -0.1}, "epsilon must be above 0"), ({"epsilon": float("nan")}, "epsilon must be above 0"),
    ],
)  # fmt: skip
def test_what_would_give_a_number_without_meaning(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Once AutoAttack said 0 % of such pictures and PGD that all withstand; and of labels that were too few, only these were looked at."""
    given = {"epsilon": 0.1, "norm": "linf", "batch_size": 4, "device": torch.device("cpu")}
    images, labels = change.pop("images", IMAGES), change.pop("labels", torch.arange(4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).train(change.pop("mode", False))
    with pytest.raises(ValueError, match=told):
        evaluate(net, images, labels, folder=tmp_path, **{**given, **change})
    with pytest.raises(ValueError, match=told):
        pgd_robust(net, images, labels, steps=2, **{**given, **change})
    if not change:  # no radius
        with pytest.raises(ValueError, match=told):
            accuracy(net, images, labels, batch_size=4, device=torch.device("cpu"))
