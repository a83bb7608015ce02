"""Whole runs in processes of their own: killed, stopped, shared, refused, mirrored."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainers.loop.folder import RunFolder
from trainers.runs.records import read_records
from trainers.runs.wandb_mirror import Mirror

pytestmark = [  # whole runs in processes of their own, stopped and gone on with
    pytest.mark.usefixtures("scans"),
    pytest.mark.long,
]
ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "experiment=at/c100_autoaug", "scale=smoke", "epochs=6", "batch_size=32", "method.awp_start_epoch=2",
    "data=image_folder", "data.image_size=8", "evaluation=screen", "evaluation.images=4", "evaluation.epsilon=0.15",
    "logger=off",
]  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "GKL_OUTPUTS": str(folder / "outputs"),
        "GKL_RESULTS": str(folder / "results"),
    }  # fmt: skip


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), *SMALL, f"data.root={os.environ['GKL_TEST_SCANS']}", *overrides],
        env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(folder: Path, *overrides: str) -> tuple[int, str, str]:
    process = start(folder, *overrides)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def checkpoint(folder: Path) -> Path | None:
    return next(iter(folder.glob("outputs/**/checkpoints/last.pt")), None)


def stamp(folder: Path) -> float:
    try:
        path = checkpoint(folder)
        return path.stat().st_mtime if path else 0.0
    except FileNotFoundError:  # between its two renames
        return 0.0


def weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    (run,) = {path.parent for path in folder.glob("outputs/**/last.pt") if path.parent.name != "checkpoints"}
    return {name: torch.load(run / f"{name}.pt", weights_only=True) for name in ("last", "swa", "ema")}


def history(folder: Path) -> list[dict[str, float]]:
    (path,) = folder.glob("results/runs/**/seed0.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, averages, history and metrics, bit for bit."""
    a, b = weights(one), weights(other)
    for name in a:
        assert a[name].keys() == b[name].keys()
        assert all(a[name][key].equal(b[name][key]) for key in a[name]), name
    assert history(one) == history(other) and len(history(one)) == 6
    (record,), (again,) = read_records(one / "results/runs"), read_records(other / "results/runs")
    assert record["metrics"] == again["metrics"] and record["config_hash"] == again["config_hash"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, out, err = finish(folder)
    assert code == 0, err
    assert "screen" in out and "record" in out
    return folder


def test_killed_three_times_at_random_it_ends_in_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"random seed {seed}")
    rng = random.Random(seed)
    for _ in range(3):
        before = stamp(tmp_path)
        process = start(tmp_path, "checkpoint_minutes=0.005")
        wait_for(lambda before=before: stamp(tmp_path) > before, process)
        time.sleep(rng.uniform(0.0, 0.6))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    code, _, err = finish(tmp_path, "checkpoint_minutes=0.005")
    assert code == 0, err
    assert_same_run(uninterrupted, tmp_path)
    code, out, _ = finish(tmp_path)
    assert code == 0 and "this run is done" in out


def test_another_measurement_takes_the_weights_that_are_there(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    before = stamp(tmp_path)
    code, _, err = finish(tmp_path, "evaluation.images=8", "evaluate=last")
    assert code == 0, err
    assert stamp(tmp_path) == before  # not a step was taken
    one, other = sorted(read_records(tmp_path / "results/runs"), key=lambda r: r["evaluation"]["n"])
    assert (one["evaluation"]["n"], other["evaluation"]["n"]) == (4, 8)
    assert other["changed"]["evaluation.images"] == 8 and other["evaluation"]["weights"] == "last"
    assert one["metrics"]["clean_last"] == other["metrics"]["clean"]
    paths = {tmp_path / "outputs" / record["checkpoint"]["path"] for record in (one, other)}
    assert len({path.parent for path in paths}) == 1 and {path.stem for path in paths} == {"swa", "last"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_saves_says_so_and_goes_on(
    signum: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, "checkpoint_minutes=0.005")
    wait_for(lambda: stamp(tmp_path) > 0, process)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # a terminal's Ctrl-C reaches the whole group
    else:
        process.send_signal(signum)  # a scheduler's SIGTERM reaches the command alone
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert err.strip().splitlines()[-1].startswith(f"stopped by {signum.name} before epoch")
    assert "checkpoint saved. The same command goes on from there" in err and "Traceback" not in err
    assert list(tmp_path.glob("results/**/*.json")) == []
    if signum == signal.SIGTERM:
        code, _, err = finish(tmp_path)
        assert code == 0, err
        assert_same_run(uninterrupted, tmp_path)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """float64, batch norm in two groups: the same updates but for the order of sums; begun on one, ended on two."""
    same = ["precision=float64", "bn_groups=2", "evaluation.images=4"]
    for name, devices in (("one", 1), ("two", 2)):
        code, _, err = finish(tmp_path / name, *same, f"devices={devices}")
        assert code == 0, err
    process = start(tmp_path / "both", *same, "devices=1", "checkpoint_minutes=0.005")
    wait_for(lambda: stamp(tmp_path / "both") > 0, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    code, _, err = finish(tmp_path / "both", *same, "devices=2")
    assert code == 0, err
    one = weights(tmp_path / "one")
    for other in ("two", "both"):
        for name, state in weights(tmp_path / other).items():
            for key, value in state.items():
                torch.testing.assert_close(
                    value, one[name][key], rtol=1e-8, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
                )
        for a, b in zip(history(tmp_path / "one"), history(tmp_path / other), strict=True):
            assert a == pytest.approx(b, rel=1e-8)
    (record,) = read_records(tmp_path / "two/results/runs")
    assert record["hardware"]["count"] == 2


def workers(launcher: int) -> dict[str, int]:
    """RANK -> process, of the processes that a launcher has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False
    ).stdout.split()
    said = {int(p): Path(f"/proc/{p}/environ").read_bytes().split(b"\0") for p in found}
    return {word.decode()[5:]: p for p, words in said.items() for word in words if word.startswith(b"RANK=")}


def test_processes_end_with_their_launcher_and_a_killed_one_is_named(tmp_path: Path) -> None:
    """Whoever is killed, the same command goes on at once, and removes what the killed have left half-written."""
    same = ["epochs=1000", "devices=2", "bn_groups=2", "checkpoint_minutes=0.005"]
    process = start(tmp_path, *same)
    wait_for(lambda: stamp(tmp_path) > 0, process)
    process.kill()  # the launcher alone
    process.wait()
    path = checkpoint(tmp_path)
    assert path
    left = path.with_name(f".last.pt.{process.pid}.tmp")
    left.write_text("half")
    again = start(tmp_path, *same)
    _, err = process.communicate(timeout=60)
    assert err.strip().splitlines()[-1].startswith("stopped by SIGTERM before epoch")
    before = stamp(tmp_path)
    wait_for(lambda: stamp(tmp_path) > before, again)
    assert not left.exists()
    os.kill(workers(again.pid)["1"], signal.SIGKILL)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 137 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("error: process 1 of this run was ended by SIGKILL")


def test_under_nohup_a_hangup_reaches_no_process_of_a_run(tmp_path: Path) -> None:
    same = ["epochs=6", "devices=2", "bn_groups=2"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to what it starts
    try:
        process = start(tmp_path, *same)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for(lambda: stamp(tmp_path) > 0, process)
    os.killpg(process.pid, signal.SIGHUP)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0 and "stopped" not in err


def test_a_second_run_on_the_same_output_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, "epochs=1000")
    wait_for(lambda: bool(list(tmp_path.glob("outputs/**/history.jsonl"))), process)
    code, _, err = finish(tmp_path, "epochs=1000")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert code == 2 and err.count("\n") == 1
    assert "another process is running in" in err and "wait for it, or stop it, or change the seed" in err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(tmp_path: Path) -> None:
    code, _, err = finish(tmp_path, "optimizer.lr=1e20", "method.awp_gamma=0")
    assert code == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert "became" in last and "epoch 1, step" in last and "the last checkpoint is intact" in last
    (path,) = tmp_path.glob("outputs/**/not_finite_epoch1_step*.pt")
    kept = torch.load(path, weights_only=True)
    assert kept["images"].shape[1:] == (3, 8, 8) and len(kept["index"]) == len(kept["labels"]) == 64
    assert list(tmp_path.glob("results/**/*.json")) == []


def test_wandb_mirrors_the_run(tmp_path: Path) -> None:
    """A real offline wandb run directory, holding what history.jsonl holds; the same run id after a restart."""
    pytest.importorskip("wandb", reason="needs wandb and what it imports")
    process = start(tmp_path, "logger=offline", "checkpoint_minutes=0.005", "evaluation.images=4")
    wait_for(lambda: bool(list(tmp_path.glob("outputs/**/history.jsonl"))) and stamp(tmp_path) > 0, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    code, _, err = finish(tmp_path, "logger=offline")
    assert code == 0, err
    for wandb_log in tmp_path.glob("outputs/**/mirror.log"):
        assert wandb_log.read_text() == ""
    files = sorted(tmp_path.glob("outputs/**/wandb/offline-run-*/run-*.wandb"))
    (record,) = read_records(tmp_path / "results/runs")
    assert len(files) == 2 and {f.stem for f in files} == {f"run-{record['config_hash']}-seed0"}
    mirrored = files[-1].read_bytes()
    assert b"test/clean" in mirrored and b"loss/robust" in mirrored and b"break_asymmetry" in mirrored
    assert "warning" not in err


def test_wandb_s_process_hears_the_end_while_a_worker_has_its_pipe(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb and what it imports")
    names = ("project", "entity", "name", "group", "job_type", "id")
    settings = {**dict.fromkeys(names, "it"), "entity": None, "tags": [], "config": {}, "mode": "offline"}
    mirror = Mirror(
        RunFolder(tmp_path), {**settings, "folder": str(tmp_path), "record": str(tmp_path / "no.json")}
    )
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    try:
        assert mirror.close(patience=60) is None
        assert worker.is_alive()
    finally:
        worker.kill()
        mirror.process.kill()


def test_wandb_in_trouble_never_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb and what it imports")
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    code, _, err = finish(tmp_path, "logger=online", "epochs=1")
    assert code == 0, err
    assert "wandb is out (" in err and "history.jsonl has everything" in err
    (written,) = tmp_path.glob("outputs/**/wandb/offline-run-*/run-*.wandb")
    assert b"test/clean" in written.read_bytes(), "what could not be sent is kept for later"


def test_a_service_that_never_answers_holds_no_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listening socket that says nothing: the run trains, ends and has its record while wandb still waits."""
    pytest.importorskip("wandb", reason="needs wandb and what it imports")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        code, _, err = finish(tmp_path, "logger=online", "logger.patience=1", "epochs=1")
    assert code == 0, err
    assert "wandb is still sending after 1 s and goes on by itself" in err
    assert len(read_records(tmp_path / "results/runs")) == 1


def test_a_killed_table_leaves_no_run_behind_and_goes_on(tmp_path: Path) -> None:
    """SIGKILL to the command alone: its runs save and stop, and the same command finds them ready."""
    arguments = [a for a in SMALL if not a.startswith(("experiment", "epochs"))]
    command = [
        sys.executable, str(ROOT / "scripts/reproduce.py"), "table=3", "rows=[gkl_basic]", "epochs=40", *arguments,
        f"data.root={os.environ['GKL_TEST_SCANS']}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: stamp(tmp_path) > 0, process)
    process.kill()
    process.communicate()
    (log,) = tmp_path.glob("outputs/**/run.log")
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "started: seed 0" in done.stdout and "[1/1] done gkl_basic seed 0" in done.stdout
    assert (
        "stopped by SIGTERM before epoch" in log.read_text()
        and len(read_records(tmp_path / "results/runs")) == 1
    )
