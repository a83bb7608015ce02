"""Random numbers that depend on (seed, epoch, sample index, purpose) alone.

    keys = sample_keys(seed=0, epoch=3, index=index, stream="crop_flip")      # (B,)
    offsets = integers(keys, count=2, high=9)                                # (B, 2)

A sample therefore looks the same in any batch, on any number of devices, and after a restart.
SplitMix64 (Steele et al. 2014) on int64 tensors, whose products wrap: the same integers on every device.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def sample_keys(seed: int, epoch: int, index: Tensor, stream: str) -> Tensor:
    """One key a sample. index: (B,) integers, the sample's place in its data set. stream: what the numbers are for."""
    name = int.from_bytes(
        hashlib.sha256(f"{seed}/{epoch}/{stream}".encode()).digest()[:8], "little", signed=True
    )
    return _mix(_mix(index.to(torch.int64) * _GOLDEN + name) + name)


def draw_seed(*of: int) -> int:
    """A seed for torch's own generator that follows from whole numbers: seed, epoch, step, process."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, of)).encode()).digest()[:8], "little") >> 1


def uniform(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32 in [0, 1), 24 random bits each."""
    return (_bits(keys, count) >> 40 & 0xFFFFFF).to(torch.float32) * 2.0**-24


def integers(keys: Tensor, count: int, high: int) -> Tensor:
    """(B, count) int64 in 0..high-1. high is small (below 2^20), so the rounding of the scaled draw does not show."""
    return ((_bits(keys, count) >> 20 & 0xFFFFFFFF) * high) >> 32


def choose(keys: Tensor, allowed: Tensor, count: int, *, enough: bool) -> Tensor:
    """`count` different candidates that are allowed, for each key, (B, count) int64, all equally likely.

    allowed: (B, N) bool. enough: every row allows count. Else candidates are drawn with replacement; a row must allow one.
    """
    draws = _bits(keys, allowed.shape[1]).bitwise_and_((1 << 62) - 1)
    if enough:
        return draws.masked_fill_(~allowed, -1).topk(count, dim=1, sorted=False).indices
    order = allowed.to(torch.int8).argsort(dim=1, descending=True, stable=True)  # the allowed ones first
    place = (_bits(keys + 1, count) >> 1 & ((1 << 62) - 1)) % allowed.sum(1, keepdim=True)
    return order.gather(1, place)


def normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(B, *shape) standard normal numbers (Box-Muller). Devices may differ in the last digit."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    bits = _bits(keys, 2 * pairs)
    unit = (
        (bits >> 11 & ((1 << 53) - 1)).to(torch.float64) + 0.5
    ) * 2.0**-53  # in (0, 1): the logarithm is finite
    radius = torch.sqrt(-2.0 * torch.log(unit[:, :pairs]))
    angle = 2.0 * math.pi * unit[:, pairs:]
    numbers = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]
    return numbers.to(dtype).view(len(keys), *shape)


def _bits(keys: Tensor, count: int) -> Tensor:
    """(B, count) int64 of 64 random bits."""
    steps = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    return _mix(keys[:, None] + steps)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift: torch's keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)
