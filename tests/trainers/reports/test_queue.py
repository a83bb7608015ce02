"""The queue: what a step is worth, the order, what fits into some minutes, and that it stops clean."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainers.errors import ConfigError
from trainers.reports.ledger import Line, ledger
from trainers.reports.queue import Step, _ordered, fitting, missing_seeds, queue
from trainers.runs.plan import Cell
from trainers.runs.records import read_records
from trainers.runs.reproduce import read_settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("differences", "missing"),
    [
        ((3.0,), 4),
        ((2.0, 2.1, 1.9), 2),  # supported, by a spread of three
        ((2.0, 2.1, 1.9, 2.0, 2.0), 0),
        ((1.0, -1.0, 2.0), 41),  # 44 would decide it, see test_ledger
        ((1.0, -1.0), 998),
    ],
)
def test_the_seeds_that_a_line_needs(differences: tuple[float, ...], missing: int) -> None:
    assert missing_seeds(Line("a against b", "Table I", "AA", differences, 60.0, ["a", "b"])) == missing


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    """Of the committed records at scale small."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GKL_RESULTS", str(ROOT / "results"))
        patched.setenv("GKL_OUTPUTS", "/nonexistent")
        settings, _ = read_settings(["scale=small", "tflops=1"])
        found, unfit = queue(read_records(ROOT / "results/runs"), settings, [])
    assert not unfit
    return found


def test_what_says_nothing_of_a_claim_s_runs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GKL_RESULTS", str(tmp_path))
    settings, _ = read_settings(["scale=small", "tflops=1"])
    steps, unfit = queue([], settings, ["method.awp_gamma=0.1"])
    assert steps and all("at/" in cell.config["experiment"] for step in steps for cell in step.cells)
    assert any(line.startswith("table 17, gkl against kd: there is no setting") for line in unfit)
    with pytest.raises(
        ConfigError, match="no claim's runs can be so configured: .* unknown setting 'nothing'"
    ):
        queue([], settings, ["setting=nothing"])


def test_the_most_telling_a_minute_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher is paid once: [t, a] is worth 0.5 in 11 minutes and [t, b] in 12, then in 2; [c] in 10."""
    took = {"t": 10.0, "a": 1.0, "b": 2.0, "c": 10.0, "unknown": None}
    monkeypatch.setattr("trainers.reports.queue._minutes", lambda cell, records, rate: took[cell.row])
    monkeypatch.setattr("trainers.reports.queue.rate", lambda plan, settings: None)

    def step(*rows: str, worth: float = 0.5) -> Step:
        some = [Cell(row, {"experiment": "at/x"}) for row in rows]
        for cell in some:
            cell.__dict__["record"] = Path(cell.row)
        return Step(["claim"], rows[-1], 0, some, None, worth)

    offered = [step("unknown", worth=9.0), step("t", "b"), step("t", "a"), step("c"), step("c", worth=0.0)]
    found = [("".join(c.row for c in s.cells), s.minutes) for s in _ordered(offered, [], {})]
    assert found == [("c", 10.0), ("ta", 11.0), ("b", 2.0), ("unknown", None)]
    # [a, b] needs what [t, a] and [t, b] bring: whichever comes last has its claim and its worth, too.
    third = replace(step("a", "b", worth=0.1), claims=["another"])
    last = _ordered([step("t", "b"), step("t", "a"), third], [], {})[-1]
    assert (last.claims, last.worth, len(last.cells)) == (["claim", "another"], 0.6, 1)


def test_nothing_twice_nothing_done_and_teachers_first(steps: list[Step]) -> None:
    known = [step for step in steps if step.minutes is not None]
    assert steps[: len(known)] == known and len(known) > 20
    brought: set[Path] = set()
    for step in steps:
        for cell in step.cells:
            assert cell.record not in brought and not cell.record.exists()
            brought.add(cell.record)
            assert all(one.record in brought or one.record.exists() for one in cell.before)


def test_every_claim_that_a_run_can_decide_is_in_it(steps: list[Step]) -> None:
    """But those whose lines have all their seeds."""
    named = {name for step in steps for name in step.claims}
    for claim in ledger(read_records(ROOT / "results/runs")):
        wanting = any(missing_seeds(line) for line in claim.lines) or not claim.lines
        assert not (claim.pairs and wanting) or claim.name in named, claim.name


def test_what_fits_into_some_minutes() -> None:
    def step(name: str, minutes: float | None) -> Step:
        return Step(["claim"], name, 0, [Cell(name, {})], minutes, 1.0)

    some = [step("a", 4.0), step("b", 30.0), step("c", 5.0), step("d", None), step("e", 2.0)]
    for minutes, at_once, rows in (
        (10, 1, "acb"),  # b is begun in the minute that is left
        (9, 1, "ac"),
        (5, 2, "acb"),
        (100, 1, "abced"),
        (1, 1, "a"),
    ):
        assert "".join(cell.row for cell in fitting(some, minutes, at_once)) == rows


@pytest.mark.long  # runs until the time is up
def test_at_the_end_of_the_minutes_it_stops_clean(tmp_path: Path) -> None:
    def reproduce(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "scripts/reproduce.py", "table=3", "scale=smoke", "rows=[kl_basic]", "logger=off", *arguments],
            cwd=ROOT, text=True, capture_output=True, check=False,
            env={**os.environ, "GKL_OUTPUTS": str(tmp_path / "outputs"), "GKL_RESULTS": str(tmp_path / "results")},
        )  # fmt: skip

    done: Any = reproduce("epochs=2000", "minutes=0.4")
    assert done.returncode == 0, done.stderr
    assert "stopped by the end of 0.4 minutes with 0 of 1 runs done" in done.stdout
    assert "1 missing" not in done.stdout and not done.stderr
    assert list(tmp_path.rglob("last.pt")) and not list(tmp_path.rglob("seed0.json"))
    assert "started: seed 0" in reproduce("epochs=2000", "plan=true").stdout
