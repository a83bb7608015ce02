"""IKL-KD: class-wise as on ImageNet against a restatement in loops, and both forms against the authors' code where it is."""

import ast
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from gkl.distillation import Context
from gkl.distillation.gkl_kd import IKLKD
from gkl.models.classifier import Taps
from trainers.runs.compose import compose
from trainers.runs.targets import instantiate

B, C = 7, 8  # 1 / 8 is the same in float32


def taps(logits: Tensor) -> Taps:
    return Taps([], [], logits[:, :0], logits)


def context() -> Context:
    empty = taps(torch.zeros(2, C))
    return Context(empty, empty, None, torch.arange(20) % C, C, seed=0)


def softmax(row: Tensor, temperature: float) -> list[Tensor]:
    powers = [(z / temperature).exp() for z in row]
    return [p / sum(powers) for p in powers]


def restated(student: Tensor, teacher: Tensor, rows: list[list[Tensor]], alpha: float, beta: float) -> Tensor:
    """IKL at T = 1 by its definition, weighed by given rows."""
    total = torch.zeros(()).double()
    for s, t, w in zip(student, teacher, rows, strict=True):
        for j in range(C):
            for k in range(C):
                total = total + 0.25 * alpha * w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
        pairs = zip(softmax(s, 1.0), softmax(t, 1.0), strict=True)
        total = total - beta * sum(q.detach() * p.log() for p, q in pairs)
    return total / B


def test_class_wise_over_three_epochs() -> None:
    """Weights of an epoch are the mean predictions of each class in the one before, uniform in the first; a class that an epoch
    has not shown keeps its row.
    """
    torch.manual_seed(0)
    method = IKLKD(
        context(), alpha=1.5, beta=4.0, temperature=1.0, weights_temperature=2.0, warmup=2, weights="class"
    )
    method = method.double()
    rows = {y: [torch.tensor(1 / C, dtype=torch.float64)] * C for y in range(C)}
    for epoch in (1, 2, 3):
        seen: dict[int, list[list[Tensor]]] = {}
        for _ in range(2):
            student = (3 * torch.randn(B, C, dtype=torch.float64)).requires_grad_()
            teacher, labels = 3 * torch.randn(B, C, dtype=torch.float64), torch.randint(C - 1, (B,))
            ours = method(taps(student), taps(teacher), labels, epoch=epoch, index=labels)[
                "distillation"
            ].mean()
            slow = min(epoch / 2, 1.0) * restated(
                student, teacher, [rows[y] for y in labels.tolist()], 1.5, 4.0
            )
            torch.testing.assert_close(ours, slow, rtol=0, atol=1e-12)
            gradients = (torch.autograd.grad(value, student)[0] for value in (ours, slow))
            torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
            for t, y in zip(teacher, labels.tolist(), strict=True):
                seen.setdefault(y, []).append(softmax(t, 2.0))
        method.end_epoch()
        rows |= {y: [sum(p[c] for p in found) / len(found) for c in range(C)] for y, found in seen.items()}


def test_the_prior_is_kept_where_it_weighs_and_learns_in_training_alone() -> None:
    """Sample-wise checkpoints, CIFAR-100's and ImageNet-LT's, hold nothing of the method."""
    given: dict[str, Any] = {
        "alpha": 1.0,
        "beta": 1.0,
        "temperature": 4.0,
        "weights_temperature": 1.0,
        "warmup": 1,
    }
    assert not IKLKD(context(), **given).state_dict()
    method = IKLKD(context(), **given, weights="class").eval()
    assert method.state_dict().keys() == {"prior.probs", "prior.sums", "prior.counts"}
    labels = torch.arange(C)
    method(taps(torch.randn(C, C)), taps(torch.randn(C, C)), labels, epoch=1, index=labels)
    assert method.prior is not None and method.prior.counts.sum() == 0


# --- against the authors' code -----------------------------------------------------------------------------------------

needs_authors = pytest.mark.skipif(
    "DKL_REF" not in os.environ, reason="needs DKL_REF, a checkout of the authors' code"
)
FILES = {"resnet34_resnet18": "r34_r18_ikl_kd", "resnet50_mobilenetv1": "r50_mv_ikl_kd"}


class Linear(nn.Linear):
    """A network of theirs: logits and what else it shows."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x.flatten(1)), None


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their code on a CPU, where what it makes float32 is float64."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, **_: self)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    yield
    torch.set_default_dtype(torch.float32)


def authors(part: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of theirs, distillers.IKL_KD say, without the rest of its package."""
    folder, _, name = part.partition(".")
    root = Path(os.environ["DKL_REF"]) / "DKLv1/KD-dkl/mdistiller" / folder
    package = types.ModuleType(f"authors_{folder}")
    package.__path__ = [str(root)]
    stubs = {"tensorboardX": {"SummaryWriter": None}, "yacs.config": {"CfgNode": types.SimpleNamespace}}
    for module, attributes in stubs.items():
        stub = types.ModuleType(module)
        stub.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return importlib.import_module(f"authors_{folder}.{name}")


def authors_settings(pair: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their defaults with one of their files over them."""
    settings = authors("engine.cfg", monkeypatch).CFG
    file = Path(os.environ["DKL_REF"]) / "DKLv1/KD-dkl/imagenet_kd_dkl_configs" / f"{FILES[pair]}.yaml"
    chosen: Any = OmegaConf.to_container(OmegaConf.load(file))
    for section in ("DISTILLER", "SOLVER", "LOG", "IKL_KD"):
        for key, value in chosen[section].items():
            assert hasattr(getattr(settings, section), key)
            setattr(getattr(settings, section), key, value)
    settings.IKL_KD.NUM_CLASSES = C
    return settings


@needs_authors
@pytest.mark.parametrize("pair", FILES)
def test_three_epochs_are_the_authors_(
    pair: str, in_float64: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their class in their trainer's epochs, with their file's settings, and ours with the experiment's."""
    settings = authors_settings(pair, monkeypatch)
    module = authors("engine.trainer", monkeypatch)
    monkeypatch.setattr(module, "validate", lambda *_: (0.0, 0.0, 0.0))
    torch.manual_seed(0)
    theirs, ours, teacher = Linear(12, C), Linear(12, C), Linear(12, C)
    ours.load_state_dict(theirs.state_dict())
    teacher.weight.data *= 10  # predictions that differ from picture to picture
    batches = [(torch.randn(9, 3, 2, 2), torch.arange(9) % C, torch.arange(9)) for _ in range(3)]

    trainer = module.BaseTrainer.__new__(module.BaseTrainer)
    trainer.cfg, trainer.train_loader, trainer.val_loader, trainer.best_acc = settings, batches, [], -1
    trainer.log, trainer.log_path = lambda *_: None, str(tmp_path)
    made = authors("distillers.IKL_KD", monkeypatch).IKL_KD(theirs, teacher, settings)
    trainer.distiller = nn.DataParallel(made)
    trainer.optimizer = trainer.init_optimizer(settings)

    method = instantiate(compose("train", [f"experiment=kd/in_ikl/{pair}"])["distiller"])(context())
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)
    prior = None
    for epoch in (1, 2, 3):
        prior = trainer.train_epoch(epoch, prior=prior)
        for x, y, index in batches:
            logits = ours(x)[0]
            terms = method(taps(logits), taps(teacher(x)[0].detach()), y, epoch=epoch, index=index)
            loss = method.label_weight * F.cross_entropy(logits, y) + terms["distillation"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        method.end_epoch()
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(method.prior.probs, prior, rtol=0, atol=1e-12)


@needs_authors
@pytest.mark.parametrize(
    ("pair", "script"),
    [("resnext101_resnet18", "X101R18"), ("resnext101_resnet50", "X101R50"), ("resnet50_resnet50", "R50R50")],
)
def test_long_tailed_ikl_is_the_authors_(pair: str, script: str) -> None:
    """Their function with the values of their script, which leaves GI and T2 as they are."""
    folder = Path(os.environ["DKL_REF"]) / "DKLv1/Imbalanced_KD-dkl"
    words = (
        (folder / f"sh/Distill/ImageNetLT_train_{script}_distill_dkl.sh")
        .read_text()
        .replace("\\\n", " ")
        .split()
    )
    assert not {"--GI", "--T2", "--temperature"} & set(words)
    tree = ast.parse((folder / "imagenetlt_distill_dkl.py").read_text())
    own = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "dkl_loss")
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module([own], []), "dkl_loss", "exec"), names)
    torch.manual_seed(0)
    student = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
    teacher, labels = 5 * torch.randn(B, C, dtype=torch.float64), torch.randint(C, (B,))
    alpha, beta = (float(words[words.index(name) + 1]) for name in ("--alpha", "--beta"))
    theirs = names["dkl_loss"](student, teacher, 1.0, alpha, beta)
    method = instantiate(compose("train", [f"experiment=kd/lt_ikl/{pair}"])["distiller"])(context())
    ours = method(taps(student), taps(teacher), labels, epoch=1, index=labels)["distillation"].mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, student)[0] for value in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
