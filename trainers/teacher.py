"""The teacher of a student run: where its weights come from, and its logits kept where that is exact.

A student learns from a run of this repository (`weights: own`), whose record names it, or from a published file.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gkl.models import load_checkpoint, published
from gkl.records import differences, read_record
from trainers.configuration import ConfigError, compose

# What a person changes in a student's data and schedule, its teacher is trained with, too.
SHARED = (
    "data", "augment", "epochs", "batch_size", "drop_last", "bn_groups", "precision", "channels_last", "compile",
    "device", "devices", "accumulate", "workers", "checkpoint_minutes", "logger", "launcher", "paths",
)  # fmt: skip


@dataclass(frozen=True)
class Teacher:
    """Which network teaches, and its weights.

    run: the experiment that trains it, seed 0. weights: own, that run's; published, a file below folder: of
    torchvision/<weights> or timm/<model> the one that these download, else <published>/ckpt_epoch_240.pth, the layout of
    RepDistiller's and mdistiller's archives, or a path of its own with a suffix.
    outputs: where runs keep their weights. record: of the teacher's run, set when a student's configuration is frozen.
    cache: folder for the teacher's logits on each view of each picture, or None: they are computed anew in every step.
    """

    network: Callable[..., nn.Module]
    run: str
    published: str
    weights: Literal["own", "published"]
    folder: str
    outputs: str
    record: str | None = None
    cache: str | None = None

    @property
    def file(self) -> Path:
        """Where the weights are. Raises ConfigError when the teacher's run has no record."""
        if self.weights == "published":
            return Path(self.folder) / published.file_name(self.published)
        if self.record is None or not Path(self.record).is_file():
            raise ConfigError(
                f"the teacher {self.run} has no record{f' at {self.record}' if self.record else ''}; train it first: "
                f"make teachers, or python scripts/train.py experiment={self.run} with this run's scale and data"
            )
        return Path(self.outputs) / read_record(Path(self.record))["checkpoint"]["path"]

    def check(self) -> None:
        """Fetch torchvision's or timm's weights if need be. Raises ConfigError when weights or their run's record are missing."""
        file = self.file
        if self.weights == "published" and not file.is_file():
            try:
                published.fetch(self.published, file)
            except (OSError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"the teacher's weights {file} are missing and cannot be fetched ({error}); put the file there "
                    "(GKL_TEACHERS), or set teacher.weights=own"
                ) from error
        if not file.is_file():
            remedy = (
                f"bring the file back (GKL_OUTPUTS), or move {self.record} away to train the teacher anew"
                if self.weights == "own"
                else "unpack RepDistiller's or mdistiller's teachers there (GKL_TEACHERS), or set teacher.weights=own"
            )
            raise ConfigError(f"the teacher's weights {file} are missing; {remedy}")

    def load(self, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
        """The network with its weights, and what a student's record says of it. Raises ConfigError for missing or other weights."""
        self.check()
        file = self.file
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        if self.weights == "own":
            record = read_record(Path(str(self.record)))
            trained = {key: value for key, value in record["config"]["model"].items() if key != "_target_"}
            given = getattr(self.network, "keywords", trained)
            if changed := differences(trained, given):
                told = ", ".join(f"{key}={one!r}, here {other!r}" for key, (one, other) in changed.items())
                raise ConfigError(
                    f"the teacher {self.run} was trained with another network than teacher.network says: {told}; make them alike"
                )
            if sha256 != record["checkpoint"]["sha256"]:
                raise ConfigError(
                    f"the teacher's weights {file} are not those of its record {self.record}; bring them back, or move "
                    "the record away to train the teacher anew"
                )
        network = self.network(num_classes=num_classes)
        try:
            load_checkpoint(network, file)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        named = {"run": self.run} if self.weights == "own" else {"published": self.published}
        return network, {**named, "sha256": sha256}


def teacher_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run that trains a student's teacher: its experiment at the student's scale, with what both share; None for none."""
    teacher = config.get("teacher")
    if not teacher or teacher["weights"] != "own":
        return None
    place = [f"scale={config['scale']}", f"protocol={config['protocol']}"]
    made = compose("train", [f"experiment={teacher['run']}", *place])
    usual = compose("train", [f"experiment={config['experiment']}", *place])
    changed = {key for key in SHARED if usual.get(key) != config.get(key)}
    return {**made, **{key: config[key] for key in changed}, "seed": 0}


def unlike(state: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
    """Raises ConfigError when a checkpoint was trained with another teacher than the one at hand."""
    if changed := differences({"teacher": state}, {"teacher": origin}):
        raise ConfigError(
            f"this run was started with another teacher ({', '.join(changed)} differs); bring that one back, or move the "
            "run's folder away to start anew"
        )


class LogitsCache:
    """A teacher's logits on the views of its training pictures, in one memory-mapped file, filled as views occur.

    Students and seeds of one teacher share it, whatever their epochs and orders. A row is a view's logits and their checksum, and is
    there when the two agree: neither a process killed while writing nor one that writes the same row can leave a wrong one.
    The file is sparse: it takes the space of the rows that are there.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        pictures: int,
        views: int,
        classes: int,
        dtype: torch.dtype,
    ) -> None:
        """key: all that the logits of a view depend on. dtype: of the logits."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.views = views
        self.row = np.dtype(
            [("logits", torch.empty(0, dtype=dtype).numpy().dtype, (classes,)), ("check", "<u4")]
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.logits"
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        self.file.truncate(pictures * views * self.row.itemsize)
        self.rows = np.memmap(path, self.row, mode="r", shape=(pictures, views))

    def get(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of views of pictures, and which of them are there, (B,) bool; all on the CPU."""
        rows = self.rows[index.numpy(), view.numpy()]
        there = [zlib.crc32(row["logits"].tobytes()) == row["check"] for row in rows]
        return torch.from_numpy(rows["logits"].copy()), torch.tensor(there)

    def put(self, index: Tensor, view: Tensor, logits: Tensor) -> None:
        """Keep logits (B, C). Raises OSError when the disk is full."""
        rows = np.empty(len(index), self.row)
        rows["logits"] = logits.cpu().numpy()
        rows["check"] = [zlib.crc32(values.tobytes()) for values in rows["logits"]]
        places = (index * self.views + view).tolist()
        for place, row in zip(
            places, rows, strict=True
        ):  # not through the map, which a full disk would end the process in
            os.pwrite(self.file.fileno(), row.tobytes(), place * self.row.itemsize)
