"""A GPU's work recorded once and replayed whole: a CUDA graph, where launching kernels one by one takes longer than they do.

    replayed = Replayed(device)
    for x, y in loader:
        out = replayed(("train", len(x)), step, (x, y))      # step(x, y) -> tensors, in a tuple, a list or a dict

A key runs as it is when it is first seen, is recorded when it comes again, and is replayed from then on: the same kernels on the
same addresses, so with the same bits.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Replayed:
    """Calls functions of tensors, by replaying what was recorded of an earlier call with the same key.

    A function must be the same work at every call with one key, but for the contents of its inputs and of tensors that it reads
    and changes in place: a number that Python holds is recorded as it is, so it belongs in the key. It reads nothing back from
    the device. What it returns is overwritten by the next call with its key.
    """

    def __init__(self, device: torch.device, *, kept: int = 6, warn: Callable[[str], None] = print) -> None:
        """kept: recordings held at once, the latest used; all of them share their memory. warn: told once if recording fails."""
        self.kept, self.warn = kept, warn
        self.failed = False
        self.known: OrderedDict[Hashable, tuple[list[Tensor | None], Callable[[], Any]] | None] = (
            OrderedDict()
        )
        if device.type == "cuda":
            # All that is recorded, and each first call, on one stream: autograd's nodes must not know of another.
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, function: Callable[..., Any], inputs: Sequence[Tensor | None]) -> Any:
        """function(*inputs), its tensors detached. key: all that it depends on beside tensors; shapes are added here."""
        if self.failed:
            return _detached(function(*inputs))
        key = key, tuple(x if x is None else (x.shape, x.stride(), x.dtype) for x in inputs)
        if key not in self.known:
            self.known[key] = None
            while len(self.known) > self.kept:
                self.known.popitem(last=False)
            return self.aside(lambda: _detached(function(*inputs)))
        self.known.move_to_end(key)
        recording = self.known[key]
        if recording is None:
            static = [x if x is None else x.clone() for x in inputs]
            try:
                recording = static, self.record(lambda: _detached(function(*static)))
            except (
                RuntimeError
            ) as error:  # what CUDA cannot record, or too little memory: nothing has been computed yet
                self.failed = True
                self.known.clear()
                self.warn(
                    f"this step cannot be recorded as a CUDA graph and runs without ({_first_line(error)})"
                )
                return _detached(function(*inputs))
            self.known[key] = recording
        else:
            for held, x in zip(recording[0], inputs, strict=True):
                if held is not None and x is not None:
                    held.copy_(x, non_blocking=True)
        return recording[1]()

    def forget(self) -> None:
        """Drop every recording: tensors that they name have been replaced."""
        self.known.clear()

    def aside(self, function: Callable[[], Any]) -> Any:
        """Call on the stream that is recorded."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = function()
        current.wait_stream(self.stream)
        return out

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """What replays the function's work. Nothing of it is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (nccl's watchdog) may ask the device things meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            out = function()

        def replay() -> Any:
            graph.replay()
            return out

        return replay


def _detached(out: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, out)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
