"""Composing as Hydra does, once for what many runs share."""

import json
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainers.errors import ConfigError
from trainers.runs import composition as module
from trainers.runs.compose import _composed, compose
from trainers.runs.composition import composition
from trainers.runs.identity import differences
from trainers.runs.plan import cells, load_table
from trainers.runs.targets import CONFIGS

ROOT = Path(__file__).resolve().parents[3]
AT, KD = "experiment=at/c100_basic_gkl", "experiment=kd/c100_gkl"
PAIR = "pair=cifar100/vgg13_vgg8"


def by_hydra(words: list[str]) -> tuple[Any, dict[str, Any]]:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        made = hydra.compose("train", words, return_hydra_config=True)
    chosen = OmegaConf.to_container(made.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    OmegaConf.set_struct(made, False)
    del made["hydra"]
    return OmegaConf.to_container(made), {k: v for k, v in chosen.items() if not str(k).startswith("hydra/")}


@pytest.mark.parametrize(
    "words",
    [
        [AT],
        [AT, "scale=smoke", "protocol=paper", "loss.gamma=0.3", "++loss.more=1", "~augment.flip"],
        [
            AT,
            "model=plain",
            "model.name=resnet_20",
            "assessment=epsilons",
            "schedule@momentum=one_cycle",
            "loss={gamma: 3}",
        ],
        ["experiment=at/c100_dm_gkl", "scale=small", "data.root=elsewhere"],
        [KD, PAIR, "scale=smoke"],
        [KD, PAIR, "pair.gkl.alpha=3", "+pair.more=4", "distiller.beta=2"],
        [KD],
        [KD, PAIR, "~pair"],
        ["experiment=kd/in_gkl", "pair=imagenet/resnet34_resnet18"],
        [KD, PAIR, "pair={student: resnet_20}"],
    ],
    ids=" ".join,
)
def test_a_composition_is_hydra_s(words: list[str]) -> None:
    """Its values and interpolations, its keys in their order but for the pair's, which no run keeps, and the choices."""
    config, chosen = composition(CONFIGS, "train", words)
    wanted, choices = by_hydra(words)
    made = OmegaConf.to_container(config)
    assert isinstance(made, dict)
    assert made.pop("pair", None) == wanted.pop("pair", None)
    assert json.dumps(made) == json.dumps(wanted) and chosen == choices


@pytest.mark.parametrize(
    "words",
    [
        [AT, "data=cifar11"],
        [AT, "loss.gama=1"],
        [KD, "pair=cifar100/none"],
        [KD, "pair=null"],
        [AT, "dta=cifar10"],
    ],
)
def test_what_hydra_refuses_is_refused_in_its_words(words: list[str]) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as ours:
        composition(CONFIGS, "train", words)
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as theirs:
        by_hydra(words)
    assert str(ours.value) == str(theirs.value)


def test_hydra_has_no_settings_of_its_own_here() -> None:
    with pytest.raises(ConfigError, match=r"there is no setting 'hydra\.verbose'"):
        compose("train", [AT, "hydra.verbose=true"])


def test_no_composition_leaves_anything_to_the_next() -> None:
    words = ["experiment=kd/c100_gkl/vgg13_vgg8", "scale=smoke"]
    before = compose("train", words)
    compose("train", [*words, "distiller.alpha=77", "+pair.gkl.more=1", "optimizer.lr=0.7", "~augment.flip"])
    compose("train", ["experiment=kd/c100_gkl/resnet56_resnet20", "scale=smoke"])
    made = composition(CONFIGS, "train", [KD, PAIR, "scale=smoke"])[0]
    made.distiller.alpha = made.pair.student = "changed"
    _composed.cache_clear()
    assert compose("train", words) == before


def test_the_runs_of_a_table_share_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Table XVII's 65 runs are eleven choices of groups: an experiment a row, networks and pairs put in."""
    module._files.cache_clear()
    _composed.cache_clear()
    merged: list[str] = []
    create = module.create_defaults_list

    def counted(files: Any, entry: str, groups: list[Any], **rest: Any) -> Any:
        merged.append(" ".join(str(o.input_line) for o in groups))
        return create(files, entry, groups, **rest)

    monkeypatch.setattr(module, "create_defaults_list", counted)
    assert len(cells(load_table("17"), scale="smoke", protocol="official")) == 65
    assert len(merged) == len(set(merged)) <= 11, merged


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    copied = tmp_path / "configs"
    shutil.copytree(CONFIGS, copied)
    assert composition(copied, "train", [AT])[0].loss.gamma == 0.4
    path = copied / "experiment/at/c100_basic_gkl.yaml"
    path.write_text(path.read_text().replace("gamma: 0.4", "gamma: 0.75"))
    assert composition(copied, "train", [AT])[0].loss.gamma == 0.75
    assert composition(copied, "train", [AT, "seed=1"])[0].loss.gamma == 0.75
    assert composition(CONFIGS, "train", [AT])[0].loss.gamma == 0.4
    assert composition(copied, "train", [KD, PAIR])[0].pair.gkl.gamma == 0.2
    path = copied / f"{PAIR.replace('=', '/')}.yaml"
    path.write_text(path.read_text().replace("gamma: 0.2", "gamma: 0.75"))
    assert composition(copied, "train", [KD, PAIR])[0].pair.gkl.gamma == 0.75


@pytest.mark.parametrize(
    ("experiment", "setting"),
    [
        ("at/c100_basic_gkl", "at_5000"),
        ("at/c100_basic_kl", "at_5000"),
        ("kd/lt_gkl/resnext101_resnet18", "lt_50"),
        ("kd/lt_gkl/resnext101_resnet18", "lt_cifar10"),
        ("ssl/fixmatch_gkl", "ssl_1024"),
        ("seg/apd_gkl", "seg_1000"),
        ("kd/c100_gkl/resnet56_resnet20", "kd_5000"),
    ],
)
def test_a_setting_is_that_of_the_committed_runs(experiment: str, setting: str) -> None:
    """But for where the pictures lie, and what they are."""
    config = compose(
        "train", [f"experiment={experiment}", "scale=small", f"setting={setting}", "data.root=/nowhere"]
    )
    paths = (ROOT / "results/runs" / experiment / "small").glob("*/seed0.json")
    runs = [json.loads(path.read_text())["config"] for path in paths]
    assert any(differences(made, config).keys() <= {"data.content"} for made in runs)


def test_a_network_alone_takes_a_setting_without_its_teacher() -> None:
    words = ["scale=small", "setting=lt_cifar10", "data.root=/nowhere"]
    alone = compose("train", ["experiment=kd/lt_vanilla/imagenet_resnet_18", *words])
    taught = compose("train", ["experiment=kd/lt_kl/resnext101_resnet18", *words])
    assert alone["model"] == taught["model"] and alone["data"] == taught["data"]
    assert "teacher" not in alone and taught["teacher"]["network"]["name"] == "resnet_20"


def test_what_is_given_beside_a_setting_takes_the_place_of_its_own() -> None:
    words = [
        "experiment=at/c100_basic_gkl",
        "scale=small",
        "model=wrn_16_2",
        "setting=at_5000",
        "data.root=/nowhere",
    ]
    config = compose("train", words)
    assert config["model"]["name"] == "wrn_16_2" and config["data"]["train_per_class"] == 500
    assert not any(word.startswith("setting=") for word in config["overrides"])
    assert {"data=image_folder", "model=wrn_16_2", "data.root=/nowhere"} <= set(config["overrides"])
    with pytest.raises(ConfigError, match="at_5000"):
        compose("train", [*words[:3], "setting=at_500"])
