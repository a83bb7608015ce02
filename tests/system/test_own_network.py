"""A run with a network from a person's file, as it is started again: from its frozen configuration, without the file."""

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from gkl.own import keep, maker, named
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


@pytest.mark.long  # whole runs
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


def test_another_person_s_folder_of_runs_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen configuration, kept file and all; until the person names the file."""
    for folder in ("OUTPUTS", "RESULTS"):
        monkeypatch.setenv(f"GKL_{folder}", str(tmp_path / folder.lower()))
    trap = tmp_path / "trap"
    (tmp_path / "net.py").write_text(f"{NET}\n__import__('pathlib').Path({str(trap)!r}).touch()\n")
    words = ["experiment=at/c100_basic_gkl", "scale=smoke", "logger=off", "device=cpu"]
    path = freeze(compose("train", [*words, f"model={tmp_path}/net.py:Net"]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another person"))
    refused = started(path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    assert (
        "the network Net has not been named by you, and is not run; if you trust it, name it"
        in refused.stderr
    )
    (kept,) = (tmp_path / "outputs" / "networks").iterdir()
    assert f"model={kept}:Net" in refused.stderr and not trap.exists()
    assert freeze(compose("train", [*words, f"model={kept}:Net"])) == path  # the same run, now named
    assert maker(f"Net@{kept.stem}", kept.parent)(num_classes=10) and trap.exists()


def test_bytecode_beside_a_kept_file_is_not_run(tmp_path: Path) -> None:
    """It may be any, with the time and size of the file's."""
    source, trap = tmp_path / "net.py", tmp_path / "trap"
    text = f"__import__('pathlib').Path({str(trap)!r}).touch()\n"
    source.write_text(NET + "#" * len(text))
    name = named(source, "Net")
    keep(source, tmp_path / "networks")
    kept = tmp_path / "networks" / f"{name.partition('@')[2]}.py"
    good, times = kept.read_bytes(), kept.stat()
    kept.write_text(NET + text)
    os.utime(kept, ns=(times.st_atime_ns, times.st_mtime_ns))
    py_compile.compile(str(kept), doraise=True)
    kept.write_bytes(good)
    os.utime(kept, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert maker(name, kept.parent)(num_classes=10) and not trap.exists()
