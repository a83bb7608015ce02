"""Every experiment composes, and at paper scale every value is the recipe's."""

import pytest

from gkl.records import differences
from trainers.configuration import ConfigError, check, choices, compose, published

EXPERIMENTS = choices("experiment")

# Block AT of the recipes, common to all: section 4.1 of the paper and the authors' adversarial-training scripts.
COMMON = {
    "epochs": 200,
    "batch_size": 128,
    "bn_groups": 4,
    "precision": "float32",
    "compile": False,
    "channels_last": False,
    "evaluate": "swa",
    "model.name": "wrn_34_10",
    "optimizer._target_": "gkl.optimizers.sgd",
    "optimizer.lr": 0.2,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False,
    "schedule._target_": "gkl.schedules.cosine",
    "attack._target_": "gkl.attacks.PGD",
    "attack.norm": "linf",
    "attack.epsilon": 8 / 255,
    "attack.ramp": True,
    "attack.start_std": 0.001,
    "method.awp_gamma": 0.005,
    "method.awp_start_epoch": 10,
    "augment.padding": 4,
    "augment.flip": 0.5,
    "averages.swa.decay": 0.9,
    "averages.swa.every": "epoch",
    "averages.swa.start_epoch": 1,
    "averages.ema.decay": 0.9996,
    "averages.ema.every": "step",
    "averages.ema.start_epoch": 150,
    "evaluation.version": "standard",
    "evaluation.norm": "linf",
    "evaluation.epsilon": 8 / 255,
    "evaluation.images": None,
    "evaluation.batch_size": 200,
}
GKL_SCHEDULE = {"schedule.offset": 0, "schedule.length": 1, "drop_last": False}
ATTACK_100 = {"attack_loss.alpha": 1.0, "attack_loss.beta": 1.0, "attack_loss.gamma": 1.0}
ATTACK_10 = {"attack_loss.alpha": 0.0, "attack_loss.beta": 1.0}
BASIC = {"augment.views": ["crop_flip"], "method.view_weights": [1.0]}
AUTOAUG = {"augment.views": ["crop_flip", "autoaugment"], "method.view_weights": [1.0, 0.5]}


def gkl(data: str, beta: float, gamma: float, tau: float, attack: dict, augment: dict) -> dict:
    return {
        "data._target_": f"gkl.data.{data}",
        "loss._target_": "gkl.objectives.GKL",
        "loss.alpha": 20.0,
        "loss.beta": beta,
        "loss.gamma": gamma,
        "loss.temperature": 1.0,
        "loss.weights": "class",
        "loss.break_asymmetry": True,
        "prior.temperature": tau,
        **GKL_SCHEDULE,
        **attack,
        **augment,
    }


def kl(data: str, schedule: dict) -> dict:
    return {
        "data._target_": f"gkl.data.{data}",
        "loss._target_": "gkl.objectives.KL",
        "loss.weight": 9.0,
        "loss.temperature": 1.0,
        "attack_loss._target_": "gkl.objectives.KL",
        **schedule,
        **BASIC,
    }


KL_SCHEDULE = {"schedule.offset": 1, "schedule.length": 0, "drop_last": True}

# experiment -> (as the authors' code runs it, as the paper and the code's intent have it)
RECIPES = {
    "at/c100_basic_gkl": (gkl("cifar100", 4.0, 0.4, 1.0, ATTACK_100, BASIC),) * 2,
    "at/c100_basic_conf": (gkl("cifar100", 4.0, 1.0, 4.0, ATTACK_100, BASIC),) * 2,
    "at/c100_basic_paper": (gkl("cifar100", 5.0, 0.4, 1.0, ATTACK_100, BASIC),) * 2,
    "at/c100_autoaug": (gkl("cifar100", 4.0, 1.0, 4.0, ATTACK_100, AUTOAUG),) * 2,
    "at/c10_basic_conf": (gkl("cifar10", 4.0, 1.0, 4.0, ATTACK_10, BASIC),) * 2,
    "at/c10_basic_gkl": (
        gkl("cifar10", 4.0, 0.2, 4.0, ATTACK_10, BASIC),
        gkl("cifar10", 4.0, 0.2, 1.0, ATTACK_10, BASIC),
    ),
    "at/c10_autoaug": (gkl("cifar10", 4.0, 1.0, 4.0, ATTACK_10, AUTOAUG),) * 2,
    "at/c100_basic_kl": (kl("cifar100", KL_SCHEDULE), kl("cifar100", GKL_SCHEDULE)),
    "at/c10_basic_kl": (kl("cifar10", KL_SCHEDULE), kl("cifar10", GKL_SCHEDULE)),
}


def value(config: dict, path: str) -> object:
    for key in path.split("."):
        config = config[key]
    return config


def test_every_experiment_has_its_recipe() -> None:
    assert set(EXPERIMENTS) == set(RECIPES)


@pytest.mark.parametrize("number, protocol", [(0, "official"), (1, "paper")])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_paper_scale_is_the_recipe(experiment: str, number: int, protocol: str) -> None:
    config = compose("train", [f"experiment={experiment}", f"protocol={protocol}"])
    wanted = {**COMMON, "attack.phases": ["executed", "intended"][number], **RECIPES[experiment][number]}
    assert {path: value(config, path) for path in wanted} == wanted


@pytest.mark.parametrize("scale", choices("scale"))
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_checks_at_every_scale(experiment: str, scale: str) -> None:
    config = compose("train", [f"experiment={experiment}", f"scale={scale}"])
    check(config, 1)
    changed = differences(published(config), config)
    assert ("data._target_" in changed) == (scale == "smoke")
    assert bool(changed) == (scale != "paper")


def test_a_departure_is_named() -> None:
    config = compose("train", ["experiment=at/c100_basic_gkl", "scale=paper", "loss.gamma=0.3", "seed=2"])
    assert differences(published(config), config) == {"loss.gamma": [0.4, 0.3]}


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["experiment=at/c100_basic_gk"],
            "unknown experiment 'at/c100_basic_gk'; did you mean 'at/c100_basic_gkl'",
        ),
        (["experiment=at/c100_basic_gkl", "scale=smok"], "unknown scale 'smok'; did you mean 'smoke'"),
        (
            ["experiment=at/c100_basic_gkl", "loss.gama=1"],
            "there is no setting 'loss.gama'.*did you mean 'gamma'",
        ),
        (["experiment=at/c100_basic_gkl", "epochs=abc"], "epochs must be int, got 'abc'"),
        (["experiment=at/c100_basic_gkl", "loss.gamma=big"], "loss.gamma must be float, got 'big'"),
        (["experiment=at/c100_basic_gkl", "loss.gamma=0.1,0.2"], "names several values"),
        (["experiment=at/c100_basic_gkl", "precision=fp16"], "precision must be .*, got 'fp16'"),
        (["experiment=at/c100_basic_gkl", "devices=3"], "batch_size=128 cannot be shared by 3 processes"),
        (["experiment=at/c100_basic_gkl", "devices=8"], "bn_groups=4 must be a multiple of devices=8"),
        (["experiment=at/c100_basic_gkl", "+loss.delta=1"], "takes no loss.delta"),
        (
            ["experiment=at/c100_basic_gkl", "loss._target_=os.system"],
            "only name objects of gkl and trainers",
        ),
        (["experiment=at/c100_basic_gkl", "evaluate=swaa"], "unknown evaluate 'swaa'; did you mean 'swa'"),
        ([], "experiment=... is missing"),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config = compose("train", overrides)
        check(config, config["devices"])
    assert "\n" not in str(caught.value)
