"""Where and how precisely networks compute: device, precision, memory format, batch norm in groups, torch.compile."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gkl.distributed import Shard
from gkl.models.batch_norm import ghost_batch_norm

Precision = Literal["float32", "tf32", "bf16", "fp16", "float64"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Compute:
    """One place for a training's networks to compute."""

    def __init__(
        self, device: torch.device, precision: Precision, *, channels_last: bool, bn_groups: int
    ) -> None:
        """precision: of the networks alone; losses and averages are float32 (float64 in tests)."""
        self.device, self.precision, self.bn_groups = device, precision, bn_groups
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.half = HALF.get(precision)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False  # losses may multiply matrices
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cudnn.deterministic = True

    def to_device(self, model: nn.Module) -> nn.Module:
        """A network on the device, its batch norm in groups."""
        ghost_batch_norm(model, self.bn_groups, across=bool(Shard(self.bn_groups).among))
        if self.dtype == torch.float64:  # else as it is: float32, but for sums that are kept in float64
            model = model.to(self.dtype)
        return model.to(self.device).to(memory_format=self.memory_format)

    def autocast(self) -> torch.autocast:
        """Inside, networks compute in the run's precision."""
        return torch.autocast(self.device.type, self.half, enabled=self.half is not None)

    def logits(self, network: Any, x: Tensor) -> Tensor:
        """A network's output in float32 or better, whatever precision it computes in."""
        with self.autocast():
            return network(x.contiguous(memory_format=self.memory_format)).to(self.dtype)


@contextmanager
def cast(network: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, convolutions and linear layers hold their parameters in dtype, cast once and not at each call as autocast does where
    no gradient is wanted; None leaves them."""
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)] if dtype else []
    parameters = [(p, p.data) for layer in layers for p in layer.parameters()]
    for p, data in parameters:
        p.data = data.to(dtype)
    try:
        yield
    finally:
        for p, data in parameters:
            p.data = data


def compiled(network: nn.Module) -> Any:
    """The network by torch.compile: block by block where it repeats one, so that a block is compiled once for each of its shapes.

    Each mode and shape has a graph of its own: an epoch's shorter last batch would otherwise make every graph one of any shape,
    and slower.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    blocks = repeated_blocks(network)
    for block in blocks:
        block.compile(dynamic=False)
    return network if blocks else torch.compile(network, dynamic=False)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules of the class that occurs most often of those that hold convolutions or linear layers; none if none occurs twice."""
    kinds: dict[type, list[nn.Module]] = {}
    for module in network.modules():
        if any(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules() if part is not module):
            kinds.setdefault(type(module), []).append(module)
    own = [same for kind, same in kinds.items() if not issubclass(kind, nn.Sequential | nn.ModuleList)]
    most = max(own, key=len, default=[])
    return most if len(most) > 1 else []
