"""Every experiment composes, and at paper scale every value is the recipe's."""

import pytest

from trainers.errors import ConfigError
from trainers.runs.compose import choices, completed_by, compose, published
from trainers.runs.identity import differences
from trainers.runs.settings import check

# The others: test_distillation_runs.py, tests/trainers/methods/test_semi_supervised.py.
EXPERIMENTS = [name for name in choices("experiment") if name.startswith("at/") and not completed_by(name)]

# Block AT of the recipes, common to all: section 4.1 of the paper and the authors' adversarial-training scripts.
COMMON = {
    "epochs": 200,
    "batch_size": 128,
    "bn_groups": 4,
    "precision": "tf32",
    "compile": False,
    "channels_last": True,
    "evaluate": "swa",
    "model.name": "wrn_34_10",
    "optimizer._target_": "optimizer/sgd",
    "optimizer.lr": 0.2,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False,
    "schedule._target_": "schedule/cosine",
    "attack._target_": "attack/PGD",
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
        "data._target_": f"data/{data}",
        "loss._target_": "loss/GKL",
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
        "data._target_": f"data/{data}",
        "loss._target_": "loss/KL",
        "loss.weight": 9.0,
        "loss.temperature": 1.0,
        "attack_loss._target_": "loss/KL",
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


DKL = {**{k: v for k, v in gkl("cifar100", 9.0, 1.0, 1.0, {}, BASIC).items() if not k.startswith(("schedule", "drop"))},
       "loss.alpha": 9.0, "loss.weights": "sample", "loss.break_asymmetry": False,
       "attack_loss._target_": "loss/KL"}  # fmt: skip
RECIPES["at/c100_dkl"] = ({**DKL, **KL_SCHEDULE}, {**DKL, **GKL_SCHEDULE})

# The other methods, each from its paper and released code; every value that its recipe states.
SGD = {"optimizer.momentum": 0.9, "optimizer.nesterov": False}
EVALUATION = {k: v for k, v in COMMON.items() if k.startswith("evaluation")}
PGD10 = {"attack.norm": "linf", "attack.epsilon": 8 / 255, "attack.ramp": False, "attack.start_std": None,
         "attack.phases": "ten"}  # fmt: skip
TRADES10 = {**PGD10, "attack.start_std": 0.001}
RESTS = {"schedule._target_": "schedule/multi_step", "schedule.factor": 0.1, "averages": {}, "bn_groups": 1,
         "batch_size": 128, "drop_last": False, **EVALUATION, **SGD}  # fmt: skip
CHOSEN_ON_TEST = {
    "selection.images": "test",
    "selection.loss": "ce",
    "selection.weights": None,
    "evaluate": "best",
}
AT_AWP = {
    **RESTS, **PGD10, **CHOSEN_ON_TEST, "method._target_": "method/PGDTraining", "data._target_": "data/cifar100",
    "model.name": "wrn_34_10", "model.normalisation": "cifar100", "attack.mode": "train", "epochs": 200, "optimizer.lr": 0.1,
    "optimizer.weight_decay": 5e-4, "schedule.drops": [101, 151], "schedule.of": 200, "method.awp_gamma": 0.01,
    "method.awp_start_epoch": 1, "augment.views": ["crop_flip_rotate"], "augment.padding": 4, "selection.steps": 20,
}  # fmt: skip
LBGAT = {
    **RESTS, **TRADES10, "method._target_": "method/LBGAT", "data._target_": "data/cifar100", "epochs": 100,
    "model.name": "wrn_34_10", "natural_model.name": "resnet_18_fine", "loss._target_": "loss/KL", "loss.weight": 6.0,
    "attack.epsilon": 0.031, "attack.phases": "lbgat", "optimizer.lr": 0.1, "optimizer.weight_decay": 2e-4,
    "schedule.drops": [76, 91], "schedule.of": 100, "schedule.first": 0.2, "method.awp_gamma": 0.0, "evaluate": "last",
}  # fmt: skip
LAS_AT = {
    **AT_AWP, "method._target_": "method/LASAT", "model.normalisation": None, "attack.mode": "eval",
    "augment.views": ["crop_flip"], "method.epsilons": list(range(7, 16)), "method.steps": list(range(8, 16)),
    "method.step_sizes": [2, 3, 4, 5], "method.interval": 10, "method.robust_reward": 4.0, "method.clean_reward": 2.0,
    "method.clip_gradient": 1.0, "strategy_model.name": "resnet_18", "strategy_optimizer.lr": 1e-4,
    "strategy_optimizer.momentum": 0.9, "strategy_optimizer.weight_decay": 5e-4,
}  # fmt: skip
ACAT = {
    **EVALUATION, **SGD, "method._target_": "method/AdversarialTraining", "data._target_": "data/cifar100",
    "model.name": "wrn_34_10", "epochs": 110, "batch_size": 128, "drop_last": False, "bn_groups": 1, "optimizer.lr": 0.2,
    "optimizer.weight_decay": 5e-4, "schedule._target_": "schedule/cosine", "schedule.offset": 1, "schedule.length": 0,
    "attack.epsilon": 8 / 255, "attack.ramp": True, "attack.start_std": 0.001, "attack.phases": "low",
    "loss._target_": "loss/KL", "loss.weight": 9.0, "attack_loss._target_": "loss/KL",
    "method.awp_gamma": 0.005, "method.awp_start_epoch": 10, "method.label_smoothing": 0.1 * 100 / 99,
    "held_out": 0.02, "held_out_by_class": True, "averages.ema.decay": 0.9996, "averages.ema.start_epoch": 82,
    "evaluate": "ema", "method.clean_first": True,
}  # fmt: skip
DAJAT = {
    **{k: v for k, v in ACAT.items() if k != "method.clean_first"}, "method._target_": "method/DAJAT",
    "augment.views": ["crop_flip", "autoaugment_first", "autoaugment_first"], "method.js_weight": 2.0,
}  # fmt: skip
DM = {
    **PGD10, **SGD, "method._target_": "method/AdversarialTraining", "data._target_": "data/cifar100",
    "model.name": "wrn_28_10_swish", "epochs": 1600, "batch_size": 2048, "bn_groups": 1, "drop_last": False,
    "generated.source": "edm", "generated.name": "cifar100_50m", "generated_share": 0.7, "held_out": 1024 / 50_000,
    "held_out_by_class": False, "augment.views": ["crop_flip_rotate"], "attack.mode": "frozen", "optimizer.lr": 0.2,
    "optimizer.weight_decay": 5e-4, "optimizer.nesterov": True, "optimizer.decay_batch_norm": False,
    "schedule._target_": "schedule/one_cycle", "schedule.start": 1 / 25, "schedule.peak": 1.0, "schedule.end": 4e-6,
    "schedule.rise": 0.025, "momentum.start": 0.95, "momentum.peak": 0.85, "momentum.end": 0.95, "momentum.rise": 0.025,
    "loss._target_": "loss/KL", "loss.weight": 5.0, "attack_loss._target_": "loss/KL",
    "method.awp_gamma": 0.0, "method.label_smoothing": 0.1, "method.clean_first": True, "method.first_statistics": True,
    "averages.ema._target_": "averages/RampedAverage", "averages.ema.decay": 0.995, "averages.ema.warmup": 0.025,
    "selection.images": "held_out", "selection.loss": "cw", "selection.steps": 40, "selection.weights": "ema",
    "selection.ties": "last", "evaluate": "best", "evaluation.batch_size": 128, "evaluation.seed": 1,
    "evaluation.version": "standard", "evaluation.epsilon": 8 / 255, "evaluation.images": None,
}  # fmt: skip
CIFAR10 = {"data._target_": "data/cifar10"}
DM_10 = {**DM, **CIFAR10, "epochs": 2400, "generated.name": "cifar10_20m", "augment.views": ["crop_flip"]}
GKL_LOSS = {
    "loss._target_": "loss/GKL",
    "loss.weight": None,
    "loss.weights": "class",
    "loss.break_asymmetry": True,
}
WIDE_10 = {**CIFAR10, "model.name": "wrn_34_20"}
OTHERS = {
    "at/c100_awp": AT_AWP,
    "at/c10_rice": {**AT_AWP, **WIDE_10, "model.normalisation": "cifar10", "augment.views": ["crop_flip"],
                    "augment.border": "reflect", "method.awp_gamma": 0.0, "selection.steps": 10},
    "at/c10_trades_awp": {
        **RESTS, **TRADES10, **CIFAR10, "method._target_": "method/AdversarialTraining", "epochs": 200,
        "model.name": "wrn_34_10", "loss._target_": "loss/KL", "loss.weight": 6.0, "optimizer.lr": 0.1,
        "optimizer.weight_decay": 5e-4, "schedule.drops": [100, 150], "schedule.of": 200, "method.awp_gamma": 0.005,
        "method.awp_start_epoch": 10, "augment.views": ["crop_flip"], "evaluate": "last",
    },
    "at/c100_lbgat": LBGAT,
    "at/c10_lbgat": {**LBGAT, **WIDE_10, "loss.weight": 0.0},
    "at/c100_lbgat_awp": {**LBGAT, "loss.weight": 9.0, "attack.epsilon": 8 / 255, "attack.phases": "ten",
                          "method.awp_gamma": 0.005, "method.awp_start_epoch": 10},
    "at/c100_las_at": {**LAS_AT, "method.label_smoothing": 0.3 * 100 / 99},
    "at/c10_las_at": {**LAS_AT, **CIFAR10, "model.normalisation": "cifar10", "augment.border": "reflect",
                      "method.steps": list(range(8, 17)), "method.interval": 1, "method.robust_reward": 1.0,
                      "method.clean_reward": 1.0, "method.label_smoothing": 0.3 * 10 / 9,
                      "strategy_optimizer.momentum": 0.0, "strategy_optimizer.weight_decay": 0.0},
    "at/c100_acat": ACAT,
    "at/c10_acat": {**ACAT, **CIFAR10, "loss.weight": 10.0, "method.label_smoothing": 0.0, "held_out": 0.002},
    "at/c100_dajat": DAJAT,
    "at/c100_dajat_200": {**DAJAT, "epochs": 200, "attack.phases": "executed", "averages.ema.start_epoch": 150},
    "at/c10_dajat": {**DAJAT, **CIFAR10, "augment.views": ["crop_flip", *["autoaugment_first"] * 3], "loss.weight": 10.0,
                     "method.js_weight": 3.0, "method.label_smoothing": 0.0, "held_out": 0.002},
    "at/c100_dm": DM,
    "at/c100_dm_gkl": {**DM, **GKL_LOSS, "loss.alpha": 12.0, "loss.beta": 5.0, "loss.gamma": 0.4, "prior.temperature": 1.0},
    "at/c10_dm": DM_10,
    "at/c10_dm_gkl": {**DM_10, **GKL_LOSS, "loss.alpha": 10.0, "loss.beta": 3.0, "loss.gamma": 1.0, "prior.temperature": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("experiment", OTHERS)
def test_other_methods_are_their_recipes(experiment: str) -> None:
    config = compose("train", [f"experiment={experiment}"])
    check(config, 1)
    for path, wanted in OTHERS[experiment].items():
        found = value(config, path)
        close = isinstance(wanted, float) and found == pytest.approx(wanted, rel=1e-12)
        assert close or found == wanted, (path, found, wanted)


def value(config: dict, path: str) -> object:
    """A dotted setting; None where it is not there."""
    for key in path.split("."):
        config = (config or {}).get(key)
    return config


def test_every_experiment_has_its_recipe() -> None:
    assert set(EXPERIMENTS) == {*RECIPES, *OTHERS} and len(EXPERIMENTS) == len(RECIPES) + len(OTHERS)


@pytest.mark.parametrize("number, protocol", [(0, "official"), (1, "paper")])
@pytest.mark.parametrize("experiment", RECIPES)
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


@pytest.mark.parametrize(
    ("words", "section", "wanted"),
    [
        (["kd/c100_gkl/vgg13_vgg8", "model=wrn_10_1"], "model", ("wrn_10_1", "cifar100_kd")),
        (["kd/c100_gkl/vgg13_vgg8", "model=wrn_34_20"], "model", ("wrn_34_20", "cifar100_kd")),
        (["kd/c100_gkl/vgg13_vgg8", "model@teacher.network=wrn_34_20"], "teacher.network", ("wrn_34_20", None)),
        (["kd/c100_vanilla/vgg_8", "model=wrn_28_10_swish"], "model", ("wrn_28_10_swish", "cifar100_kd")),
        (["kd/in_kd/resnet34_resnet18", "model=timm_resnet_50"], "model", ("resnet50", "imagenet")),
        (["at/c100_lbgat", "model@natural_model=wrn_34_20"], "natural_model", ("wrn_34_20", None)),
        (["at/c100_lbgat", "model=resnet_20"], "model", ("resnet_20", "cifar100_kd")),
        (["at/c100_awp", "model=wrn_16_4"], "model", ("wrn_16_4", "cifar100")),
        (["kd/strong_vanilla/timm_resnet_50", "model.name=resnet10t"], "model", ("resnet10t", "imagenet")),
    ],
)  # fmt: skip
def test_the_network_that_is_named_is_the_one_trained(
    words: list[str], section: str, wanted: tuple[str, str | None]
) -> None:
    """Also where the experiment names its own, and whether or not the network has a file in configs/model."""
    config = compose("train", [f"experiment={words[0]}", *words[1:]])
    check(config, 1)
    assert (value(config, f"{section}.name"), value(config, f"{section}.normalisation")) == wanted


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
        (["experiment=at/c100_basic_gkl", "epochs=abc"], "epochs must be a whole number, got 'abc'"),
        (["experiment=at/c100_basic_gkl", "loss.gamma=big"], "loss.gamma must be a number, got 'big'"),
        (
            ["experiment=at/c100_basic_gkl", "loss.gamma=0.1,0.2"],
            "names several values.* is quoted: 'loss.gamma=\"...\"'",
        ),
        (["experiment=at/c100_basic_gkl", "precision=fp8"], "precision must be .*, got 'fp8'"),
        (
            ["experiment=at/c100_basic_gkl", "accumulate=3"],
            "accumulate=3 must divide the 4 batch-norm groups of a process",
        ),
        (["experiment=at/c100_basic_gkl", "workers=-1"], r"workers must be in \[0, 512\], got -1"),
        (["experiment=at/c100_basic_gkl", "workers=some"], "workers must be .*, got 'some'"),
        (["experiment=at/c100_basic_gkl", "devices=3"], "batch_size=128 cannot be shared by 3 processes"),
        (
            ["experiment=at/c100_basic_gkl", "devices=6", "batch_size=12"],
            "bn_groups=4 must be a multiple or a divisor of devices=6 and divide",
        ),
        (
            ["experiment=kd/c100_vanilla/resnet_20", "devices=2"],
            "bn_groups=1 must be a multiple of devices=2 and divide",
        ),
        (["experiment=at/c100_basic_gkl", "+loss.delta=1"], "takes no loss.delta"),
        (
            ["experiment=at/c100_lbgat", "natural_model=resnet18"],
            "natural_model is a section, got 'resnet18'; choose it as model@natural_model=resnet18",
        ),
        (
            ["experiment=kd/own", "model=resnet18", "teacher.network=net.py:Net"],
            "teacher.network is a section, got 'net.py:Net'; choose it as model@teacher.network=net.py:Net",
        ),
        (
            ["experiment=at/c100_basic_gkl", "loss._target_=os.system"],
            "_target_ names 'os.system'; a configuration builds only what a file of configs/ names",
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
