"""Runs started elsewhere: by a real Slurm, preempted and queued again; on two machines that lose each other."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.system.test_commands import Command, command  # noqa: F401  (a fixture)
from tests.trainers.runs.test_interruptions import (
    ROOT,
    SMALL,
    assert_same_run,
    checkpoint,
    environment,
    finish,
    stamp,
)
from trainers.runs.launchers.local import Local
from trainers.runs.launchers.nodes import TorchrunNodes
from trainers.runs.launchers.slurm import Slurm
from trainers.runs.records import read_records

pytestmark = pytest.mark.long  # whole runs in processes of their own, on several machines

GKL = "experiment=at/c100_basic_gkl"
SLURM = ["launcher=slurm", "launcher.gpus=0", "launcher.cpus_per_device=1", "launcher.minutes=30"]


def until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# --- what cannot be started -------------------------------------------------------------------------------------------


def test_without_slurm_or_an_endpoint_one_line_says_so(
    command: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    for script, more in (("train", [GKL]), ("reproduce", ["table=3", "rows=[gkl_basic]"])):
        code, _, err = command(script, *more, "scale=smoke", "launcher=slurm")
        assert code == 2 and err.strip().endswith("use launcher=local") and "needs sbatch on the PATH" in err
        code, _, err = command(script, *more, "scale=smoke", "launcher=torchrun-nodes")
        assert code == 2 and "launcher.endpoint must be HOST:PORT of one of the 2 machines" in err
        code, _, err = command(script, *more, "scale=smoke", "launcher=sge")
        assert code == 2 and "unknown launcher 'sge'; there are: local, slurm, torchrun-nodes" in err


def test_a_cluster_s_own_words_reach_sbatch() -> None:
    made = Slurm(
        partition="gpu", account=None, qos="low", minutes=90, warning_seconds=60, requeues=5, array=7, nodes=2, gpus=4,
        cpus_per_device=3, memory_gb=32.0, setup=["module load cuda"], python="apptainer exec gkl.sif python",
        extra={"constraint": "3090"},
    )  # fmt: skip
    assert made.parameters == {
        "partition": "gpu", "account": None, "qos": "low", "time": 90, "signal_delay_s": 60, "array_parallelism": 7,
        "nodes": 2, "gpus_per_node": 4, "setup": ["module load cuda"], "mem": "32GB",
        "additional_parameters": {"requeue": True, "constraint": "3090"},
    }  # fmt: skip


def test_more_runs_than_gpus_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def seen(devices: int) -> list[str]:
        return [Local().environment(slot, devices, 5)["CUDA_VISIBLE_DEVICES"] for slot in range(5)]

    assert seen(1) == ["0", "1", "2", "3", "0"]
    assert seen(2) == ["0,1", "2,3", "0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert seen(1) == ["3"] * 5


def test_a_machine_s_share_of_a_run_is_the_same_command() -> None:
    nodes = TorchrunNodes(2, "one:29500", "10.0.0.2", restarts=3, wait_minutes=1)
    assert nodes.command(Path("run.yaml"))[1:] == [
        "-m", "trainers.runs", "run.yaml", "--nodes", "2", "--endpoint", "one:29500", "--restarts", "3", "--wait", "60",
        "--address", "10.0.0.2",
    ]  # fmt: skip
    assert nodes.concurrent_runs(1) == 1


# --- Slurm ------------------------------------------------------------------------------------------------------------


def jobs(state: str = "") -> list[str]:
    asked = ["squeue", "--me", "-h", "-r", "-o", "%i", *(["-t", state] if state else [])]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.slurm
@pytest.mark.usefixtures("scans")
@pytest.mark.timeout(1200)
def test_slurm_trains_with_two_processes_and_a_preempted_job_comes_back_to_the_same_bits(
    tmp_path: Path,
) -> None:
    """scontrol requeue sends what a preemption does: SIGTERM, and the job back into the queue."""
    same = ["devices=2", "bn_groups=2", "checkpoint_minutes=0.005"]
    code, _, err = finish(tmp_path / "here", *same)
    assert code == 0, err
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), *SMALL, f"data.root={os.environ['GKL_TEST_SCANS']}", *same, *SLURM],
        env=environment(tmp_path / "slurm"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: stamp(tmp_path / "slurm") > 0)
    (job,) = jobs("R")
    subprocess.run(["scontrol", "requeue", job], check=True)
    out, _ = process.communicate(timeout=900)  # Slurm holds a requeued job back for two minutes
    assert process.returncode == 0, out
    (log,) = tmp_path.glob("slurm/outputs/**/run.log")
    assert "stopped by SIGTERM before epoch" in log.read_text()
    assert_same_run(tmp_path / "here", tmp_path / "slurm")
    (record,) = read_records(tmp_path / "slurm/results/runs")
    assert record["hardware"]["count"] == 2


@pytest.mark.slurm
@pytest.mark.usefixtures("scans")
@pytest.mark.timeout(1200)
def test_a_table_goes_through_slurm_and_its_jobs_outlive_the_command(tmp_path: Path) -> None:
    arguments = [a for a in SMALL if not a.startswith(("experiment", "epochs"))]
    table = [
        sys.executable, str(ROOT / "scripts/reproduce.py"), "table=3", "rows=[gkl_basic,kl_basic]", "epochs=2", *arguments,
        f"data.root={os.environ['GKL_TEST_SCANS']}", *SLURM, "launcher.array=1",
    ]  # fmt: skip
    process = subprocess.Popen(
        table, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until(lambda: checkpoint(tmp_path))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on in the queue" in err
    submitted = set(jobs())
    assert submitted
    done = subprocess.run(table, env=environment(tmp_path), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path / "results/runs")) == 2
    tickets = [path.read_text() for path in tmp_path.glob("outputs/**/slurm.json")]
    assert len(tickets) == 2 and len({t.rpartition("_")[0] for t in tickets}) == 1, (
        "one array, submitted once"
    )


@pytest.mark.slurm
@pytest.mark.usefixtures("scans")
def test_a_run_that_fails_in_slurm_is_named_with_its_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/sweep.py"), *SMALL, f"data.root={os.environ['GKL_TEST_SCANS']}", *SLURM,
         "optimizer.lr=1e20,2e20", "method.awp_gamma=0"],
        env=environment(tmp_path), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "seed 0 failed:" in done.stderr
        and "became" in done.stderr
        and "the last checkpoint is intact" in done.stderr
    )
    until(lambda: not jobs())


# --- two machines -----------------------------------------------------------------------------------------------------

ONE, TWO = "10.77.0.1", "10.77.0.2"


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two network namespaces joined by a cable: address -> name."""
    names = {address: f"gkl-{os.getpid()}-{k}" for k, address in enumerate((ONE, TWO))}
    commands = [f"ip netns add {name}" for name in names.values()]
    (one, two), pid = names.values(), os.getpid()
    commands += [f"ip link add a{pid} netns {one} type veth peer name b{pid} netns {two}"]
    for (address, name), link in zip(names.items(), "ab", strict=True):
        commands += [f"ip -n {name} addr add {address}/24 dev {link}{pid}", f"ip -n {name} link set lo up"]
        commands += [f"ip -n {name} link set {link}{pid} up"]
    try:
        for line in commands:
            subprocess.run(line.split(), check=True)
        yield names
    finally:
        for name in names.values():
            for found in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout.split():
                os.kill(int(found), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.namespaces
@pytest.mark.usefixtures("scans")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lost", [ONE, TWO])
def test_a_machine_that_dies_comes_back_and_the_run_ends_in_the_same_bits(
    lost: str, machines: dict[str, str], tmp_path: Path
) -> None:
    """Every process of one machine is killed at once, that of the endpoint or the other; the same command is typed again there."""
    same = ["bn_groups=2", "checkpoint_minutes=0.005"]
    code, _, err = finish(tmp_path / "here", *same, "devices=2")
    assert code == 0, err

    def started(address: str) -> subprocess.Popen[str]:
        link = subprocess.run(
            ["ip", "-n", machines[address], "-br", "addr"], capture_output=True, text=True, check=True
        ).stdout
        card = next(line.split("@")[0] for line in link.splitlines() if address in line)
        return subprocess.Popen(
            ["ip", "netns", "exec", machines[address], sys.executable, str(ROOT / "scripts/train.py"), *SMALL,
             f"data.root={os.environ['GKL_TEST_SCANS']}", *same, "launcher=torchrun-nodes", f"launcher.endpoint={ONE}:29577",
             "launcher.wait_minutes=2"],
            env={**environment(tmp_path / "two"), "GKL_ADDRESS": address, "GLOO_SOCKET_IFNAME": card},
            stdout=subprocess.DEVNULL, stderr=open(tmp_path / f"{address}.log", "a"), text=True, start_new_session=True,
        )  # fmt: skip

    running = {address: started(address) for address in (ONE, TWO)}
    until(lambda: stamp(tmp_path / "two") > 0)
    for found in subprocess.run(
        ["ip", "netns", "pids", machines[lost]], capture_output=True, text=True
    ).stdout.split():
        os.kill(int(found), signal.SIGKILL)
    running[lost].wait(30)
    assert read_records(tmp_path / "two/results/runs") == []
    running[lost] = started(lost)
    codes = {address: process.wait(600) for address, process in running.items()}
    logs = {address: (tmp_path / f"{address}.log").read_text()[-2000:] for address in running}
    assert codes == {ONE: 0, TWO: 0}, logs
    assert_same_run(tmp_path / "here", tmp_path / "two")
    (record,) = read_records(tmp_path / "two/results/runs")
    assert record["hardware"]["count"] == 2
