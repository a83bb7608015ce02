"""Accuracy under attack: against slow definitions, and AutoAttack against the package as it comes."""

import copy
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn

from gkl import evaluation
from gkl.data import digits
from gkl.evaluation import accuracy, autoattack, collect, evaluate, first_of_each_class, pgd_robust

CPU = torch.device("cpu")


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


def test_standard_is_the_package_s_own(tmp_path: Path) -> None:
    model, (images, labels) = Classifier().eval(), scans(12)
    stock = AutoAttack(model, norm="Linf", eps=0.15, seed=3, version="standard", device=CPU)
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    x_adv, _ = stock.run_standard_evaluation(floats(images), labels, batch_size=12)
    with torch.no_grad():
        expected = model(x_adv).argmax(-1) == labels
    result = evaluate(model, images, labels, epsilon=0.15, folder=tmp_path, device=CPU, batch_size=12, seed=3)
    assert result is not None and result.robust_flags.equal(expected) and result.n == 12
    assert result.robust == 100 * expected.double().mean().item() and 0 < result.robust < result.clean
    assert list(result.after) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(result.after.values()) == sorted(result.after.values(), reverse=True)
    assert result.after["square"] == result.robust and "pyautoattack" in result.versions


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_shares_of_several_processes_make_one_result(norm: str, tmp_path: Path) -> None:
    model, (images, labels) = Classifier().eval(), scans(15)
    epsilon = 0.15 if norm == "linf" else 1.2
    options = {"epsilon": epsilon, "norm": norm, "version": "screen", "batch_size": 6, "device": CPU}
    one = evaluate(model, images, labels, folder=tmp_path / "one", **options)
    calls: list[tuple[int, int]] = []
    shared = {
        **options,
        "folder": tmp_path / "two",
        "world_size": 2,
        "on_progress": lambda *a: calls.append(a),
    }
    assert evaluate(model, images, labels, rank=0, **shared) is None  # batches 0 and 2; batch 1 is missing
    two = evaluate(model, images, labels, rank=1, **shared)
    assert one is not None and two is not None and calls == [(1, 2), (2, 2), (1, 1)]
    assert two.robust_flags.equal(one.robust_flags) and two.after == one.after
    assert 0 < one.robust < one.clean


def test_a_killed_evaluation_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    script = tmp_path / "attack.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_evaluation import Classifier, scans\nfrom gkl.evaluation import evaluate\n"
        "torch.set_num_threads(1)\nimages, labels = scans(30)\n"
        f"evaluate(Classifier().eval(), images, labels, epsilon=0.08, folder=Path({str(tmp_path / 'killed')!r}),\n"
        "         version='screen', batch_size=6, device=torch.device('cpu'))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (done := list(tmp_path.glob("killed/*/batch_*.npz"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(done) < 5
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/*/batch_*.npz")}
    model, (images, labels) = Classifier().eval(), scans(30)
    options = {"epsilon": 0.08, "version": "screen", "batch_size": 6, "device": CPU}
    resumed = evaluate(model, images, labels, folder=tmp_path / "killed", **options)
    whole = evaluate(model, images, labels, folder=tmp_path / "whole", **options)
    assert resumed is not None and whole is not None and resumed.robust_flags.equal(whole.robust_flags)
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
    assert other is not None and other.clean < weak.clean and len(list(tmp_path.iterdir())) == 3


def test_a_damaged_batch_is_attacked_again_and_a_missing_one_named(tmp_path: Path) -> None:
    model, (images, labels) = Classifier().eval(), scans(10)
    options = {"epsilon": 0.08, "version": "screen", "folder": tmp_path, "device": CPU, "batch_size": 5}
    first = evaluate(model, images, labels, **options)
    (path,) = tmp_path.glob("*/batch_00001.npz")
    path.write_bytes(path.read_bytes()[:200])
    again = evaluate(model, images, labels, **options)
    assert first is not None and again is not None and again.robust_flags.equal(first.robust_flags)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the batches \[1\]; run the evaluation again"):
        collect(path.parent, 2, {"version": "screen", "pyautoattack": "0.2.0"})


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
            x_adv, predictions = honest(self, x, y, **keywords)
            return change(x, x_adv), predictions

        return run

    for change, message in (
        (lambda x, adv: (adv + 0.05).clamp(0, 1), "an image 0.0[56].* away, epsilon is 0.01"),
        (lambda x, adv: torch.where(x > 0.99, x + 0.005, x), "pixels outside"),
        (lambda x, adv: adv * float("nan"), "RuntimeError|away|outside"),
    ):
        monkeypatch.setattr(autoattack.AutoAttack, "run_standard_evaluation", lying(change))
        with pytest.raises(RuntimeError, match=message):
            evaluate(model, images, labels, **options)
    assert list(tmp_path.glob("*/*.npz")) == []


def test_autoattack_errors(tmp_path: Path) -> None:
    model, (images, labels) = Classifier(), scans(4)
    options = {"epsilon": 0.01, "folder": tmp_path, "device": CPU}
    with pytest.raises(ValueError, match=r"eval mode, it is in training mode; call model.eval\(\)"):
        evaluate(model.train(), images, labels, **options)
    with pytest.raises(
        ValueError, match="version must be standard or screen and norm linf or l2, got 'fast'"
    ):
        evaluate(model.eval(), images, labels, version="fast", **options)
    three = scans(4, classes=3)
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3"):
        evaluate(Classifier(classes=3).eval(), *three, **options)
