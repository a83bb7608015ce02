"""Prepare generated pictures: stream DM-AT's npz parts into memory-mapped, checksummed shards, once.

    python scripts/prepare.py generated=data/generated/cifar100_50m 'parts=[50m_part1.npz,50m_part2.npz]'
    python scripts/prepare.py generated=data/generated/cifar100_50m verify=true      # read all shards, compare checksums

classes=100 refuses labels of no class before anything is written. A part is never held in memory. The parts are on the Hugging Face Hub: P2333/DM-Improves-AT, cifar10/ and cifar100/.
"""

import trainers.interrupt  # noqa: F401

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gkl.data.generated import open_shards
from gkl.data.preparing import prepare
from trainers.command import run_main
from trainers.errors import ConfigError

SETTINGS: dict[str, Any] = {"generated": None, "parts": [], "verify": False, "classes": None}


def main(arguments: list[str]) -> int:
    """Check, write or verify, report. Returns the exit code."""
    given = OmegaConf.to_container(OmegaConf.merge(SETTINGS, OmegaConf.from_dotlist(arguments)))
    assert isinstance(given, dict)
    if set(given) != {*SETTINGS} or not isinstance(given["generated"], str):
        raise ConfigError(
            "prepare needs generated=FOLDER and parts=[FILE,...] or verify=true, and takes classes=NUMBER"
        )
    if not (given["classes"] is None or (type(given["classes"]) is int and given["classes"] > 0)):
        raise ConfigError(
            f"classes must be how many the labels are of, such as classes=100, got {given['classes']!r}"
        )
    folder, parts = Path(given["generated"]), given["parts"]
    if not isinstance(parts, list) or not (parts or given["verify"]):
        raise ConfigError(f"parts must be a list such as parts=[part1.npz,part2.npz], got {parts!r}")
    try:
        if parts:
            prepare([Path(str(part)) for part in parts], folder, given["classes"])
        pictures = open_shards(str(folder), given["classes"] or 2**31, verify=given["verify"] is True)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(
            f"{error.strerror} at {error.filename or folder}; nothing was kept. Mend it, then start again"
        ) from error
    classes = int(pictures.labels.max()) + 1
    state = "verified" if given["verify"] is True else "ready"
    print(
        f"{folder}: {len(pictures):,} pictures of {classes} classes in {len(pictures.shards)} shards, {state}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
