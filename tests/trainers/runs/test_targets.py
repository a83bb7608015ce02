"""What a configuration may build: names that stay when classes move, and nothing that configs/ does not name."""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainers.errors import ConfigError, RunError
from trainers.reports.release import pack
from trainers.runs import compose as compose_module
from trainers.runs import targets
from trainers.runs.__main__ import main
from trainers.runs.compose import compose, published
from trainers.runs.identity import config_hash, differences
from trainers.runs.paths import freeze
from trainers.runs.plan import row_config
from trainers.runs.records import read_record, read_records
from trainers.runs.settings import check
from trainers.runs.targets import CONFIGS, addresses, instantiate, locate

RECORDS = CONFIGS.parent / "results" / "runs"
EXPERIMENTS = (
    "at/c100_basic_gkl",
    "at/c10_las_at",
    "at/c100_dm_gkl",
    "kd/c100_gkl/vgg13_vgg8",
    "kd/strong_gkl/beitv2_resnet50",
)


def forget() -> None:
    """Nothing that was read from configs/ before is still known."""
    for remembered in (
        targets.addresses, targets._names, targets.parameters_of, compose_module._composed, compose_module.completed_by,
        compose_module.families,
    ):  # fmt: skip
        remembered.cache_clear()


@pytest.fixture
def other_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of configs/ that is taken for it."""
    copied = tmp_path / "configs"
    shutil.copytree(CONFIGS, copied)
    for module in (targets, compose_module):
        monkeypatch.setattr(module, "CONFIGS", copied)
    forget()
    yield copied
    monkeypatch.undo()
    forget()


def composed() -> dict[str, dict[str, Any]]:
    return {
        f"{experiment} {scale}": compose("train", [f"experiment={experiment}", f"scale={scale}", "epochs=7"])
        for experiment in EXPERIMENTS
        for scale in ("paper", "smoke")
    }


# --- names --------------------------------------------------------------------------------------------------------------


def test_every_name_leads_somewhere_and_no_two_to_the_same() -> None:
    """A class that two kinds named would have two names, and what it is called would hang on the order of files."""
    assert len(addresses()) > 50
    for name, address in addresses().items():
        made = locate(name)
        assert callable(made) and made.__name__ == address.rpartition(".")[2] == name.partition("/")[2]
    assert len(set(addresses().values())) == len(addresses())
    written = {
        address
        for path in CONFIGS.rglob("*.yaml")
        for address in re.findall(r"_target_: *(\S+)", path.read_text())
    }
    assert written == set(addresses().values())


def test_a_name_with_two_addresses_is_refused(other_configs: Path) -> None:
    other = (other_configs / "loss/kl.yaml").read_text().replace("gkl.losses.objectives.KL", "gkl.losses.KL")
    (other_configs / "loss/another_kl.yaml").write_text(other)
    with pytest.raises(ConfigError, match="configs/ gives loss/KL two addresses, .*; it needs one") as caught:
        addresses()
    assert "\n" not in str(caught.value)


def test_an_address_without_its_class_is_refused(other_configs: Path) -> None:
    path = other_configs / "loss/kl.yaml"
    path.write_text(path.read_text().replace("objectives.KL", "objectives.LK"))
    with pytest.raises(
        ConfigError, match="configs/ says that loss/LK is gkl.losses.objectives.LK, which does not exist"
    ):
        locate("loss/LK")


def test_classes_that_move_leave_every_hash_and_difference(
    other_configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every class and function that configs/ names in a module of another package, one after its kind."""
    before = composed()
    hashes = {name: config_hash(config) for name, config in before.items()}
    departed = {name: differences(published(config), config) for name, config in before.items()}
    records = {
        record["path"]: record
        for record in read_records(RECORDS / "at")
        if record["experiment"] in EXPERIMENTS
    }
    assert len(set(hashes.values())) == len(before) and all(departed.values()) and records

    package = tmp_path / "moved"
    package.mkdir()
    for name, address in addresses().items():
        kind, _, attribute = name.partition("/")
        with (package / f"{kind}.py").open("a") as file:
            file.write(f"from {address.rpartition('.')[0]} import {attribute}\n")
    for path in other_configs.rglob("*.yaml"):
        kind = path.relative_to(other_configs).parts[0]
        path.write_text(re.sub(r"(_target_: *)[\w.]+\.(\w+)", rf"\1moved.{kind}.\2", path.read_text()))
    monkeypatch.syspath_prepend(tmp_path)
    forget()

    assert all(address.startswith("moved.") for address in addresses().values())
    after = composed()
    assert after == before
    assert {name: config_hash(config) for name, config in after.items()} == hashes
    assert {name: differences(published(config), config) for name, config in after.items()} == departed
    assert {r["path"]: r for r in read_records(RECORDS / "at") if r["experiment"] in EXPERIMENTS} == records
    assert instantiate(after["at/c100_basic_gkl smoke"]["loss"]).gamma == 0.4
    assert {"moved.loss", "moved.method", "moved.data", "moved.distiller"} <= sys.modules.keys()
    for module in [name for name in sys.modules if name.partition(".")[0] == "moved"]:
        del sys.modules[module]


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "os.system",
        "trainers.runs.launchers.local.spawn",  # of ours, and of no file of configs/
        "gkl.losses.objectives.CrossEntropy",
        "gkl.losses.objectives.KLL",
        "GKL",
    ],
)
def test_an_address_that_no_file_names_is_refused_in_one_line(address: str) -> None:
    for words in (
        ["experiment=at/c100_basic_gkl", f"loss._target_={address}"],
        ["experiment=kd/c100_gkl/vgg13_vgg8", f"teacher.network._target_={address}"],
        ["experiment=at/c100_basic_gkl", f"+further={{deeper: [{{_target_: {address}}}]}}"],
    ):
        with pytest.raises(
            ConfigError, match=f"_target_ names '{re.escape(address)}'; a configuration"
        ) as caught:
            compose("train", words)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="_target_ names"):
        row_config(
            {"experiment": "at/c100_basic_gkl", "overrides": {"loss._target_": address}}, "smoke", "official"
        )


def test_an_address_that_a_file_names_is_its_name() -> None:
    words = ["experiment=at/c100_basic_gkl", "scale=smoke"]
    typed = compose("train", [*words, "attack_loss._target_=gkl.losses.objectives.GKL"])
    assert typed["attack_loss"]["_target_"] == "loss/GKL"
    assert config_hash(typed) == config_hash(compose("train", words))


def spoilt_data(config: dict[str, Any], target: str, trace: Path) -> None:
    config["data"] = {"_target_": target, "command": f"touch {trace}"}


def spoilt_launcher(config: dict[str, Any], target: str, trace: Path) -> None:
    config["launcher"] = {"_target_": target, "command": f"touch {trace}"}


def spoilt_assessment(config: dict[str, Any], target: str, trace: Path) -> None:
    config["assessment"] = {"_target_": target, "name": "attacks", "command": f"touch {trace}"}


def spoilt_part(config: dict[str, Any], target: str, trace: Path) -> None:
    config["loss"]["further"] = [{"_target_": target, "command": f"touch {trace}"}]


@pytest.mark.parametrize("spoil", [spoilt_data, spoilt_launcher, spoilt_assessment, spoilt_part])
@pytest.mark.parametrize(
    "target", ["trainers.runs.launchers.local.spawn", "os.system", "subprocess.getoutput", "loss/os.system", "data/nothing"]
)  # fmt: skip
def test_a_frozen_configuration_with_another_target_runs_nothing(
    target: str, spoil: Callable[..., None], tmp_path: Path
) -> None:
    trace = tmp_path / "ran"
    config = compose(
        "train",
        ["experiment=at/c100_basic_gkl", "scale=smoke", "device=cpu", "logger=off", f"paths.outputs={tmp_path}/outputs",
         f"paths.results={tmp_path}/results"],
    )  # fmt: skip
    path = freeze(config)
    spoil(config, target, trace)
    OmegaConf.save(OmegaConf.create(config), path)
    with pytest.raises(
        RunError, match=f"'{re.escape(target)}' is nothing that a configuration may build"
    ) as error:
        main([str(path)])
    assert "\n" not in str(error.value)
    assert not trace.exists() and not list(tmp_path.rglob("*.pt")) and not (tmp_path / "results").exists()


@pytest.mark.parametrize("target", ["trainers.runs.launchers.local.spawn", "os.system", "loss/nothing"])
def test_a_record_with_another_target_is_refused_and_named(target: str, tmp_path: Path) -> None:
    whole = next(RECORDS.glob("at/c100_basic_gkl/smoke/*/seed0.json"))
    record, trace = json.loads(whole.read_text()), tmp_path / "ran"
    record["config"]["loss"] = {"_target_": target, "command": f"touch {trace}"}
    path = tmp_path / "seed0.json"
    path.write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match=rf"record .*seed0\.json is damaged: '{re.escape(target)}' is nothing that"
    ) as error:
        read_record(path)
    assert "\n" not in str(error.value) and not trace.exists()
    assert read_record(whole)["config"]["loss"]["_target_"] == "loss/GKL"
    with pytest.raises(ValueError, match="is nothing that a configuration may build"):
        pack(path, tmp_path, tmp_path / "release")
    taught = compose("train", ["experiment=kd/c100_kd/resnet56_resnet20", "scale=smoke"])["teacher"]
    with pytest.raises(ValueError, match="is nothing that a configuration may build"):
        instantiate({**taught, "record": str(path), "outputs": str(tmp_path)}).load(10)
    assert not trace.exists() and not (tmp_path / "release").exists()


# --- defaults -------------------------------------------------------------------------------------------------------------

BASE = ["experiment=at/c100_basic_gkl", "scale=smoke"]
# dotted setting, its default, another value: of parts of every depth, and of the training itself
DEFAULTS = [
    ("method.clean_first", False, True),
    ("method.label_smoothing", 0.0, 0.1),
    ("loss.break_asymmetry", True, False),
    ("augment.border", "black", "reflect"),
    ("attack.start_std", 0.001, None),  # null is a value like any other where it is not the default
    ("optimizer.decay_batch_norm", True, False),
    ("held_out", 0.0, 0.02),
    ("held_out_by_class", False, True),
    ("momentum", None, {"_target_": "schedule/one_cycle", "_partial_": True, "start": 1.0}),
]


def changed(config: dict[str, Any], dotted: str, *value: Any) -> dict[str, Any]:
    """A copy with a setting of another value, or without it."""
    made = copy.deepcopy(config)
    *sections, last = dotted.split(".")
    node = made
    for section in sections:
        node = node[section]
    node.pop(last, None)
    if value:
        (node[last],) = value
    return made


@pytest.mark.parametrize(("dotted", "default", "other"), DEFAULTS)
def test_a_default_is_the_same_run_whether_it_is_said_or_not(dotted: str, default: Any, other: Any) -> None:
    config = compose("train", BASE)
    said, unsaid, moved = (changed(config, dotted, *value) for value in ((default,), (), (other,)))
    assert config_hash(said) == config_hash(unsaid) == config_hash(config)
    assert config_hash(moved) != config_hash(config)
    assert differences(config, said) == {}
    if "." in dotted:
        assert differences(said, unsaid) == {}
        assert differences(unsaid, moved) == {dotted: [default, other]}


def test_a_part_s_default_is_its_own() -> None:
    """false of one part is no default of another's, nor of a section that builds nothing."""
    config = compose("train", BASE)
    assert config_hash(changed(config, "evaluation.clean_first", False)) != config_hash(config)
    assert config_hash(changed(config, "prior.held_out", 0.0)) != config_hash(config)


def test_defaults_in_lists_and_in_parts_of_parts_count_by_their_own_part() -> None:
    config = compose("train", ["experiment=kd/c100_gkl/vgg13_vgg8", "scale=smoke"])
    networks = [changed(config, "teacher.network.normalisation", *value) for value in ((None,), ())]
    assert config_hash(networks[0]) == config_hash(networks[1])
    check(networks[1], 1)


def test_a_name_may_be_typed_as_well_as_an_address() -> None:
    words = ["experiment=at/c100_basic_kl", "scale=smoke"]
    for typed in ("loss/KL", addresses()["loss/KL"]):
        assert compose("train", [*words, f"loss._target_={typed}"])["loss"]["_target_"] == "loss/KL"
    with pytest.raises(ConfigError, match="_target_ names 'loss/Nothing'; a configuration builds only"):
        compose("train", [*words, "loss._target_=loss/Nothing"])
