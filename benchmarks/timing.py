"""What the benchmarks share: the clock, and pictures of CIFAR-100's shape."""

import time
from collections.abc import Callable

import torch

from gkl.data import ImageData


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's own work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def noise() -> ImageData:
    """256 random pictures of 32x32 in 100 classes: a step's time does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (256,), generator=generator)
    return ImageData("noise", 100, pictures, labels, pictures, labels, tuple(map(str, range(100))))
