"""Whose statistics a network shifts and scales its pictures by: for every network, by name or in numbers."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch

from gkl.models import create
from gkl.models.normalise import STATISTICS, Normalise, Unchanged, mean_and_std, normaliser

OURS = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("gkl.")]
# One of each file of ours, and timm's.
KINDS = {timm.model_entrypoint(name).__module__: name for name in OURS if not re.search("wrn_[23]", name)}
OWN = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.mark.parametrize("name", [*sorted({*KINDS.values(), "wrn_10_1", "wrn_10_1_swish"}), "resnet10t"])
def test_every_network_takes_own_mean_and_std(name: str) -> None:
    """The network without normalisation, of pictures that were normalised before, is the same function."""
    torch.manual_seed(0)
    plain = create(name, 10, "none")
    own = create(name, 10, OWN)
    assert isinstance(plain.normalise, Unchanged) and isinstance(own.normalise, Normalise)
    own.load_state_dict(plain.state_dict())
    side = 32 if name.startswith("vit") else 64
    x = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(OWN[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.equal(own(x), plain((x - mean) / std))
        assert not torch.equal(own(x), plain(x))


def test_a_name_is_its_numbers() -> None:
    for name, (mean, std) in STATISTICS.items():
        one, other = Normalise(name), Normalise({"mean": list(mean), "std": list(std)})
        assert torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)
        assert mean_and_std(name) == (mean, std)
    assert type(normaliser(None)) is torch.nn.Identity


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("imgnet", "must be none, .*or one of cifar10, .*, got imgnet"),
        ({"mean": [0.5] * 3}, "must be {mean:.r,g,b.,std:.r,g,b.} or a name"),
        ({"mean": [0.5] * 3, "std": [0.2] * 3, "var": [0.1] * 3}, "or a name"),
        ({"mean": [0.5], "std": [0.2]}, "or a name"),
        ({"mean": 0.5, "std": 0.2}, "or a name"),
        ([[0.5] * 3, [0.2] * 3], "or a name"),
        ({"mean": [125.3, 123.0, 113.9], "std": [63.0, 62.1, 66.7]}, "pictures are in .0, 1., divide by 255"),
        ({"mean": [0.5] * 3, "std": [0.2, 0.0, 0.2]}, "needs mean in .0, 1. and std in .0, 1."),
        ({"mean": [0.5] * 3, "std": [0.2, float("nan"), 0.2]}, "needs mean in"),
    ],
)
def test_what_is_no_normalisation_is_one_line(asked: str | Mapping[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        create("wrn_10_1", 10, asked)
    assert "\n" not in str(caught.value)
