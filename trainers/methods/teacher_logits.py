"""A teacher's logits where they are all that a method sees: its forward pass made cheap, and kept where that is exact.

logits = teacher_logits.of(x)                        # (b, C) computed
logits = teacher_logits.kept(make_x, epoch, step, index)     # from the cache, what is missing computed and kept
"""

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gkl.evaluation.kept import looks, named
from gkl.models.batch_norm import eval_mode
from trainers.loop.training import Training


class TeacherLogits:
    """Logits of images from batches of one size, in which an image's are the same bits in whatever company."""

    def __init__(self, training: Training, network: nn.Module, size: int) -> None:
        """network: the teacher, or its equal with batch norm folded. size: of the batches, the last one filled up."""
        self.training, self.network, self.size = training, network, size
        self.cache: LogitsCache | None = None

    def of(self, x: Tensor) -> Tensor:
        """(b, C), without gradient."""
        found = []
        with torch.no_grad(), eval_mode(self.network):
            for few in x.split(self.size):
                place = torch.arange(self.size, device=x.device) % len(few)
                whole = few if len(few) == self.size else few[place]
                found.append(self._forward(whole)[: len(few)])
        return torch.cat(found)

    def _forward(self, x: Tensor) -> Tensor:
        compute, network = self.training.compute, self.network
        with compute.autocast():
            taps = network.forward_taps(x.contiguous(memory_format=compute.memory_format))  # type: ignore[operator]
        return taps[-1].to(compute.dtype)

    def keep(self, folder: Path, teacher: str, *, mixed: bool) -> None:
        """Keep logits in folder from now on. teacher: its fingerprint. Raises ValueError when views cannot be counted."""
        training, compute = self.training, self.training.compute
        batches, augment, data = training.batches, training.batches.augment, training.data
        if augment.count is None or mixed or batches.generated:
            raise ValueError(
                "teacher.cache keeps the teacher's logits on each view of a picture, and here a picture has more than can be "
                "counted (crop_flip alone has few, without mixing or generated pictures); set teacher.cache=null"
            )
        key = {
            "teacher": teacher,
            "data": data.sha256,
            "held_out": batches.held_out.tolist(),
            "views": [augment.padding, augment.border],
            # A network's bits depend on how many pictures it sees at once, and not on which.
            "computed": [
                self.size, str(compute.dtype), compute.precision, str(compute.memory_format), training.device.type,
                training.setup.compile,
            ],
            "machine": [
                torch.__version__,
                torch.get_num_threads(),
                torch.cuda.get_device_name(training.device)
                if training.device.type == "cuda"
                else torch.backends.cpu.get_cpu_capability(),
            ],
        }  # fmt: skip
        size = {"pictures": len(batches.labels), "views": augment.count, "classes": data.num_classes}
        shades = torch.linspace(0.0, 1.0, 3 * self.size * data.image_size**2, device=training.device)
        shades = shades.view(self.size, 3, data.image_size, data.image_size).to(compute.dtype)
        self.cache = LogitsCache(folder, key, looks(self.of(shades)), **size, dtype=compute.dtype)

    def kept(self, x: Callable[[], Tensor], epoch: int, step: int, index: Tensor) -> Tensor | None:
        """Logits (b, C) on views of pictures as they are kept, None where none are; those missing are computed and kept.

        x: makes the views. index: (b,) sample numbers of this process's part of the step, on the CPU.
        """
        if self.cache is None:
            return None
        batches = self.training.batches
        numbers = batches.augment.numbers(seed=self.training.seed, epoch=epoch, index=index)
        view = self.training.shard.mine(batches.items(step)) // batches.samples(step)
        number = torch.stack(numbers)[view, torch.arange(len(index))]
        kept, there = self.cache.get(index, number)
        logits = kept.to(self.training.device, non_blocking=True)
        if not there.all():
            missing = (~there).nonzero().squeeze(1)
            here = missing.to(self.training.device, non_blocking=True)
            logits[here] = fresh = self.of(x()[here])
            self.cache.put(index[missing], number[missing], fresh)
        return logits


class LogitsCache:
    """A teacher's logits on the views of its training pictures, in one memory-mapped file, filled as views occur.

    Students and seeds of one teacher share it, whatever their epochs and orders. A row is a view's logits and their checksum, and is
    there when the two agree: neither a process killed while writing nor one that writes the same row can leave a wrong one.
    The file is sparse: it takes the space of the rows that are there.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        seen: Tensor,
        *,
        pictures: int,
        views: int,
        classes: int,
        dtype: torch.dtype,
    ) -> None:
        """key: all that the logits of a view depend on. seen: see gkl.evaluation.kept.named. dtype: of the logits."""
        name = named(folder, key, seen)
        self.views = views
        self.row = np.dtype(
            [("logits", torch.empty(0, dtype=dtype).numpy().dtype, (classes,)), ("check", "<u4")]
        )
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.logits"
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
        self.file.truncate(pictures * views * self.row.itemsize)
        self.rows = np.memmap(path, self.row, mode="r", shape=(pictures, views))

    def get(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of views of pictures, and which of them are there, (B,) bool; all on the CPU."""
        rows = self.rows[index.numpy(), view.numpy()]
        there = [zlib.crc32(row["logits"].tobytes()) == row["check"] for row in rows]
        return torch.from_numpy(rows["logits"].copy()), torch.tensor(there)

    def put(self, index: Tensor, view: Tensor, logits: Tensor) -> None:
        """Keep logits (B, C). Raises OSError when the disk is full."""
        rows = np.empty(len(index), self.row)
        rows["logits"] = logits.cpu().numpy()
        rows["check"] = [zlib.crc32(values.tobytes()) for values in rows["logits"]]
        places = (index * self.views + view).tolist()
        for place, row in zip(
            places, rows, strict=True
        ):  # not through the map, which a full disk would end the process in
            os.pwrite(self.file.fileno(), row.tobytes(), place * self.row.itemsize)
