"""Feature methods against slow restatements of their equations in float64, and against a reference where there is one."""

import importlib
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.distillation import Context
from gkl.distillation.attention import AttentionTransfer
from gkl.distillation.crd import CRD
from gkl.distillation.fitnet import FitNet, regressor
from gkl.distillation.ofd import OFD, margin
from gkl.distillation.reviewkd import ReviewKD, student_maps, teacher_maps
from gkl.distillation.rkd import RKD
from gkl.models import create
from gkl.models.classifier import TappedClassifier, Taps
from gkl.rng import choose, sample_keys
from trainers.runs.compose import choices, compose

B, C = 5, 4
STUDENT = ((3, 8), (4, 8), (5, 4), (6, 2))  # channels and side of stem and stages
TEACHER = ((4, 8), (6, 8), (7, 8), (9, 4))


class Stages(TappedClassifier):
    """A teacher for OFD: nothing but its batch norms."""

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        return list(self.norms)


@pytest.fixture
def given() -> tuple[Context, Taps, Taps, Tensor, Tensor]:
    """Context, student's taps with gradient, teacher's taps, labels, index."""
    torch.manual_seed(0)

    def taps(shapes: Any, features: int, gradient: bool) -> Taps:
        maps = [[torch.randn(B, c, s, s, dtype=torch.float64) for c, s in shapes] for _ in range(2)]
        pooled, logits = torch.randn(B, features, dtype=torch.float64), torch.randn(B, C, dtype=torch.float64)
        for tensor in (*maps[0], *maps[1], pooled, logits):
            tensor.requires_grad_(gradient)
        return Taps(maps[0], maps[1], pooled, logits)

    network = Stages(C, 9)
    network.norms = nn.ModuleList(nn.BatchNorm2d(c) for c, _ in TEACHER[1:])
    for norm in network.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    student, teacher = taps(STUDENT, 6, True), taps(TEACHER, 9, False)
    labels = torch.tensor([0, 1, 2, 3, 1])
    context = Context(student, teacher, network.double(), torch.arange(40) % C, C, seed=3)
    return context, student, teacher, labels, torch.tensor([0, 5, 10, 15, 1])


def same(method: Any, given: Any, restated: Tensor, epoch: int = 1) -> None:
    """The method's distillation term is the restated one: value, gradient to the student and to its own layers."""
    _, student, teacher, labels, index = given
    value = method(student, teacher, labels, epoch=epoch, index=index)["distillation"]
    assert value.shape == (B,)
    torch.testing.assert_close(value.mean(), restated, rtol=1e-11, atol=1e-12)
    inputs = [
        t
        for t in (*student.features, *student.preact_features, student.pooled, *method.parameters())
        if t.requires_grad
    ]
    one, two = (
        torch.autograd.grad(v, inputs, allow_unused=True, retain_graph=True) for v in (value.mean(), restated)
    )
    assert any(g is not None and g.abs().sum() > 0 for g in one)
    for a, b in zip(one, two, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_fitnet(given: Any) -> None:
    context, student, teacher, _, _ = given
    method = FitNet(context, layer=2, weight=100.0).double()
    convolution, norm, _ = method.regressor
    made = convolution(student.features[2])
    mean, variance = made.mean((0, 2, 3), keepdim=True), made.var((0, 2, 3), keepdim=True, correction=0)
    scaled = norm.weight.view(1, -1, 1, 1) * (made - mean) / (variance + norm.eps).sqrt() + norm.bias.view(
        1, -1, 1, 1
    )
    target = teacher.features[2]
    total = sum((scaled.relu() - target).flatten() ** 2)
    same(method, given, 100.0 * total / target.numel())


@pytest.mark.parametrize(("height", "target"), [(8, 4), (4, 8), (8, 8), (8, 3), (1, 1)])
def test_fitnets_regressor_reaches_the_teachers_shape(height: int, target: int) -> None:
    student, teacher = torch.zeros(2, 3, height, height), torch.zeros(2, 5, target, target)
    assert regressor(student, teacher)(student).shape == teacher.shape


def test_fitnet_says_where_it_cannot_reach() -> None:
    with pytest.raises(
        ValueError, match=r"student's 2 x 2 map to the teacher's 8 x 8; choose another distiller.layer"
    ):
        regressor(torch.zeros(2, 3, 2, 2), torch.zeros(2, 5, 8, 8))


def huber(a: Tensor, b: Tensor) -> Tensor:
    gap = (a - b).abs()
    return gap**2 / 2 if gap < 1 else gap - 0.5


def test_rkd(given: Any) -> None:
    context, student, teacher, _, _ = given

    def potentials(e: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        d = [
            [(e[i] - e[j]).norm() if i != j else torch.zeros(()).double() for j in range(B)] for i in range(B)
        ]
        pairs = [d[i][j] for i in range(B) for j in range(B) if i != j]
        mean = sum(pairs) / len(pairs)
        angle = []
        for i in range(B):
            toward = [(e[j] - e[i]) / (d[i][j] if i != j else 1.0) for j in range(B)]
            angle += [toward[j] @ toward[k] for j in range(B) for k in range(B)]
        return [d[i][j] / mean for i in range(B) for j in range(B)], angle

    (d, a), (td, ta) = potentials(student.pooled), potentials(teacher.pooled)
    distance = sum(huber(x, y) for x, y in zip(d, td, strict=True)) / B**2
    angle = sum(huber(x, y) for x, y in zip(a, ta, strict=True)) / B**3
    same(RKD(context, distance_weight=25.0, angle_weight=50.0), given, 25.0 * distance + 50.0 * angle)


def test_crd(given: Any) -> None:
    """Two steps: the second finds the features that the first has stored, and keeps its constants."""
    context, student, teacher, labels, index = given
    method = CRD(context, dim=7, negatives=6, momentum=0.5, temperature=0.3, weight=0.8).double()
    banks = [method.memory_student.clone(), method.memory_teacher.clone()]
    constants: list[Tensor] = []
    size = len(context.train_labels)

    def restated(epoch: int) -> Tensor:
        chosen = method.drawn(epoch, index, labels)
        features = []
        for layer, pooled in ((method.embed_student, student.pooled), (method.embed_teacher, teacher.pooled)):
            raw = [layer.weight @ x + layer.bias for x in pooled]
            features.append([r / r.norm() for r in raw])
        total = torch.zeros(()).double()
        for side, (mine, bank) in enumerate(zip(features, reversed(banks), strict=True)):
            scores = []
            for i in range(B):
                numbers = [int(index[i]), *chosen[i].tolist()]
                scores.append([(bank[n] @ mine[i] / 0.3).exp() for n in numbers])
            if len(constants) == side:
                every = [s.detach() for row in scores for s in row]
                constants.append(sum(every) / len(every) * size)
            for row in scores:
                p = [s / constants[side] for s in row]
                total = total - (p[0] / (p[0] + 6 / size + 1e-7)).log()
                total = total - sum(((6 / size) / (q + 6 / size + 1e-7)).log() for q in p[1:])
        banks[:] = [bank.clone() for bank in banks]
        for bank, fresh in zip(banks, features, strict=True):
            for i in range(B):
                moved = 0.5 * bank[index[i]] + 0.5 * fresh[i].detach()
                bank[index[i]] = moved / moved.norm()
        return 0.8 * total / B

    for epoch in (1, 2):
        same(method, given, restated(epoch), epoch)
        torch.testing.assert_close(method.memory_student, banks[0])
        torch.testing.assert_close(method.memory_teacher, banks[1])


def test_crds_stored_features_stay_in_evaluation(given: Any) -> None:
    context, student, teacher, labels, index = given
    method = CRD(context, dim=7, negatives=6).double().eval()
    before = method.memory_student.clone()
    method(student, teacher, labels, epoch=1, index=index)
    assert torch.equal(method.memory_student, before)


def test_negatives_are_of_other_classes_and_follow_from_the_picture_alone(given: Any) -> None:
    context, _, _, labels, index = given
    method = CRD(context, dim=7, negatives=30)  # all there are
    drawn = method.drawn(1, index, labels)
    assert (context.train_labels[drawn] != labels[:, None]).all()
    assert all(len(set(row.tolist())) == 30 for row in drawn)
    few = CRD(context, dim=7, negatives=10)
    assert torch.equal(few.drawn(1, index, labels)[2:3], few.drawn(1, index[2:3], labels[2:3]))
    assert not torch.equal(few.drawn(1, index, labels), few.drawn(2, index, labels))
    many = CRD(context, dim=7, negatives=50).drawn(1, index, labels)  # more than there are: some twice
    assert many.shape == (B, 50)
    assert (context.train_labels[many] != labels[:, None]).all()


@pytest.mark.parametrize("count", [3, 12])
def test_choices_are_even(count: int) -> None:
    allowed = torch.tensor([True, False, True, True, True, False, True, True, True, True]).expand(4000, -1)
    chosen = choose(sample_keys(0, 1, torch.arange(4000), "test"), allowed, count, enough=count <= 8)
    frequency = torch.bincount(chosen.flatten(), minlength=10) / (4000 * count / 8)
    assert torch.equal(frequency == 0, ~allowed[0])
    torch.testing.assert_close(frequency[allowed[0]], torch.ones(8), rtol=0, atol=0.06)


LIKE = [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(("stages", "pairs"), [("all", LIKE), ([[2, 2], [3, 3]], LIKE[1:]), ([[2, 1], [3, 2]], [(2, 1), (3, 2)])])  # fmt: skip
def test_ofd(given: Any, stages: Any, pairs: list[tuple[int, int]]) -> None:
    context, student, teacher, _, _ = given
    assert OFD.teacher_mode == "train"
    method = OFD(context, kernel_size=1, weight=0.001, stages=stages).double()
    total = torch.zeros(()).double()
    for number, (s, t) in enumerate(pairs):
        mine = method.connectors[number](student.preact_features[s])
        target = F.adaptive_avg_pool2d(teacher.preact_features[t], mine.shape[-2:])
        lowest = margin(context.network.norms[t - 1])
        for place in torch.cartesian_prod(*(torch.arange(n) for n in mine.shape)).tolist():
            a, b, m = mine[tuple(place)], target[tuple(place)], lowest[place[1]]
            share = 2.0 ** (number + 1 - len(pairs))
            if b > 0 or (m < b <= 0 and a > b):
                total = total + (a - b) ** 2 * share
            elif b <= m and a > m:
                total = total + (a - m) ** 2 * share
    same(method, given, 0.001 * total / B)


def test_ofds_margin_is_the_mean_of_the_negative_half() -> None:
    from scipy.stats import norm as normal
    from scipy.stats import truncnorm

    layer = nn.BatchNorm2d(5)
    layer.weight.data = torch.tensor([1.0, -0.7, 2.0, 0.3, 0.1])
    layer.bias.data = torch.tensor([0.0, 0.5, -1.0, -0.2, 5.0])
    for channel, value in enumerate(margin(layer).tolist()):
        std, mean = abs(layer.weight[channel].item()), layer.bias[channel].item()
        expected = -3 * std
        if normal.cdf(-mean / std) > 0.001:
            expected = truncnorm.mean(-math.inf, -mean / std, loc=mean, scale=std)
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("stages", "pairs"), [("all", LIKE), ([[2, 1], [3, 2]], [(2, 1), (3, 2)])])
def test_attention_transfer(given: Any, stages: Any, pairs: list[tuple[int, int]]) -> None:
    context, student, teacher, _, _ = given
    total = torch.zeros(()).double()
    for s, t in pairs:
        maps, both = [], (student.features[s], teacher.features[t])
        size = min(x.shape[-1] for x in both)
        for x in both:
            cell = x.shape[-1] // size
            cells = x.unfold(2, cell, cell).unfold(3, cell, cell).mean((4, 5))
            attention = (cells**2).mean(1).reshape(len(x), -1)
            maps.append(attention / attention.pow(2).sum(1, keepdim=True).sqrt())
        total = total + ((maps[0] - maps[1]) ** 2).mean()
    same(AttentionTransfer(context, weight=1000.0, stages=stages).double(), given, 1000.0 * total)


@pytest.mark.parametrize("method", [AttentionTransfer, OFD])
@pytest.mark.parametrize("stages", [[], [[0, 1]], [[1, 4]], [[1]], [[1, 2, 3]]])
def test_stages_that_a_network_lacks_are_named(given: Any, method: Any, stages: Any) -> None:
    with pytest.raises(
        ValueError, match=r"distiller.stages .* student's stage in 1..3 and a teacher's in 1..3"
    ):
        method(given[0], weight=1.0, stages=stages)


def test_networks_of_other_depths_are_told_what_to_set(given: Any) -> None:
    """OFD aligns from the last stage, attention transfer asks."""
    context, student, teacher, labels, index = given
    shorter = student._replace(features=student.features[1:], preact_features=student.preact_features[1:])
    context = Context(shorter, teacher, context.network, context.train_labels, C, 0)
    with pytest.raises(ValueError, match="got 2 and 3; set distiller.stages"):
        AttentionTransfer(context, weight=1.0)
    torch.manual_seed(1)
    aligned = OFD(context).double()
    torch.manual_seed(1)
    chosen = OFD(context, stages=[[1, 2], [2, 3]]).double()
    one, other = (
        m(shorter, teacher, labels, epoch=1, index=index)["distillation"] for m in (aligned, chosen)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("before", [False, True])
def test_reviewkd(given: Any, before: bool) -> None:
    context, student, teacher, _, _ = given
    method = ReviewKD(context, weight=5.0, warmup=20, student_before=before).double()
    mine, targets = student_maps(student, before), teacher_maps(teacher)
    assert [len(mine), len(targets)] == [4, 4]
    total, residual = torch.zeros(()).double(), None
    for number in (3, 2, 1, 0):
        fusion, size = method.fusions[number], targets[number].shape[-1]
        x = fusion.inward[1](fusion.inward[0](mine[number]))
        if number < 3:
            side = x.shape[-1]
            pick = torch.arange(side) * residual.shape[-1] // side
            residual = residual[:, :, pick][:, :, :, pick]
            weights = torch.sigmoid(fusion.attention[0](torch.cat([x, residual], 1)))
            x = x * weights[:, 0].unsqueeze(1) + residual * weights[:, 1].unsqueeze(1)
        pick = torch.arange(size) * x.shape[-1] // size
        residual = x[:, :, pick][:, :, :, pick]
        fused = fusion.outward[1](fusion.outward[0](residual))
        value, norm, weight = ((fused - targets[number]) ** 2).mean(), 1.0, 1.0
        for level in (4, 2, 1):
            if level < size:
                weight /= 2
                cells = [m.unfold(2, size // level, size // level).unfold(3, size // level, size // level).mean((4, 5))
                         for m in (fused, targets[number])]  # fmt: skip
                value, norm = value + weight * ((cells[0] - cells[1]) ** 2).mean(), norm + weight
        total = total + value / norm
    same(method, given, 5.0 * 3 / 20 * total, epoch=3)


def test_reviewkd_needs_as_many_stages(given: Any) -> None:
    context, student, teacher, _, _ = given
    shorter = Context(
        student._replace(features=student.features[1:]), teacher, None, context.train_labels, C, 0
    )
    with pytest.raises(ValueError, match="as many stages in the student as in the teacher, got 2 and 3"):
        ReviewKD(shorter, weight=1.0, warmup=1)


def test_gradients_stop_at_the_teacher_and_every_pair_fits_every_method() -> None:
    """At 32x32, the published geometry, with two classes' worth of training labels."""
    networks: dict[str, Taps] = {}
    models: dict[str, TappedClassifier] = {}
    for pair in choices("pair/cifar100"):
        config = compose("train", [f"experiment=kd/c100_kd/{pair}"])
        names = (config["model"]["name"], config["teacher"]["network"]["name"])
        for name in names:
            if name not in networks:
                models[name] = create(name, num_classes=100).eval()
                with torch.no_grad():
                    networks[name] = models[name].forward_taps(torch.rand(2, 3, 32, 32))
        student, teacher = (networks[name] for name in names)
        context = Context(student, teacher, models[names[1]], torch.arange(20) % 2, 100, seed=0)
        for method in (FitNet(context), RKD(context), CRD(context, negatives=4), OFD(context), ReviewKD(context, weight=5.0, warmup=20)):  # fmt: skip
            wanted = student._replace(logits=student.logits.clone().requires_grad_())
            terms = method(wanted, teacher, torch.tensor([0, 1]), epoch=1, index=torch.tensor([0, 1]))
            assert terms["distillation"].shape == (2,), (pair, type(method))
            assert terms["distillation"].isfinite().all()
            assert not any(
                t.requires_grad for t in (*teacher.features, *teacher.preact_features, teacher.pooled)
            )


# --- against mdistiller ------------------------------------------------------------------------------------------------

needs_reference = pytest.mark.skipif(
    "MDISTILLER_REF" not in os.environ, reason="needs MDISTILLER_REF, a checkout of mdistiller"
)


def reference(name: str) -> Any:
    """One of mdistiller's distiller files, without the rest of its package."""
    root = Path(os.environ["MDISTILLER_REF"]) / "mdistiller" / "distillers"
    package = types.ModuleType("reference_distillers")
    package.__path__ = [str(root)]
    sys.modules["reference_distillers"] = package
    return importlib.import_module(f"reference_distillers.{name}")


@needs_reference
def test_rkd_equals_the_reference(given: Any) -> None:
    context, student, teacher, labels, index = given
    loss = reference("RKD").rkd_loss(student.pooled, teacher.pooled)
    terms = RKD(context)(student, teacher, labels, epoch=1, index=index)
    torch.testing.assert_close(terms["distillation"].mean(), loss, rtol=1e-12, atol=0)


@needs_reference
def test_dkd_equals_the_reference(given: Any) -> None:
    from gkl.distillation.dkd import DKD

    context, student, teacher, labels, index = given
    loss = reference("DKD").dkd_loss(student.logits, teacher.logits, labels, 1.0, 6.0, 4.0)
    terms = DKD(context, alpha=1.0, beta=6.0, temperature=4.0, warmup=0)(
        student, teacher, labels, epoch=1, index=index
    )
    torch.testing.assert_close(terms["distillation"].mean(), loss, rtol=1e-12, atol=0)


@needs_reference
def test_ofd_equals_the_reference(given: Any) -> None:
    context, student, teacher, labels, index = given
    method = OFD(context).double()
    feat_loss = reference("OFD").feat_loss
    loss = torch.zeros(()).double()
    for number in range(3):
        mine = method.connectors[number](student.preact_features[number + 1])
        target = F.adaptive_avg_pool2d(teacher.preact_features[number + 1], mine.shape[-2:])
        loss = loss + feat_loss(mine, target, getattr(method, f"margin{number}")) / 2 ** (2 - number)
    terms = method(student, teacher, labels, epoch=1, index=index)
    torch.testing.assert_close(terms["distillation"].mean(), 0.001 * loss, rtol=1e-12, atol=0)


@needs_reference
def test_reviewkd_equals_the_reference(given: Any) -> None:
    context, student, teacher, labels, index = given
    module = reference("ReviewKD")
    method = ReviewKD(context, weight=5.0, warmup=0).double()
    mine, targets = student_maps(student, before=False), teacher_maps(teacher)
    results, residual = [], None
    for number in (3, 2, 1, 0):
        theirs = module.ABF(mine[number].shape[1], 6, targets[number].shape[1], number < 3).double()
        ours = method.fusions[number]
        theirs.conv1.load_state_dict(ours.inward.state_dict())
        theirs.conv2.load_state_dict(ours.outward.state_dict())
        if number < 3:
            theirs.att_conv.load_state_dict(ours.attention.state_dict())
        fused, residual = theirs(mine[number], residual, mine[number].shape[-1], targets[number].shape[-1])
        results.insert(0, fused)
    loss = module.hcl_loss(results, targets)
    terms = method(student, teacher, labels, epoch=1, index=index)
    torch.testing.assert_close(terms["distillation"].mean(), 5.0 * loss, rtol=1e-12, atol=0)


@needs_reference
def test_crd_equals_the_reference(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of its memory and loss on the same embeddings and negatives."""
    context, student, teacher, labels, index = given
    module = reference("CRD")
    monkeypatch.setattr(module.AliasMethod, "cuda", lambda self: None)
    method = CRD(context, dim=7, negatives=6, temperature=0.07, weight=1.0).double()
    contrast = module.ContrastMemory(7, len(context.train_labels), 6, 0.07, 0.5).double()
    contrast.memory_v1.copy_(method.memory_student)
    contrast.memory_v2.copy_(method.memory_teacher)
    criterion = module.ContrastLoss(len(context.train_labels))
    temperature = contrast.params[1]  # a float32 0.07 in the reference
    method.temperature = float(temperature)
    for epoch in (1, 2):
        chosen = torch.cat([index[:, None], method.drawn(epoch, index, labels)], 1)
        mine, theirs = (
            F.normalize(method.embed_student(student.pooled)),
            F.normalize(method.embed_teacher(teacher.pooled)),
        )
        out_s, out_t = contrast(mine, theirs, index, chosen)
        loss = criterion(out_s) + criterion(out_t)
        terms = method(student, teacher, labels, epoch=epoch, index=index)
        torch.testing.assert_close(terms["distillation"].mean(), loss.squeeze(), rtol=1e-9, atol=0)
    torch.testing.assert_close(method.memory_student, contrast.memory_v1)
