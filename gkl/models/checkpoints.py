"""Weights from our runs, the authors', RobustBench's or anyone's checkpoint. Never a pickle with code.

report = load_checkpoint(model, "model.pt")  # or an error that names what does not fit
print(report)  # 212 of the model's 212 tensors matched; found under 'state_dict'; ...
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gkl.lines import one_line
from gkl.models.checkpoint_files import WRAPPING, named_statistics, read, state_dict, unusable
from gkl.models.clip import Clip
from gkl.models.load_report import (
    CheckpointMismatch,
    LoadReport,
    classes_of,
    diagnosis,
    head_elsewhere,
    head_of,
    headless,
    report_of,
    statistics_among,
)
from gkl.models.normalise import (
    Normalise,
    Statistics,
    described,
    normalises_by,
    same,
    statistics_within,
    twice_before,
)
from gkl.models.reparametrised import folded
from gkl.models.timm_network import TimmNetwork


def load_checkpoint(
    model: nn.Module, path: str | Path, key: str | None = None, *, any_classes: bool = False
) -> LoadReport:
    """Fill a model from a checkpoint saved by torch or as .safetensors, whatever modules wrapped the network.

    key: of the state dict in the file, see gkl.models.checkpoint_files.state_dict. A normalisation that the file holds becomes the
    model's where that has none. any_classes: of a file with another number of classes, with a
    self-supervised head or none, all but the head. The model changes only if the file fills all of it.
    A normalisation that the network's own tensors hold and the file does not stays.
    Raises FileNotFoundError for no file; ValueError for a damaged one, one that holds code, no state dict, or several networks;
    CheckpointMismatch (a ValueError) for weights of another architecture, number of classes or normalisation, and for such as a
    network cannot compute with: NaN, quantised, without numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}{' but a folder' if path.is_dir() else ''}; give the path of a .pt, .pth or .safetensors file"
        )
    content = read(path)
    met = _meeting(model, content, path, key)
    report, state, own = met.report, met.state, met.own
    classes = classes_of(report, state, own, getattr(model, "num_classes", None))
    bare = headless(report, met.head, own, met.left)
    if any_classes and bare:
        unused = report.unused + report.unexpected
        report = replace(report, anew=report.missing, missing=(), unused=unused, unexpected=())
    if any_classes and classes is not None:
        anew = tuple(name for name in state if state[name].shape != own[name].shape)
        report = replace(report, anew=anew, mismatched=())
        state = {name: tensor for name, tensor in state.items() if name not in anew}
    if not report.fits:
        what = (
            f"which has {model.num_classes} classes and the file {classes}"
            if classes is not None
            else diagnosis(report, own, met.head if bare else None)
        )
        raise CheckpointMismatch(f"{path} does not fit the {type(model).__name__}, {what}: {report}", report)
    if wrong := unusable(state, own):
        raise CheckpointMismatch(f"{path}: {wrong}: {report}", report)
    if met.statistics:
        if all(twice_before(place, met.left) for place in met.places):
            raise CheckpointMismatch(
                f"{path} normalises its pictures twice, one layer after the other; save the inner network alone and give "
                "model.normalisation what both come to",
                report,
            )
        _normalise_by(met.statistics, model, path, report)
    elif (named := named_statistics(content)) and not normalises_by(model, named):
        report = replace(
            report,
            named=f"its settings name {described(named)}, by which nothing is normalised here: model.normalisation says by what",
        )
    met.network.load_state_dict(state, strict=False)
    return report


def keyed(message: str, section: str) -> str:
    """An error's message with checkpoint_key as it is called in a section of a configuration."""
    return re.sub(r"(?<![\w.])checkpoint_key=", f"{section}.checkpoint_key=", message)


@dataclass(frozen=True)
class _Meeting:
    """A file's tensors beside a network's."""

    network: nn.Module  # what of the model the file holds
    own: Mapping[str, Tensor]  # its tensors, without a normalisation that the file has not
    state: dict[str, Tensor]  # the file's by these names
    left: dict[str, Tensor]  # the file's others
    places: Sequence[str]  # what the names begin with in the file
    head: str | None  # the last layer
    report: LoadReport
    statistics: Statistics | None  # the file's normalisation


def _meeting(model: nn.Module, content: Any, path: Path, key: str | None) -> _Meeting:
    """How a file's content meets a model. Raises ValueError for no state dict, and for several networks."""
    tensors, wrapper, others = state_dict(content, path, key)
    # In files it has timm's names, or OpenCLIP's.
    network: Any = model.model if isinstance(model, TimmNetwork | Clip) else model
    computed: tuple[str, ...] = ()
    if not folded(network.state_dict())[1]:  # else the network computes its own so
        tensors, computed = folded(tensors)
    network = _held(network, tensors, path)
    own = network.state_dict()
    given = _by_own_name(tensors, own, path)
    head = head_of(network, getattr(model, "num_classes", None))
    places = _prefixes(given, own, path, wrapper, head)
    by, its = statistics_among(own)
    kept = [name for name in its if by and places[0] + name not in given]
    own = {name: tensor for name, tensor in own.items() if name not in kept}
    state = {name: given[places[0] + name] for name in own if places[0] + name in given}
    taken = {place + name for place in places for name in state}
    elsewhere = head_elsewhere(head, own, state, {name: t for name, t in given.items() if name not in taken})
    state |= {name: given[place] for name, place in elsewhere.items()}
    left = {name: t for name, t in given.items() if name not in taken | {*elsewhere.values()}}
    report, statistics = report_of(state, own, left, places[0])
    report = replace(report, wrapper=wrapper, others=others, computed=computed, head=(*elsewhere.values(),))
    if by and kept:
        told = f"normalised by the network's own {described(by)}, of which the file holds nothing"
        report = replace(report, normalised=told)
    return _Meeting(network, own, state, left, places, head, report, statistics)


def _held(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """What of the network the file holds: it, or the one module within it that holds all its weights, if more of those names are there.

    A normalisation around that module stays as the network made it.
    """

    def share(module: nn.Module) -> float:
        own = module.state_dict()
        met = _met(_by_own_name(tensors, own, path), own)
        return max(met.values()) / max(len(own), 1)

    levels = [network]
    while True:
        own = levels[-1].state_dict()
        weighted = {name.partition(".")[0] for name in own if name not in statistics_among(own)[1]}
        inner = getattr(levels[-1], weighted.pop(), None) if len(weighted) == 1 else None
        if not isinstance(inner, nn.Module):
            break
        levels.append(inner)
    return max(levels, key=share)  # the first of equals


def _by_own_name(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The file's tensors, WRAPPING left out of their names where the model's own have none. Raises ValueError for a name twice."""
    bare = {WRAPPING.sub("", name): name for name in own}
    if len(bare) < len(own):
        bare = {name: name for name in own}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        parts = WRAPPING.sub("", key).split(".")
        ends = (n for n in range(len(parts)) if ".".join(parts[n:]) in bare)
        start = next(ends, None)
        name = ".".join(parts)
        if start is not None:
            name = "".join(f"{part}." for part in parts[:start]) + bare[".".join(parts[start:])]
        name = key if key in own else name
        if name in found:
            raise ValueError(
                f"{path} holds several networks ({one_line(name)} twice); save the state dict of one"
            )
        found[name] = tensor
    return found


def _prefixes(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, wrapper: str | None, head: str | None
) -> list[str]:
    """What the network's names begin with in the file, the same network's again after it where modules share it.

    With a head or without. Where it is not all there, what most of its names begin with. Raises ValueError for several networks.
    """
    met = _met(given, own)
    needed = [name for name in own if not name.endswith(".num_batches_tracked")]
    for _ in range(2):
        whole = [p for p in met if all(p + n in given and given[p + n].shape == own[n].shape for n in needed)]
        if whole or head is None:
            break
        needed = [name for name in needed if not name.startswith(f"{head}.")]
    if len(whole) > 1 and ("" in whole or not _alike([[given[p + n] for n in needed] for p in whole])):
        asked = " or ".join(f"checkpoint_key={f'{wrapper}.' if wrapper else ''}{p[:-1]}" for p in whole if p)
        bare = "; the one without it has to be saved by itself" if "" in whole else ""
        raise ValueError(
            f"{path} holds several networks ({needed[0]} twice); say which: {one_line(asked)}{bare}"
        )
    return whole or [max(met, key=lambda prefix: (met[prefix], -len(prefix)))]


def _met(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Counter[str]:
    """How many of the network's names are there by what they begin with in the file; those of its shapes count twice."""
    met: Counter[str] = Counter({"": 0})
    for key, tensor in given.items():
        parts = key.split(".")
        for n in range(len(parts)):
            name = ".".join(parts[n:])
            if name in own:
                met[key.removesuffix(name)] += 2 if tensor.shape == own[name].shape else 1
    return met


def _alike(copies: Sequence[Sequence[Tensor]]) -> bool:
    """Whether they are one network, which modules of the file share (an attack and what it attacks)."""
    return all(torch.equal(a, b) for other in copies[1:] for a, b in zip(copies[0], other, strict=True))


def _normalise_by(statistics: Statistics, model: nn.Module, path: Path, report: LoadReport) -> None:
    """Have the model normalise as its file does. Raises CheckpointMismatch where it is to normalise otherwise, or cannot."""
    layer = getattr(model, "normalise", None)
    within = statistics_within(model.model) if isinstance(model, TimmNetwork) else ()
    if type(layer) is nn.Identity and not within:
        device = next(model.parameters()).device
        model.normalise = Normalise(statistics).to(device)
    elif not normalises_by(model, statistics) and not any(same(has, statistics) for has in within):
        by = within[0] if within else layer.statistics() if isinstance(layer, Normalise) else None
        has = f"as {described(by)}" if by else "nothing"
        raise CheckpointMismatch(
            f"{path} normalises its pictures by {described(statistics)}, and the {type(model).__name__} here {has}; "
            "leave model.normalisation out, or give the file's",
            report,
        )
