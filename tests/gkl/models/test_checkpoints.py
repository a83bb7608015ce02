"""Published layouts, what trainings wrap and save beside, damaged files and files with code, against the loader."""

import argparse
import copy
import errno
import functools
import io
import os
import re
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import gkl.models
from gkl.losses import ClassPrior
from gkl.models import CheckpointMismatch, checkpoint_files, create, load_checkpoint
from gkl.models.batch_norm import split_batch_norm
from gkl.models.checkpoint_files import archive_damage, read
from gkl.models.normalise import Normalise
from gkl.models.own import OwnNetwork
from gkl.models.wide_resnet import SwishWideResNet, WideResNet

WRAPPED = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 200, "best": 31.9},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda state: {"model_state_dict": state, "unaveraged_model_state_dict": {}},
}


def trained(model: nn.Module) -> nn.Module:
    """Every tensor different from a fresh model's."""
    for index, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 17 + index)
    return model


def assert_equal(model: nn.Module, reference: nn.Module) -> None:
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def save(state: Any, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def reference_names(blocks: int) -> list[str]:
    """What the authors' and TRADES' WideResNet calls its tensors, written out by hand."""
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight"]
    for stage in (1, 2, 3):
        for i in range(blocks):
            at = f"block{stage}.layer.{i}"
            names += [f"{at}.bn1.{key}" for key in bn] + [f"{at}.conv1.weight"]
            names += [f"{at}.bn2.{key}" for key in bn] + [f"{at}.conv2.weight"]
            names += [f"{at}.convShortcut.weight"] if i == 0 else []
    return [*names, *(f"bn1.{key}" for key in bn), "fc.weight", "fc.bias"]


def swish_reference_names(blocks: int) -> list[str]:
    """What DM-AT's and RobustBench's network calls its tensors, written out by hand."""
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["init_conv.weight"]
    for stage in (0, 1, 2):
        for i in range(blocks):
            at = f"layer.{stage}.block.{i}"
            names += [f"{at}.batchnorm_0.{key}" for key in bn] + [f"{at}.conv_0.weight"]
            names += [f"{at}.batchnorm_1.{key}" for key in bn] + [f"{at}.conv_1.weight"]
            names += [f"{at}.shortcut.weight"] if i == 0 else []
    return [*names, *(f"batchnorm.{key}" for key in bn), "logits.weight", "logits.bias"]


@pytest.mark.parametrize(
    ("name", "names"),
    [("wrn_34_10", reference_names(5)), ("wrn_28_10_swish", swish_reference_names(4))],
)
def test_published_parameter_names(name: str, names: list[str]) -> None:
    with torch.device("meta"):
        assert sorted(gkl.models.create(name, num_classes=100).state_dict()) == sorted(names)


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("network", [WideResNet, SwishWideResNet])
def test_published_layouts_load(
    network: type[nn.Module], parallel: bool, wrapper: str, tmp_path: Path
) -> None:
    source = trained(network(10, 1, num_classes=10))
    state = (nn.DataParallel(nn.Sequential(source)) if parallel else source).state_dict()
    assert all(key.startswith("module.0.") for key in state) == parallel
    model = network(10, 1, num_classes=10)
    report = load_checkpoint(model, save(WRAPPED[wrapper](state), tmp_path))
    assert_equal(model, source)
    assert report.fits and len(report.matched) == len(source.state_dict()) and not report.missing
    assert report.wrapper == (None if wrapper == "plain" else wrapper)
    assert str(report).startswith(f"{len(state)} of the model's {len(state)} tensors matched")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."]
)
def test_prefixes_are_stripped(prefix: str, tmp_path: Path) -> None:
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    load_checkpoint(
        model, save({prefix + key: value for key, value in source.state_dict().items()}, tmp_path)
    )
    assert_equal(model, source)


def test_a_model_whose_own_names_look_like_prefixes(tmp_path: Path) -> None:
    source = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    load_checkpoint(model, save(source.state_dict(), tmp_path))
    assert_equal(model, source)


def test_spare_first_stage_is_left_out_and_reported(tmp_path: Path) -> None:
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    state = source.state_dict()
    state |= {f"sub_{key}": value + 1 for key, value in state.items() if key.startswith("block1.")}
    report = load_checkpoint(model, save({f"module.{key}": value for key, value in state.items()}, tmp_path))
    assert_equal(model, source)
    assert len(report.unused) == 12 and all(name.startswith("sub_block1.") for name in report.unused)
    assert "12 unused and left out (sub_block1.layer.0.bn1.weight" in str(report)


def test_a_second_batch_norm_of_advprop_s_is_left_out_and_reported(tmp_path: Path) -> None:
    """timm's own split network, whose eval mode has the first set alone."""
    source = timm.create_model("resnet10t", num_classes=10)
    split = trained(timm.layers.convert_splitbn_model(source, 2)).eval()
    model = create("resnet10t", 10, normalisation="none").eval()
    report = load_checkpoint(model, save(split.state_dict(), tmp_path))
    assert report.fits and "unused and left out (conv1.1.aux_bn" in str(report)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), split(x))


@pytest.mark.parametrize("name", ["aux1.fc2.weight", "AuxLogits.conv0.conv.weight"])
def test_further_heads_of_a_training_are_left_out_and_reported(name: str, tmp_path: Path) -> None:
    """As torchvision's GoogLeNet and Inception have them: their eval mode does not compute them."""
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    report = load_checkpoint(model, save(source.state_dict() | {name: torch.rand(10, 64)}, tmp_path))
    assert report.fits and f"1 unused and left out ({name})" in str(report)
    assert_equal(model, source)


def test_a_second_batch_norm_of_dajat_s_is_left_out_and_reported(tmp_path: Path) -> None:
    source, model = trained(split_batch_norm(WideResNet(10, 1))).eval(), WideResNet(10, 1).eval()
    report = load_checkpoint(model, save(source.state_dict(), tmp_path))
    assert report.fits and "35 unused and left out (block1.layer.0.bn1.auxiliary.weight" in str(report)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), source(x))


def test_safetensors(tmp_path: Path) -> None:
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert_equal(model, source)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or no checkpoint"):
        load_checkpoint(model, tmp_path / "model.safetensors")


def test_batch_counters_may_be_floats_or_missing(tmp_path: Path) -> None:
    """Averaged by the authors' script a counter is a float; files of torch before 0.4.1 have none."""
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    state = source.state_dict()
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    load_checkpoint(model, save(state | {key: state[key] + 0.25 for key in counters}, tmp_path))
    assert_equal(model, source)
    model = WideResNet(10, 1)
    report = load_checkpoint(model, save({k: v for k, v in state.items() if k not in counters}, tmp_path))
    assert report.fits and sorted(report.missing) == sorted(counters)
    assert torch.equal(model.fc.weight, source.fc.weight) and model.bn1.num_batches_tracked == 0


def changed(state: dict[str, Tensor], **new: Tensor | None) -> dict[str, Tensor]:
    state = state | {key.replace("__", "."): value for key, value in new.items()}
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (
            lambda s: WideResNet(10, 1, 100).state_dict(),
            "which has 10 classes and the file 100.*2 of another shape",
        ),
        (
            lambda s: WideResNet(10, 2, 10).state_dict(),
            "being of another architecture, depth or width.*of another shape",
        ),
        (lambda s: WideResNet(16, 1, 10).state_dict(), "36 not in the model .block1.layer.1.bn1.weight"),
        (lambda s: SwishWideResNet(10, 1).state_dict(), "0 of the model's 46 tensors matched"),
        (
            lambda s: changed(s, fc__bias=None),
            "45 of the model's 46 tensors matched; 1 missing in the file .fc.bias",
        ),
        (
            lambda s: (
                {f"base_model.model.{k}": v for k, v in s.items()}
                | {"base_model.model.fc.lora_A.default.weight": torch.ones(2, 64)}
            ),
            "holding LoRA's factors apart from the weights; merge them",
        ),
        (lambda s: changed(s, bn1__running_var=None), "1 missing in the file .bn1.running_var"),
        (lambda s: changed(s, mean=torch.zeros(3)), "1 not in the model .mean"),
        (  # a head of Sequential(Dropout, Linear, Norm)
            lambda s: (
                {key.replace("fc.", "fc.1."): value for key, value in s.items()}
                | {"fc.2.weight": torch.ones(10)}
            ),
            r"or a file that builds it, model=net\.py:Net.*not in the model .fc\.1\.weight",
        ),
        (
            lambda s: changed(s, fc__weight=torch.zeros(10, 65)),
            r"fc.weight: \(10, 65\) in the file, \(10, 64\) in",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_the_model_left_alone(file: Any, told: str, tmp_path: Path) -> None:
    model = trained(WideResNet(10, 1, num_classes=10))
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointMismatch, match=told) as caught:
        load_checkpoint(model, save(file(WideResNet(10, 1).state_dict()), tmp_path))
    assert "\n" not in str(caught.value) and "model.pt" in str(caught.value)
    assert not caught.value.report.fits
    assert_equal(model, before)


def test_the_report_of_an_error_has_every_name(tmp_path: Path) -> None:
    path = save(WideResNet(16, 1).state_dict(), tmp_path)
    with pytest.raises(CheckpointMismatch) as caught:
        load_checkpoint(WideResNet(10, 1), path)
    assert len(caught.value.report.unexpected) == 36 and " and 32 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(2)], "but list"),
        (torch.zeros(2), "but Tensor"),
        ({}, "but an empty dict"),
        ({"state_dict": {}}, "but a dict of state_dict"),
        ({"task": {"model": {}}, "position": {}}, "but a dict of task, position"),
        ({"conv1.weight": torch.zeros(2), "epoch": 3}, "but a dict of conv1.weight, epoch"),
    ],
)
def test_files_without_a_state_dict(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"holds no state dict .*{told}"):
        load_checkpoint(WideResNet(10, 1), save(content, tmp_path))


def test_two_networks_in_one_file(tmp_path: Path) -> None:
    state = WideResNet(10, 1).state_dict()
    with pytest.raises(
        ValueError,
        match="holds several networks .conv1.weight twice.*; the one without it has to be saved by itself",
    ):
        load_checkpoint(
            WideResNet(10, 1), save(state | {f"model.{k}": v for k, v in state.items()}, tmp_path)
        )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("harm", ["cut", "half", "empty", "text"])
def test_damaged_files(harm: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(WideResNet(10, 1).state_dict(), path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    damaged = {
        "cut": whole[:-64],
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"<html>Quota exceeded",
    }
    path.write_bytes(damaged[harm])
    model = trained(WideResNet(10, 1))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="model.pt is damaged or no checkpoint") as caught:
        load_checkpoint(model, path)
    assert "\n" not in str(caught.value)
    assert_equal(model, before)


def test_a_flipped_bit_among_the_weights_is_seen(tmp_path: Path) -> None:
    model = WideResNet(10, 1)
    path = save(model.state_dict(), tmp_path)
    data = bytearray(path.read_bytes())
    data[data.find(model.fc.weight.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or no checkpoint .the checksum of .* is wrong"):
        load_checkpoint(model, path)


class Bomb:
    """Unpickled the careless way it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(legacy: bool, tmp_path: Path) -> None:
    path, trap = tmp_path / "model.pt", tmp_path / "trap"
    content = {"state_dict": WideResNet(10, 1).state_dict(), "extra": Bomb(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="holds Python objects .*mkdir.* that could run code") as caught:
        load_checkpoint(WideResNet(10, 1), path)
    assert not trap.exists() and "\n" not in str(caught.value)
    torch.load(path, weights_only=False)  # the trap is one
    assert trap.exists()


@pytest.mark.parametrize("extra", [nn.Linear(2, 2), Fraction(1, 2)], ids=["module", "fraction"])
def test_objects_in_a_file_are_refused_by_name(extra: Any, tmp_path: Path) -> None:
    path = save({"state_dict": WideResNet(10, 1).state_dict(), "extra": extra}, tmp_path)
    with pytest.raises(
        ValueError, match=rf"holds Python objects .*{type(extra).__name__}.*save its state dict"
    ):
        load_checkpoint(WideResNet(10, 1), path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_checkpoint(WideResNet(10, 1), path)


# --- as other trainings save ------------------------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def robustness(state: dict[str, Tensor]) -> dict[str, Any]:
    """The robustness library's: the network and its normaliser, and both again inside the attack."""
    shape = (3, 1, 1)
    return {
        "model": {
            **{f"module.normalizer.new_{n}": t.view(shape) for n, t in (("mean", MEAN), ("std", STD))},
            **under("module.model.", state),
            **{
                f"module.attacker.normalize.new_{n}": t.view(shape) for n, t in (("mean", MEAN), ("std", STD))
            },
            **under("module.attacker.model.", state),
        },
        "epoch": 3,
    }


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    metrics = {"train_acc.tp": torch.zeros(10, dtype=torch.int64), "val_loss.mean_value": torch.tensor(0.3)}
    return {
        "state_dict": {**under("model.", state), **metrics, "criterion.weight": torch.ones(10)},
        "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.99)},
        "pytorch-lightning_version": "2.1.0",
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}}],
    }


def sequential(state: dict[str, Tensor]) -> dict[str, Any]:
    """RobustBench's normalised networks."""
    return {**under("1.", state), "0.mean": MEAN, "0.std": STD}


def buffers(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        **under("module.", state),
        "module.mu": MEAN.view(1, 3, 1, 1),
        "module.sigma": STD.view(1, 3, 1, 1),
    }


def averaged(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"n_averaged": torch.tensor(7), **under("module.", state)}


def compiled_inside(state: dict[str, Tensor]) -> dict[str, Any]:
    return {f"net._orig_mod.module.{k}".replace("layer.", "layer._orig_mod."): v for k, v in state.items()}


def parameters_of_wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    """named_parameters() and named_buffers(), which an average kept by hand is made of: their names, unlike state_dict()'s, have these."""
    wrapped = {k.replace("layer.", "layer._checkpoint_wrapped_module."): v for k, v in state.items()}
    return under("_fsdp_wrapped_module.", wrapped)


AS_SAVED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], bool]] = {
    "sequential": (sequential, True),
    "buffers": (buffers, True),
    "robustness": (robustness, True),
    "lightning": (lightning, False),
    "averaged": (averaged, False),
    "averaged in a module": (lambda s: under("ema.", averaged(s)), False),
    "compiled inside": (compiled_inside, False),
    "parameters of wrapped modules": (parameters_of_wrapped, False),
    **{f"{p}*": (lambda s, p=p: under(p, s), False) for p in ("net.", "backbone.", "encoder.net.0.", "module.model.1.")},
}  # fmt: skip


@pytest.mark.parametrize("layout", AS_SAVED)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_others_save_loads_with_its_normalisation(layout: str, suffix: str, tmp_path: Path) -> None:
    """The file's network, pictures normalised as it does, is what the model computes afterwards."""
    made, normalised = AS_SAVED[layout]
    source, model = WideResNet(10, 1, num_classes=10).eval(), WideResNet(10, 1, num_classes=10).eval()
    content = made(source.state_dict())
    if suffix == ".safetensors":
        content = content.get("state_dict", content.get("model", content))
        save_file({k: v.clone() for k, v in content.items()}, tmp_path / "model.safetensors")
    else:
        save(content, tmp_path)
    report = load_checkpoint(model, tmp_path / f"model{suffix}")
    assert len(report.matched) == len(source.state_dict()) and report.fits
    x = torch.rand(2, 3, 8, 8)
    wanted = (x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1) if normalised else x
    assert torch.equal(model(x), source(wanted))
    assert (
        "normalised by the file's mean (0.4, 0.5, 0.6) and std (0.2, 0.25, 0.3)" in str(report)
    ) == normalised


@pytest.mark.parametrize("kind", ["timm", "torchvision", "numpy", "lightning"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_settings_and_numbers_beside_the_weights_are_not_made(
    kind: str, legacy: bool, tmp_path: Path
) -> None:
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    state = source.state_dict()
    args = argparse.Namespace(lr=0.1, output=tmp_path, classes=[1, 2], scores=np.arange(3.0))
    content = {
        "timm": {"epoch": 3, "arch": "wrn", "state_dict": state, "args": args, "metric": np.float64(31.5)},
        "torchvision": {"model": state, "lr_scheduler": {"last_epoch": 3}, "args": args},
        "numpy": {"net": state, "acc": np.float32(90.0), "history": np.ones((2, 2)), "best": defaultdict(list, a=[1])},
        "lightning": {"state_dict": state, "hyper_parameters": argparse.Namespace(path=Path("x"), other=object())},
    }[kind]  # fmt: skip
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    load_checkpoint(model, tmp_path / "model.pt")
    assert_equal(model, source)


class Making:
    """An object of a class that a placeholder stands for, if it were made."""

    def __reduce__(self) -> Any:
        return np.save, (str(Path(os.environ["TRAP"])), np.zeros(1))


def test_a_function_of_numpy_in_a_file_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "trap.npy"))
    path = save({"model": WideResNet(10, 1).state_dict(), "extra": Making()}, tmp_path)
    load_checkpoint(WideResNet(10, 1), path)
    assert not (tmp_path / "trap.npy").exists()
    torch.load(path, weights_only=False)  # the trap is one
    assert (tmp_path / "trap.npy").exists()


@pytest.mark.parametrize(
    ("key", "other"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema.net")]
)
def test_of_weights_and_their_average_the_weights_unless_asked(key: str, other: str, tmp_path: Path) -> None:
    source, average = trained(WideResNet(10, 1)), WideResNet(10, 1)
    outer, _, inner = other.partition(".")
    second: Any = averaged(average.state_dict())
    path = save({key: source.state_dict(), outer: {inner: second} if inner else second}, tmp_path)
    model = WideResNet(10, 1)
    report = load_checkpoint(model, path)
    assert_equal(model, source)
    assert f"found under '{key}' and not '{other}', which checkpoint_key=... takes" in str(report)
    report = load_checkpoint(model, path, other)
    assert_equal(model, average)
    assert f"found under '{other}' and not '{key}'" in str(report)


def test_a_key_reaches_into_the_names_of_a_state_dict(tmp_path: Path) -> None:
    """A module that trains one network beside another: neither is taken unasked."""
    student, teacher = trained(WideResNet(10, 1)), WideResNet(10, 1)
    both = under("module.student.", student.state_dict()) | under("module.teacher.", teacher.state_dict())
    path = save({"state_dict": both}, tmp_path)
    model = WideResNet(10, 1)
    told = r"several networks \(conv1.weight twice\); say which: checkpoint_key=state_dict.student or checkpoint_key=state_dict.teacher$"
    with pytest.raises(ValueError, match=told):
        load_checkpoint(model, path)
    load_checkpoint(model, path, "state_dict.student")
    assert_equal(model, student)


@pytest.mark.parametrize(
    ("content", "key", "told"),
    [
        ({"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}}, None, "several state dicts .a, b.; say which: checkpoint_key=a"),
        ({"model": {"x": torch.ones(1)}}, "ema", "no state dict under checkpoint_key=ema; it holds model"),
        ({"x": torch.ones(1)}, "ema", "no state dict under checkpoint_key=ema; its tensors lie under no key"),
    ],
)  # fmt: skip
def test_a_key_that_is_needed_or_is_not_there(content: Any, key: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        load_checkpoint(WideResNet(10, 1), save(content, tmp_path), key)


@pytest.mark.parametrize("place", ["head.weight", "model.head.weight", "model.fc2.weight"])
def test_a_layer_more_is_not_another_architecture_and_not_left_out(place: str, tmp_path: Path) -> None:
    """Every tensor has its place, and yet the file's network computes something else."""
    state = under("model.", WideResNet(10, 1).state_dict()) | {place: torch.ones(10, 10)}
    with pytest.raises(CheckpointMismatch, match="46 of the model's 46") as caught:
        load_checkpoint(WideResNet(10, 1), save(state, tmp_path))
    assert "which is all there, with more around it that the model has not" in str(caught.value)
    assert "architecture" not in str(caught.value)


@pytest.mark.parametrize("asked", ["cifar10", "none", {"mean": [0.1] * 3, "std": [0.2] * 3}])
def test_a_normalisation_other_than_the_file_s_is_refused(asked: Any, tmp_path: Path) -> None:
    path = save(sequential(create("wrn_10_1", 10).state_dict()), tmp_path)
    with pytest.raises(
        CheckpointMismatch, match=r"normalises its pictures by mean \(0.4, 0.5, 0.6\)"
    ) as caught:
        load_checkpoint(create("wrn_10_1", 10, asked), path)
    assert "\n" not in str(caught.value) and "leave model.normalisation out, or give the file's" in str(
        caught.value
    )
    own = {"mean": MEAN.tolist(), "std": STD.tolist()}
    assert load_checkpoint(create("wrn_10_1", 10, own), path).fits


def test_a_normalisation_that_the_model_cannot_take_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    path = save(under("net.", model.state_dict()) | {"mu": MEAN, "sigma": STD}, tmp_path)
    with pytest.raises(
        CheckpointMismatch, match="normalises its pictures by .* and the Sequential here nothing"
    ):
        load_checkpoint(model, path)


def test_timm_s_network_takes_on_the_file_s_normalisation(tmp_path: Path) -> None:
    source, model = create("resnet10t", 10).eval(), create("resnet10t", 10).eval()
    load_checkpoint(model, save(sequential(source.model.state_dict()), tmp_path))  # type: ignore[operator, union-attr]
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), source((x - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)))
    assert isinstance(model.normalise, Normalise)


def test_a_training_may_begin_with_another_number_of_classes(tmp_path: Path) -> None:
    """All but the head is the file's, the head stays as it was initialised; and this is said."""
    source, path = trained(WideResNet(10, 1, num_classes=100)), tmp_path / "model.pt"
    save({"state_dict": source.state_dict()}, tmp_path)
    torch.manual_seed(0)
    fresh = create("wrn_10_1", 7)
    torch.manual_seed(0)
    model = create("wrn_10_1", 7, checkpoint=str(path))
    for name, tensor in model.state_dict().items():
        wanted = fresh if name.startswith("fc.") else source
        assert torch.equal(tensor, wanted.state_dict()[name]), name
    assert "44 of the model's 46 tensors matched" in model.__dict__["begun"]
    assert "2 of the head made anew, as the file's is another (fc.weight, fc.bias)" in model.__dict__["begun"]
    with pytest.raises(CheckpointMismatch, match="which has 7 classes and the file 100"):
        load_checkpoint(create("wrn_10_1", 7), path)


def test_a_training_begins_from_the_same_architecture_and_the_file_it_was_given(tmp_path: Path) -> None:
    path = save(WideResNet(16, 1, num_classes=100).state_dict(), tmp_path)
    with pytest.raises(CheckpointMismatch, match="another architecture"):
        create("wrn_10_1", 7, checkpoint=str(path))
    save(WideResNet(10, 1, num_classes=7).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="model.pt has changed since the run was started with it"):
        create("wrn_10_1", 7, checkpoint=str(path), checkpoint_sha256="0" * 64)


@pytest.mark.parametrize("stem", ["prior.", "gkl_terms.prior.", "network.prior.", ""])
def test_a_class_prior_beside_the_network_is_of_the_training(stem: str, tmp_path: Path) -> None:
    """As docs/using-the-loss.md has it among a model's modules."""
    model = create("wrn_10_1", 10)
    state = {f"network.{name}": tensor for name, tensor in model.state_dict().items()}
    prior = {f"{stem}{name}": tensor for name, tensor in ClassPrior(10).state_dict().items()}
    report = load_checkpoint(model, save(state | prior, tmp_path))
    assert report.fits and {*report.beside} == {*prior}
    prior[f"{stem}counts"] = torch.zeros(3)  # no prior's
    with pytest.raises(
        CheckpointMismatch, match=r"more around it .*; if that is no part .*, checkpoint_key=network: "
    ):
        load_checkpoint(model, save(state | prior, tmp_path))
    if stem != "network.prior.":
        assert load_checkpoint(model, tmp_path / "model.pt", "network").fits


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_normalisation_of_one_number_is_all_channels(shape: tuple[int, ...], tmp_path: Path) -> None:
    """As for grey pictures, and (x - 0.5) / 0.25: left out as a counter it would be another function."""
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    one = {"0.mean": torch.full(shape, 0.5), "0.std": torch.full(shape, 0.25)}
    told = str(load_checkpoint(model, save(under("1.", source.state_dict()) | one, tmp_path)))
    assert "normalised by the file's mean (0.5, 0.5, 0.5) and std (0.25, 0.25, 0.25)" in told
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.eval()(x), source.eval()((x - 0.5) / 0.25))


@pytest.mark.parametrize("name", ["temperature", "0.weight", "net_scale"])
def test_a_single_weight_outside_the_network_is_no_counter(name: str, tmp_path: Path) -> None:
    """A PReLU or a learned scale around the network: without it the function is another."""
    state = under("1.", WideResNet(10, 1).state_dict()) | {name: torch.tensor([0.25])}
    with pytest.raises(
        CheckpointMismatch, match=f"more around it that the model has not.*1 not in the model .{name}"
    ):
        load_checkpoint(WideResNet(10, 1), save(state, tmp_path))


def test_a_training_that_begins_from_a_normalised_file_must_say_so(tmp_path: Path) -> None:
    """The weights it ends with do not hold the normalisation: measured by its configuration they would be another function."""
    path = save(sequential(trained(WideResNet(10, 1)).state_dict()), tmp_path)
    with pytest.raises(
        ValueError, match="must say so.*model.normalisation={mean:.0.4,0.5,0.6.,std:.0.2,0.25,0.3.}"
    ):
        create("wrn_10_1", 10, checkpoint=str(path))
    own = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    assert "46 of the model's 46" in create("wrn_10_1", 10, own, checkpoint=str(path)).__dict__["begun"]


@pytest.mark.parametrize("classes", [10, 4])
def test_positions_of_another_picture_size_are_told_with_what_to_do(classes: int, tmp_path: Path) -> None:
    small = {"depth": 1, "embed_dim": 12, "num_heads": 1, "patch_size": 8}
    network = create("vit_tiny_patch16_224", classes, timm_options={**small, "img_size": 64})
    path = save(network.state_dict(), tmp_path)
    with pytest.raises(
        ValueError, match=r"another size; give .*model.timm_options=.*data.image_size=.*pos_embed: \(1, 65"
    ) as told:
        create("vit_tiny_patch16_224", 10, timm_options={**small, "img_size": 32}, checkpoint=str(path))
    assert "another architecture" not in str(told.value)


@pytest.mark.parametrize("option", [{"pretrained": True}, {"checkpoint_path": "f.pt"}])
def test_weights_that_a_run_is_not_known_by_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match="a run would not be known by; name their file: model.checkpoint=FILE"
    ):
        create("resnet10t", 10, timm_options=option)


def test_parts_among_lightning_s_hyper_parameters_are_not_made(tmp_path: Path) -> None:
    """Optimizers to be made, schedules, losses: save_hyperparameters keeps what a module was made from."""
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    parts = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
        "scheduler": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        "criterion": nn.CrossEntropyLoss(weight=torch.ones(10)),
    }
    content = {"state_dict": under("model.", source.state_dict()), "hyper_parameters": parts}
    assert load_checkpoint(model, save(content, tmp_path)).fits
    assert_equal(model, source)
    read = checkpoint_files.read(tmp_path / "model.pt")["hyper_parameters"]
    assert all(isinstance(part, checkpoint_files.Placeholder) for part in read.values())


def test_a_device_that_fails_at_a_file_s_end_is_no_damage(tmp_path: Path) -> None:
    class Failing(io.BytesIO):
        """Its last kilobyte cannot be read."""

        def read(self, size: int | None = -1) -> bytes:
            end = len(self.getvalue()) if size is None or size < 0 else self.tell() + size
            if end > len(self.getvalue()) - 1024:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    torch.save({"weight": torch.zeros(9000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    assert archive_damage(io.BytesIO(whole)) is None
    assert archive_damage(io.BytesIO(whole[:-1024]))
    with pytest.raises(OSError, match="Input/output error"):
        archive_damage(Failing(whole))
    (tmp_path / "whole.pt").write_bytes(whole[:-1024])
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        read(tmp_path / "whole.pt")


def with_nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nan
    return changed


@pytest.mark.parametrize(
    "change, message",
    [
        (with_nan, "fc.bias holds NaN or infinite numbers: the training that saved it had failed"),
        (lambda t: t / 0, "fc.bias holds NaN or infinite numbers"),
        (lambda t: (100 * t).to(torch.int8), "fc.bias is int8 and the model's torch.float32, so that its scale is lost"),
        (lambda t: t.to(torch.complex64), "fc.bias is complex64 and the model's"),
        (lambda t: t.to_sparse(), "fc.bias is a torch.sparse_coo tensor without plain numbers"),
        (lambda t: t.to("meta"), "fc.bias is a meta tensor without plain numbers"),
    ],
    ids=["nan", "infinite", "int8", "complex", "sparse", "meta"],
)  # fmt: skip
def test_numbers_that_a_network_cannot_compute_with_are_refused(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    """Once argmax of NaN was class 0, and what was left of quantised weights without their scale was measured."""
    state = trained(create("wrn_10_1", 10)).state_dict()
    torch.save(state | {"fc.bias": change(state["fc.bias"] + 1.0)}, tmp_path / "f.pt")
    model = create("wrn_10_1", 10)
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointMismatch, match=re.escape(message)):
        load_checkpoint(model, tmp_path / "f.pt")
    assert_equal(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    state = create("wrn_10_1", 10).state_dict()
    torch.save({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, tmp_path / "f.pt")
    assert load_checkpoint(create("wrn_10_1", 10), tmp_path / "f.pt").fits


@pytest.mark.parametrize(
    "content, why",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a pointer of Git LFS: git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "it is a web page"),
        (b"\0\1\2\3 weights", "torch.save did not write it"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoints_are_called_what_they_are(
    content: bytes, why: str, tmp_path: Path
) -> None:
    """And torch's advice, to load them unsafely, is not handed on."""
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"f.pt is damaged or no checkpoint ({why}")) as refused:
        read(tmp_path / "f.pt")
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "write", "told"),
    [
        ("w.npz", lambda p: np.savez(p, weight=np.zeros(3)), r"w.npz is an archive of numpy's; save .*torch.from_numpy"),
        ("w.npy", lambda p: np.save(p, np.zeros(3)), r"w.npy is one array of numpy's; save all .*torch.from_numpy"),
        ("w.pt.gz", lambda p: p.write_bytes(b"\x1f\x8b\x08\x00 rest"), r"w.pt.gz is packed by gzip; unpack it"),
        (
            "w.pt2",
            lambda p: torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), p),
            r"w.pt2 is a program of torch.export; save its weights",
        ),
    ],
)  # fmt: skip
def test_other_tools_files_are_whole_and_told_how_they_come_here(
    name: str, write: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    """They were called damaged, to be downloaded again."""
    write(tmp_path / name)
    with pytest.raises(ValueError, match=told) as refused:
        read(tmp_path / name)
    assert "damaged" not in str(refused.value) and "\n" not in str(refused.value)


def test_safetensors_are_read_whatever_they_are_called(tmp_path: Path) -> None:
    state = create("wrn_10_1", 10).state_dict()
    save_file(state, tmp_path / "pytorch_model.bin")
    assert load_checkpoint(create("wrn_10_1", 10), tmp_path / "pytorch_model.bin").fits


def test_two_layers_that_normalise_are_not_taken_for_one(tmp_path: Path) -> None:
    """Of one statistics, they were once one layer; the robustness library's two names of one layer still are."""
    state = create("wrn_10_1", 10).state_dict()
    pair = {"mean": MEAN, "std": STD}
    layers = {f"{at}.{name}": value for at in ("0", "1.0") for name, value in pair.items()}
    path = save({f"1.1.{name}": value for name, value in state.items()} | layers, tmp_path)
    with pytest.raises(CheckpointMismatch, match="normalises its pictures twice, one layer after the other"):
        load_checkpoint(create("wrn_10_1", 10), path)
    path = save(robustness(state), tmp_path)
    assert load_checkpoint(create("wrn_10_1", 10), path).normalised


@pytest.mark.parametrize("place", ["hyper_parameters", "config", "mean and std beside the weights"])
def test_a_normalisation_among_the_settings_is_told(place: str, tmp_path: Path) -> None:
    pair = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    beside: dict[str, Any] = (
        {place: pair} if " " not in place else {n: torch.tensor(v) for n, v in pair.items()}
    )
    path = save({"state_dict": create("wrn_10_1", 10).state_dict(), **beside}, tmp_path)
    told = "its settings name mean (0.5, 0.5, 0.5) and std (0.25, 0.25, 0.25), by which nothing is normalised here"
    assert told in str(load_checkpoint(create("wrn_10_1", 10), path))
    assert told not in str(load_checkpoint(create("wrn_10_1", 10, normalisation=pair), path))


def test_a_torchscript_archive_is_told_how_its_weights_are_saved(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "f.pt")  # type: ignore[no-untyped-call]
    with pytest.raises(
        ValueError, match=r"f\.pt is a TorchScript archive.*torch\.jit\.load\(path\)\.state_dict"
    ):
        read(tmp_path / "f.pt")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
@pytest.mark.parametrize(
    "computed",
    [
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        torch.nn.utils.weight_norm,
        functools.partial(torch.nn.utils.weight_norm, dim=None),  # type: ignore[arg-type]
        torch.nn.utils.parametrizations.weight_norm,
        functools.partial(torch.nn.utils.parametrizations.weight_norm, dim=1),
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.spectral_norm,
    ],
)
def test_weights_that_are_computed_become_what_they_are(
    tmp_path: Path, computed: Callable[[nn.Module], Any], prefix: str
) -> None:
    """As torch's own modules have them in eval mode; what is no such weight stays an error."""
    torch.manual_seed(0)
    saved = create("wrn_10_1", num_classes=7).eval()
    for module in list(saved.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            computed(module)
    x = torch.rand(2, 3, 32, 32)
    saved.train()(x)  # power iterations and running statistics
    expected = saved.eval()(x)
    state = {prefix + name: tensor for name, tensor in saved.state_dict().items()}
    model = create("wrn_10_1", num_classes=7).eval()
    report = load_checkpoint(model, save(state, tmp_path))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(report.computed) == 10 and "10 computed from a mask, or from direction" in str(report)
    del state[next(name for name in state if name.endswith(("_mask", "_v", "original1")))]
    with pytest.raises(CheckpointMismatch):
        load_checkpoint(model, save(state, tmp_path))


class Around(nn.Module):
    """A network under a name of a person's own, behind what normalises."""

    def __init__(self, network: nn.Module, buffers: bool, mean: torch.Tensor = MEAN) -> None:
        super().__init__()
        self.n = network
        self.mean, self.std = mean.tolist(), STD.tolist()
        if buffers:
            del self.mean, self.std
            self.register_buffer("mean", mean.view(3, 1, 1))
            self.register_buffer("std", STD.view(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.as_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        logits: torch.Tensor = self.n((x - mean) / std)
        return logits


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "n.", "model.n."])
@pytest.mark.parametrize("buffers", [True, False])
def test_a_network_that_keeps_its_backbone_under_another_name_takes_the_backbone_s_file(
    prefix: str, buffers: bool, tmp_path: Path
) -> None:
    source, model = trained(WideResNet(10, 1)), OwnNetwork(Around(WideResNet(10, 1), buffers), 10)
    report = load_checkpoint(model, save(under(prefix, source.state_dict()), tmp_path))
    assert report.fits and len(report.matched) == len(source.state_dict())
    assert_equal(model.model.n, source)
    assert torch.equal(model.model.mean.flatten() if buffers else torch.tensor(model.model.mean), MEAN)
    assert type(model.normalise) is nn.Identity


def test_what_the_network_normalises_by_stays_where_the_file_has_none(tmp_path: Path) -> None:
    model = OwnNetwork(nn.Sequential(Around(WideResNet(10, 1), True), nn.Linear(10, 10)), 10)
    state = {n: t for n, t in model.model.state_dict().items() if n not in ("0.mean", "0.std")}
    report = load_checkpoint(model, save(state, tmp_path))
    assert report.fits and "by the network's own mean (0.4" in str(report)
    del state["0.n.conv1.weight"]
    with pytest.raises(CheckpointMismatch, match=r"1 missing in the file \(0.n.conv1.weight\)"):
        load_checkpoint(model, save(state, tmp_path))


@pytest.mark.parametrize("buffers", [True, False])
def test_a_file_s_normalisation_is_not_added_to_the_network_s_own(buffers: bool, tmp_path: Path) -> None:
    path = save(sequential(WideResNet(10, 1).state_dict()), tmp_path)
    model = OwnNetwork(Around(WideResNet(10, 1), buffers), 10)
    assert load_checkpoint(model, path).fits
    assert type(model.normalise) is nn.Identity
    other = OwnNetwork(Around(WideResNet(10, 1), buffers, MEAN / 2), 10)
    with pytest.raises(
        CheckpointMismatch, match=r"normalises its pictures by .*and the OwnNetwork here as mean"
    ):
        load_checkpoint(other, path)
    with pytest.raises(
        ValueError, match="Around normalises its pictures by .* itself.*leave one of them out"
    ):
        OwnNetwork(Around(WideResNet(10, 1), buffers), 10, "cifar10")


def moco(network: nn.Module) -> dict[str, Tensor]:
    """MoCo v2's file: two encoders, each with a projection in the head's place, and a queue."""
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).state_dict()
    encoder = {**state, **under("fc.", head)}
    other = {name: tensor + 1 for name, tensor in encoder.items()}
    return {
        **under("module.encoder_q.", encoder),
        **under("module.encoder_k.", other),
        "module.queue": torch.rand(16, 8),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }


@pytest.mark.parametrize("key", ["state_dict.module.encoder_q", "state_dict.encoder_q"])
def test_a_training_may_begin_from_a_self_supervised_one(key: str, tmp_path: Path) -> None:
    source = trained(WideResNet(10, 1))
    path = save({"state_dict": moco(source)}, tmp_path)
    with pytest.raises(
        ValueError, match="several networks.*say which: model.checkpoint_key=state_dict.encoder_q or"
    ):
        create("wrn_10_1", 7, checkpoint=str(path))
    model = create("wrn_10_1", 7, checkpoint=str(path), checkpoint_key=key)
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, source.state_dict()[name]), name
    said = model.__dict__["begun"]
    assert "44 of the model's 46 tensors matched" in said and "4 unused and left out (fc.0.weight" in said
    assert "2 of the head made anew, as the file's is another (fc.weight, fc.bias)" in said
    assert "pictures go in as they are, in [0, 1]; where its training normalised them, set model.norm" in said
    with pytest.raises(
        CheckpointMismatch, match="having another head, or none, in the place of fc: train one"
    ):
        load_checkpoint(create("wrn_10_1", 7), path, key)


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"projector.0.weight": torch.rand(3, 3)},
        {"mask_token": torch.rand(3), "decoder_embed.weight": torch.rand(3, 3)},
    ],
)
def test_a_training_may_begin_from_a_file_without_a_head(beside: dict[str, Tensor], tmp_path: Path) -> None:
    state = {n: t for n, t in WideResNet(10, 1).state_dict().items() if not n.startswith("fc.")}
    model = create("wrn_10_1", 7, checkpoint=str(save(under("backbone.", state) | beside, tmp_path)))
    assert "44 of the model's 46 tensors matched" in model.__dict__["begun"]
    deeper = state | {"block4.layer.0.conv1.weight": torch.rand(3, 3)}
    with pytest.raises(CheckpointMismatch, match="another architecture"):
        create("wrn_10_1", 7, checkpoint=str(save(deeper, tmp_path)))
    with pytest.raises(CheckpointMismatch, match="1 missing in the file .fc.bias"):
        create("wrn_10_1", 7, checkpoint=str(save(state | {"fc.weight": torch.rand(7, 64)}, tmp_path)))
    del state["conv1.weight"]
    with pytest.raises(CheckpointMismatch, match="another architecture"):
        create("wrn_10_1", 7, checkpoint=str(save(state, tmp_path)))


@pytest.mark.parametrize(
    "place", ["head.fc.", "linear.", "backbone.fc.1.", "classifier."]
)  # mmpretrain's, a linear evaluation's, behind a dropout
def test_a_head_outside_the_backbone_or_behind_a_dropout_is_the_head(place: str, tmp_path: Path) -> None:
    source, model = trained(WideResNet(10, 1)), WideResNet(10, 1)
    state = {f"backbone.{name}": tensor for name, tensor in source.state_dict().items()}
    moved = {f"{place}{name}": state.pop(f"backbone.fc.{name}") for name in ("weight", "bias")}
    report = load_checkpoint(model, save(state | moved, tmp_path))
    assert report.fits and f"2 of the head under other names ({place}weight, {place}bias)" in str(report)
    assert_equal(model, source)
    two = state | moved | {f"aux.{name.rpartition('.')[2]}": tensor for name, tensor in moved.items()}
    for other in (two, state | moved | {"neck.weight": torch.rand(64, 64)}):  # which, and of what
        with pytest.raises(CheckpointMismatch, match="another architecture"):
            load_checkpoint(WideResNet(10, 1), save(other, tmp_path))
    with pytest.raises(
        CheckpointMismatch, match="which has 7 classes and the file 10|another architecture|another head"
    ):
        load_checkpoint(WideResNet(10, 1, num_classes=7), save(state | moved, tmp_path))


def test_a_key_that_is_asked_for_is_called_as_the_training_calls_it(tmp_path: Path) -> None:
    path = save({"ema": WideResNet(10, 1).state_dict(), "online": WideResNet(10, 1).state_dict()}, tmp_path)
    with pytest.raises(ValueError, match=r"say which: model\.checkpoint_key=ema"):
        create("wrn_10_1", 10, checkpoint=str(path))
    with pytest.raises(ValueError, match=r"say which: checkpoint_key=ema"):
        load_checkpoint(WideResNet(10, 1), path)
