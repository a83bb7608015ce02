"""What is out of its range is refused before anything starts, with its name and what it may be."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import pytest

from trainers.errors import ConfigError
from trainers.runs.compose import choices, completed_by, compose
from trainers.runs.ranges import RANGES, check_ranges, numbers
from trainers.runs.settings import SECTIONS, SETTINGS, check, check_radii, check_sections, doubtful_radii
from trainers.runs.targets import addresses, fits, mistyped, parameters_of
from trainers.runs.teacher import prerequisites

PIXELS = r"must be in \(0, 1\], got .*: 8 levels of 255 are '\$\{px:8\}'"


def composed(*words: str) -> dict[str, Any]:
    return compose("train", ["experiment=at/c100_basic_gkl", "scale=smoke", *words])


@pytest.mark.parametrize(
    "word, message",
    [
        ("evaluation.norm=Linf", "evaluation.norm must be linf or l2, got 'Linf'"),
        (
            "evaluation.epsilon=8/255",
            r"evaluation.epsilon must be a number, got '8/255'; a fraction is written '\$\{px:8\}', in quotes",
        ),
        (
            "attack.epsilon=2/255",
            r"attack.epsilon must be a number, got '2/255'; a fraction is written '\$\{px:2\}', in quotes$",
        ),
        ("evaluation.images=0", "evaluation.images must be at least 1, got 0"),
        ("evaluation.images=-1", "evaluation.images must be at least 1, got -1"),
        (
            "evaluation.images=abc",
            "evaluation.images must be a whole number, robustbench or null, got 'abc'; null takes all$",
        ),
        ("evaluation.version=plus", "evaluation.version must be standard or screen, got 'plus'"),
        ("evaluation.epsilon=8", f"evaluation.epsilon {PIXELS}"),
        ("+evaluation.limit=3", "unknown setting 'evaluation.limit'.*evaluation.version, evaluation.norm"),
        ("~evaluation.norm", "evaluation also needs norm"),
        ("attack.epsilon=-1", f"attack.epsilon {PIXELS}"),
        ("attack.epsilon=8", f"attack.epsilon {PIXELS}"),
        ("loss.alpha=-5", "loss.alpha must be at least 0, got -5"),
        ("loss.gamma=nan", "loss.gamma must be a finite number, got nan"),
        ("prior.temperature=0", "prior.temperature must be above 0, got 0"),
        ("loss.temperature=-1", "loss.temperature must be above 0, got -1"),
        ("optimizer.lr=-1", "optimizer.lr must be above 0, got -1"),
        ("averages.swa.start_epoch=-1", "averages.swa.start_epoch must be at least 0, got -1"),
        ("averages.swa.start_epoch=50", "averages.swa.start_epoch=50 is past the last epoch, 10"),
        (
            "selection=most_robust selection.images=test selection.loss=ce selection.steps=1 +selection.weights=ema "
            "evaluate=best averages.ema.start_epoch=50",
            "selection.weights=ema: averages.ema.start_epoch=50 is past the last epoch, 10",
        ),
        ("augment.flip=2", r"augment.flip must be in \[0, 1\], got 2"),
        ("held_out=1.0", r"held_out must be in \[0, 1\), got 1"),
        ("held_out=-0.5", r"held_out must be in \[0, 1\), got -0.5"),
        ("epochs=0", "epochs must be at least 1, got 0"),
        ("seed=-1", r"seed must be in \[0, 262144\], got -1"),
        ("seed=99999999", r"seed must be in \[0, 262144\]"),
        ("workers=-1", r"workers must be in \[0, 512\], got -1"),
        ("workers=100000", r"workers must be in \[0, 512\], got 100000"),
        ("method.view_weights=[-1.0]", "method.view_weights.0 must be at least 0, got -1"),
        ("~loss.gamma", "loss needs loss.gamma, which loss/GKL cannot do without"),
        (
            "~loss",
            "loss is not chosen, and alpha, beta, gamma alone make none; choose loss=..., or leave out ~loss",
        ),
        ("~optimizer", "optimizer is not chosen, and .* alone make none; choose optimizer=..."),
        ("~attack", "attack is not chosen"),
        ("~launcher", "the configuration lacks launcher; leave out ~launcher"),
        ("~paths", "the configuration lacks paths; leave out ~paths"),
    ],
)
def test_refused_in_one_line(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(composed(*word.split()), 1)


@pytest.mark.parametrize(
    "experiment",
    ["clip/baseline", "llava/language", "seg/baseline", "ssl/fixmatch_gkl", "ssl/denoising", "kd/c100_vanilla/resnet_20"],
)  # fmt: skip
def test_what_a_training_does_not_keep_is_not_evaluated_and_what_it_does_not_say_is_no_attack(
    experiment: str,
) -> None:
    """Once both were found missing when the training was over."""

    def asked(*words: str) -> dict[str, Any]:
        return compose("train", [f"experiment={experiment}", "scale=smoke", *words])

    if experiment.startswith("kd"):  # the best epoch on the test images
        check(asked("evaluate=best"), 1)
    else:
        with pytest.raises(ConfigError, match=r"^unknown evaluate 'best'; .*there are: last$"):
            check(asked("evaluate=best"), 1)
    classifier = experiment.startswith(("kd", "ssl/fixmatch"))
    for name in ("epsilons", "attacks", "structure", *(() if classifier else ("class_scores",))):
        told = "attacks as the section evaluation says, and" if classifier else "measures a classifier, and"
        with pytest.raises(ConfigError, match=f"^assessment={name} {told} {experiment}"):
            check(asked(f"assessment={name}"), 1)


@pytest.mark.parametrize("section", ["attack", "evaluation"])
def test_a_radius_that_leads_from_any_picture_to_any_other_is_refused(section: str) -> None:
    """Once l2 took 128, people's 128/255, and a network's robust accuracy was 0 % without a word."""
    config = composed(f"{section}.norm=l2", f"{section}.epsilon=128")
    check(config, 1)  # the pictures' size is not known yet
    check_radii(composed(f"{section}.norm=l2", f"{section}.epsilon=3"), 3 * 32**2)
    with pytest.raises(
        ConfigError,
        match=rf"{section}.epsilon must be .* at most 55.43, .* got 128; 128 levels of 255 are 0.502$",
    ):
        check_radii(config, 3 * 32**2)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "data=image_folder",
            r"^data.root=\.\.\. is missing: it is left open",
        ),  # once root=..., which is no setting
        ("selection=most_robust", r"^selection.images=\.\.\. is missing"),
        (
            "assessment=renditions",
            "^assessment.root follows data.root, which is not there; set assessment.root=",
        ),
        ("loss.alpha=${frac:3}", r"^loss.alpha: there is no \$\{frac:\.\.\.\}"),
        ("loss.alpha=${px:a}", r"^px takes levels of 255, as \$\{px:8\}, got 'a' \(found for loss.alpha\)"),
        ("data.root=~/pictures", "no shell spells out a ~ within a word; write data.root=/"),
    ],
)
def test_what_cannot_be_composed_is_told_by_its_whole_name(word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        composed(word)


@pytest.mark.parametrize("run", ["", "seg/nothing"])
def test_a_run_before_that_has_no_name_is_one_line(run: str) -> None:
    with pytest.raises(ConfigError, match=f"^unknown experiment '{run}'"):
        prerequisites(compose("train", ["experiment=seg/apd_gkl", "scale=smoke", f"teacher.run={run}"]))


def test_a_fraction_of_255_is_written_so() -> None:
    config = composed("evaluation.epsilon=${px:8}", "attack.epsilon=${px:16}")
    check(config, 1)
    assert (config["evaluation"]["epsilon"], config["attack"]["epsilon"]) == (8 / 255, 16 / 255)


@pytest.mark.parametrize("word", ["evaluation.epsilon=8", "evaluation.norm=Linf", "evaluation.images=0"])
def test_evaluation_alone_is_checked_as_well(word: str) -> None:
    config = compose("evaluate", ["checkpoint=f.pt", "model=wrn_10_1", "data=digits", word])
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        check_sections(config)


def test_every_number_of_every_experiment_has_a_range() -> None:
    """A setting added without one would take anything."""
    wholes = [e if not (group := completed_by(e)) else f"{e}/{'resnet_20' if group == 'model' else choices(group)[0]}"
              for e in choices("experiment")]  # fmt: skip
    for experiment in wholes:
        config = compose("train", [f"experiment={experiment}", "scale=smoke"])
        check(config, 1)
        for where, _ in numbers(config):
            name = next(part for part in reversed(where.split(".")) if not part.isdigit())
            assert name in RANGES, where


def test_a_length_in_l2_may_be_above_one() -> None:
    """As the robustness library's 3.0 on ImageNet; in linf it is still refused."""
    check_ranges({"evaluation": {"norm": "l2", "epsilon": 3.0}})
    for section in ({"norm": "linf", "epsilon": 3.0}, {"norm": "l2", "epsilon": -1.0}, {"epsilon": 3.0}):
        with pytest.raises(ConfigError, match="evaluation.epsilon must be"):
            check_ranges({"evaluation": section})


def test_what_a_setting_takes_is_said_in_words() -> None:
    """Once in Python's: Union[int, Literal['robustbench'], NoneType]."""
    hints = [*SETTINGS.values(), *(hint for types in SECTIONS.values() for hint in types.values())]
    hints += [hint for name in addresses() for key, hint in parameters_of(name)[1].items() if key != "return"]
    odd = object()
    for hint in hints:
        if not fits(odd, hint):
            assert not re.search(
                r"[A-Z\[\]]|typing|collections|\bint\b|float\b(?!32|64)|\bstr\b",
                said := mistyped("x", hint, 0),
            ), said
    wanted = Literal["all"] | Sequence[Sequence[int]]
    assert (
        mistyped("x", wanted, [None, True, "a"])
        == "x must be all or a list of lists of whole numbers, got [null, true, 'a']"
    )
    assert mistyped("x", bool | Literal["auto"], 2) == "x must be true, false or auto, got 2"


@pytest.mark.parametrize(
    ("norm", "epsilon", "told"),
    [
        ("l2", 8 / 255, "evaluation.epsilon is 8/255 in l2, a radius of linf"),
        ("l2", 4 / 255, "is 4/255 in l2"),
        ("linf", 0.5, "every picture may become the same grey"),
        ("l2", 0.5, None),
        ("l2", 36 / 255, None),
        ("l2", 0.125, None),
        ("linf", 8 / 255, None),
        ("linf", 0.3, None),
    ],
)
def test_a_radius_of_the_other_norm_is_told(norm: str, epsilon: float, told: str | None) -> None:
    """Whoever sets norm=l2 alone keeps linf's radius, and gets a number near the clean one."""
    config = {"evaluation": {"norm": norm, "epsilon": epsilon}, "attack": None}
    lines = doubtful_radii(config)
    assert len(lines) == (told is not None)
    assert told is None or (told in lines[0] and "\n" not in lines[0])
