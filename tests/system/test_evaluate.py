"""scripts/evaluate.py with other people's files: what it says of them, and the numbers that follow."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gkl.data.digits import digits
from gkl.models import create
from tests.system.test_commands import Command, command  # noqa: F401  (a fixture)
from trainers.runs.compose import compose

QUICK = ["data=digits", "device=cpu", "evaluation=screen", "evaluation.images=10", "evaluation.epsilon=0.05"]


def numbers(out: str) -> dict[str, Any]:
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """As a training of torchvision's saves, behind RobustBench's normalisation."""
    torch.manual_seed(0)
    state = create("wrn_10_1", num_classes=10).state_dict()
    average = create("wrn_10_1", num_classes=10).state_dict()
    statistics = {"0.mean": torch.tensor([0.4, 0.5, 0.6]), "0.std": torch.tensor([0.2, 0.25, 0.3])}
    content = {
        "model": {f"1.{key}": value for key, value in state.items()} | statistics,
        "model_ema": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in average.items()}},
        "args": argparse.Namespace(lr=0.1),
    }
    torch.save(content, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_which_weights_and_whose_normalisation_are_said_and_chosen(command: Command, theirs: Path) -> None:  # noqa: F811
    given = [f"checkpoint={theirs}", "model=wrn_10_1", *QUICK]
    code, out, err = command("evaluate", *given)
    assert code == 0, err
    assert (
        "46 of the model's 46 tensors matched; found under 'model' and not 'model_ema', which checkpoint_key=... takes; "
        "there as 1.*; normalised by the file's mean (0.4, 0.5, 0.6) and std (0.2, 0.25, 0.3)\n" in err
    )
    assert "pictures go in" not in err
    own = "model.normalisation={mean:[0.4,0.5,0.6],std:[0.2,0.25,0.3]}"
    assert numbers(command("evaluate", *given, own)[1]) == numbers(out)
    code, averages, err = command("evaluate", *given, "checkpoint_key=model_ema")
    assert command("evaluate", *given, "checkpoint.key=model_ema")[1] == averages
    assert (
        code == 0 and "found under 'model_ema' and not 'model'" in err and numbers(averages) != numbers(out)
    )
    assert "go in as they are, in [0, 1]; where its training normalised them, set model.normalisation=" in err
    _, _, err = command("evaluate", *given, "checkpoint_key=model_ema", "model.normalisation=cifar10")
    assert "pictures go in normalised by mean (0.4914, 0.4822, 0.4465) and std (0.2471" in err


def test_another_normalisation_than_the_file_s_is_one_line(command: Command, theirs: Path) -> None:  # noqa: F811
    code, _, err = command(
        "evaluate", f"checkpoint={theirs}", "model=wrn_10_1", "model.normalisation=cifar10", *QUICK
    )
    assert code == 2 and err.count("\n") == 1, err
    assert (
        "normalises its pictures by mean (0.4, 0.5, 0.6) and std (0.2, 0.25, 0.3), and the WideResNet here as"
        in err
    )


def test_imagenet_s_attack_reads_pictures_from_their_files(command: Command, theirs: Path) -> None:  # noqa: F811
    """At a tiny size; and what it is at its own."""
    given = [
        f"checkpoint={theirs}",
        "model=wrn_10_1",
        "device=cpu",
        "evaluation.version=screen",
        "evaluation.images=10",
    ]
    files = ["data=digits_files", "data.resize=32"]
    code, out, err = command("evaluate", *given, *files, "evaluation=imagenet")
    assert code == 0, err
    assert numbers(out)["epsilon"] == pytest.approx(4 / 255) and numbers(out)["n"] == 10
    config = compose(
        "evaluate", ["checkpoint=f.pt", "model=resnet50", "data=imagenet", "evaluation=imagenet"]
    )
    assert config["evaluation"]["images"] == "robustbench" and config["evaluation"]["version"] == "standard"
    code, out, err = command("evaluate", *given[:-1], *files, "evaluation.images=robustbench")
    assert code == 2 and err.count("\n") == 1 and "use data=imagenet" in err and not out, err


def test_timm_s_network_by_name(command: Command, tmp_path: Path) -> None:  # noqa: F811
    torch.save({"state_dict": create("resnet10t", 10).model.state_dict()}, tmp_path / "timm.pt")  # type: ignore[operator, union-attr]
    for name in ("resnet10t", "timm/resnet10t"):
        code, out, err = command("evaluate", f"checkpoint={tmp_path}/timm.pt", f"model={name}", *QUICK)
        assert code == 0 and numbers(out)["n"] == 10, err


def test_a_network_of_no_classes_is_one_line(command: Command, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "clip.pt")
    given = ["model=clip_b16", "model.name=clip_scan_48", "model.normalisation=null", *QUICK]
    code, _, err = command("evaluate", f"checkpoint={tmp_path / 'clip.pt'}", *given)
    assert code == 2 and err.count("\n") == 1, err
    assert (
        "AutoAttack asks a network for a picture's class, and a Clip gives none; choose model=... of a classifier"
        in err
    )


def test_a_number_may_be_a_key(command: Command, theirs: Path) -> None:  # noqa: F811
    code, _, err = command("evaluate", f"checkpoint={theirs}", "model=wrn_10_1", "checkpoint_key=3", *QUICK)
    assert code == 2 and err.count("\n") == 1, err
    assert "holds no state dict under checkpoint_key=3; it holds model, model_ema" in err


def test_networks_that_no_attack_says_anything_of_are_one_line(command: Command, tmp_path: Path) -> None:  # noqa: F811
    state = create("wrn_10_1", num_classes=10).state_dict()
    torch.save(state | {"fc.weight": torch.zeros_like(state["fc.weight"])}, tmp_path / "f.pt")
    code, _, err = command("evaluate", f"checkpoint={tmp_path / 'f.pt'}", "model=wrn_10_1", *QUICK)
    told = "error: AutoAttack cannot measure these weights: the network gives every image the same logits"
    assert code == 2 and told in err, err
    assert "Traceback" not in err


def test_few_labels_are_tested_on_all_and_maps_are_refused(command: Command, theirs: Path) -> None:  # noqa: F811
    given = [f"checkpoint={theirs}", "model=wrn_10_1", *QUICK]
    whole, few = (command("evaluate", *given, f"data={name}") for name in ("digits", "digits_few"))
    assert few[0] == 0, few[2]
    assert numbers(whole[1]) | {"data": "digits_few"} == numbers(few[1])
    code, _, err = command("evaluate", *given, "data=digits_mosaics")
    assert code == 2 and err.count("\n") == 1, err
    assert "has a label for each pixel, which AutoAttack does not take; choose data of one label" in err


LINEAR = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.fc(x.mean(1).flatten(1))
"""


def test_classes_in_another_order_are_told(command: Command, tmp_path: Path) -> None:  # noqa: F811
    data = digits()
    x = data.train_images.double().mean(1).flatten(1) / 255
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    fitted = torch.linalg.lstsq(
        design, torch.nn.functional.one_hot(data.train_labels).double(), driver="gelsd"
    )
    weights = fitted.solution.T.float()
    (tmp_path / "net.py").write_text(LINEAR)
    for turned, told in ((0, False), (1, True)):
        mine = weights.roll(turned, 0).contiguous()
        torch.save({"fc.weight": mine[:, :64].clone(), "fc.bias": mine[:, 64].clone()}, tmp_path / "w.pt")
        code, _, err = command(
            "evaluate", f"checkpoint={tmp_path / 'w.pt'}", f"model={tmp_path / 'net.py'}:Net", *QUICK
        )
        assert code == 0, err
        assert (
            "less than guessing; its classes may stand in another order than here, 0, 1, 2, 3" in err
        ) == told
