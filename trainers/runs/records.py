"""One JSON file per run: what was run, on what, and what came out. Append-only, checked when written and when read.

path = write_record(Path("results/runs"), record, history)
records = read_records(Path("results/runs"))

A record that cannot be read counts as missing: it is named, its run is done again, and its file is kept as *.damaged.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainers.errors import ConfigError, RunError
from trainers.files import write_text
from trainers.runs.identity import config_hash

SCHEMA = 2
Record = dict[str, Any]

REQUIRED: dict[str, Any] = {
    "schema": int,
    "experiment": str,
    "scale": str,
    "protocol": str,
    "seed": int,
    "config_hash": str,
    "config": dict,
    "overrides": list,
    "changed": dict,
    "status": str,
    "metrics": dict,
    "history": str,
    "checkpoint": dict,
    "code": dict,
    "versions": dict,
    "hardware": dict,
    "data": dict,
    "cost": dict,
    "finished": str,
}
# A further evaluation of a run's weights. checkpoint: their sha256, which ties it to the run's record.
ASSESSMENT: dict[str, Any] = {
    "assessment": str,
    "settings": dict,
    "checkpoint": str,
    "metrics": dict,
    "details": dict,
    "code": dict,
    "versions": dict,
    "hardware": dict,
    "cost": dict,
    "finished": str,
}


def record_path(root: Path, experiment: str, scale: str, config_hash: str, seed: int) -> Path:
    """<root>/<experiment>/<scale>/<hash>/seed<k>.json"""
    return root / experiment / scale / config_hash / f"seed{seed}.json"


def validate(record: Any) -> None:
    """Raises ValueError naming the first thing wrong with a record."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, got {type(record).__name__}")
    if record.get("schema") != SCHEMA:
        raise ValueError(f"record schema {record.get('schema')} is not {SCHEMA}, the one this version reads")
    for key, kind in REQUIRED.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"a record needs {key} ({kind.__name__}), got {record.get(key)!r}")
    if record["status"] not in ("done", "failed"):
        raise ValueError(f"status must be done or failed, got {record['status']!r}")
    _validate_metrics(record["metrics"])
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["finished"]):
        raise ValueError(f"finished must look like 2026-01-31T12:00:00Z, got {record['finished']!r}")
    if Path(record["history"]).is_absolute():
        raise ValueError(f"history must be a relative path, got {record['history']!r}")
    if "stand_in_for" not in record["data"] or not isinstance(record["data"].get("name"), str):
        raise ValueError(f"data needs name and stand_in_for, got {record['data']!r}")
    if record["config_hash"] != config_hash(record["config"]):
        raise ValueError(
            f"config_hash {record['config_hash']} is not that of the record's config, {config_hash(record['config'])}"
        )


def _validate_metrics(metrics: Mapping[str, Any]) -> None:
    for name, value in metrics.items():
        if type(value) not in (int, float) or not math.isfinite(value) or not 0.0 <= value <= 100.0:
            raise ValueError(f"metric {name} must be a percentage, got {value!r}")


def write_record(root: Path, record: Record, history: str = "") -> Path:
    """Write a record to its place, whole or not at all, its history (JSON lines) first.

    Raises RunError rather than change a record or a history that is there.
    """
    validate(record)
    path = record_path(root, record["experiment"], record["scale"], record["config_hash"], record["seed"])
    return _write_once(path, record, validate, history)


def assessment_path(record: Path, name: str) -> Path:
    """Where a run's further evaluation of that name lies: beside its record."""
    return record.with_name(f"{record.stem}.{name}.json")


def write_assessment(record: Path, assessment: Record) -> Path:
    """Write a further evaluation of a run's weights beside its record. Raises as write_record."""
    validate_assessment(assessment)
    return _write_once(assessment_path(record, assessment["assessment"]), assessment, validate_assessment)


def read_assessment(path: Path) -> Record:
    """A checked further evaluation. Raises ValueError naming the file when it is damaged."""
    return _read(path, validate_assessment)


def validate_assessment(assessment: Any) -> None:
    """Raises ValueError naming the first thing wrong with an assessment."""
    if not isinstance(assessment, dict):
        raise ValueError(f"an assessment is a JSON object, got {type(assessment).__name__}")
    for key, kind in ASSESSMENT.items():
        if not isinstance(assessment.get(key), kind):
            raise ValueError(f"an assessment needs {key} ({kind.__name__}), got {assessment.get(key)!r}")
    _validate_metrics(assessment["metrics"])


def _write_once(path: Path, record: Record, check: Callable[[Any], None], history: str = "") -> Path:
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
    beside = path.with_suffix(".jsonl")
    if is_whole(path, check):
        if path.read_text(encoding="utf-8") == text:
            return path
        raise RunError(
            f"{path} holds another record of the same run; records are never changed, move it away first"
        )
    for old in (path, beside) if history else (path,):
        if old.exists():  # of a record that cannot be read, or that was never written
            os.replace(old, old.with_name(f"{old.name}.damaged"))
    if history:
        write_text(beside, history)
    write_text(path, text)
    return path


def is_whole(path: Path, check: Callable[[Any], None] = validate) -> bool:
    """Whether there is a record (or, with its own check, an assessment) that can be read."""
    return path.is_file() and _is_whole(path, check, stamp(path))


def stamp(path: Path) -> tuple[int, ...]:
    """What a file that was written again has another of: its time, size and number."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@lru_cache(4096)
def _is_whole(path: Path, check: Callable[[Any], None], stat: tuple[int, ...]) -> bool:
    try:
        found = _read(path, check)
        if check is validate:
            _check_place(path, found)
    except ValueError:
        return False
    return True


def _check_place(path: Path, record: Record) -> None:
    """Raises ValueError for a record that was copied to where another run's is looked for."""
    if path.parts[-2:] != (record["config_hash"], f"seed{record['seed']}.json"):
        raise ValueError(
            f"record {path} is of seed {record['seed']} of {record['config_hash']}, and lies where another run's would; move it away"
        )


def read_record(path: Path) -> Record:
    """A checked record. Raises ValueError naming the file when it is damaged."""
    return _read(path, validate)


def _read(path: Path, check: Callable[[Any], None]) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if isinstance(record, dict) and type(found := record.get("schema")) is int and found > SCHEMA:
            raise RunError(
                f"record {path} is of schema {found}, which a later version of gkl has written, and this one reads {SCHEMA}; bring gkl up "
                "to date, or choose another folder with GKL_RESULTS=..."
            )
        check(record)
    except (
        ValueError,
        ConfigError,
    ) as error:  # json's error is a ValueError as well; of a later version's record nothing is known
        raise ValueError(f"record {path} is damaged: {error}") from error
    return dict(record)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


class Records(list[Record]):
    """Records in the order of their paths. damaged: a line for each file that cannot be read, which counts as missing."""

    def __init__(self) -> None:
        super().__init__()
        self.damaged: list[str] = []


def read_records(root: Path) -> Records:
    """All records below root, each with its `path` relative to root.

    A run's assessments lie in `assessments` by name, their metrics among its own. Of a run's copies one counts, that which lies least
    deep; of others that say something else a line tells.
    """
    records = Records()
    taken: dict[tuple[Any, ...], Path] = {}

    def read(path: Path, reader: Callable[[Path], Record]) -> Iterator[Record]:
        try:
            yield reader(path)
        except (ValueError, RunError) as error:
            records.damaged.append(f"{error}; it counts as missing")

    def run_of(record: Record) -> tuple[Any, ...]:
        return tuple(record[key] for key in ("experiment", "scale", "config_hash", "seed"))

    def placed(path: Path) -> Record:
        record = read_record(path)
        _check_place(path, record)
        if (
            first := taken.setdefault(run_of(record), path)
        ) != path and first.read_bytes() != path.read_bytes():
            raise ValueError(f"record {path} is another one of the run of {first}; move one of them away")
        return record

    for path in sorted(root.rglob("seed*.json"), key=lambda found: (len(found.parts), found)):
        if not re.fullmatch(r"seed\d+", path.stem):
            continue
        for record in read(path, placed):
            if taken[run_of(record)] != path:
                continue
            beside = sorted(path.parent.glob(f"{path.stem}.*.json"))
            found = [assessment for p in beside for assessment in read(p, read_assessment)]
            mine = {a["assessment"]: a for a in found if a["checkpoint"] == record["checkpoint"]["sha256"]}
            for assessment in mine.values():
                record["metrics"] = {**record["metrics"], **assessment["metrics"]}
            records.append({**record, "assessments": mine, "path": str(path.relative_to(root))})
    records.sort(key=lambda record: Path(record["path"]))
    return records
