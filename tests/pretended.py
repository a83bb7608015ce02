"""A device that is not there, for tests of what a GPU would be asked.

    with pretended:                                 # the fixture, or Pretended()
        task = task_of(..., device=str(DEVICE))
    assert pretended.waits == [] and pretended.strays == []

Tensors that say they lie on `meta` hold their numbers on the CPU, so whole steps run; a dispatch mode notes every operation for
which a GPU would have to be waited for (a value read back, a shape that depends on values, a copy between the two that is not
asynchronous), and every one that a GPU would refuse, since one of its tensors lies on the CPU.
"""

import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gkl.models.pspnet import averaging, interpolating
from trainers.loop.compute import Compute

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "bincount",
}  # fmt: skip


# What takes tensors of both devices: a copy, and an index on the CPU.
ACROSS = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class There(Tensor):
    """A tensor on the pretended device. here: its numbers, on the CPU."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=DEVICE
        )  # fmt: skip
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise AssertionError(f"{func} of a pretended tensor outside the mode")


class Pretended(TorchDispatchMode):
    """Computes on the CPU what is asked of the device. waits: where it had to be waited for. strays: where a tensor was not there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.strays: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given: dict[int, There] = {}

        def enter(x: Any) -> Any:
            if isinstance(x, There):
                given[id(x.here)] = x
                return x.here
            return torch.device("cpu") if isinstance(x, torch.device) and x == DEVICE else x

        inner, options = tree_map(enter, args), tree_map(enter, kwargs)
        there = bool(given)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == DEVICE
        self.note(func, args, kwargs, inner, there, bool(given))
        out = func(*inner, **options)
        if not there:
            return out

        def leave(x: Any) -> Any:
            return (given[id(x)] if id(x) in given else There(x)) if isinstance(x, Tensor) else x

        return tree_map(leave, out)

    def note(self, func: Any, args: Any, kwargs: Any, inner: Any, there: bool, was_there: bool) -> None:
        name = func.__name__.split(".")[0]
        waits = was_there and name in READS
        if name == "_to_copy":
            waits = there != was_there and not kwargs.get("non_blocking")
        elif name == "copy_":
            across = isinstance(args[0], There) != isinstance(args[1], There)
            waits = across and not (kwargs.get("non_blocking") or any(args[2:])) and args[1].ndim > 0
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = was_there and any(x is not None and x.dtype == torch.bool for x in inner[1])
        if waits:
            self.waits.append(f"{name} at {where()}")
        if was_there and name not in ACROSS:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            if any(not isinstance(x, There) and x.ndim > 0 for x in tensors):
                self.strays.append(f"{name} at {where()}")


def where() -> str:
    """The line of the project that is being carried out."""
    frames = [
        f
        for f in traceback.extract_stack()
        if any(Path(f.filename).is_relative_to(ROOT / part) for part in ("gkl", "trainers", "benchmarks"))
    ]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "backward"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    monkeypatch.setattr(Compute, "autocast", lambda self: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    # Whose tensors no wrapper can hold.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
    with torch.device("cpu"):  # which looks up once what makes tensors, and is to find torch's own
        tensor = torch.tensor
        tensor(0)

    def copied(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """As on a GPU: made on the CPU, and copied while one waits."""
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", copied)
    monkeypatch.setattr(
        Tensor, "new_tensor", lambda self, data: copied(data, dtype=self.dtype, device=self.device)
    )
    yield Pretended()
    for kept in (interpolating, averaging):  # tensors of the device by what they are of
        kept.cache_clear()
