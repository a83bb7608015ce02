"""A run with a network from a person's file, as it is started again: from its frozen configuration, without the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gkl.models.test_own import NET
from trainers.runs.compose import compose
from trainers.runs.paths import freeze

ROOT = Path(__file__).resolve().parents[2]


def started(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "trainers.runs", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_goes_on_without_the_file_and_another_s_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("OUTPUTS", "RESULTS"):
        monkeypatch.setenv(f"GKL_{folder}", str(tmp_path / folder.lower()))
    (tmp_path / "net.py").write_text(NET)
    words = [
        "experiment=at/c100_basic_gkl",
        "scale=smoke",
        "epochs=1",
        "logger=off",
        "evaluation=screen",
        "evaluation.images=4",
    ]
    path = freeze(compose("train", [*words, f"model={tmp_path}/net.py:Net", "device=cpu"]))
    assert str(tmp_path / "net.py") not in path.read_text()
    (tmp_path / "net.py").unlink()
    done = started(path)
    assert done.returncode == 0, done.stderr
    record = json.loads(next((tmp_path / "results" / "runs").rglob("seed0.json")).read_text())
    assert record["config"]["model"]["name"].startswith("Net@") and str(tmp_path) not in json.dumps(
        record["overrides"]
    )
    for kept in (tmp_path / "outputs" / "networks").iterdir():
        kept.unlink()  # as on a machine whose person has not named it
    for weights in (tmp_path / "results" / "runs").rglob("*.json*"):
        weights.unlink()
    refused = started(path)
    assert refused.returncode == 2 and "name it on the command line, model=FILE.py:Net" in refused.stderr
    assert "Traceback" not in refused.stderr
