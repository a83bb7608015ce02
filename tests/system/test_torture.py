"""Runs killed, stopped and damaged at random until they are done, of every method: `make torture` (half an hour), a short form in make test.

A trial: the run as it is, once; then the same run with faults between and within its starts. At the end its weights, its history and its
metrics must be those of the first, to the bit, and the folder must hold nothing that a killed process left. TORTURE_SEED=... repeats one.
"""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gkl.data.image_folder import image_files
from trainers.runs.records import read_records

ROOT = Path(__file__).resolve().parents[2]
AT = ["evaluation=screen", "evaluation.images=4", "epochs=3", "method.awp_start_epoch=2"]
TRIALS: list[tuple[str, list[str]]] = [
    ("at/c100_basic_gkl", AT),
    ("at/c100_dajat", AT),
    ("at/c100_las_at", AT),
    ("at/c100_lbgat_awp", AT),
    ("at/c10_rice", [*AT, "batch_size=256"]),
    ("at/c100_dm_gkl", [*AT, "generated.images=500"]),
    ("kd/c100_vanilla/resnet_20", ["epochs=6"]),
    ("kd/c100_vanilla/resnet_20", ["epochs=6", "devices=2", "bn_groups=2"]),
    ("kd/in_vanilla/imagenet_resnet_18", ["epochs=2", "workers=2"]),
    ("kd/lt_vanilla/resnet_20", ["epochs=3"]),
    ("ssl/denoising", ["epochs=8"]),
    ("clip/baseline", ["epochs=3"]),
    ("llava/language", ["data.epochs=1"]),
    ("seg/baseline", ["epochs=3", "data.train_pages=80", "data.test_pages=8"]),
    ("seg/baseline", ["epochs=3", "data.train_pages=80", "data.test_pages=10"]),
]


@dataclass
class Trial:
    """A run in a folder of its own, and what was done to it."""

    experiment: str
    folder: Path
    words: list[str]
    faults: list[str] = field(default_factory=list)
    starts: int = 0

    def start(self, *more: str, limit: int | None = None) -> subprocess.Popen[str]:
        """limit: bytes that a file of it may have, as a full disk."""
        self.starts += 1
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GKL_OUTPUTS": str(self.folder / "outputs"),
                       "GKL_RESULTS": str(self.folder / "results"), "GKL_DATA": str(self.folder / "data")}  # fmt: skip
        command = [sys.executable, str(ROOT / "scripts/train.py"), f"experiment={self.experiment}", "scale=smoke", "device=cpu",
                   "logger=off", *self.words, *more]  # fmt: skip
        if limit is not None:
            command = ["bash", "-c", f'trap "" XFSZ; ulimit -f {limit // 1024}; exec "$@"', "bash", *command]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> None:
        """To its end; it must be a good one."""
        process = self.start()
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, (self.experiment, self.faults, out, err)

    def checkpoints(self) -> list[Path]:
        """Those that are there, the last one first."""
        return [
            path
            for name in ("last.pt", "previous.pt")
            for path in (self.folder / "outputs" / self.experiment).glob(f"**/checkpoints/{name}")
        ]

    def outcome(self) -> dict[str, Any]:
        """All that must be the same."""
        (record,) = read_records(self.folder / "results/runs")
        (history,) = self.folder.glob("results/runs/**/seed0.jsonl")
        rows = [json.loads(line) for line in history.read_text().splitlines()]
        weights = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in self.folder.glob("outputs/**/seed0/*.pt")
        }
        return {
            "weights": weights, "metrics": record["metrics"], "hash": record["config_hash"],
            "history": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
        }  # fmt: skip

    def wait(self, process: subprocess.Popen[str], until: Callable[[], bool], seconds: float = 120) -> None:
        """Until something is so or the process has ended."""
        deadline = time.monotonic() + seconds
        while not until() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)


def stopped(trial: Trial, draw: random.Random, signum: signal.Signals) -> str:
    """A start that is sent a signal at a random moment after its first checkpoint of this start, or before any."""
    before = {path: path.stat().st_mtime_ns for path in trial.checkpoints()}
    process = trial.start("checkpoint_minutes=0.003")
    if draw.random() < 0.8:
        trial.wait(
            process,
            lambda: any(before.get(p) != p.stat().st_mtime_ns for p in trial.checkpoints() if p.exists()),
        )
        time.sleep(draw.uniform(0.0, 1.5))
    else:
        time.sleep(draw.uniform(0.0, 8.0))
    if process.poll() is None:
        os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=120)
    allowed = {0, -signum, 128 + signum}
    assert process.returncode in allowed, (process.returncode, err)
    assert "Traceback" not in err or signum == signal.SIGKILL, err
    return f"{signum.name}"


def killed(trial: Trial, draw: random.Random) -> str:
    """SIGKILL of all its processes."""
    return stopped(trial, draw, signal.SIGKILL)


def told_to_stop(trial: Trial, draw: random.Random) -> str:
    """SIGTERM, SIGINT or SIGHUP."""
    return stopped(trial, draw, draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))


def damaged(trial: Trial, draw: random.Random) -> str:
    """The last checkpoint, in one of the ways in which disks do it; the one before it is good."""
    found = trial.checkpoints()
    if len(found) < 2:
        return "no checkpoint to damage yet"
    path = found[0]
    data = bytearray(path.read_bytes())
    how = draw.choice(["empty", "cut", "a bit", "zeros"])
    if how == "empty":
        data = bytearray()
    elif how == "cut":
        data = data[: draw.randrange(1, len(data))]
    elif how == "a bit":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        at = draw.randrange(len(data))
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)
    return f"last.pt: {how}"


def full_disk(trial: Trial, draw: random.Random) -> str:
    """No file of more than a few kilobytes can be written."""
    process = trial.start("checkpoint_minutes=0.003", limit=16 * 1024)
    _, err = process.communicate(timeout=300)
    assert process.returncode in (0, 2), (process.returncode, err)
    assert process.returncode == 0 or ("cannot write" in err and "Traceback" not in err), err
    return "full disk"


def left_behind(trial: Trial, draw: random.Random) -> str:
    """What a process that was killed while writing leaves; a run that is done writes nothing more."""
    if any(trial.folder.glob("results/runs/**/seed0.json")):
        return "done already"
    for folder in {path.parent for path in trial.checkpoints()}:
        leaving = folder / ".last.pt.999999.tmp"
        leaving.write_bytes(b"half")
        os.utime(leaving, (time.time() - 7200,) * 2)
    return "leavings"


FAULTS = (killed, told_to_stop, damaged, full_disk, left_behind)


def tortured(experiment: str, words: list[str], folder: Path, seed: int, faults: int) -> Trial:
    """A run with faults against the same without. Raises AssertionError where anything was lost."""
    draw = random.Random(f"{seed}/{experiment}")
    plain = Trial(experiment, folder / "plain", words)
    plain.finish()
    trial = Trial(experiment, folder / "tortured", words)
    trial.faults.append(killed(trial, draw))
    for _ in range(faults):
        fault = draw.choice(FAULTS)
        trial.faults.append(fault(trial, draw))
        if fault in (damaged, left_behind) and draw.random() < 0.5:
            trial.faults.append(killed(trial, draw))
    trial.finish()
    assert trial.outcome() == plain.outcome(), (experiment, seed, trial.faults)
    assert not list((trial.folder / "outputs").rglob("*.tmp")), trial.faults
    return trial


def table(trials: list[Trial], seed: int) -> str:
    """What was done to whom."""
    named = [f"{t.experiment} {' '.join(w for w in t.words if 'devices' in w)}" for t in trials]
    lines = [
        f"{name:44} {t.starts:3} starts  nothing lost  {', '.join(t.faults)}"
        for name, t in zip(named, trials, strict=True)
    ]
    return "\n".join([f"torture, seed {seed}:", *lines])


def test_a_run_is_tortured(tmp_path: Path) -> None:
    """The short form: two faults beside a kill."""
    seed = int(os.environ.get("TORTURE_SEED", random.randrange(10**6)))
    print(f"TORTURE_SEED={seed}")
    print(table([tortured("kd/c100_vanilla/resnet_20", ["epochs=2"], tmp_path, seed, faults=2)], seed))


def flipped(data: bytearray, draw: random.Random) -> None:
    """A few bytes of other values."""
    for _ in range(draw.choice([1, 3, 30])):
        data[draw.randrange(len(data))] = draw.randrange(256)


def cut(data: bytearray, draw: random.Random) -> None:
    """Its end gone."""
    del data[draw.randrange(1, len(data)) :]


def overwritten(data: bytearray, draw: random.Random) -> None:
    """A stretch of another file."""
    at = draw.randrange(len(data))
    data[at : at + 500] = draw.randbytes(len(data[at : at + 500]))


def moved(data: bytearray, draw: random.Random) -> None:
    """A stretch left out."""
    at = draw.randrange(len(data))
    del data[at : at + draw.randrange(1, 600)]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_what_they_were_or_refused(kind: str, tmp_path: Path) -> None:
    """Whatever has happened to an archive of PNG files: pictures that were in it, or one line. Names have no checksum, pixels have."""
    seed = int(os.environ.get("TORTURE_SEED", random.randrange(10**6)))
    print(f"TORTURE_SEED={seed}")
    draw = random.Random(f"{seed}/{kind}")
    whole = archive(tmp_path, kind)
    pictures = read_all(whole)
    refused = 0
    for number in range(200):
        data = bytearray((whole / "train.tar" if kind == "tar" else whole).read_bytes())
        draw.choice([flipped, cut, overwritten, moved])(data, draw)
        place = tmp_path / f"{number}" / ("train.tar" if kind == "tar" else "pictures.zip")
        place.parent.mkdir()
        place.write_bytes(data)
        if kind == "tar":
            shutil.copy(whole / "val.tar", place.parent)
        try:
            found = read_all(place.parent if kind == "tar" else place)
        except (ValueError, OSError) as error:
            assert str(error) and str(error).isprintable()
            refused += 1
        else:
            assert found <= pictures, (seed, number)
        shutil.rmtree(place.parent)
    print(f"{kind}, seed {seed}: {refused} refused, {number + 1 - refused} whole")
    assert refused > 10


def archive(folder: Path, kind: str) -> Path:
    """Pictures of three classes as a zip file, or as a folder of shards."""
    path = folder / ("pictures.zip" if kind == "zip" else "shards")
    draw = random.Random(0)
    members = []
    for split in ("train", "val"):
        for number in range(12):
            buffer = io.BytesIO()
            Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(buffer, "PNG")
            members.append((split, number, buffer.getvalue()))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as written:
            for split, number, content in members:
                written.writestr(f"{split}/class{number % 3}/{number}.png", content)
        return path
    path.mkdir()
    for split in ("train", "val"):
        with tarfile.open(path / f"{split}.tar", "w") as written:
            for _, number, content in (m for m in members if m[0] == split):
                for name, data in (
                    (f"{number:03d}.png", content),
                    (f"{number:03d}.cls", str(number % 3).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    written.addfile(info, io.BytesIO(data))
    return path


def read_all(path: Path) -> set[str]:
    """The pixels of every picture, training and test, digested."""
    data = image_files(str(path), image_size=8, resize=8, decoder="pillow")
    return {
        hashlib.sha256(np.asarray(part.read(number, "pillow")).tobytes()).hexdigest()
        for part in (data.train, data.test)
        for number in range(len(part.labels))
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("RUN_SLOW" not in os.environ, reason="half an hour; make torture runs it")
def test_every_method_is_tortured(tmp_path: Path) -> None:
    """Two at a time; a line for each."""
    from concurrent.futures import ThreadPoolExecutor

    seed = int(os.environ.get("TORTURE_SEED", random.randrange(10**6)))
    print(f"TORTURE_SEED={seed}")
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(tortured, name, words, tmp_path / "-".join([name, *words]).replace("/", "-"), seed, 5)
            for name, words in TRIALS
        ]
        trials = [one.result() for one in waiting]
    print(table(trials, seed))
