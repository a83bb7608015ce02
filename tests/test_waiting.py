"""A step asks its device for nothing: on a GPU each question waits for all that was launched before it.

The device is pretended. Tensors that say they lie on `meta` hold their numbers on the CPU, so whole steps run; a dispatch mode
notes every operation for which a GPU would have to be waited for: a value read back, a shape that depends on values, a copy
between the two that is not asynchronous.
"""

import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distillation import make_task
from test_methods import task_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from trainers.training import Training

DEVICE = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "repeat_interleave", "bincount",
}  # fmt: skip


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
    """Computes on the CPU what is asked of the device. waits: where it had to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

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
            frames = [
                f
                for f in traceback.extract_stack()
                if Path(f.filename).is_relative_to(ROOT / "gkl")
                or Path(f.filename).is_relative_to(ROOT / "trainers")
            ]
            where = (
                f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "backward"
            )
            self.waits.append(f"{name} at {where}")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    monkeypatch.setattr(Training, "autocast", lambda self: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # whose tensors no wrapper can hold
    tensor = torch.tensor

    def copied(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """As on a GPU: made on the CPU, and copied while one waits."""
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", copied)
    monkeypatch.setattr(
        Tensor, "new_tensor", lambda self, data: copied(data, dtype=self.dtype, device=self.device)
    )
    return Pretended()


def test_what_waits_is_noted(pretended: Pretended) -> None:
    x = torch.arange(4.0)
    with pretended:
        there = x.to(DEVICE, non_blocking=True)
        assert there.add(1).mul_(2).sum().device == DEVICE and not pretended.waits
        (
            float(there.sum()),
            there.cpu(),
            x.to(DEVICE),
            torch.tensor([1.0], device=DEVICE),
            there[there > 1],
            there.nonzero(),
        )
        there.copy_(x)
    assert [wait.split()[0] for wait in pretended.waits] == [
        "_local_scalar_dense", "_to_copy", "_to_copy", "_to_copy", "index", "nonzero", "copy_",
    ]  # fmt: skip


AT = [
    "c100_basic_gkl",
    "c100_basic_kl",
    "c100_autoaug",
    "c100_acat",
    "c100_dajat",
    "c100_dm",
    "c10_rice",
    "c100_awp",
    "c100_lbgat_awp",
]
STRONG = ("c100_autoaug", "c100_dajat")  # whose views are torchvision's operations, some of which wait


@pytest.mark.parametrize("experiment", AT)
def test_an_adversarial_step_waits_for_nothing(experiment: str, tmp_path: Path, pretended: Pretended) -> None:
    """All but LAS-AT, whose strategy network says how many steps an attack takes."""
    own = [f"generated.root={tmp_path}"] if experiment == "c100_dm" else []
    with pretended:
        _, task = task_of(f"at/{experiment}", "epochs=200", *own, device=str(DEVICE))
        task.start_epoch(60)
        pretended.waits.clear()
        for step in range(2):
            scalars = task.train_step(60, step)
    assert all(isinstance(value, There) for value in scalars.values())
    waits = (
        [where for where in pretended.waits if " gkl/augment.py" not in where]
        if experiment in STRONG
        else pretended.waits
    )
    assert waits == []


KD = ["kd", "gkl", "ikl", "dkd", "fitnet", "rkd", "crd", "ofd", "reviewkd"]


@pytest.mark.parametrize("method", KD)
def test_a_distillation_step_waits_for_nothing(method: str, tmp_path: Path, pretended: Pretended) -> None:
    with pretended:
        task = make_task(method, tmp_path, device=str(DEVICE))
        task.start_epoch(3)
        for _ in range(2):  # at first the teacher's kept logits are not there yet, and are written
            pretended.waits.clear()
            for step in range(2):
                task.train_step(3, step)
    assert pretended.waits == []
