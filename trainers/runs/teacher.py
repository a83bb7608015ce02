"""The teacher of a student run, or the weights that a run begins with: where they come from.

A student learns from a run of this repository (`weights: own`), whose record names it, or from a published file.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gkl.models import load_checkpoint, published
from gkl.models.checkpoints import keyed
from gkl.models.normalise import taken
from trainers.errors import ConfigError
from trainers.runs.compose import compose
from trainers.runs.identity import differences
from trainers.runs.records import is_whole, read_record, stamp

# What a person changes of these is changed for the run before, too: how and where it runs, and, unless it has data of its own,
# what it is trained with.
MACHINE = (
    "precision", "channels_last", "compile", "device", "devices", "accumulate", "workers", "checkpoint_minutes", "logger", "launcher", "paths",
)  # fmt: skip
TRAINED_WITH = ("data", "augment", "epochs", "batch_size", "drop_last", "bn_groups")


@dataclass(frozen=True)
class Teacher:
    """Which network teaches, and its weights.

    run: the experiment that trains it, seed 0, perhaps with overrides after it. weights: own, that run's; published, a file below folder: of
    torchvision/<weights> or timm/<model> the one that these download, else <published>/ckpt_epoch_240.pth, the layout of
    RepDistiller's and mdistiller's archives, or a path of its own with a suffix.
    outputs: where runs keep their weights. record: of the teacher's run, set when a student's configuration is frozen.
    weights: file: checkpoint, any file that gkl.models.load_checkpoint reads; checkpoint_sha256: its content when the run was composed.
    cache: folder for the teacher's logits on each view of each picture, or None: they are computed anew in every step.
    own_data: its run's data and schedule are its own, and not the student's.
    """

    network: Callable[..., nn.Module]
    run: str
    published: str
    weights: Literal["own", "published", "file"]
    folder: str
    outputs: str
    record: str | None = None
    cache: str | None = None
    checkpoint: str | None = None
    checkpoint_key: str | None = None
    checkpoint_sha256: str | None = None
    own_data: bool = False

    @property
    def file(self) -> Path:
        """Where the weights are. Raises ConfigError when the teacher's run has no record."""
        if self.weights == "published":
            return Path(self.folder) / published.file_name(self.published)
        if self.weights == "file":
            if self.checkpoint is None:
                raise ConfigError(
                    "teacher.checkpoint=... is missing: the file with the weights of teacher.network, beside teacher=file"
                )
            return Path(self.checkpoint)
        if self.record is None or not Path(self.record).is_file():
            raise ConfigError(
                f"the teacher {self.run} has no record{f' at {self.record}' if self.record else ''}; train it first: "
                f"make teachers, or python scripts/train.py experiment={self.run} with this run's scale and data"
            )
        return Path(self.outputs) / read_record(Path(self.record))["checkpoint"]["path"]

    @property
    def sha256(self) -> str | None:
        """Of the weights that teach now, None where they are missing."""
        if self.weights != "own":
            return _sha256(self.file, stamp(self.file)) if self.file.is_file() else None
        record = Path(str(self.record))
        return str(read_record(record)["checkpoint"]["sha256"]) if is_whole(record) else None

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
        if self.weights == "file" and not file.is_file():
            raise ConfigError(
                f"no teacher's weights at {file}; set teacher.checkpoint=... to a .pt, .pth or .safetensors file"
            )
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
        elif self.weights == "file" and sha256 != (self.checkpoint_sha256 or sha256):
            raise ConfigError(
                f"{file} has changed since the run was started with it; bring it back, or start a new run"
            )
        network = self.network(num_classes=num_classes)
        try:
            report = load_checkpoint(network, file, self.checkpoint_key)
        except ValueError as error:
            raise ConfigError(keyed(str(error), "teacher")) from error
        say = self.weights != "own" and hasattr(network, "normalise") and not report.normalised
        how = f"; {taken(network, 'teacher.network')}" if say else ""
        network.__dict__["begun"] = f"the teacher is {file.name}: {report}{how}"
        named = {
            "own": {"run": self.run},
            "published": {"published": self.published},
            "file": {"file": file.name},
        }[self.weights]
        return network, {**named, "sha256": sha256}


@lru_cache(64)
def _sha256(file: Path, stamp: tuple[int, ...]) -> str:
    """A file's digest, once for what it is."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sources(config: Mapping[str, Any]) -> list[str]:
    """The sections of a configuration that name a network which must be there before: a teacher, what a run begins with."""
    return [
        key
        for key, node in config.items()
        if isinstance(node, Mapping) and node.get("_target_") == "teacher/Teacher"
    ]


def prerequisites(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The runs that must be done before, by section: each one's experiment at this scale, with what both share but for what it is asked."""
    found = {}
    for key in sources(config):
        teacher = config[key]
        if teacher["weights"] != "own":
            continue
        place = [f"scale={config['scale']}", f"protocol={config['protocol']}"]
        experiment, *asked = teacher["run"].split() or [""]
        made = compose("train", [f"experiment={experiment}", *place, *asked])
        usual = compose("train", [f"experiment={config['experiment']}", *place])
        shared = {*MACHINE, *(() if teacher.get("own_data") else TRAINED_WITH)} - {*map(_setting, asked)}
        changed = {key for key in shared if usual.get(key) != config.get(key)}
        own = [word for word in config["overrides"] if _setting(word) in shared]
        found[key] = {**made, **{key: config[key] for key in changed}, "seed": 0, "overrides": [*asked, *own]}
    return found


def _setting(override: str) -> str:
    """What an override changes, or the section that it lies in."""
    return re.split("[.@=]", override.lstrip("+~"))[0]
