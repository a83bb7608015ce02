"""GKL-KD and IKL-KD of every pair against the authors' code, run with their files where these are."""

import ast
import copy
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
from gkl.models.classifier import Taps
from trainers.runs.compose import compose
from trainers.runs.targets import instantiate

pytestmark = pytest.mark.skipif(
    "DKL_REF" not in os.environ, reason="needs DKL_REF, a checkout of the authors' code"
)
B, C = 7, 5
VERSIONS = {"ikl": "DKLv1", "gkl": "DKLv2"}
FOLDERS = {"c100_ikl": "cifar100_kd_dkl_configs", "in_ikl": "imagenet_kd_dkl_configs",
           "c100_gkl": "cifar100_config_gkl", "in_gkl": "imagenet_config_gkl"}  # fmt: skip
FILES = {
    "c100": {"resnet110_resnet32": "res110_res32", "resnet32x4_resnet8x4": "res32x4_res8x4", "resnet32x4_shufflenetv1": "res32x4_shuv1",
             "resnet32x4_shufflenetv2": "res32x4_shuv2", "resnet50_mobilenetv2": "res50_mv2", "resnet56_resnet20": "res56_res20",
             "vgg13_mobilenetv2": "vgg13_mv2", "vgg13_vgg8": "vgg13_vgg8", "wrn40_2_shufflenetv1": "wrn40_2_shuv1",
             "wrn40_2_wrn16_2": "wrn40_2_wrn_16_2", "wrn40_2_wrn40_1": "wrn40_2_wrn_40_1"},
    "in": {"resnet34_resnet18": "r34_r18_{}_kd", "resnet50_mobilenetv1": "r50_mv_{}_kd"},
}  # fmt: skip
SCRIPTS = {"resnext101_resnet18": "X101R18", "resnext101_resnet50": "X101R50", "resnet50_resnet50": "R50R50"}


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


def taps(logits: Tensor) -> Taps:
    return Taps([], [], logits[:, :0], logits)


def ours_of(config: dict[str, Any]) -> Any:
    empty = taps(torch.zeros(2, C))
    return instantiate(config["distiller"])(Context(empty, empty, None, torch.arange(20) % C, C, seed=0))


def authors(version: str, part: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A file of theirs, distillers.IKL_KD say, without the rest of its package."""
    folder, _, name = part.partition(".")
    package = types.ModuleType(f"authors_{version}_{folder}")
    package.__path__ = [str(Path(os.environ["DKL_REF"]) / version / "KD-dkl/mdistiller" / folder)]
    stubs = {"tensorboardX": {"SummaryWriter": None}, "yacs.config": {"CfgNode": types.SimpleNamespace}}
    for module, attributes in stubs.items():
        stub = types.ModuleType(module)
        stub.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


def authors_settings(experiment: str, pair: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their defaults with one of their files over them."""
    data, kind = experiment.split("_")
    settings = copy.deepcopy(authors(VERSIONS[kind], "engine.cfg", monkeypatch).CFG)
    file = Path(VERSIONS[kind], "KD-dkl", FOLDERS[experiment], FILES[data][pair].format(kind) + ".yaml")
    chosen: Any = OmegaConf.to_container(OmegaConf.load(Path(os.environ["DKL_REF"]) / file))
    method = f"{kind.upper()}_KD"
    for name in {"DISTILLER", "SOLVER", "LOG", method} & chosen.keys():
        section = getattr(settings, name)
        assert chosen[name].keys() <= vars(section).keys()
        vars(section).update(chosen[name])
    getattr(settings, method).NUM_CLASSES = C
    return settings


@pytest.mark.parametrize(("experiment", "pair"), [(e, p) for e in FOLDERS for p in FILES[e.split("_")[0]]])
def test_epochs_are_the_authors_(
    experiment: str, pair: str, in_float64: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their class in three epochs of their trainer with their file's settings, and ours with the experiment's at paper scale."""
    kind = experiment.split("_")[1]
    settings = authors_settings(experiment, pair, monkeypatch)
    module = authors(VERSIONS[kind], "engine.trainer", monkeypatch)
    monkeypatch.setattr(module, "validate", lambda *_: (0.0, 0.0, 0.0))
    torch.manual_seed(0)
    theirs, ours, teacher = Linear(12, C), Linear(12, C), Linear(12, C)
    ours.load_state_dict(theirs.state_dict())
    teacher.weight.data *= 10  # predictions that differ from picture to picture
    batches = [(torch.randn(9, 3, 2, 2), torch.arange(9) % C, torch.arange(9)) for _ in range(3)]

    name = f"{kind.upper()}_KD"
    trainer = module.BaseTrainer.__new__(module.BaseTrainer)
    trainer.cfg, trainer.train_loader, trainer.val_loader, trainer.best_acc = settings, batches, [], -1
    trainer.log, trainer.log_path = lambda *_: None, str(tmp_path)
    made = getattr(authors(VERSIONS[kind], f"distillers.{name}", monkeypatch), name)
    trainer.distiller = nn.DataParallel(made(theirs, teacher, settings))
    trainer.optimizer = trainer.init_optimizer(settings)

    config = compose("train", [f"experiment=kd/{experiment}/{pair}"])
    method, chosen = ours_of(config), config["optimizer"]
    optimizer = torch.optim.SGD(
        ours.parameters(), chosen["lr"], chosen["momentum"], weight_decay=chosen["weight_decay"]
    )
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
        if method.prior is not None:
            torch.testing.assert_close(method.prior.probs, prior, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pair", SCRIPTS)
@pytest.mark.parametrize("kind", VERSIONS)
def test_long_tailed_terms_are_the_authors_(kind: str, pair: str) -> None:
    """Their function with the values of their script. IKL's leave GI and T2 as they are, so its weights are each picture's own."""
    folder = Path(os.environ["DKL_REF"]) / VERSIONS[kind] / "Imbalanced_KD-dkl"
    script = folder / f"sh/Distill/ImageNetLT_train_{SCRIPTS[pair]}_distill_dkl.sh"
    words = script.read_text().replace("\\\n", " ").split()
    given = {
        name[2:]: float(words[words.index(name) + 1])
        for name in ("--alpha", "--beta", "--gamma", "--T2")
        if name in words
    }
    assert ("--GI" in words, "T2" in given, "--temperature" in words) == (kind == "gkl", kind == "gkl", False)
    tree = ast.parse((folder / "imagenetlt_distill_dkl.py").read_text())
    own = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "dkl_loss")
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(ast.Module([own], []), "dkl_loss", "exec"), names)

    torch.manual_seed(0)
    student = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
    teacher, labels = 5 * torch.randn(B, C, dtype=torch.float64), torch.randint(C, (B,))
    method = ours_of(compose("train", [f"experiment=kd/lt_{kind}/{pair}"])).double()
    if method.prior is not None:
        method.prior.probs.copy_(torch.rand(C, C).softmax(1))
        given |= {"CLASS_PRIOR": method.prior.probs[labels]}
    theirs = names["dkl_loss"](student, teacher, 1.0, GI="--GI" in words, **given)
    ours = method(taps(student), taps(teacher), labels, epoch=1, index=labels)["distillation"].mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, student)[0] for value in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
