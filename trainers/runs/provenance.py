"""Which code, packages and machine made a record, what it cost, and when it was finished."""

import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gkl.distributed import world_size


def provenance(device: torch.device, code: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Which code, packages and machine made a record, what it cost, and when it was finished."""
    return {
        "code": code,
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "timm", "pyautoattack", "numpy")
        }
        | {"python": sys.version.split()[0]},
        "hardware": {
            "device": device.type,
            "count": world_size(),
            "name": machine_name(device),
        },
        "cost": {
            "seconds": round(seconds, 1),
            "device_hours": round(seconds * world_size() / 3600, 4),
            "peak_memory_bytes": peak_memory(device),
        },
        "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def code_state() -> dict[str, Any]:
    """The commit of this checkout and whether it is changed; None where git does not say."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        changed = ["git", "status", "--porcelain", "--", "gkl", "trainers", "configs", "scripts"]
        status = subprocess.run(changed, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def machine_name(device: torch.device) -> str:
    """What records call a device: the card, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the card, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
