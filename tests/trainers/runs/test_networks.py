"""Which network a run has, as a person names it: its normalisation, timm's by name."""

from typing import Any

import pytest

from trainers.errors import ConfigError
from trainers.runs.compose import choices, compose
from trainers.runs.identity import config_hash, differences
from trainers.runs.settings import check_sections

AT = ["experiment=at/c100_basic_gkl", "scale=smoke"]
KD = ["experiment=kd/c100_gkl/vgg13_vgg8", "scale=smoke"]
OWN = "{mean:[0.4,0.5,0.6],std:[0.2,0.25,0.3]}"


def network(config: dict[str, Any], place: str = "model") -> dict[str, Any]:
    for key in place.split("."):
        config = config[key]
    return config


@pytest.mark.parametrize("model", [*choices("model"), "wrn_10_1", "resnet18", "vgg_8", "preact_resnet_18"])
@pytest.mark.parametrize("value", ["cifar10", "none", OWN])
def test_normalisation_is_an_ordinary_setting_of_every_network(model: str, value: str) -> None:
    named = [] if model not in ("cifar100_kd", "imagenet", "plain") else ["model.name=resnet_20"]
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
