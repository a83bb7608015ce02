"""The configurations of the distillation tables against their recipes, their rendering, and whole runs in processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gkl.models.test_distillation_models import NETWORKS as ALL_NETWORKS
from trainers.errors import ConfigError
from trainers.reports.tables import build, markdown
from trainers.runs.compose import choices, completed_by, compose, published
from trainers.runs.identity import config_hash, differences
from trainers.runs.plan import cells, claims, experiments, load_table
from trainers.runs.records import read_records
from trainers.runs.settings import check

ROOT = Path(__file__).resolve().parents[3]
# pair -> GKL-KD's alpha, beta, gamma, weights; IKL-KD's alpha, beta; DKD's beta; ReviewKD's weight; learning rate
RECIPES = {
    "resnet56_resnet20": (4, 1, 0.2, "class", 4, 1, 2, 0.6, 0.05),
    "resnet110_resnet32": (4, 1, 0.1, "sample", 12, 1, 2, 1.0, 0.05),
    "resnet32x4_resnet8x4": (16, 1, 0.05, "class", 8, 1, 8, 5.0, 0.05),
    "wrn40_2_wrn16_2": (20, 3, 0.3, "sample", 12, 3, 6, 5.0, 0.05),
    "wrn40_2_wrn40_1": (12, 1, 0.3, "sample", 8, 1, 6, 5.0, 0.05),
    "vgg13_vgg8": (8, 1, 0.2, "class", 12, 1, 6, 5.0, 0.05),
    "resnet32x4_shufflenetv1": (8, 1, 0.0, "class", 8, 1, 8, 5.0, 0.01),
    "wrn40_2_shufflenetv1": (8, 1, 0.0, "sample", 4, 1, 8, 5.0, 0.01),
    "vgg13_mobilenetv2": (12, 4, 0.1, "class", 12, 4, 6, 5.0, 0.01),
    "resnet50_mobilenetv2": (8, 1, 0.05, "class", 12, 1, 8, 5.0, 0.01),
    "resnet32x4_shufflenetv2": (12, 3, 0.1, "class", 12, 3, 8, 8.0, 0.01),
}
NETWORKS = [name for name, (_, origin, *_) in ALL_NETWORKS.items() if origin.startswith("cifar/")]
METHODS = ("fitnet", "rkd", "crd", "ofd", "reviewkd", "dkd", "kd", "ikl", "gkl")
COMMON = {
    "epochs": 240, "batch_size": 64, "drop_last": False, "bn_groups": 1, "precision": "tf32", "evaluate": "last",
    "data._target_": "data/cifar100", "augment.views": ["crop_flip"], "augment.padding": 4, "augment.flip": 0.5,
    "model.normalisation": "cifar100_kd", "optimizer.momentum": 0.9, "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False, "schedule.drops": [151, 181, 211], "schedule.of": 240, "schedule.factor": 0.1,
    "schedule.first": 1.0, "averages": {},
}  # fmt: skip


def flat(config: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        config = config[key]
    return config


def test_every_pair_has_its_recipe() -> None:
    assert set(RECIPES) == set(choices("pair/cifar100"))
    kinds = {name for name in choices("experiment") if completed_by(name) == "pair/cifar100"}
    assert kinds == {f"kd/c100_{method}" for method in METHODS}


@pytest.mark.parametrize("pair", RECIPES)
def test_paper_scale_is_the_recipe(pair: str) -> None:
    alpha, beta, gamma, weights, ikl_alpha, ikl_beta, dkd_beta, review, lr = RECIPES[pair]
    own = {
        "gkl": {"alpha": alpha, "beta": beta, "gamma": gamma, "weights": weights, "temperature": 4.0,
                "prior_temperature": 4.0, "warmup": 20},
        "ikl": {"alpha": ikl_alpha, "beta": ikl_beta, "temperature": 4.0, "weights_temperature": 100.0, "warmup": 20},
        "dkd": {"alpha": 1.0, "beta": dkd_beta, "temperature": 4.0, "warmup": 20},
        "kd": {"weight": 0.9, "temperature": 4.0},
        "fitnet": {"layer": 2, "weight": 100.0},
        "rkd": {"distance_weight": 25.0, "angle_weight": 50.0},
        "crd": {"dim": 128, "negatives": 16384, "momentum": 0.5, "temperature": 0.07, "weight": 0.8},
        "ofd": {"kernel_size": 1, "weight": 0.001},
        "reviewkd": {"weight": review, "warmup": 20, "max_width": 512},
    }  # fmt: skip
    for method in METHODS:
        config = compose("train", [f"experiment=kd/c100_{method}/{pair}"])
        check(config, 1)
        assert config["experiment"] == f"kd/c100_{method}/{pair}"
        wanted = {**COMMON, "optimizer.lr": lr, "teacher.network.normalisation": "cifar100_kd", "teacher.weights": "own",
                  "distiller.label_weight": 0.1 if method == "kd" else 1.0,
                  **{f"distiller.{key}": value for key, value in own[method].items()}}  # fmt: skip
        assert {key: flat(config, key) for key in wanted} == wanted, method
        names = (config["teacher"]["network"]["name"], config["model"]["name"])
        assert [n.replace("_", "").removesuffix("half") for n in names] == pair_names(pair)
        assert config["teacher"]["run"] == f"kd/c100_vanilla/{names[0]}"


def pair_names(pair: str) -> list[str]:
    """The two networks of a pair's name, without underscores."""
    plain = {name.replace("_", "").removesuffix("half") for name in NETWORKS}
    joined = pair.replace("_", "")
    return next([joined[:i], joined[i:]] for i in range(len(joined)) if {joined[:i], joined[i:]} <= plain)


@pytest.mark.parametrize("network", NETWORKS)
def test_teachers_and_students_alone_have_the_same_recipe(network: str) -> None:
    config = compose("train", [f"experiment=kd/c100_vanilla/{network}"])
    check(config, 1)
    slow = network.startswith(("mobilenet", "shufflenet"))
    wanted = {
        **COMMON,
        "optimizer.lr": 0.01 if slow else 0.05,
        "model.name": network,
        "distiller.label_weight": 1.0,
    }
    assert {key: flat(config, key) for key in wanted} == wanted
    assert "teacher" not in config and "attack" not in config


@pytest.mark.parametrize("scale", ["small", "smoke"])
@pytest.mark.parametrize("method", METHODS)
def test_scales_shrink_the_recipe(method: str, scale: str) -> None:
    config = compose("train", [f"experiment=kd/c100_{method}/vgg13_vgg8", f"scale={scale}"])
    check(config, 1)
    changed = differences(published(config), config)
    assert ("data._target_" in changed) == (scale == "smoke")
    assert config["model"]["name"] == "vgg_8", "the paper's own networks at every scale"
    assert not any(key.startswith(("attack", "evaluation")) for key in config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=kd/c100_gkl"], "pair=cifar100/... is missing; one of: resnet110_resnet32"),
        (["experiment=kd/c100_gkl/vgg13_vgg9"], "unknown pair 'vgg13_vgg9'; did you mean 'vgg13_vgg8'"),
        (["experiment=kd/c100_vanilla/resnet_57"], "unknown model 'resnet_57'"),
        (
            ["experiment=kd/c100_gkl/vgg13_vgg8", "distiller.gama=1"],
            "there is no setting 'distiller.gama'.*'gamma'",
        ),
        (["experiment=kd/c100_gkl/vgg13_vgg8", "distiller.gamma=big"], "distiller.gamma must be a number"),
        (
            ["experiment=kd/c100_gkl/vgg13_vgg8", "evaluate=lst"],
            "unknown evaluate 'lst'; did you mean 'last'",
        ),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config = compose("train", words)
        check(config, 1)
    assert "\n" not in str(caught.value)


def test_plans_train_teachers_first_and_once() -> None:
    table = load_table("17")
    plan = cells(
        table,
        scale="smoke",
        protocol="official",
        rows=["gkl"],
        columns=["wrn40_2_wrn16_2", "wrn40_2_wrn40_1"],
    )
    names = [(cell.row, cell.config["experiment"]) for cell in plan]
    assert names == [("teacher", "kd/c100_vanilla/wrn_40_2"), ("gkl", "kd/c100_gkl/wrn40_2_wrn16_2"),
                     ("gkl", "kd/c100_gkl/wrn40_2_wrn40_1")]  # fmt: skip
    assert [cell.record for cell in plan[1].before] == [plan[0].record]
    with pytest.raises(
        ConfigError, match="unknown column of table17 'vgg13_vgg9'; did you mean 'vgg13_vgg8'"
    ):
        cells(table, scale="smoke", protocol="official", columns=["vgg13_vgg9"])
    runs = [len(cells(load_table(n), scale="smoke", protocol="official")) for n in ("17", "18")]
    assert runs == [9 * 6 + 5 + 6, 9 * 5 + 4 + 3]


def test_a_table_of_runs_shows_best_and_last_and_pairs_by_column() -> None:
    table = load_table("17")

    def record(experiment: str, seed: int, best: float, last: float) -> dict[str, Any]:
        config = compose("train", [f"experiment={experiment}", "scale=paper", f"seed={seed}"])
        return {
            "experiment": experiment, "scale": "paper", "protocol": "official", "seed": seed, "status": "done",
            "config": config, "config_hash": config_hash(config), "changed": {}, "finished": "2026-01-31T12:00:00Z",
            "metrics": {"top1": last, "top1_best": best}, "path": "p.json",
            "departures": {"teacher.weights": ["own", "published"]},
            "data": {"name": "cifar100", "stand_in_for": None, "train": 50000, "test": 10000},
            "teacher": {"run": "kd/c100_vanilla/vgg_13", "top1": 74.5, "sha256": "0" * 64},
            "evaluation": {"weights": "last"}, "code": {"commit": "a" * 40}, "cost": {"device_hours": 1.0},
            "hardware": {"count": 1, "name": "card"},
        }  # fmt: skip

    records = [record("kd/c100_gkl/vgg13_vgg8", s, 75.0 + s, 74.0 + s) for s in (0, 1)]
    records += [record("kd/c100_kd/vgg13_vgg8", s, 73.0, 72.0) for s in (0, 1)]
    built = build(table, records, scale="paper", protocol="official", claims=claims())
    rows = {row.id: row for row in built.rows}
    assert rows["gkl"].ours["vgg13_vgg8"] == [75.0, 76.0] and rows["gkl"].beside["vgg13_vgg8"] == [74.0, 75.0]
    assert not rows["gkl"].ours["resnet56_resnet20"] and "some columns missing" in rows["gkl"].status
    assert rows["gkl"].comparable
    text = markdown(built)
    assert "| 74.98 / 75.50 ± 0.71, se 0.50 (2); 74.50 |" in text
    assert "VGG13 → VGG8: paper / ours; last epoch" in text
    assert (
        "GKL-KD minus KD, paired over 2 seeds, mean ± half-width of the 95 % interval: VGG13 → VGG8 +2.50 ± 6.35"
        in text
    )
    assert "10000 tested, taught by kd/c100_vanilla/vgg_13 (74.50, 000000000000)" in text
    assert "different weights" not in text
    records[0]["teacher"]["sha256"] = "1" * 64
    mixed = markdown(build(table, records, scale="paper", protocol="official", claims=claims()))
    assert (
        "students of kd/c100_vanilla/vgg_13 were taught by 2 different weights of it (000000000000, 111111111111)"
        in mixed
    )
    assert experiments(table, table["rows"][0])["vgg13_vgg8"] == "kd/c100_vanilla/vgg_13"


# --- whole runs -------------------------------------------------------------------------------------------------------


def called(script: str, folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments, "scale=smoke", "data=image_folder",
         "data.image_size=8", f"data.root={os.environ['GKL_TEST_SCANS']}", "epochs=2", "logger=off"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GKL_OUTPUTS": str(folder / "outputs"),
             "GKL_RESULTS": str(folder / "results")},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long  # a teacher and two students in processes of their own
@pytest.mark.usefixtures("scans")
def test_a_student_run_names_its_teacher_first_missing_then_found(tmp_path: Path) -> None:
    code, _, err = called("train", tmp_path, "experiment=kd/c100_gkl/resnet56_resnet20")
    assert code == 2 and not (tmp_path / "results").exists() and not list(tmp_path.rglob("*.pt"))
    assert "the teacher kd/c100_vanilla/resnet_56 has no record at" in err and err.count("\n") == 1
    code, out, err = called(
        "reproduce", tmp_path, "table=17", "rows=[kd,gkl]", "columns=[resnet56_resnet20]", "jobs=2"
    )
    assert code == 0, out + err
    records = {r["experiment"]: r for r in read_records(tmp_path / "results" / "runs")}
    teacher = records["kd/c100_vanilla/resnet_56"]
    for method in ("kd", "gkl"):
        student = records[f"kd/c100_{method}/resnet56_resnet20"]
        assert student["teacher"] == {"run": "kd/c100_vanilla/resnet_56", "sha256": teacher["checkpoint"]["sha256"],
                                      "top1": teacher["metrics"]["top1"]}  # fmt: skip
        rows = [
            json.loads(line)
            for line in next((tmp_path / "results").rglob(f"c100_{method}/**/*.jsonl")).open()
        ]
        assert student["metrics"] == {
            "top1": rows[-1]["test/top1"],
            "top1_best": max(r["test/top1"] for r in rows),
        }
    (kept,) = (tmp_path / "outputs" / "teacher_logits").glob("*.logits")  # one, for both students
    assert kept.stat().st_size > 0
    assert (tmp_path / "results/tables/table17.md").is_file() and "GKL-KD" in out
    written = tmp_path / "results/runs" / teacher["path"]
    again = written.read_text().replace(
        teacher["checkpoint"]["sha256"], "0" * 64
    )  # as trained anew elsewhere
    whole = written.read_text()
    written.write_text(again)
    for script, *words in (
        ("train", "experiment=kd/c100_kd/resnet56_resnet20"),
        ("reproduce", "table=17", "rows=[kd]", "columns=[resnet56_resnet20]"),
    ):
        code, out, err = called(script, tmp_path, *words)
        assert code == 2 and "and these are 000000000000 now; move the record away" in err, out
        assert err.count("\n") == 1
    written.write_text(whole)
    (tmp_path / "outputs" / teacher["checkpoint"]["path"]).unlink()
    code, _, err = called("train", tmp_path, "experiment=kd/c100_dkd/resnet56_resnet20")
    assert code == 2 and "weights" in err and "are missing; bring the file back" in err
