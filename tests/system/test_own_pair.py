"""A teacher, a student and pictures of one's own, and a training that begins from a checkpoint, from the command to the record."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gkl.data.digits import digits
from gkl.models import create
from trainers.runs.compose import compose
from trainers.runs.settings import build

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["scale=smoke", "epochs=1", "logger=off", "device=cpu"]


def trained(folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The record of a training, and what it said."""
    there = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    there |= {f"GKL_{name}": str(folder / name.lower()) for name in ("OUTPUTS", "RESULTS")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *QUICK, *words],
        cwd=folder, env=there, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = (folder / "results" / "runs").rglob("seed0.json")
    return json.loads(record.read_text()), done.stderr + done.stdout


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for number in range(4 * count):
            path = tmp_path / "pictures" / part / f"class{number % 4}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.mark.long  # whole runs
def test_a_student_learns_from_a_file_s_teacher_on_one_s_own_pictures(tmp_path: Path, pictures: Path) -> None:
    teacher = {"state_dict_ema": {}, "state_dict": create("resnet10t", 4).state_dict()}
    torch.save(teacher, tmp_path / "teacher.pt")
    record, said = trained(
        tmp_path, "experiment=kd/own", "model=wrn_10_1", "model@teacher.network=timm/resnet10t", "teacher.checkpoint=teacher.pt",
        "data=image_folder", f"data.root={pictures}", "batch_size=8",
    )  # fmt: skip
    assert record["experiment"] == "kd/own/wrn_10_1" and record["teacher"]["file"] == "teacher.pt"
    assert "the teacher is teacher.pt: 86 of the model's 86 tensors matched; found under 'state_dict'" in said
    assert (
        "pictures go in as they are, in [0, 1]; where its training normalised them, set teacher.network.normalisation="
        in said
    )
    assert "loss/distillation" in next((tmp_path / "results" / "runs").rglob("seed0.jsonl")).read_text()


@pytest.mark.long  # whole runs
def test_adversarial_training_begins_from_a_checkpoint_of_other_classes(tmp_path: Path) -> None:
    torch.save(create("wrn_10_1", 100).state_dict(), tmp_path / "c100.pt")
    record, said = trained(
        tmp_path, "experiment=at/c100_basic_gkl", "model=wrn_10_1", "model.checkpoint=c100.pt", "evaluation=screen",
        "evaluation.images=4",
    )  # fmt: skip
    assert "begins from c100.pt: 44 of the model's 46 tensors matched; 2 of the head made anew" in said
    assert (
        "pictures go in as they are, in [0, 1]; where its training normalised them, set model.normalisation="
        in said
    )
    assert record["config"]["model"]["checkpoint_sha256"] and "model.checkpoint=PATH" in record["overrides"]


@pytest.mark.parametrize(
    ("experiment", "key"),
    [("kd/own", "teacher.network"), ("at/c100_lbgat", "natural_model"), ("at/c10_las_at", "strategy_model")],
)
def test_pictures_that_another_network_of_a_run_cannot_take_are_one_line(
    tmp_path: Path, experiment: str, key: str
) -> None:
    """Not the model alone: the teacher, the guide, the strategy."""
    words = [*QUICK, f"experiment={experiment}", "model=wrn_10_1", f"model@{key}=vit_tiny_patch16_224"]
    if key == "teacher.network":
        torch.save(create("vit_tiny_patch16_224", 10).model.state_dict(), tmp_path / "vit.pt")  # type: ignore[operator, union-attr]
        words.append(f"teacher.checkpoint={tmp_path}/vit.pt")
    config = compose("train", words)
    with pytest.raises(
        ValueError, match="VisionTransformer cannot take pictures of 8x8.*choose data.image_size"
    ):
        build(config, device=torch.device("cpu"), data=digits())
