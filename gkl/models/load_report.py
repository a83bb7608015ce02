"""How the weights of a file meet those of a model: what is matched, missing, left over, and what that means.

report, statistics = report_of(state, own, left, prefix)
print(report)       # 212 of the model's 212 tensors matched; found under 'state_dict'; ...
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gkl.lines import one_line
from gkl.models.checkpoint_files import some
from gkl.models.normalise import MEANS, Statistics, described, same
from gkl.models.timm_network import of_another_size

# TRADES' network has a second first stage that no forward pass uses; files trained with it hold its weights. Older files of
# timm's BEiT hold a table that is computed anew. For training alone are AdvProp's second batch norm (timm's aux_bn), and the further
# heads of GoogLeNet and Inception.
UNUSED = re.compile(r"^sub_block1\.|\.relative_position_index$|\.aux_bn\.\d+\.|^(aux[12]|AuxLogits)\.")
# What a training keeps beside its network and no forward pass reads; counters of any name are told by their type.
BESIDE = re.compile(
    r"(^|[._])(criterion|loss\w*|metrics?|acc|accuracy|auroc|f1|confmat)([._]|$)|\.(mean|sum|max|min)_value$"
)


# Heads that a self-supervised training has in the classifier's place (SimCLR, MoCo, BYOL, SwAV, DINO), decoders (MAE), and what it keeps.
PRETEXT = re.compile(
    r"^(proj|pred|head|fc|linear|classifier|mlp|contrastive|prototypes|queue|decoder|mask_token)"
)


@dataclass(frozen=True)
class LoadReport:
    """How the tensors of a file meet those of a model, by name, without the prefixes of wrapping modules."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the model alone; batch counters may be, as nothing reads them
    unexpected: tuple[str, ...]  # in the file alone
    mismatched: tuple[str, ...]  # "name: (its shape) in the file, (its shape) in the model"
    unused: tuple[str, ...]  # in the file alone and known to be in no forward pass
    wrapper: str | None = None  # the key under which the state dict was found
    others: tuple[str, ...] = ()  # keys of the file's other state dicts
    prefix: str = ""  # what the network's names begin with in the file
    beside: tuple[str, ...] = ()  # counters and metrics that a training keeps beside its network
    anew: tuple[str, ...] = ()  # the head's, kept as they were: the file has another number of classes
    head: tuple[str, ...] = ()  # what the file calls the head, where that is not the model's name or place
    normalised: str | None = None  # what became of the normalisation that the file holds
    computed: tuple[str, ...] = ()  # weights that the file holds as what they come of: pruned, normalised
    named: str | None = None  # a normalisation that its settings name and the model has not

    @property
    def fits(self) -> bool:
        """Whether the file fills the model, no tensor left over."""
        unfilled = [name for name in self.missing if not name.endswith(".num_batches_tracked")]
        return not (unfilled or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched) + len(self.anew)
        parts = [f"{len(self.matched)} of the model's {total} tensors matched"]
        found = f"found under {self.wrapper!r}" if self.wrapper else ""
        if self.others:
            found += f" and not {' or '.join(map(repr, self.others[:4]))}, which checkpoint_key=... takes"
        parts += [found] if found else []
        parts += [f"there as {one_line(self.prefix)}*"] if self.prefix else []
        lists = {
            "missing in the file": self.missing,
            "not in the model": self.unexpected,
            "of another shape": self.mismatched,
            "unused and left out": self.unused,
            "of the training and left out": self.beside,
            "of the head made anew, as the file's is another": self.anew,
            "of the head under other names": self.head,
            "computed from a mask, or from direction and length": self.computed,
        }
        parts += [f"{len(names)} {what} ({some(names)})" for what, names in lists.items() if names]
        return "; ".join([*parts, *filter(None, (self.normalised, self.named))])


class CheckpointMismatch(ValueError):
    """A file's weights are not this model's. `report` has every name; the message the first few."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def report_of(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], left: Mapping[str, Tensor], prefix: str
) -> tuple[LoadReport, Statistics | None]:
    """How the network `state`, in the file named `prefix`*, and what is left there meet the model; and the file's normalisation."""
    statistics, told = statistics_among(left)
    parts = {name.partition(".")[0] for name in own}
    unused = [key for key in left if _is_unused(key.removeprefix(prefix), own)]
    priors = _priors(left)
    beside = [
        k
        for k, t in left.items()
        if k in priors or (k not in told and _beside(k.removeprefix(prefix), t, parts))
    ]
    wrong = [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    return LoadReport(
        matched=tuple(name for name in state if name not in wrong),
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(key for key in left if key not in (*unused, *beside, *told)),
        mismatched=tuple(
            f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            for name in wrong
        ),
        unused=tuple(key.removeprefix(prefix) for key in unused),
        prefix=prefix,
        beside=tuple(beside),
        normalised=f"normalised by the file's {described(statistics)}" if statistics else None,
    ), statistics


def _is_unused(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is in no forward pass in eval mode: the second batch norms of DAJAT's, too, beside the first."""
    return bool(UNUSED.search(name)) or (".auxiliary." in name and name.replace(".auxiliary.", ".") in own)


def statistics_among(left: Mapping[str, Tensor]) -> tuple[Statistics | None, tuple[str, ...]]:
    """Mean and standard deviation of the three channels among a file's tensors, None for none or several; and their names."""
    found: dict[str, Statistics] = {}
    for key, tensor in left.items():
        stem, _, name = key.rpartition(".")
        spread = left.get(f"{stem}.{MEANS.get(name)}".lstrip("."))
        if spread is not None and tensor.numel() == spread.numel() in (1, 3) and tensor.is_floating_point():
            mean, std = (t.flatten().tolist() * (3 // t.numel()) for t in (tensor, spread))
            pair = {"mean": mean, "std": std}
            found |= {key: pair, f"{stem}.{MEANS[name]}".lstrip("."): pair}
    several = [pair for pair in found.values() if not same(pair, next(iter(found.values())))]
    return (None, ()) if several or not found else (next(iter(found.values())), tuple(found))


def _priors(left: Mapping[str, Tensor]) -> set[str]:
    """The names of what a gkl.losses.prior.ClassPrior keeps, wherever in a training's module it lies."""
    stems = {key.removesuffix("probs") for key in left if key.rpartition(".")[2] == "probs"}
    found = [[f"{stem}{name}" for name in ("probs", "sums", "counts")] for stem in stems]
    return {
        key
        for keys in found
        if {*keys} <= {*left} and left[keys[0]].shape == left[keys[1]].shape == left[keys[2]].shape * 2
        for key in keys
    }


def _beside(name: str, tensor: Tensor, parts: set[str]) -> bool:
    """Whether a tensor of no layer: a counter or score, or what a loss or metric keeps. parts: the model's own layers."""
    if name.partition(".")[0] in parts or name.endswith("num_batches_tracked"):
        return False
    return not tensor.is_floating_point() or bool(BESIDE.search(name))


def classes_of(
    report: LoadReport, state: Mapping[str, Tensor], own: Mapping[str, Tensor], num_classes: int | None
) -> int | None:
    """The file's number of classes where that is all that it differs in, else None."""
    if not report.mismatched or report.missing or report.unexpected:
        return None
    wrong = [(t.shape, own[n].shape) for n, t in state.items() if t.shape != own[n].shape]
    alike = all(a[1:] == b[1:] and b[:1] == (num_classes,) and a[:1] == wrong[0][0][:1] for a, b in wrong)
    return wrong[0][0][0] if alike and report.matched else None


def head_of(network: nn.Module, num_classes: int | None) -> str | None:
    """The name of a network's last layer, None where it has none of so many classes."""
    layers = [n for n, m in network.named_modules() if n and getattr(m, "out_features", 0) == num_classes]
    return layers[-1] if layers else None


def head_elsewhere(
    head: str | None, own: Mapping[str, Tensor], state: Mapping[str, Tensor], left: Mapping[str, Tensor]
) -> dict[str, str]:
    """Where the head lies that `state` has not: its names in the file, by the network's; empty where that is not known.

    It is the only layer among the file's other tensors, `left`, and of the head's shapes: outside the backbone, or behind a dropout.
    """
    names = [name for name in own if head and name.startswith(f"{head}.")]
    stems = {key.rpartition(".")[0] for key in left if key.rpartition(".")[2] == "weight"}
    if not names or len(stems) != 1 or any(name in state for name in names):
        return {}
    found = {name: f"{next(iter(stems))}.{name.removeprefix(f'{head}.')}" for name in names}
    fits = all(place in left and left[place].shape == own[name].shape for name, place in found.items())
    return found if fits else {}


def headless(
    report: LoadReport, head: str | None, own: Mapping[str, Tensor], left: Mapping[str, Tensor]
) -> bool:
    """Whether a file has all of a network but its last layer, and beside it at most a head that gives no classes.

    own: the network's tensors. left: the file's others.
    """
    missing = [name for name in report.missing if not name.endswith(".num_batches_tracked")]
    whole = [name for name in own if head and name.startswith(f"{head}.")]
    if not whole or not {*whole} <= {*missing} or report.mismatched or not report.matched:
        return False
    others = [name.removeprefix(report.prefix) for name in report.unexpected]
    shapes = [own[name].shape for name in missing]
    if any(left[name].shape in shapes for name in report.unexpected):
        return False  # a head of these classes behind further layers
    return all(name.startswith(f"{head}.") for name in missing) and all(
        name.startswith(f"{head}.") or PRETEXT.match(name) for name in others
    )


def diagnosis(report: LoadReport, own: Mapping[str, Tensor], head: str | None) -> str:
    """What sets the file apart. head: the last layer, where that is what it has not."""
    if any("lora_" in name for name in report.unexpected):
        return "holding LoRA's factors apart from the weights; merge them (peft: model.merge_and_unload()) and save that state dict"
    if head:
        return f"having another head, or none, in the place of {head}: train one on it (model.checkpoint=...), or name a file that builds it (model=net.py:Net)"
    if len(report.matched) == len(own):
        top = sorted({name.partition(".")[0] for name in report.unexpected})
        key = ".".join(part for part in (report.wrapper, report.prefix[:-1]) if part)
        alone = (
            f"; if that is no part of what it computes, checkpoint_key={one_line(key)}"
            if report.prefix
            else ""
        )
        return f"which is all there, with more around it that the model has not ({some(tuple(top))}){alone}"
    if not (report.missing or report.unexpected) and (sized := of_another_size(report.mismatched)):
        return sized
    return "being of another architecture, depth or width, or incomplete (choose its model=..., or a file that builds it, model=net.py:Net, and save that module's own names: torch.save(net.state_dict(), ...))"
