"""Triton reads TRITON_INTERPRET when it is imported: what its kernels do without a GPU, a test file does as a script of its own.

found = in_a_process(__file__, "interpret", TRITON_INTERPRET="1")      # what the file prints, read back

if __name__ == "__main__":
    answer(interpret=lambda: ..., compile=lambda: ...)
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (86, 90)  # of the GPUs, two generations, that kernels are compiled for


def in_a_process(file: str, mode: str, **environment: str) -> Any:
    """What a test file says when it is run as a script."""
    outer = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, file, mode],
        env=outer | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def answer(**modes: Callable[[], Any]) -> None:
    """Print what the mode that the script was called with finds."""
    print(json.dumps(modes[sys.argv[1]]()))


def of_each_capability(compiled_sizes: Callable[[int], dict[str, int]]) -> dict[str, dict[str, int]]:
    """Bytes of machine code of each kernel for each of the GPUs."""
    return {f"sm_{capability}": compiled_sizes(capability) for capability in CAPABILITIES}
