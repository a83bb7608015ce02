"""Weights from our runs, the authors', RobustBench's or anyone's plain state dict. Never a pickle with code.

report = load_checkpoint(model, "model.pt")  # or an error that names what does not fit
print(report)  # 212 of the model's 212 tensors matched; found under 'state_dict'; ...
"""

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gkl.models.timm_network import TimmNetwork

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
# What DataParallel and DDP, torch.compile, RobustBench and a Sequential put before the network's own names.
PREFIX = re.compile(r"^((module|_orig_mod|model|0)\.)+")
# TRADES' network has a second first stage that no forward pass uses; files trained with it hold its weights. Older files of
# timm's BEiT hold a table that is computed anew.
UNUSED = re.compile(r"^sub_block1\.|\.relative_position_index$")


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a file meet those of a model, by name, without the prefixes of wrapping modules."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the model alone; batch counters may be, as nothing reads them
    unexpected: tuple[str, ...]  # in the file alone
    mismatched: tuple[str, ...]  # "name: (its shape) in the file, (its shape) in the model"
    unused: tuple[str, ...]  # in the file alone and known to be in no forward pass
    wrapper: str | None  # the key under which the state dict was found

    @property
    def fits(self) -> bool:
        """Whether the file fills the model, no tensor left over."""
        unfilled = [name for name in self.missing if not name.endswith(".num_batches_tracked")]
        return not (unfilled or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of the model's {total} tensors matched"]
        parts += [f"found under {self.wrapper!r}"] if self.wrapper else []
        lists = {
            "missing in the file": self.missing,
            "not in the model": self.unexpected,
            "of another shape": self.mismatched,
            "unused and left out": self.unused,
        }
        parts += [f"{len(names)} {what} ({_some(names)})" for what, names in lists.items() if names]
        return "; ".join(parts)


class CheckpointMismatch(ValueError):
    """A file's weights are not this model's. `report` has every name; the message the first few."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Fill a model from a state dict, plain or under one of WRAPPERS, saved by torch or as .safetensors.

    Prefixes of wrapping modules are stripped. The model changes only if the file fills all of it.
    Raises FileNotFoundError for no file; ValueError for a damaged one, one that holds code or no state dict;
    CheckpointMismatch (a ValueError) for weights of another architecture or number of classes.
    """
    if isinstance(model, TimmNetwork):  # its files have timm's names, ours a prefix that is stripped
        return load_checkpoint(model.model, path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a .pt, .pth or .safetensors file")
    found, wrapper = _state_dict(_read(path), path)
    wanted = model.state_dict()
    state: dict[str, Tensor] = {}
    for key, tensor in found.items():
        name = key if key in wanted else PREFIX.sub("", key.replace("_orig_mod.", ""))
        if name in state:
            raise ValueError(f"{path} holds several networks ({name} twice); save the state dict of one")
        state[name] = tensor
    both = [name for name in wanted if name in state]
    shapes = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in both}
    wrong = {name: (a, b) for name, (a, b) in shapes.items() if a != b}
    extra = [name for name in state if name not in wanted]
    report = LoadReport(
        matched=tuple(name for name in both if name not in wrong),
        missing=tuple(name for name in wanted if name not in state),
        unexpected=tuple(name for name in extra if not UNUSED.search(name)),
        mismatched=tuple(f"{name}: {a} in the file, {b} in the model" for name, (a, b) in wrong.items()),
        unused=tuple(name for name in extra if UNUSED.search(name)),
        wrapper=wrapper,
    )
    if not report.fits:
        what = _diagnosis(report, list(wrong.values()), getattr(model, "num_classes", None))
        raise CheckpointMismatch(f"{path} does not fit the {type(model).__name__}, {what}: {report}", report)
    model.load_state_dict({name: state[name] for name in both}, strict=False)
    return report


def archive_damage(file: IO[bytes]) -> str | None:
    """Why an archive that torch.save wrote is not whole, None for a whole one: torch.load does not look at the checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            name = archive.testzip()
    except (OSError, MemoryError):  # of the machine, not of the file
        raise
    except Exception as error:  # damaged archives fail in every way there is
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the checksum of {name} is wrong" if name else None


def _read(path: Path) -> Any:
    """What a file holds, tensors and plain containers only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                if damaged := archive_damage(file):
                    raise ValueError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files fail in every way there is
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds Python objects ({forbidden[1]}) that could run code, and was not loaded; "
                "where you trust it, save its state dict alone: torch.save(model.state_dict(), path)"
            ) from error
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint ({why}); copy or download it again") from error


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors by name, and the wrapper they were found under."""
    wrapper = None
    if isinstance(content, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    state = content if wrapper is None else content[wrapper]
    if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
        return dict(state), wrapper
    what = type(content).__name__
    if isinstance(content, Mapping):
        what = f"a dict of {_some(tuple(map(str, content)))}" if content else "an empty dict"
    raise ValueError(
        f"{path} holds no state dict (tensors by name, plain or under {', '.join(WRAPPERS)}), but {what}; "
        "save one with torch.save(model.state_dict(), path)"
    )


def _diagnosis(report: LoadReport, wrong: list[tuple[Any, Any]], num_classes: int | None) -> str:
    """What sets the file apart; wrong: the shapes that differ, in the file and in the model."""
    names_fit = report.matched and not report.missing and not report.unexpected
    if names_fit and all(a[1:] == b[1:] and b[:1] == (num_classes,) for a, b in wrong):
        return f"which has {num_classes} classes and the file {wrong[0][0][0]}"
    return "being of another architecture, depth or width, or incomplete"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
