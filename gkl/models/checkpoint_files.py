"""What a checkpoint's file holds, read without running anything: its state dicts, and which one is meant.

content = read("last.pt")                       # tensors and plain containers; settings beside them are placeholders
state, key, others = state_dict(content, "last.pt", key=None)
"""

import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gkl.lines import one_line
from gkl.models.normalise import of_channels

# Under which keys the network lies, the first that is there; averages (timm's state_dict_ema, torchvision's model_ema) are asked for.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
# What DataParallel and DDP, AveragedModel, torch.compile, activation checkpoints and FSDP put before the names of what they wrap.
WRAPPING = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Python objects that people save beside weights: settings, numbers of numpy's, paths. None is made; a placeholder stands for each.
SETTINGS = re.compile(
    r"^(argparse\.Namespace|types\.SimpleNamespace|(__builtin__|builtins)\.(object|list|dict|set|frozenset|tuple|int|float|complex|"
    r"str|bool|bytearray|slice|range)|copy_?reg\._reconstructor|collections\.(deque|defaultdict)|datetime\.\w+|enum\.\w+|"
    r"(easydict|addict(\.addict)?|lightning_fabric\.utilities\.data|lightning\.fabric\.utilities\.data|"
    r"pytorch_lightning\.utilities\.parsing|lightning\.pytorch\.utilities\.parsing)\.\w*Dict|"
    r"(pathlib|numpy|omegaconf|yacs|ml_collections|torchmetrics|pytorch_lightning|lightning|lightning_fabric)\.[\w.]+|"
    r"typing\.Any|functools\.partial|torch\.(optim|nn\.modules\.loss)\.[\w.]+)$"  # as Lightning's hyper-parameters hold them
)
# What other tools write, by how it begins, and how its weights come here.
OTHERS = {
    b"\x93NUMPY": "one array of numpy's; save all of a network's by name",
    b"\x89HDF": "an HDF5 file; save its arrays as tensors by name",
    b"\x1f\x8b": "packed by gzip; unpack it",
}
BY_NAME = "torch.save({name: torch.from_numpy(array), ...}, 'weights.pt')"
DICTS = re.compile(r"\.\w*Dict$")


class Placeholder:
    """Stands for an object of a file that is not made. Takes whatever that would be made from, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __new__(cls, *_: Any, **__: Any) -> "Placeholder":
        """Whatever the arguments."""
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def read(path: Path) -> Any:
    """What a file holds: tensors, plain containers, and placeholders for SETTINGS.

    Raises ValueError for a damaged file, and for one that holds other Python objects.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if (
                path.suffix == ".safetensors" or start[5:] == b"\0\0\0{"
            ):  # the length of its header, whatever it is called
                return load_file(path)
            if start.startswith(b"PK\x03\x04") and (damaged := archive_damage(file)):
                raise ValueError(damaged)
        return _unpickled(path)
    except OSError:
        raise
    except Exception as error:  # damaged files fail in every way there is
        if forbidden := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds Python objects ({one_line(forbidden[1])}) that could run code, and was not loaded; "
                "where you trust it, save its state dict alone: torch.save(model.state_dict(), path)"
            ) from error
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "TorchScript" in why:
            raise ValueError(
                f"{path} is a TorchScript archive, whose code is not run here; save its weights: torch.save(torch.jit.load(path).state_dict(), ...)"
            ) from error
        if other := _of_others(path):
            raise ValueError(f"{path} is {other}") from error
        why = _no_pickle(path) if "weights_only" in why else why  # torch's advice is to load it unsafely
        raise ValueError(
            f"{path} is damaged or no checkpoint ({one_line(why)}); copy or download it again"
        ) from error


def _of_others(path: Path) -> str | None:
    """What a whole file of another tool's is, and what to do; None where it is none of them."""
    with open(path, "rb") as file:
        start = file.read(8)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return f"an archive of numpy's; save its arrays as tensors by name: {BY_NAME}"
        if any(name.endswith("archive_format") for name in names):
            return "a program of torch.export; save its weights: torch.save(torch.export.load(path).state_dict, ...)"
    return next(
        (
            f"{what}: {BY_NAME}" if "save" in what else what
            for s, what in OTHERS.items()
            if start.startswith(s)
        ),
        None,
    )


def named_statistics(content: Any) -> dict[str, list[float]] | None:
    """A mean and std of channels that a file's settings name (Lightning's hyper-parameters), None where there are none or several."""
    found: list[dict[str, list[float]]] = []

    def look(node: Any, depth: int) -> None:
        if not isinstance(node, Mapping) or not depth or _is_state_dict(node):
            return
        mean, std = of_channels(node.get("mean")), of_channels(node.get("std"))
        if mean and std:
            found.append({"mean": mean, "std": std})
        for child in node.values():
            look(child, depth - 1)

    look(content, 4)
    return found[0] if found and all(pair == found[0] for pair in found) else None


def _no_pickle(path: Path) -> str:
    """What a file is that torch.save did not write, from how it begins."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: git lfs pull fetches the file"
    if start.startswith(b"{"):
        return "it is text, JSON: of a network in several files the index; load it where it was saved, and save one state dict"
    return "it is a web page" if start.startswith(b"<") else "torch.save did not write it"


def _unpickled(path: Path) -> Any:
    """torch.load with weights alone, again with a placeholder for each of SETTINGS that it meets."""
    met: dict[str, Any] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(stands, name) for name, stands in met.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
            name = found[1] if found else ""
            name = name if "." in name else f"builtins.{name}"  # torch leaves that out
            if not SETTINGS.match(name) or name in met:
                raise
            met[name] = (
                _empty_dict
                if name.endswith(".defaultdict")
                else OrderedDict
                if DICTS.search(name)
                else type(name, (Placeholder,), {})
            )


def archive_damage(file: IO[bytes]) -> str | None:
    """Why an archive that torch.save wrote is not whole, None for a whole one: torch.load does not look at the checksums."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 2**16 - 22))
    file.read()  # where the list of its members is: zipfile takes a device's error there for damage
    try:
        with zipfile.ZipFile(file) as archive:
            name = archive.testzip()
    except (OSError, MemoryError):  # of the machine, not of the file
        raise
    except Exception as error:  # damaged archives fail in every way there is
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"the checksum of {name} is wrong" if name else None


def state_dict(
    content: Any, path: Path, key: str | None = None
) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """The tensors by name, the key they were found under, and the keys of the file's other state dicts.

    key: under which they lie, as "state_dict_ema", "task.model" or, within a state dict, what its names begin with; None: the first
    of WRAPPERS, or the only one. Raises ValueError where there is none, or several and none of WRAPPERS.
    """
    found = {name: state for name, state in _candidates(content).items() if name}
    if key is not None:
        return _under(content, path, key, found)
    if _is_state_dict(content):
        return dict(content), None, ()
    chosen = next((w for w in _nested(WRAPPERS, content) if w in found), None)
    if chosen is None and len(found) > 1:
        raise ValueError(
            f"{path} holds several state dicts ({some(tuple(found))}); say which: checkpoint_key={one_line(next(iter(found)))}"
        )
    chosen = chosen or next(iter(found), None)
    if chosen is None:
        what = type(content).__name__
        if isinstance(content, Mapping):
            what = f"a dict of {some(tuple(map(str, content)))}" if content else "an empty dict"
        raise ValueError(
            f"{path} holds no state dict (tensors by name, plain or under {', '.join(WRAPPERS)}), but {what}; "
            "save one with torch.save(model.state_dict(), path)"
        )
    return found[chosen], chosen, tuple(name for name in found if name != chosen)


def _nested(wrappers: tuple[str, ...], content: Any) -> list[str]:
    """The wrappers in their order, then those within one."""
    return (
        [*wrappers, *(f"{a}.{b}" for a in wrappers for b in wrappers)] if isinstance(content, Mapping) else []
    )


def _is_state_dict(node: Any) -> bool:
    return (
        isinstance(node, Mapping)
        and bool(node)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in node.items())
    )


def _candidates(node: Any, where: str = "", depth: int = 2) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a file by their dotted keys; what optimizers keep is none."""
    if _is_state_dict(node):
        return {where: dict(node)}
    if not isinstance(node, Mapping) or depth == 0:
        return {}
    return {
        name: state
        for key, child in node.items()
        if isinstance(key, str) and not re.search("optim|sched|scaler|rng|callback", key)
        for name, state in _candidates(child, f"{where}.{key}".lstrip("."), depth - 1).items()
    }


def _under(
    content: Any, path: Path, key: str, found: Mapping[str, dict[str, Tensor]]
) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """The state dict at a dotted key, whose last parts may be the beginning of its names."""
    node, rest = content, key.split(".")
    while rest and isinstance(node, Mapping) and not _is_state_dict(node):
        whole = [n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in node]
        if not whole:
            break
        node, rest = node[".".join(rest[: whole[0]])], rest[whole[0] :]
    if _is_state_dict(node):
        start = "".join(f"{part}." for part in rest)
        bare = {WRAPPING.sub("", name): tensor for name, tensor in node.items()} if rest else node
        for names, begin in ((bare, start), (node, start), (bare, WRAPPING.sub("", start))):
            if state := {name.removeprefix(begin): t for name, t in names.items() if name.startswith(begin)}:
                return state, key, tuple(name for name in found if name != key)
    known = f"it holds {some(tuple(found))}" if found else "its tensors lie under no key"
    raise ValueError(f"{path} holds no state dict under checkpoint_key={key}; {known}")


def unusable(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the contents of tensors whose shapes fit: the first that a network cannot compute with."""
    for name, tensor in state.items():
        found = f"{name} is {tensor.dtype}".replace("torch.", "")
        if tensor.is_meta or tensor.layout != torch.strided:
            return f"{name} is a {'meta' if tensor.is_meta else tensor.layout} tensor without plain numbers; save dense ones"
        if own[name].is_floating_point() and not tensor.is_floating_point():
            return f"{found} and the model's {own[name].dtype}, so that its scale is lost; save weights that are no quantised ones"
        counts = tensor.is_floating_point() and bool(own[name].isfinite().all())
        if counts and not bool(tensor.float().isfinite().all()):
            return f"{name} holds NaN or infinite numbers: the training that saved it had failed; take an earlier file"
    return None


def some(names: tuple[str, ...]) -> str:
    """The first few of many."""
    return one_line(", ".join(names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
