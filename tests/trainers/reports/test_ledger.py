"""The ledger: its rule on differences whose verdict is known, its prices against simulation, and that it leaves nothing out."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from trainers.reports.computed import gradients_of_dkl, scores_by_size, time_over_kd
from trainers.reports.ledger import Line, ledger, markdown, place_of, seeds_needed
from trainers.reports.tables import paired_half_width
from trainers.runs.plan import load_table
from trainers.runs.records import read_records
from trainers.runs.targets import CONFIGS

ROOT = Path(__file__).resolve().parents[3]


def line(*differences: float) -> Line:
    return Line("a against b", "Table I, small", "AA", differences, 3600.0, ["a.json", "b.json"])


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((2.0, 2.1, 1.9), "supported"),
        ((-2.0, -2.1, -1.9), "contradicted"),
        ((1.0, -1.0, 2.0), "undecided; 44 seeds would decide it, 41.0 h more"),
        ((3.0,), "undecided: one pair"),
        ((1.0, -1.0), "undecided, and would be with 1000 seeds"),
    ],
)
def test_the_rule(differences: tuple[float, ...], verdict: str) -> None:
    """(1, -1, 2): mean 0.667, standard deviation 1.528; its interval, 0.667 -+ 3.79, holds 0. With 44 seeds (2.017 + 0.850) 1.528 / sqrt(44)
    = 0.660 < 0.667, with 43 it is 0.668; a pair takes an hour."""
    assert line(*differences).verdict == verdict
    if len(differences) > 1:
        low, high = line(*differences).interval or (0, 0)
        assert (low + high) / 2 == pytest.approx(statistics.mean(differences))
        assert (high - low) / 2 == pytest.approx(paired_half_width(differences))


def test_so_many_seeds_decide_in_eight_of_ten_trials() -> None:
    """Simulated: normal differences of that mean and spread, the interval of each trial."""
    draw = np.random.default_rng(0)
    for mean, spread in ((1.0, 1.0), (0.5, 1.0), (3.0, 1.5)):
        n = seeds_needed(mean, spread)
        assert n is not None
        trials = [paired_half_width(x) < abs(np.mean(x)) for x in draw.normal(mean, spread, (2000, n))]
        assert 0.74 < np.mean(trials) < 0.93, (mean, spread, n)  # above 0.8 where n is rounded up from little
    assert seeds_needed(0.0, 1.0) is None


def test_every_claim_names_rows_that_there_are() -> None:
    for path in (CONFIGS / "claim").glob("*.yaml"):
        claim = OmegaConf.load(path)
        assert claim.claim.endswith((".", ").")) and claim.where
        for pair in claim.get("pairs", []):
            kind, number = place_of(pair)
            rows = {row["id"] for row in load_table(number, kind)["rows"]}
            assert {pair.ours, pair.other} <= rows, path


def test_theorem_1_is_computed() -> None:
    assert gradients_of_dkl([]).startswith("supported: the largest relative difference is")


def test_the_committed_ledger_is_that_of_the_committed_records() -> None:
    """Every pair of records of a claim has its line: nothing is dropped. But for Theorem 1's last digits, which a machine may have its own."""
    claims = ledger(read_records(ROOT / "results/runs"))
    text = markdown(claims)
    there = (ROOT / "results/claims.md").read_text()
    assert [row for row in text.splitlines() if "relative difference" not in row] == [
        row for row in there.splitlines() if "relative difference" not in row
    ]
    robust = next(claim for claim in claims if claim.name == "07_robust")
    lines = {(one.where.split(",")[0], len(one.differences)) for one in robust.lines}
    assert {("Table III", 5), ("Table IV", 5), ("Table IV", 3)} <= lines
    for one in robust.lines:
        assert len(one.records) == 2 * len(one.differences)
        assert all((ROOT / "results/runs" / path).is_file() for path in one.records)


def test_what_an_assessment_found_is_compared_by_seed(tmp_path: Path) -> None:
    """Figure 4's margins: the mean over the classes, in percent."""
    claims = {claim.name: claim for claim in ledger(read_records(ROOT / "results/runs"))}
    (line,) = claims["20_margins"].lines
    details = [
        json.loads((ROOT / "results/runs" / path).with_suffix(".structure.json").read_text())["details"][
            "margins"
        ]
        for path in line.records
    ]
    ours, other = (100 * sum(found) / len(found) for found in details)
    assert line.differences == [pytest.approx(ours - other)] and line.metric == "mean class margin, percent"


def test_what_is_computed_from_records_and_benchmarks() -> None:
    records = read_records(ROOT / "results/runs")
    assert re.match(r"undecided: Spearman's .* [+-]\d\.\d\d in kd/lt_vanilla/", scores_by_size(records))
    assert (
        scores_by_size([]) == "undecided: no run has Spearman's coefficient of class size and mean score yet"
    )
    found = re.match(r"(\w+): GKL-KD's step / KD's, median and quartiles, (.*)", time_over_kd([]))
    assert found
    bounds = [(float(low), float(high)) for low, high in re.findall(r"\((\d\.\d+) to (\d\.\d+)\)", found[2])]
    assert bounds and all(low <= high for low, high in bounds)
    assert (found[1] == "supported") == all(high <= 1.05 for _, high in bounds)
    assert (found[1] == "contradicted") == any(low > 1.05 for low, _ in bounds)
