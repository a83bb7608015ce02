"""Which network a run has, as a person names it: its normalisation, timm's by name, one from a file."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gkl.data.digits import digits
from gkl.data.memory import ImageData
from gkl.own import named
from tests.gkl.models.test_own import NET
from trainers.errors import ConfigError
from trainers.runs.compose import choices, compose, usual
from trainers.runs.identity import asked, config_hash, differences, without_excluded
from trainers.runs.paths import check_sources
from trainers.runs.settings import build, check, check_sections

AT = ["experiment=at/c100_basic_gkl", "scale=smoke"]
KD = ["experiment=kd/c100_gkl/vgg13_vgg8", "scale=smoke"]
OWN = "{mean:[0.4,0.5,0.6],std:[0.2,0.25,0.3]}"


def network(config: dict[str, Any], place: str = "model") -> dict[str, Any]:
    for key in place.split("."):
        config = config[key]
    return config


SEEING = sorted(
    {*choices("model")} - {"llama", "llava"}
)  # of which one sees nothing, the other through its tower


@pytest.mark.parametrize("model", [*SEEING, "wrn_10_1", "resnet18", "vgg_8", "preact_resnet_18"])
@pytest.mark.parametrize("value", ["cifar10", "none", OWN])
def test_normalisation_is_an_ordinary_setting_of_every_network(model: str, value: str) -> None:
    named = [] if model not in ("cifar100_kd", "imagenet", "plain", "own") else ["model.name=resnet_20"]
    config = compose("train", [*AT, f"model={model}", *named, f"model.normalisation={value}"])
    found = network(config)["normalisation"]
    assert found == (value if value != OWN else {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]})
    check_sections(config)
    words = ["checkpoint=f.pt", f"model={model}", *named, "data=digits", f"model.normalisation={value}"]
    assert network(compose("evaluate", words))["normalisation"] == found


def test_a_normalisation_is_another_run_and_none_named_is_the_same() -> None:
    usual = compose("train", AT)
    other = compose("train", [*AT, "model.normalisation=cifar100"])
    assert config_hash(other) != config_hash(usual)
    assert differences(usual, other) == {"model.normalisation": [None, "cifar100"]}
    without = {**usual, "model": {k: v for k, v in usual["model"].items() if k != "normalisation"}}
    assert config_hash(without) == config_hash(usual)  # of a record from before there was the setting


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([*AT, "model.normalisation=cifar1"], "model.normalisation: .* must be none, .* or one of cifar10"),
        ([*AT, "model.normalisation={mean:[125,123,114],std:[63,62,67]}"], "divide by 255"),
        ([*KD, "teacher.network.normalisation=x"], "teacher.network.normalisation: .* must be none"),
    ],
)
def test_a_wrong_normalisation_is_told_before_anything_starts(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_sections(compose("train", words))


# --- a person's own, and timm's ---------------------------------------------------------------------------------------


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GKL_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    return tmp_path / "net.py"


@pytest.mark.parametrize("place", ["model", "teacher.network"])
def test_a_file_s_network_is_known_by_its_content(net: Path, place: str) -> None:
    key = "model" if place == "model" else "model@teacher.network"
    words = [*(AT if place == "model" else KD), f"{key}={net}:Net"]
    config = compose("train", words)
    name = network(config, place)["name"]
    assert name == named(net, "Net") and network(config, place)["_target_"] == "model/own"
    assert (Path("outputs/networks") / f"{name.partition('@')[2]}.py").read_text() == NET
    assert config["overrides"] == [f"{key}={name}"]  # a record names the content, and no place
    check_sections(config)
    Path("elsewhere.py").write_text(NET)
    assert config_hash(compose("train", [*words[:-1], f"{key}=elsewhere.py:Net"])) == config_hash(config)
    assert config_hash(compose("train", [*words[:-1], f"{key}={name}"])) == config_hash(config)
    net.write_text(NET + "\n# changed")
    assert config_hash(compose("train", words)) != config_hash(config)


def test_a_file_s_network_completes_an_experiment_s_name(net: Path) -> None:
    config = compose("train", ["experiment=kd/c100_vanilla", "scale=smoke", "model=net.py:Net"])
    assert config["experiment"] == f"kd/c100_vanilla/{named(net, 'Net')}"
    assert usual(config)["model"] == config["model"]


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
@pytest.mark.parametrize("start", [AT, ["experiment=kd/c100_vanilla", "scale=smoke"]], ids=["at", "kd"])
def test_timm_s_network_by_name(start: list[str], name: str) -> None:
    config = compose("train", [*start, f"model={name}", "model.timm_options={drop_rate:0.1}"])
    assert config["model"]["name"] == "resnet18" and config["model"]["timm_options"] == {"drop_rate": 0.1}
    assert (
        compose("evaluate", ["checkpoint=f.pt", "data=digits", f"model={name}"])["model"]["name"]
        == "resnet18"
    )


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("net.py", "net.py is a file; say what in it makes the network: net.py:NAME"),
        ("none.py:Net", "no network's file none.py .No such file"),
        ("timm/resnet19", "unknown model 'resnet19'"),
    ],
)
def test_a_network_that_is_not_there_is_one_line(net: Path, model: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose("train", [*AT, f"model={model}"])


# --- from a checkpoint, and taught by one -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (AT, "model"),
        (["experiment=kd/own", "scale=smoke", "model=resnet18", "model@teacher.network=resnet34"], "teacher"),
    ],
)
def test_a_checkpoint_is_known_by_its_content(words: list[str], place: str, tmp_path: Path) -> None:
    one, other, copy = (tmp_path / name for name in ("one.pt", "other.pt", "copy.pt"))
    one.write_bytes(b"one"), copy.write_bytes(b"one"), other.write_bytes(b"other")
    hashes = [
        config_hash(compose("train", [*words, *given]))
        for given in ([], *([f"{place}.checkpoint={path}"] for path in (one, copy, other)))
    ]
    assert hashes[1] == hashes[2] and len({*hashes}) == 3
    config = compose("train", [*words, f"{place}.checkpoint={one}"])
    assert (
        str(tmp_path) not in str(without_excluded(config))
        and asked(config["overrides"])[-1] == f"{place}.checkpoint=PATH"
    )
    check_sections(config)
    with pytest.raises(ConfigError, match=rf"no checkpoint at none.pt; set {place}.checkpoint=... to a .pt"):
        check_sections(compose("train", [*words, f"{place}.checkpoint=none.pt"]))


def test_a_pair_of_one_s_own_borrows_none() -> None:
    words = ["experiment=kd/own", "scale=smoke", "model=resnet18", "model@teacher.network=resnet34"]
    config = compose("train", [*words, "data=image_folder", "data.root=pictures"])
    assert config["model"]["name"] == "resnet18" and config["teacher"]["network"]["name"] == "resnet34"
    assert config["model"]["normalisation"] is None and config["distiller"]["_target_"] == "distiller/GKLKD"
    assert compose("train", [*words, "distiller=kd"])["distiller"]["_target_"] == "distiller/KD"
    with pytest.raises(
        ConfigError, match="teacher.checkpoint=... is missing: the file with the weights of teacher.network"
    ):
        check_sources(config)


@pytest.mark.parametrize("name", ["resnet10t", "lcnet_050", "mobilenetv3_small_050", "convnext_atto"])
@pytest.mark.parametrize("experiment", ["at/c10_rice", "kd/c100_vanilla"])
def test_timm_s_networks_train(experiment: str, name: str) -> None:
    """Two steps, batch norm in groups where the experiment has them; timm's batch norm with its activation among them."""
    words = [
        f"experiment={experiment}",
        "scale=smoke",
        f"model=timm/{name}",
        "batch_size=8",
        "channels_last=false",
    ]
    groups = ["bn_groups=2"] if experiment.startswith("at/") else []
    config = compose("train", [*words, *groups])
    check(config, 1)
    task = build(config, device=torch.device("cpu"), data=scans(image_size=32))
    task.start_epoch(1)
    for step in range(2):
        shares = task.train_step(1, step)
        assert all(torch.isfinite(value).all() for value in shares.values())


def scans(image_size: int) -> ImageData:
    """A few digits, enlarged."""
    whole = digits()
    train, test = (
        F.interpolate(x[:32].float(), image_size).byte() for x in (whole.train_images, whole.test_images)
    )
    return dataclasses.replace(
        whole,
        train_images=train,
        test_images=test,
        train_labels=whole.train_labels[:32],
        test_labels=whole.test_labels[:32],
    )
