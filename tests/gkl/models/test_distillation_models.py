"""The networks of the distillation tables: sizes, taps, published parameter names, and equality with a reference."""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gkl.models import CheckpointMismatch, create, load_checkpoint
from gkl.models.classifier import TappedClassifier

# ours -> (parameters at 100 classes, reference's module and function, channels of stem and stages, sides of their maps at 32x32)
NETWORKS = {
    "resnet_20": (278_324, "cifar/resnet.resnet20", (16, 16, 32, 64), (32, 32, 16, 8)),
    "resnet_32": (472_756, "cifar/resnet.resnet32", (16, 16, 32, 64), (32, 32, 16, 8)),
    "resnet_56": (861_620, "cifar/resnet.resnet56", (16, 16, 32, 64), (32, 32, 16, 8)),
    "resnet_110": (1_736_564, "cifar/resnet.resnet110", (16, 16, 32, 64), (32, 32, 16, 8)),
    "resnet_8x4": (1_233_540, "cifar/resnet.resnet8x4", (32, 64, 128, 256), (32, 32, 16, 8)),
    "resnet_32x4": (7_433_860, "cifar/resnet.resnet32x4", (32, 64, 128, 256), (32, 32, 16, 8)),
    "wrn_16_2": (703_284, "cifar/wrn.wrn_16_2", (16, 32, 64, 128), (32, 32, 16, 8)),
    "wrn_40_1": (569_780, "cifar/wrn.wrn_40_1", (16, 16, 32, 64), (32, 32, 16, 8)),
    "wrn_40_2": (2_255_156, "cifar/wrn.wrn_40_2", (16, 32, 64, 128), (32, 32, 16, 8)),
    "vgg_8": (3_965_028, "cifar/vgg.vgg8_bn", (64, 128, 256, 512, 512), (32, 16, 8, 4, 4)),
    "vgg_13": (9_462_180, "cifar/vgg.vgg13_bn", (64, 128, 256, 512, 512), (32, 16, 8, 4, 4)),
    "mobilenet_v2_half": (812_836, "cifar/mobilenetv2.mobile_half", (16, 12, 16, 48, 160), (16, 16, 8, 4, 2)),
    "shufflenet_v1": (949_258, "cifar/ShuffleNetv1.ShuffleV1", (24, 240, 480, 960), (32, 16, 8, 4)),
    "shufflenet_v2": (1_355_528, "cifar/ShuffleNetv2.ShuffleV2", (24, 116, 232, 464), (32, 16, 8, 4)),
    "resnet_50": (23_705_252, "cifar/resnetv2.ResNet50", (64, 256, 512, 1024, 2048), (32, 32, 16, 8, 4)),
    "mobilenet_v1": (
        3_309_476,
        "imagenet/mobilenetv1.MobileNetV1",
        (32, 128, 256, 512, 1024),
        (16, 8, 4, 2, 1),
    ),
}
# Telling names of the published files.
KEYS = {
    "resnet_56": {"layer2.0.downsample.0.weight": (32, 16, 1, 1), "fc.weight": (100, 64), "bn1.running_mean": (16,)},
    "wrn_40_2": {"block2.layer.0.convShortcut.weight": (64, 32, 1, 1), "fc.bias": (100,), "bn1.weight": (128,)},
    "vgg_13": {"block1.3.weight": (128, 128, 3, 3), "block0.1.running_var": (64,), "classifier.weight": (100, 512)},
    "resnet_50": {"layer1.0.shortcut.1.weight": (256,), "layer4.2.conv3.weight": (2048, 512, 1, 1), "linear.bias": (100,)},
    "mobilenet_v2_half": {"blocks.1.0.conv.3.weight": (48, 1, 3, 3), "conv2.0.weight": (1280, 160, 1, 1),
                          "classifier.0.weight": (100, 1280)},
    "shufflenet_v1": {"layer1.0.conv3.weight": (216, 18, 1, 1), "linear.weight": (100, 960)},
    "shufflenet_v2": {"layer3.0.conv5.weight": (232, 232, 1, 1), "layer1.2.bn3.weight": (58,), "conv2.weight": (1024, 464, 1, 1)},
}  # fmt: skip
# As mdistiller's get_bn_before_relu() has them.
MARGINS = {
    "resnet_20": ["layer1.2.bn2", "layer2.2.bn2", "layer3.2.bn2"],
    "resnet_50": ["layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3"],
    "wrn_16_2": ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"],
    "vgg_13": ["block1.4", "block2.4", "block3.4", "block4.4"],
    "mobilenet_v1": ["model.3.4", "model.5.4", "model.11.4", "model.13.4"],
    "mobilenet_v2_half": ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"],
}
LARGE = ("resnet_110", "resnet_32x4", "resnet_50", "vgg_13", "wrn_40_2", "resnet_56")
SMALL = [name for name in NETWORKS if name not in LARGE]


def made(name: str, classes: int = 100, **options: str) -> TappedClassifier:
    torch.manual_seed(0)
    model = create(name, num_classes=classes, **options)
    assert isinstance(model, TappedClassifier)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_taps_and_names(name: str) -> None:
    count, _, channels, sides = NETWORKS[name]
    model = made(name).eval()
    assert sum(p.numel() for p in model.parameters()) == count
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        taps = model.forward_taps(x)
        assert torch.equal(taps.logits, model(x))
        assert torch.equal(taps.logits, model.get_classifier()(taps.pooled))
    shapes = [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert [tuple(t.shape) for t in taps.features] == [tuple(t.shape) for t in taps.preact_features] == shapes
    assert taps.pooled.shape == (2, model.num_features)
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in KEYS.get(name, ())} == KEYS.get(name, {})


@pytest.mark.parametrize("name", NETWORKS)
def test_what_stands_before_the_activation(name: str) -> None:
    model = made(name, 10).eval()
    with torch.no_grad():
        taps = model.forward_taps(torch.rand(2, 3, 8, 8))
    assert taps.logits.shape == (2, 10)
    for before, after in zip(taps.preact_features[1:], taps.features[1:], strict=True):
        if name.startswith("mobilenet_v2"):
            assert before is after
        elif name.startswith("shufflenet_v2"):
            shuffled = after.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)  # undoes the shuffle
            assert torch.equal(F.relu(before), shuffled)
        elif not name.startswith("wrn"):
            assert torch.equal(F.relu(before), after)
    if name.startswith("wrn"):  # a stage ends in the next one's first batch norm
        for norm, before, after in zip(
            model.batch_norms(), taps.preact_features[1:], taps.features[1:], strict=True
        ):
            assert torch.equal(norm(after), before)


@pytest.mark.parametrize("name", [*SMALL, "resnet_50"])
def test_gradients_reach_every_tap_and_every_batch_norm_sees_a_batch_once(name: str) -> None:
    model = made(name, 10).train()
    taps = model.forward_taps(torch.rand(4, 3, 16, 16))
    tapped = [*taps.features, *taps.preact_features, taps.pooled]
    gradients = torch.autograd.grad(sum((t**2).sum() for t in tapped) + taps.logits.sum(), tapped)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(m.num_batches_tracked) for m in norms} == {1}


@pytest.mark.parametrize("name", MARGINS)
def test_margins_can_be_taken_of_every_teacher(name: str) -> None:
    model = made(name, 10)
    names = {module: at for at, module in model.named_modules()}
    assert [names[norm] for norm in model.batch_norms()] == MARGINS[name]


@pytest.mark.parametrize("name", ["shufflenet_v1", "shufflenet_v2"])
def test_margins_are_refused_where_a_stage_ends_otherwise(name: str) -> None:
    with pytest.raises(ValueError, match="OFD needs"):
        made(name, 10).batch_norms()


@pytest.mark.parametrize("name", ["resnet_8x4", "resnet_50", "wrn_16_2", "vgg_8", "mobilenet_v2_half"])
def test_initialisation(name: str) -> None:
    """Convolutions N(0, 2 / (k^2 c_out)), depthwise ones too; N(0, 0.01^2) where mdistiller sets the classifier so."""
    model = made(name)
    for at, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), at
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert (module.bias == 0).all(), at
    classifier = model.get_classifier()
    own = name.startswith(("vgg", "mobilenet_v2"))
    std = 0.01 if own else 1 / math.sqrt(3 * model.num_features)
    assert classifier.weight.std().item() == pytest.approx(std, rel=0.03)
    assert (classifier.bias == 0).all() == (own or name.startswith("wrn"))


def test_normalisation_is_inside() -> None:
    inside, outside = (
        made("resnet_8x4", 10, normalisation="cifar100_kd").eval(),
        made("resnet_8x4", 10).eval(),
    )
    mean = torch.tensor([0.5071, 0.4867, 0.4408]).view(3, 1, 1)
    std = torch.tensor([0.2675, 0.2565, 0.2761]).view(3, 1, 1)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(inside(x), outside((x - mean) / std))
    assert inside.state_dict().keys() == outside.state_dict().keys()


def test_vgg_pools_once_more_at_64_pixels() -> None:
    with torch.no_grad():
        taps = made("vgg_8", 10).eval().forward_taps(torch.rand(1, 3, 64, 64))
    assert [t.shape[-1] for t in taps.features] == [64, 32, 16, 8, 4]


def test_published_files_load(tmp_path: Path) -> None:
    source = made("resnet_20")
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": source.state_dict(), "accuracy": 69.06}, path)
    target = create("resnet_20", num_classes=100, normalisation="cifar100_kd")
    assert load_checkpoint(target, path).fits
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))
    with pytest.raises(CheckpointMismatch):
        load_checkpoint(made("resnet_32"), path)


@pytest.mark.skipif(
    "MDISTILLER_REF" not in os.environ, reason="needs MDISTILLER_REF, a checkout of mdistiller"
)
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_the_reference(name: str) -> None:
    file, function = NETWORKS[name][1].split(".")
    spec = importlib.util.spec_from_file_location(
        Path(file).name, Path(os.environ["MDISTILLER_REF"]) / "mdistiller" / "models" / f"{file}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    side, classes = (32, 100) if file.startswith("cifar") else (224, 1000)
    reference, model = (
        getattr(module, function)(num_classes=classes).double(),
        made(name, classes).double(),
    )
    assert list(model.state_dict()) == list(reference.state_dict())
    x = torch.rand(4, 3, side, side, dtype=torch.float64)
    for mode in (
        True,
        False,
    ):  # training first: then the running statistics are more than their initial values
        model.load_state_dict(reference.state_dict())
        with torch.no_grad():
            logits, feats = reference.train(mode)(x)
            taps = model.train(mode).forward_taps(x)
        torch.testing.assert_close(taps.logits, logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(taps.pooled, feats["pooled_feat"], rtol=0, atol=1e-10)
        known = len(feats["feats"])  # the reference's networks for ImageNet do not give their stem
        pairs = [*zip(taps.features[-known:], feats["feats"], strict=True)]
        pairs += zip(taps.preact_features[-known:], feats.get("preact_feats", feats["feats"]), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
