"""PSPNet: APD's network in numbers and by the names of its files, its draws by keys, its maps without torch's resizing."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gkl.models import create, load_checkpoint
from gkl.models.pspnet import BasicBlock, Bottleneck, DeepResNet, KeyedDropout2d, Pool, PSPNet, resized
from gkl.models.timm_network import set_sample_keys
from gkl.rng import sample_keys
from trainers.runs.compose import compose

needs_apd = pytest.mark.skipif(
    "APD_REF" not in os.environ, reason="needs APD_REF, a checkout of dvlab-research/APD"
)


@pytest.fixture
def apd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """APD's own model.pspnet."""
    monkeypatch.syspath_prepend(os.environ["APD_REF"])
    with torch.random.fork_rng(devices=[]):
        yield importlib.import_module("model.pspnet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "model"]:
        del sys.modules[name]


def filled(model: nn.Module) -> nn.Module:
    """Weights and statistics that no layer hides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(1.0 + 0.2 * torch.rand(value.shape, generator=generator))
            elif name.endswith(("running_mean", "bias")):
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model


@needs_apd
@pytest.mark.parametrize("layers", [18, 101])
def test_it_is_apd_s_network_and_takes_its_files(layers: int, apd: Any, tmp_path: Path) -> None:
    """Their file as they save it, from several cards; logits and all maps in eval mode, and in training mode with gradients."""
    theirs = filled(
        apd.Model(layers=layers, classes=150, pretrained=False, args=SimpleNamespace(classes=150)).double()
    )
    state = {f"module.{name}": value.float() for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 100, "state_dict": state, "optimizer": {}}, tmp_path / "train_epoch_100.pth")
    ours: Any = create(f"pspnet_{layers}", 150, "none")
    report = load_checkpoint(ours, tmp_path / "train_epoch_100.pth")
    assert report.fits and not report.unused and not report.unexpected
    ours.double()
    theirs.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x = torch.randn(2, 3, 73, 57, dtype=torch.float64)
    y = torch.randint(0, 150, (2, 73, 57))
    for module in theirs.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    for mode in (False, True):
        theirs.train(mode), ours.train(mode)
        _, main, auxiliary, feats = theirs(x, y)
        maps = ours.forward_maps(x)
        assert maps.logits.shape == (2, 150, 10, 8)
        for one, other in ((feats[-1], maps.logits), (feats[-2], maps.features)):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
        large = resized(maps.logits, (73, 57))
        torch.testing.assert_close(F.cross_entropy(large, y), main, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            F.cross_entropy(resized(maps.auxiliary, (73, 57)), y), auxiliary, rtol=1e-9, atol=1e-9
        )
    gradients = []
    for loss, model in (
        (main + auxiliary, theirs),
        (F.cross_entropy(large, y) + F.cross_entropy(resized(maps.auxiliary, (73, 57)), y), ours),
    ):
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), one, other in zip(ours.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9, msg=name)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("size", "to"), [((9, 9), (65, 65)), ((10, 8), (73, 57)), ((1, 1), (9, 9)), ((6, 6), (3, 5))]
)
def test_maps_are_resized_and_pooled_as_torch_does(size: tuple[int, int], to: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    wanted = F.interpolate(x, to, mode="bilinear", align_corners=True)
    torch.testing.assert_close(resized(x, to), wanted, rtol=0, atol=1e-12)
    for parts in (1, 2, 3, 6):
        torch.testing.assert_close(Pool(parts)(x), F.adaptive_avg_pool2d(x, parts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["pspnet_18", "pspnet_50_w32"])
def test_one_convolution_of_each_late_block_is_dilated(name: str) -> None:
    model: Any = create(name, 10, width=8, head=16)
    for stage, dilation in ((model.layer1, 1), (model.layer3, 2), (model.layer4, 4)):
        for block in stage:
            large = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
            assert [m.dilation[0] for m in large] == [dilation, 1][: len(large)]
            assert all(m.padding == m.dilation and m.stride == (1, 1) for m in large)
    assert model.forward_features(torch.rand(2, 3, 65, 65)).shape == (2, 16, 9, 9)


def test_dropout_follows_from_keys_and_drops_whole_channels() -> None:
    model: Any = create("pspnet_18", 10, width=8, head=16, dropout=0.5).train()
    drops = [m for m in model.modules() if isinstance(m, KeyedDropout2d)]
    keys = sample_keys(0, 1, torch.arange(6), "inside_the_network")
    x = torch.ones(6, 400, 2, 2)
    set_sample_keys(model, keys)
    one, other = (drop(x) for drop in drops)
    assert not one.equal(other)
    assert one.flatten(2).std(2).max() == 0 and set(one.unique().tolist()) == {0.0, 2.0}
    assert abs(one.mean().item() - 1.0) < 0.1
    set_sample_keys(model, keys[3:])
    assert drops[0](x[3:]).equal(one[3:])  # whatever pictures stand beside
    assert drops[0].eval()(x).equal(x)


def test_it_begins_from_a_classifier_of_its_depth() -> None:
    torch.manual_seed(0)
    classifier = filled(DeepResNet(BasicBlock, (2, 2, 2, 2), 20, "none"))
    model = PSPNet(BasicBlock, (2, 2, 2, 2), 10, "none")
    before = model.cls[0].weight.clone()
    model.begin_from(classifier)
    x = torch.rand(2, 3, 33, 33)
    stem = x
    for n in (1, 2, 3):
        stem = classifier.get_submodule(f"bn{n}")(classifier.get_submodule(f"conv{n}")(stem)).relu()
    assert model.layer0(x).equal(F.max_pool2d(stem, 3, 2, 1))
    state = classifier.state_dict()
    assert all(
        value.equal(state[name])
        for name, value in model.state_dict().items()
        if name[:6] in ("layer1", "layer4")
    )
    assert model.cls[0].weight.equal(before)
    with pytest.raises(
        ValueError, match="begins from a ResNet of its own depth and width; .* tensors are missing"
    ):
        PSPNet(Bottleneck, (3, 4, 6, 3), 10).begin_from(classifier)


@pytest.mark.parametrize("name", ["pspnet_18", "deep_resnet_18"])
def test_a_file_of_other_names_or_with_code_is_refused(name: str, tmp_path: Path) -> None:
    model = create(name, 10)
    state = model.state_dict()
    torch.save(
        {key: value for key, value in state.items() if not key.startswith("layer4")}, tmp_path / "part.pth"
    )
    with pytest.raises(ValueError, match="does not fit the .* missing in the file"):
        load_checkpoint(model, tmp_path / "part.pth")
    torch.save({"state_dict": state, "f": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="could run code, and was not loaded"):
        load_checkpoint(model, tmp_path / "code.pth")


@pytest.mark.parametrize(("name", "parameters"), [("pspnet_18", 17_013_612), ("pspnet_101", 68_173_036)])
def test_parameter_counts(name: str, parameters: int) -> None:
    """With 150 classes, the auxiliary head in it."""
    with torch.device("meta"):
        assert sum(p.numel() for p in create(name, 150).parameters()) == parameters


@pytest.mark.parametrize("name", ["pspnet_18", "pspnet_101"])
def test_each_scale_has_a_network_of_the_kind(name: str) -> None:
    for scale in ("paper", "small", "smoke"):
        config = compose("train", ["experiment=seg/baseline", f"model={name}", f"scale={scale}"])["model"]
        assert config["normalisation"] == "imagenet" and (scale != "paper" or config["name"] == name)
        assert isinstance(create(config["name"], 10), PSPNet)
