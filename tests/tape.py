"""What a CUDA graph does, on the CPU: operations are noted as they are called, undone, and called again on the same tensors.

As there, a number that Python held is what it was, and a value read back from the "device" is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gkl.graphs import Replayed

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount"}


class Notes(TorchDispatchMode):
    """Notes operations, their arguments and results, and what the tensors held that they changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.split(".")[0] in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        arguments = func._schema.arguments
        for place, argument in enumerate(arguments):
            # batch norm's schema does not tell that it changes these
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in ("running_mean", "running_var"):
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(given):
                    self.keep(tensor)
        out = func(*args, **kwargs)
        if not any(result.alias_info for result in func._schema.returns):  # else views of what was there
            self.made.update(t.untyped_storage()._cdata for t in tree_leaves(out) if isinstance(t, Tensor))
        # As they lie now: a parameter may be pointed at other numbers afterwards, and a graph knows addresses.
        args, kwargs = (tree_map_only(Tensor, Tensor.detach, given) for given in (args, kwargs))
        self.calls.append((func, args, kwargs, out))
        return out

    def keep(self, tensor: Tensor) -> None:
        """Remember what a tensor held that was there before."""
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.made and storage._cdata not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage._cdata] = whole, whole.clone()


class Taped(Replayed):
    """Replays operations on the CPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(torch.device("cpu"), **options)
        self.recorded = self.replayed = 0

    def aside(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        notes = Notes()
        try:
            with notes:
                out = function()
        finally:
            for whole, held in notes.before.values():
                whole.copy_(held)
        self.recorded += 1

        def replay() -> Any:
            self.replayed += 1
            with torch.no_grad():
                for func, args, kwargs, results in notes.calls:
                    again = func(*args, **kwargs)
                    alias = [r.alias_info is not None for r in func._schema.returns]
                    kept, new = ([x] if len(alias) == 1 else list(x or ()) for x in (results, again))
                    for aliased, *pair in zip(alias, kept, new, strict=True):
                        if not aliased:
                            for old, fresh in zip(*map(tree_leaves, pair), strict=True):
                                if isinstance(old, Tensor):
                                    old.copy_(fresh)
            return out

        return replay
