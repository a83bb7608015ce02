"""Prepare generated pictures: stream DM-AT's npz parts into memory-mapped, checksummed shards, once.

    python scripts/prepare.py generated=data/generated/cifar100_50m 'parts=[50m_part1.npz,50m_part2.npz]'
    python scripts/prepare.py generated=data/generated/cifar100_50m verify=true      # read all shards, compare checksums

A part is never held in memory. The parts are on the Hugging Face Hub: P2333/DM-Improves-AT, cifar10/ and cifar100/.
"""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from gkl.data.generated import open_shards, prepare
from trainers.command import run_main
from trainers.errors import ConfigError


def main(arguments: list[str]) -> int:
    """Check, write or verify, report. Returns the exit code."""
    given = OmegaConf.to_container(
        OmegaConf.merge({"generated": None, "parts": [], "verify": False}, OmegaConf.from_dotlist(arguments))
    )
    assert isinstance(given, dict)
    if set(given) != {"generated", "parts", "verify"} or not isinstance(given["generated"], str):
        raise ConfigError("prepare needs generated=FOLDER and parts=[FILE,...] or verify=true")
    folder, parts = Path(given["generated"]), given["parts"]
    if not isinstance(parts, list) or not (parts or given["verify"]):
        raise ConfigError(f"parts must be a list such as parts=[part1.npz,part2.npz], got {parts!r}")
    try:
        if parts:
            prepare([Path(str(part)) for part in parts], folder)
        pictures = open_shards(str(folder), num_classes=2**31, verify=given["verify"] is True)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        raise ConfigError(str(error)) from error
    classes = int(pictures.labels.max()) + 1
    state = "verified" if given["verify"] is True else "ready"
    print(
        f"{folder}: {len(pictures):,} pictures of {classes} classes in {len(pictures.shards)} shards, {state}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, __doc__))
