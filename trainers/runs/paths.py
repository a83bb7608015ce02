"""Where a run keeps what it has, and the frozen configuration that every process of it starts from."""

import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gkl.atomic import remove
from trainers.errors import ConfigError
from trainers.files import write_atomically
from trainers.loop.folder import RunFolder
from trainers.runs import records
from trainers.runs.identity import config_hash, training_hash
from trainers.runs.targets import CONFIGS, instantiate
from trainers.runs.teacher import prerequisites, sources


def folders() -> dict[str, str]:
    """The folders of runs that are told nothing else, by name: outputs, results."""
    paths = OmegaConf.load(CONFIGS / "train.yaml").paths
    return {str(name): str(path) for name, path in paths.items()}


def run_folder(config: dict[str, Any]) -> RunFolder:
    """Where a run keeps its checkpoints and history: <outputs>/<experiment>/<scale>/<training hash>/seed<k>.

    Runs that differ in their evaluation alone share it: the second measures the weights that it finds there.
    """
    run = f"{config['experiment']}/{config['scale']}/{training_hash(config)}/seed{config['seed']}"
    return RunFolder(Path(config["paths"]["outputs"]) / run, run)


def processes(config: dict[str, Any]) -> int:
    """How many processes share each batch of a run."""
    return int(config["devices"] * (config.get("launcher") or {}).get("nodes", 1))


def record_path(config: dict[str, Any]) -> Path:
    """Where a run's record is written."""
    return records.record_path(
        Path(config["paths"]["results"]) / "runs",
        config["experiment"],
        config["scale"],
        config_hash(config),
        config["seed"],
    )


def with_records(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the paths of the records of the runs before it."""
    before = prerequisites(config)
    return config | {key: {**config[key], "record": str(record_path(run))} for key, run in before.items()}


def check_sources(config: dict[str, Any], published: bool = False) -> None:
    """Raises ConfigError naming the record or weights that a run lacks of those before it. published: of those that no run makes."""
    whole, before = with_records(config), prerequisites(config)
    for key in sources(config):
        if not (published and key in before):
            instantiate(whole[key]).check()


def _check_writable(results: Path) -> None:
    """Raises ConfigError before a training whose record could not be written."""
    existing = next(path for path in (results, *results.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write in the results folder {results}: {error.strerror}; choose another with GKL_RESULTS=..."
        ) from error


def freeze(config: dict[str, Any]) -> Path:
    """Write the resolved configuration into its run's folder; every process of the run starts from this file."""
    config = with_records(config)
    _check_writable(Path(config["paths"]["results"]))
    folder = run_folder(config)
    folder.open("lock").close()  # says what is wrong with it, if anything is
    path = folder.path / f"{config_hash(config)}.yaml"
    write_atomically(path, lambda temporary: OmegaConf.save(OmegaConf.create(config), temporary))
    remove(path.with_name("progress.json"))  # of an earlier start
    return path
