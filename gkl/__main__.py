"""What is installed: gkl, torch and its GPUs, and which extras are whole. The command `gkl`, or python -m gkl."""

import platform
import re
from importlib.metadata import PackageNotFoundError, distribution, metadata, requires

import torch

import gkl


def main() -> None:
    """Print it."""
    print(f"gkl {gkl.__version__}, torch {torch.__version__}, python {platform.python_version()}")
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    print(f"GPU: {', '.join(cards) or 'none that torch sees'}")
    for extra in metadata("gkl").get_all("Provides-Extra", []):
        missing = [name for name in packages(extra) if not installed(name)]
        print(
            f"{extra}: "
            + (f"pip install 'gkl[{extra}]' brings {', '.join(missing)}" if missing else "installed")
        )


def packages(extra: str) -> list[str]:
    """Names of the distributions that an extra asks for, those of the extras it contains included."""
    found: list[str] = []
    for line in requires("gkl") or []:
        if re.search(rf"""extra == ["']{extra}["']""", line):
            inner = re.match(r"gkl\[([\w,-]+)\]", line)
            found += (
                [name for each in inner[1].split(",") for name in packages(each)]
                if inner
                else re.findall(r"^[\w.-]+", line)
            )
    return list(dict.fromkeys(found))


def installed(name: str) -> bool:
    """Whether a distribution is, in whatever version."""
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
