"""Sums over the processes of a run; with one process (or none initialised) they return what they are given.

The few places where the mathematics of a step couples samples (normaliser, class prior, gradients) call these,
so that N processes holding slices of a batch compute what one process holding all of it would.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Before any group is made: the default arguments of its functions keep the group that there is at its import, which DDP does
    # at the first chance. A group so kept outlives destroy_process_group, and gloo's threads may then abort a process that ends.
    import torch.distributed.nn.functional  # noqa: F401

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that share each batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@dataclass(frozen=True)
class Shard:
    """Which items of a batch are this process's: contiguous batch-norm groups, as DataParallel scatters them over its cards.

    Where processes are a multiple of the groups, each has a part of one. Neither being a multiple of the other is not meant.
    """

    groups: int  # parts of the batch that batch norm sees apart

    @property
    def among(self) -> int:
        """How many processes share each group; 0 where each has whole ones."""
        return world_size() // self.groups if world_size() > self.groups else 0

    def group_size(self, items: int) -> int:
        """Items of a batch-norm group, where a batch has `items`."""
        return math.ceil(items / self.groups)

    def reaches_all(self, items: int) -> bool:
        """Whether every process has some of so many items."""
        size = self.group_size(items)
        groups = math.ceil(items / size)
        if among := self.among:
            return groups == self.groups and items - (groups - 1) * size >= among
        return groups > (world_size() - 1) * (self.groups // world_size())

    def mine(self, items: int) -> Tensor:
        """Numbers of this process's items."""
        groups = torch.arange(items).split(self.group_size(items))
        if among := self.among:
            group, part = divmod(rank(), among)
            return groups[group].tensor_split(among)[part] if group < len(groups) else torch.arange(0)
        held = self.groups // world_size()
        own = groups[rank() * held : (rank() + 1) * held]
        return torch.cat(own) if own else torch.arange(0)


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, without gradient; the same on every process."""
    if world_size() == 1:
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all processes, with gradient. Each process's gradient must be of its own share of the loss."""
    return tensor if world_size() == 1 else _Sum.apply(tensor)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)


def agree(value: int) -> int:
    """The largest of the processes' values, so that all of them do the same."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def first_said(words: str | None) -> str | None:
    """What the first of the processes that have something to say says, None where none has; no device is waited for."""
    if world_size() == 1:
        return words
    any_has = torch.tensor(words is not None, dtype=torch.int32)
    dist.all_reduce(any_has, op=dist.ReduceOp.MAX, group=_on_cpus())
    if not any_has:
        return None
    return next(each for each in gathered(words) if each is not None)


def gathered(value: T) -> list[T]:
    """What each process has, process by process; plain Python values, and no device is waited for."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_on_cpus())
    return found


def _on_cpus() -> Any:
    """The processes of the world over gloo, whatever they talk by on their devices; all of them must ask at once."""
    world = dist.group.WORLD
    if world not in _BESIDE:
        _BESIDE[world] = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _BESIDE[world]


_BESIDE: WeakKeyDictionary[Any, Any] = (
    WeakKeyDictionary()
)  # the group on CPUs beside each world, no longer than it


def all_gather(tensor: Tensor) -> Tensor:
    """Every process's rows, in the order of the processes, (b, ...) -> (B, ...); with gradient. b may differ.

    Each process's gradient must be of its own share of the loss: the sum over processes comes back.
    """
    return tensor if world_size() == 1 else _Cat.apply(tensor)


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
        counts[rank()] = len(tensor)
        dist.all_reduce(counts)
        ctx.counts = counts.tolist()
        # A sum of zero-padded parts: gloo's all_gather takes parts of one size alone.
        whole = tensor.new_zeros(sum(ctx.counts), *tensor.shape[1:])
        whole.split(ctx.counts)[rank()].copy_(tensor)
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.counts)[rank()]


def rows_before(tensor: Tensor) -> Tensor | int:
    """How many rows the processes before this one have, of tensors (b, ...) whose b may differ; no number is waited for."""
    if world_size() == 1:
        return 0
    counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    counts[rank()] = len(tensor)
    dist.all_reduce(counts)
    return counts[: rank()].sum()


def all_reduce_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one message per dtype."""
    _in_one_message(tensors, dist.all_reduce)


def broadcast_(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Replace each tensor by process `source`'s, in one message per dtype."""
    _in_one_message(tensors, lambda flat: dist.broadcast(flat, source))


def _in_one_message(tensors: Iterable[Tensor], exchange: Callable[[Tensor], object]) -> None:
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for group in by_dtype.values():
        flat = torch.cat([t.detach().reshape(-1) for t in group])
        exchange(flat)
        for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))
