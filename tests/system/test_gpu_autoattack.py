"""AutoAttack and PGD replayed from CUDA graphs: what the stock package says on the same card, image by image."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from torch import Tensor, nn

from gkl.evaluation import autoattack, evaluate, pgd_robust
from gkl.models import create

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
RADII = {
    "linf": (0.1, 0.07, 0.05, 0.035, 0.025, 0.018, 0.012),
    "l2": (6.0, 4.0, 2.8, 2.0, 1.4, 1.0, 0.7, 0.5),
}


class Short(AutoAttack):
    """The package's AutoAttack for five classes, with fewer iterations and 300 queries."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        for apgd in (self.apgd, self.apgd_targeted):
            apgd.n_iter, apgd.n_iter_2, apgd.n_iter_min = 30, 6, 2
        self.fab.n_iter, self.square.n_queries = 20, 300
        self.apgd_targeted.n_target_classes = self.fab.n_target_classes = 4


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """What the package is given is what ours sets: float32 throughout, and kernels that add in one order."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = False, False, True
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


@cache
def subject(name: str, device: torch.device = CUDA) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that tells five coarse patterns in noise apart, and 64 pictures of them."""
    torch.manual_seed(0)
    model = create(name, num_classes=5).to(device)
    patterns = F.interpolate(torch.rand(5, 3, 4, 4), scale_factor=8)
    labels = torch.arange(64) % 5
    images = ((patterns[labels] + 0.6 * torch.randn(64, 3, 32, 32)).clamp(0, 1) * 255).to(torch.uint8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        noisy = (patterns[labels] + 0.6 * torch.randn(64, 3, 32, 32)).clamp(0, 1).to(device)
        optimizer.zero_grad()
        F.cross_entropy(model(noisy), labels.to(device)).backward()
        optimizer.step()
    return model.eval(), images, labels


def attack(norm: str, epsilon: float, device: torch.device = CUDA) -> dict[str, Any]:
    return {
        "norm": norm, "epsilon": epsilon, "steps": 10, "step_size": epsilon / 4, "batch_size": 24, "device": device
    }  # fmt: skip


def radius(name: str, norm: str, device: torch.device = CUDA) -> float:
    """The largest in which 40 % of the pictures withstand PGD, so that some fall to each attack."""
    for epsilon in RADII[norm]:
        flags = pgd_robust(*subject(name, device), **attack(norm, epsilon, device), graph=False)
        if flags.double().mean() >= 0.4:
            break
    return epsilon


@pytest.mark.parametrize(("name", "norm"), [("preact_resnet_18", "linf"), ("wrn_16_2", "l2")])
def test_verdicts_are_the_package_s_and_images_those_without_graphs(
    name: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device = CUDA
) -> None:
    monkeypatch.setattr(autoattack, "AutoAttack", Short)
    model, images, labels = subject(name, device)
    epsilon = radius(name, norm, device)
    stock = Short(
        model, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon, seed=0, version="standard", device=device
    )
    y = labels.to(device)
    _, predicted = stock.run_standard_evaluation((images.float() / 255).to(device), y, batch_size=24)
    options: dict[str, Any] = {"norm": norm, "epsilon": epsilon, "batch_size": 24, "device": device}
    replayed = evaluate(model, images, labels, folder=tmp_path / "replayed", **options)
    plain = evaluate(model, images, labels, folder=tmp_path / "plain", graph=False, **options)
    print(
        f"{name}, {norm} {epsilon}: {replayed.after}, {plain.seconds:.1f} s, replayed {replayed.seconds:.1f}"
    )
    assert 0 < replayed.robust < replayed.clean and replayed.after == plain.after
    assert replayed.robust_flags.equal((predicted == y).cpu())
    assert replayed.warnings == plain.warnings
    files = [sorted(tmp_path.glob(f"{kind}/*/*.npz")) for kind in ("replayed", "plain")]
    assert len(files[0]) > 4
    for one, other in zip(*files, strict=True):
        a, b = np.load(one), np.load(other)
        assert all(np.array_equal(a[key], b[key]) for key in ("points", "robust", "x_adv")), one.name


@pytest.mark.parametrize(("loss", "norm"), [("ce", "linf"), ("cw", "l2")])
def test_pgd_is_the_same_replayed(loss: str, norm: str) -> None:
    model, images, labels = subject("preact_resnet_18")
    options: dict[str, Any] = {**attack(norm, radius("preact_resnet_18", norm)), "loss": loss}
    replayed = pgd_robust(model, images, labels, **options)
    assert replayed.equal(pgd_robust(model, images, labels, graph=False, **options))
    assert 0 < replayed.sum() < 64


def test_a_network_that_reads_values_back_is_attacked_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(autoattack, "AutoAttack", Short)

    class Reading(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * (1.0 if float(x.detach().sum()) > 0 else 2.0)

    inner, images, labels = subject("wrn_16_2")
    model = Reading(inner).eval()
    options: dict[str, Any] = {"epsilon": radius("wrn_16_2", "linf"), "version": "screen", "device": CUDA}
    found, plain = (
        evaluate(model, images, labels, folder=tmp_path / str(graph), graph=graph, **options)
        for graph in (True, False)
    )
    assert found.robust_flags.equal(plain.robust_flags) and found.warnings == plain.warnings
    assert capsys.readouterr().out.count("cannot be recorded as a CUDA graph") == 1
    assert pgd_robust(inner, images, labels, **attack("linf", 0.01)).shape == (64,)  # the card is well


def test_recordings_leave_no_memory_behind(tmp_path: Path) -> None:
    model, images, labels = subject("wrn_16_2")
    options: dict[str, Any] = {"epsilon": 0.02, "version": "screen", "device": CUDA}
    before = torch.cuda.memory_allocated()
    evaluate(model, images, labels, folder=tmp_path, **options)
    torch._C._cuda_clearCublasWorkspaces()  # cuBLAS keeps one for every stream that it has seen
    assert torch.cuda.memory_allocated() < before + 16 * 2**20
