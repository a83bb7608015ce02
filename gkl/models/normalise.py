"""Shift and scale of the input channels, inside a network: what goes in is always a picture in [0, 1]."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

STATISTICS = {  # mean and standard deviation of the training pictures' channels
    # as DM-AT has them
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    # as RepDistiller and mdistiller have them
    "cifar100_kd": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    # as USB has them
    "cifar100_usb": ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
    # as torchvision has them, and everyone after it
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # as OpenAI's CLIP and OpenCLIP have them
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    # to [-1, 1], as many of timm's transformers have it
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


# Statistics of a normalising layer in a file: RobustBench's, the robustness library's, and what else people call them.
MEANS = {"mean": "std", "mu": "sigma", "new_mean": "new_std", "_mean": "_std", "image_mean": "image_std", "pixel_mean": "pixel_std"}  # fmt: skip

Statistics = Mapping[
    str, Sequence[float]
]  # {"mean": three numbers, "std": three numbers}, of pictures in [0, 1]
Normalisation = (
    str | Statistics | None
)  # by name or in numbers; None: as the network has it by itself, most have none


class Normalise(nn.Module):
    """Shift and scale of the channels; no part of the state dict, since published files do not hold them."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalisation: str | Statistics) -> None:
        """normalisation: a name in STATISTICS, or mean and std. Raises ValueError for anything else."""
        super().__init__()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in mean_and_std(normalisation))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1] -> the same shape."""
        return (x - self.mean) / self.std

    def statistics(self) -> Statistics:
        """Its mean and std."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}


class Unchanged(nn.Identity):
    """Pictures as they are, because that was asked for: no file's normalisation takes its place."""


def normaliser(normalisation: Normalisation) -> nn.Module:
    """The layer that a network begins with; None takes pictures as they are, and so does "none", whatever a checkpoint says."""
    if normalisation is None:
        return nn.Identity()
    return Unchanged() if normalisation == "none" else Normalise(normalisation)


def mean_and_std(normalisation: str | Statistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of a name in STATISTICS, or as given. Raises ValueError for another name, and for what no channels' statistics are."""
    if isinstance(normalisation, str):
        if normalisation not in STATISTICS:
            raise ValueError(
                f"normalisation must be none, {{mean:[r,g,b],std:[r,g,b]}} or one of {', '.join(STATISTICS)}, got {normalisation}"
            )
        return STATISTICS[normalisation]
    parts = normalisation if isinstance(normalisation, Mapping) else {}
    given = [parts.get(name) for name in ("mean", "std")]
    if set(parts) != {"mean", "std"} or not all(
        isinstance(values, Sequence) and len(values) == 3 and all(isinstance(v, int | float) for v in values)
        for values in given
    ):
        raise ValueError(f"normalisation must be {{mean:[r,g,b],std:[r,g,b]}} or a name, got {normalisation}")
    mean, std = (tuple(float(v) for v in values) for values in given)  # type: ignore[union-attr]
    if not (all(0 <= v <= 1 for v in mean) and all(0 < v <= 1 for v in std)):
        raise ValueError(
            f"normalisation needs mean in [0, 1] and std in (0, 1], got {mean} and {std}; pictures are in [0, 1], divide by 255"
        )
    return mean, std


def twice_before(place: str, names: Iterable[str]) -> bool:
    """Whether two layers that lie one within the other normalise what goes to the network whose tensors' names begin with `place`.

    names: of the tensors beside the network. Two names of one layer, side by side, are one.
    """
    stems = {name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in MEANS}
    around = {stem if place.startswith(f"{stem}.") else f"{stem.rpartition('.')[0]}/" for stem in stems}
    return sum(place.startswith(at.rstrip("/") + ("." if at.rstrip("/") else "")) for at in around) > 1


def normalises_by(model: nn.Module, statistics: Statistics) -> bool:
    """Whether a network begins with such a layer."""
    layer = getattr(model, "normalise", None)
    return isinstance(layer, Normalise) and same(layer.statistics(), statistics)


def of_channels(value: Any) -> list[float] | None:
    """Three numbers, of a list or a tensor, None for anything else; a tensor of one is that of each channel."""
    if isinstance(value, Tensor):
        value = value.detach().flatten().tolist()
        value = value * 3 if len(value) == 1 else value
    three = isinstance(value, list | tuple) and len(value) == 3
    return [float(v) for v in value] if three and all(isinstance(v, int | float) for v in value) else None


def statistics_within(module: nn.Module) -> tuple[Statistics, ...]:
    """Mean and standard deviation of each layer in a network that holds such as attributes, buffers or lists; not (0, 1)."""
    pairs = [
        (of_channels(getattr(layer, mean, None)), of_channels(getattr(layer, std, None)))
        for layer in module.modules()
        for mean, std in MEANS.items()
    ]
    found = [{"mean": mean, "std": std} for mean, std in pairs if mean and std]
    return tuple(one for one in found if not same(one, {"mean": [0.0] * 3, "std": [1.0] * 3}))


def taken(model: nn.Module, key: str) -> str:
    """How a network takes pictures, in words: few files say how theirs was trained, and a wrong guess is a wrong number.

    key: of the configuration's section that makes it.
    """
    layer, within = getattr(model, "normalise", None), statistics_within(getattr(model, "model", model))
    if isinstance(layer, Normalise) or within:
        by = layer.statistics() if isinstance(layer, Normalise) else within[0]
        return f"pictures go in normalised by {described(by)}"
    raw = "pictures go in as they are, in [0, 1]"
    if type(layer) is nn.Identity:
        return (
            f"{raw}; where its training normalised them, set {key}.normalisation=cifar10 (or imagenet, ...)"
        )
    return raw


def same(one: Statistics, other: Statistics) -> bool:
    """Whether two normalise alike, up to the digits that people write."""
    return all(
        abs(a - b) < 1e-4 for name in ("mean", "std") for a, b in zip(one[name], other[name], strict=True)
    )


def described(statistics: Statistics) -> str:
    """For a person."""
    shown = [", ".join(f"{value:.4g}" for value in statistics[name]) for name in ("mean", "std")]
    return f"mean ({shown[0]}) and std ({shown[1]})"
