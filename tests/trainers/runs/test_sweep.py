"""Sweeps: what is swept, runs stopped and gone on with, their table and figures, Optuna's search within intervals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.system.test_commands import Command, command  # noqa: F401  (a fixture)
from tests.trainers.runs.test_interruptions import ROOT, SMALL, environment, wait_for
from trainers.errors import ConfigError
from trainers.reports.figures import draw, pareto_front
from trainers.reports.tables import Row, Table
from trainers.runs.compose import _composed
from trainers.runs.records import read_records
from trainers.runs.reproduce import read_settings
from trainers.runs.sweep import Interval, Search, read_sweep

pytestmark = pytest.mark.long  # whole sweeps in processes of their own

GKL = "experiment=at/c100_basic_gkl"


def test_what_is_swept_and_what_is_shared() -> None:
    sweep = read_sweep([GKL, "loss.gamma=0,0.4", "loss.alpha=12,20", "epochs=3", "data=digits"])
    assert sweep.shared == ["epochs=3", "data=digits"] and not sweep.searched
    assert sweep.grid() == [{"loss.gamma": g, "loss.alpha": a} for g in (0, 0.4) for a in (12, 20)]
    assert sweep.name == "at-c100_basic_gkl-loss.gamma-loss.alpha"
    assert [row["id"] for row in sweep.table(sweep.grid()[:1])["rows"]] == ["loss.gamma=0,loss.alpha=12"]
    searched = read_sweep([GKL, "loss.gamma=interval(0,1)", "loss.alpha=tag(log,interval(4,40))"])
    assert searched.searched and searched.swept == {
        "loss.gamma": Interval(0.0, 1.0, False), "loss.alpha": Interval(4.0, 40.0, True),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GKL, "loss.gamma=interval(1,0)"], "an interval goes from a lower to a higher value"),
        ([GKL, "loss.alpha=tag(log,interval(0,40))"], "above 0 on a logarithmic scale"),
        (["experiment=kd/c100_gkl", "loss.gamma=0,1"], r"a sweep names its experiment whole: experiment=kd/c100_gkl/"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_sweep(arguments)


@pytest.mark.parametrize("arguments", [["loss.gamma=interval(0,1)"], ["loss.gamma=0,1", "trials=4"]])
def test_trials_and_intervals_belong_together(arguments: list[str], command: Command) -> None:  # noqa: F811
    code, _, err = command("sweep", GKL, "scale=smoke", *arguments)
    assert code == 2 and "trials=... and settings with an interval(low,high) belong together" in err


# --- whole sweeps -----------------------------------------------------------------------------------------------------


def sweep(folder: Path, *overrides: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "scripts/sweep.py"), *SMALL, f"data.root={os.environ['GKL_TEST_SCANS']}", "epochs=3",
        "method.awp_gamma=0", "jobs=1", *overrides,
    ]  # fmt: skip


def carried_out(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        sweep(folder, *overrides), env=environment(folder), capture_output=True, text=True, timeout=500
    )


def metrics(folder: Path) -> dict[str, object]:
    return {
        r["config_hash"]: (r["metrics"], r["checkpoint"]["sha256"])
        for r in read_records(folder / "results/runs")
    }


@pytest.mark.usefixtures("scans")
def test_interrupted_and_gone_on_with_it_has_the_records_of_one_that_was_not(tmp_path: Path) -> None:
    grid = ("loss.gamma=0,0.4,1",)
    whole = carried_out(tmp_path / "whole", *grid, "jobs=2")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        sweep(tmp_path / "cut", *grid), env=environment(tmp_path / "cut"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for(lambda: len(list(tmp_path.glob("cut/outputs/**/history.jsonl"))) == 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        "stopped by SIGINT with 1 of 3 runs done; each of the others that had begun saved where it was" in err
    )
    done = metrics(tmp_path / "cut")
    assert len(done) == 1
    again = carried_out(tmp_path / "cut", *grid)
    assert again.returncode == 0 and "1 of 3 runs done" in again.stdout, again.stderr
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole") and len(metrics(tmp_path / "cut")) == 3
    table = (tmp_path / "cut/results/sweeps/at-c100_autoaug-loss.gamma-smoke.md").read_text()
    assert table == (tmp_path / "whole/results/sweeps/at-c100_autoaug-loss.gamma-smoke.md").read_text()
    for record in read_records(tmp_path / "cut/results/runs"):  # each row shows its own run's numbers
        loss, shown = record["config"]["loss"], record["metrics"]["clean"]
        assert f"| {loss['gamma']:g} | – | {shown:.2f} (1) |" in table
    pictures = list((tmp_path / "cut/results/sweeps").glob("*.p[nd][gf]"))
    assert len(pictures) == 2 and all(path.stat().st_size > 5000 for path in pictures)


@pytest.mark.usefixtures("scans")
def test_a_failing_run_stops_the_sweep_unless_it_is_to_keep_going(tmp_path: Path) -> None:
    fails = ("optimizer.lr=1e20,0.1",)  # not finite in the first steps
    done = carried_out(tmp_path / "fast", *fails)
    assert done.returncode == 2 and metrics(tmp_path / "fast") == {}
    assert "error: row optimizer.lr=1e+20, seed 0 failed:" in done.stderr and "became" in done.stderr
    done = carried_out(tmp_path / "slow", *fails, "keep_going=true")
    assert done.returncode == 2 and len(metrics(tmp_path / "slow")) == 1
    assert done.stderr.count("error: row") == 1 and "| 0.1 |" in done.stdout


@pytest.mark.usefixtures("scans")
def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Optuna's front: 2 points, then the same study to 3; every value within its interval, every point with its record."""
    intervals = ("loss.gamma=interval(0,1)", "loss.alpha=tag(log,interval(4,40))", "epochs=1")
    done = carried_out(tmp_path, *intervals, "trials=2")
    assert done.returncode == 0, done.stderr
    first = metrics(tmp_path)
    assert len(first) == 2
    done = carried_out(tmp_path, *intervals, "trials=3")
    assert done.returncode == 0 and "2 of 3 points tried" in done.stdout, done.stderr
    assert len(metrics(tmp_path)) == 3 and first.items() <= metrics(tmp_path).items()
    losses = [r["config"]["loss"] for r in read_records(tmp_path / "results/runs")]
    assert all(0 <= loss["gamma"] <= 1 and 4 <= loss["alpha"] <= 40 for loss in losses)
    assert len({loss["gamma"] for loss in losses}) == 3
    assert len(list((tmp_path / "results/sweeps").glob("*.png"))) == 1


def test_a_begun_point_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search killed with a point begun asks for that point's runs first, not for another point's."""
    monkeypatch.setenv("GKL_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("GKL_RESULTS", str(tmp_path / "results"))
    settings, overrides = read_settings(
        [GKL, "scale=smoke", "loss.gamma=interval(0,1)", "trials=8", "jobs=1"]
    )
    begun = Search(read_sweep(overrides), settings).first()
    again = Search(read_sweep(overrides), settings).first()
    assert [cell.config["loss"]["gamma"] for cell in again] == [
        cell.config["loss"]["gamma"] for cell in begun
    ]
    assert len(begun) == 1


def test_other_pictures_at_the_same_place_are_another_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OUTPUTS", "RESULTS"):
        monkeypatch.setenv(f"GKL_{name}", str(tmp_path / name.lower()))
    draws = np.random.default_rng(0)
    for number in range(12):
        for part in ("train", "test"):
            path = tmp_path / "pictures" / part / f"c{number % 4}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    words = [
        GKL,
        "scale=smoke",
        "data=image_folder",
        f"data.root={tmp_path}/pictures",
        "loss.gamma=interval(0,1)",
    ]
    settings, overrides = read_settings([*words, "trials=2", "jobs=1"])
    before = Search(read_sweep(overrides), settings)
    assert before.study.study_name == Search(read_sweep(overrides), settings).study.study_name
    Image.new("RGB", (8, 8)).save(path)
    _composed.cache_clear()  # of this process
    assert before.study.study_name != Search(read_sweep(overrides), settings).study.study_name


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_front_is_what_no_other_point_surpasses_in_both() -> None:
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (2.0, 3.0), "d": (3.0, 1.0), "e": (0.5, 5.0)}
    assert pareto_front(points) == {"a", "b", "d"}


def test_two_swept_numbers_make_a_heat_map_of_their_means() -> None:
    values = {(g, a): 10.0 * g + a for g in (0, 1) for a in (12, 20)}
    record = {"seed": 0, "scale": "smoke"}
    rows = [
        Row(
            f"{g},{a}",
            (str(g), str(a)),
            {},
            {"clean": [v], "aa": [v / 2]},
            "stand-in: digits",
            False,
            None,
            [record],
        )
        for (g, a), v in values.items()
    ]
    table = Table("Sweep", "smoke", "official", "", ("gamma", "alpha"), {"clean": "Clean", "aa": "AA"}, rows)
    figure = draw("ablation", table)
    assert figure is not None
    (image,) = figure.subfigs[0].axes[0].images
    assert image.get_array().tolist() == [[12.0, 22.0], [20.0, 30.0]]
    assert {text.get_text() for text in figure.subfigs[0].axes[0].texts} == {"12.0", "22.0", "20.0", "30.0"}
