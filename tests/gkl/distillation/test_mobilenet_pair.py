"""ResNet50 -> MobileNetV1 as Table V's numbers have it, mdistiller's: what AT, OFD and ReviewKD compare.

The experiments' own settings, against their definition on the lists of maps that mdistiller's networks show, and against
mdistiller's classes, networks and files where they are.
"""

import importlib.util
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from gkl.distillation import Context, Distiller
from gkl.models import create
from gkl.models.classifier import TappedClassifier, Taps
from tests.gkl.distillation.test_features import needs_reference, reference
from trainers.runs.compose import compose
from trainers.runs.targets import instantiate

CLASSES = 4
LABELS = torch.tensor([0, 3])


def networks(side: int) -> tuple[TappedClassifier, TappedClassifier, Tensor]:
    """Student and teacher in float64, with batch norms that are more than their initial values, and two pictures."""
    torch.manual_seed(0)
    student, teacher = (create(n, num_classes=CLASSES) for n in ("mobilenet_v1", "imagenet_resnet_50"))
    for network in (student, teacher):
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return student.double(), teacher.double(), torch.rand(2, 3, side, side, dtype=torch.float64)


def method(name: str, student: Taps, teacher: Taps, network: TappedClassifier) -> Distiller:
    """An experiment's method at paper scale."""
    config = compose("train", [f"experiment=kd/in_{name}/resnet50_mobilenetv1"])["distiller"]
    made: Distiller = instantiate(config)(
        Context(student, teacher, network, torch.arange(8) % CLASSES, CLASSES, seed=0)
    )
    return made.double()


def term(made: Distiller, student: Taps, teacher: Taps) -> Tensor:
    """Its mean over the batch, in its first epoch."""
    return made(student, teacher, LABELS, epoch=1, index=LABELS)["distillation"].mean()


@pytest.fixture(scope="module")
def shown() -> tuple[Taps, Taps, TappedClassifier]:
    """Taps of both networks and the teacher, at 64 pixels."""
    student, teacher, x = networks(64)
    with torch.no_grad():
        return student.train().forward_taps(x), teacher.eval().forward_taps(x), teacher


def test_attention_transfer_has_three_terms_a_stage_apart(shown: Any) -> None:
    student, teacher, _ = shown
    total = torch.zeros(()).double()
    listed = student.features[1:]  # as mdistiller's MobileNet shows them: without a stem
    for s, t in zip(listed[1:], teacher.features[1:], strict=False):
        assert s.shape[-1] == t.shape[-1] // 2
        maps = [m.pow(2).mean(1).flatten(1) for m in (s, F.adaptive_avg_pool2d(t, s.shape[-1]))]
        ours, theirs = (m / m.norm(dim=1, keepdim=True) for m in maps)
        total = total + 1000.0 * (ours - theirs).pow(2).mean()
    torch.testing.assert_close(term(method("at", *shown), student, teacher), total, rtol=1e-12, atol=0)


def test_ofd_leaves_out_the_first_stage(shown: Any) -> None:
    student, teacher, _ = shown
    made: Any = method("ofd", *shown)
    assert [c[0].weight.shape[:2] for c in made.connectors] == [(512, 256), (1024, 512), (2048, 1024)]
    total = torch.zeros(()).double()
    for number, stage in enumerate((2, 3, 4)):
        lowest = getattr(made, f"margin{number}")
        a, b = made.connectors[number](student.preact_features[stage]), teacher.preact_features[stage]
        assert a.shape == b.shape
        above = torch.where(b > lowest, b, lowest)
        total = total + 0.0001 * ((a - above) ** 2)[(a > above) | (b > 0)].sum() / 2 / 2 ** (2 - number)
    torch.testing.assert_close(term(made, student, teacher), total, rtol=1e-12, atol=0)


def test_reviewkd_fuses_maps_of_512_channels(shown: Any) -> None:
    made: Any = method("reviewkd", *shown)
    assert [f.inward[0].weight.shape[:2] for f in made.fusions] == [
        (512, c) for c in (128, 256, 512, 1024, 1024)
    ]
    assert [f.outward[0].weight.shape[0] for f in made.fusions] == [256, 512, 1024, 2048, 2048]


# --- against mdistiller ------------------------------------------------------------------------------------------------


def reference_network(file: str, name: str) -> Any:
    path = Path(os.environ["MDISTILLER_REF"]) / "mdistiller/models/imagenet" / f"{file}.py"
    spec = importlib.util.spec_from_file_location(file, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def settings(name: str) -> types.SimpleNamespace:
    """mdistiller's file of a method, over those of its defaults that the method reads."""
    file = Path(os.environ["MDISTILLER_REF"]) / f"configs/imagenet/r50_mv1/{name}.yaml"
    defaults = {
        "AT": {"P": 2, "LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 1000.0}},
        "OFD": {"LOSS": {"CE_WEIGHT": 1.0, "FEAT_WEIGHT": 0.001}, "CONNECTOR": {"KERNEL_SIZE": 1}},
    }
    chosen: Any = OmegaConf.merge(defaults, OmegaConf.load(file))
    return chosen


@needs_reference
@pytest.mark.parametrize(("name", "theirs_is"), [("at", "AT"), ("ofd", "OFD"), ("reviewkd", "ReviewKD")])
def test_the_whole_step_is_mdistillers(name: str, theirs_is: str) -> None:
    """Its class on its networks and our method on ours, the same weights in both: the term, and its gradient to the student."""
    student, teacher, x = networks(224)
    theirs = [reference_network("mobilenetv1", "MobileNetV1"), reference_network("resnet", "resnet50")]
    for network, other in zip((student, teacher), theirs, strict=True):
        other.fc = torch.nn.Linear(other.fc.in_features, CLASSES)
        other.double().load_state_dict(network.state_dict())
    published = getattr(reference(theirs_is), theirs_is)(*theirs, settings(name)).double()
    published.train()  # OFD's teacher with it

    few = (student.eval().forward_taps(x), teacher.eval().forward_taps(x))
    made: Any = method(name, *few, teacher)
    if name == "ofd":
        for ours, other in zip(made.connectors, published.connectors.connectors, strict=True):
            ours.load_state_dict(other.state_dict())
        for number, other in enumerate(published.margins):  # which are float32
            torch.testing.assert_close(getattr(made, f"margin{number}"), other.double(), rtol=1e-6, atol=0)
            getattr(made, f"margin{number}").copy_(other)
    if name == "reviewkd":
        for ours, other in zip(made.fusions, reversed(published.abfs), strict=True):
            assert ours.load_state_dict(
                dict(zip(ours.state_dict(), other.state_dict().values(), strict=True))
            )
    _, losses = published(image=x, target=LABELS, epoch=1)
    with torch.no_grad():
        taught = teacher.train(made.teacher_mode == "train").forward_taps(x)
    value = term(made, student.train().forward_taps(x), taught)
    torch.testing.assert_close(value, losses["loss_kd"], rtol=1e-9, atol=0)
    value.backward()
    losses["loss_kd"].backward()
    one, other = (dict(n.named_parameters()) for n in (student, theirs[0]))
    for at, parameter in one.items():
        if other[at].grad is None:
            assert parameter.grad is None, at
            continue
        scale = float(other[at].grad.abs().max())
        torch.testing.assert_close(parameter.grad, other[at].grad, rtol=1e-8, atol=1e-9 * scale)
