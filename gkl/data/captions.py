"""Pictures with captions to train with, and pictures with classes to test zero-shot with: CLIP's data.

data = digits_captions("outputs/digits", context_length=12)
batch = data.batches(augment=ResizedCrop((0.9, 1.0), flip=0.0), ...).batch(epoch, step)       # a CaptionBatch
for x, y in data.test_batches(numbers, 50, part=data.tests["imagenet_r"].pictures): ...
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gkl.data.crops import CentreCrop, ResizedCrop
from gkl.data.decoding import Decoder
from gkl.data.files import FileViews, Split
from gkl.data.pairs import Draw, Pairs
from gkl.data.stores import PictureError
from gkl.data.tokens import Template, Tokenizer, every_text
from gkl.data.workers import as_a_worker, handed_over, loader
from gkl.distributed import Shard, world_size
from gkl.rng import sample_keys


class TestSet(NamedTuple):
    """pictures: with the numbers of their classes. among: (C,) bool, the classes that are told apart."""

    pictures: Split
    among: Tensor


@dataclass(frozen=True)
class CaptionData:
    """pairs: to train with, None where there is nothing but tests. class_names: (C,), a class is its place. templates: of the tests.

    tests: by the metric that they give, the first of them `imagenet`. resize: the test pictures' shorter side.
    """

    name: str
    pairs: Pairs | None
    tokenizer: Tokenizer
    class_names: tuple[str, ...]
    templates: tuple[Template, ...]
    tests: Mapping[str, TestSet]
    image_size: int
    decoder: Decoder

    in_memory: ClassVar[bool] = False
    shots: ClassVar[None] = None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_names)

    @property
    def train_labels(self) -> Tensor:
        """A pair has no class; as many zeros as an epoch has pairs, which take no memory."""
        return torch.zeros(1, dtype=torch.int64).expand(0 if self.pairs is None else len(self.pairs))

    @property
    def test_labels(self) -> Tensor:
        """(N,) int64, of `imagenet`."""
        return self.tests["imagenet"].pictures.labels

    def _digest(self) -> Any:
        texts = every_text(self.class_names, self.templates)
        return hashlib.sha256("\n".join([self.pairs.sha256 if self.pairs else "", *texts]).encode())

    @cached_property
    def trained_on(self) -> str:
        """Digest of the pairs and of what the classes are called: all that a training reads."""
        return str(self._digest().hexdigest())

    @cached_property
    def sha256(self) -> str:
        """Digest of these and of the tests' lists."""
        digest = self._digest()
        for name, test in self.tests.items():
            digest.update(name.encode() + b"\n".join(test.pictures.names.tolist()))
            digest.update(test.pictures.labels.numpy().tobytes() + test.among.numpy().tobytes())
        return str(digest.hexdigest())

    def batches(self, *, augment: Any, **settings: Any) -> "CaptionBatches":
        """A training's batches. Raises ValueError for settings that pairs cannot have."""
        if not isinstance(augment, ResizedCrop) or augment.repeats > 1:
            raise ValueError(
                f"{self.name} needs augment=resized_crop, one view of each, got {type(augment).__name__}"
            )
        idle = ("generated", "generated_share", "held_out", "held_out_by_class", "views_together")
        if any([settings.pop(name, None) for name in idle]):
            raise ValueError(
                f"{self.name} has captions and no classes: no generated pictures, none held out, one view; leave them out"
            )
        if not settings.pop("drop_last"):
            raise ValueError(
                f"{self.name} comes in whole batches, since every pair is told apart from the others of its batch; set drop_last=true"
            )
        return CaptionBatches(self, augment, **settings)

    def test_batches(
        self, numbers: Tensor, batch_size: int, workers: int = 0, part: Split | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Test views (b, 3, S, S) uint8 and labels (b,) of pictures by number. part: of another test than `imagenet`."""
        part = part or self.tests["imagenet"].pictures
        views = FileViews(part, CentreCrop(self.image_size, "bicubic"), self.image_size, self.decoder)
        batches = [[(int(number), 0) for number in few] for few in numbers.split(batch_size) if len(few)]
        for x, index in loader(views, batches, workers):
            yield x, part.labels[index]


class CaptionBatch(NamedTuple):
    """This process's part of a step, on the device. images: (b, 3, S, S) uint8 views. tokens: (b, L). sample: (b,) places in the epoch, on
    the CPU. replaced: (), how many damaged pairs were passed over."""

    images: Tensor
    tokens: Tensor
    sample: Tensor
    replaced: Tensor


class CaptionBatches:
    """Pairs read, cut and tokenised ahead of the steps by worker processes, each of which has lanes of its own."""

    generated = None

    def __init__(
        self, data: CaptionData, augment: Any, *, device: torch.device, shard: Shard, workers: int, batch_size: int, seed: int
    ) -> None:  # fmt: skip
        """workers: processes that read and decode."""
        self.data, self.augment, self.device, self.workers = data, augment, device, workers
        self.batch_size, self.seed = batch_size, seed
        self.labels, self.held_out = data.train_labels, torch.arange(0)
        self.lanes = (data.pairs.lanes if data.pairs else None) or batch_size
        own = shard.mine(batch_size)
        each = batch_size // self.lanes
        if batch_size % self.lanes or self.lanes % world_size():
            raise ValueError(
                f"data.lanes={self.lanes} must divide batch_size={batch_size} and be a multiple of the {world_size()} processes, each of which "
                "reads lanes of its own"
            )
        self.own_lanes, self.each = own[::each] // each, each
        # A run that trains nothing has no pairs.
        self.steps_per_epoch = len(data.pairs) // batch_size if data.pairs else 1
        self.next: tuple[int, int] = (0, 0)  # epoch and step that the stream gives next
        self.stream: Iterator[Any] = iter(())

    def start_epoch(self, epoch: int) -> None:
        """Nothing is to be done."""

    def samples(self, step: int) -> int:
        """How many pairs a step takes, over all processes."""
        return self.batch_size

    def items(self, step: int) -> int:
        """As many."""
        return self.batch_size

    def batch(self, epoch: int, step: int) -> CaptionBatch:
        """This process's part of a step. Raises PictureError."""
        if self.next != (epoch, step):
            self.stream = self._read(epoch, step)
        self.next = (0, 0)  # unless it comes
        parts = next(self.stream)
        self.next = (epoch, step + 1)
        if step + 1 == self.steps_per_epoch:
            self.stream = iter(())  # as in FileBatches
        images, tokens, replaced = (torch.cat([part[k] for part in parts]) for k in range(3))
        there = [t.to(self.device, non_blocking=True) for t in (images, tokens, replaced.sum())]
        sample = (self.own_lanes[:, None] * self.each + torch.arange(self.each)).flatten()
        return CaptionBatch(there[0], there[1], step * self.batch_size + sample, there[2])

    def see(self, images: Tensor, view: Any, draws: Any) -> Tensor:
        """The images, views that they are."""
        return images

    def _read(self, epoch: int, first: int) -> Iterator[list[Any]]:
        """From a step on: images, tokens and damaged ones of each worker's lanes, which follow one another."""
        count = max(1, min(self.workers, len(self.own_lanes)))
        stream = DataLoader(
            _Lanes(self, epoch, first), batch_size=None, num_workers=self.workers and count,
            pin_memory=torch.cuda.is_available(), worker_init_fn=as_a_worker if self.workers else None,
        )  # fmt: skip
        parts = []
        for part in handed_over(stream):
            if isinstance(part, PictureError):
                raise part
            parts.append(part)
            if len(parts) == count:
                yield parts
                parts = []

    def part(self, epoch: int, step: int, lanes: Sequence[int]) -> Any:
        """Images (k, 3, S, S), tokens (k, L) and the damaged ones (k,) of some lanes in a step; a PictureError where one is not to be had."""
        source, first = self.data.pairs, step * self.each
        assert source is not None
        try:
            found = source.take(Draw(self.seed, epoch), lanes, self.lanes, first, self.each)
        except PictureError as error:
            return error
        place = step * self.batch_size + torch.tensor(
            [lane * self.each + n for lane in lanes for n in range(self.each)]
        )
        keys = sample_keys(self.seed, epoch, place, "resized_crop").tolist()
        size = self.data.image_size
        images = torch.stack(
            [self.augment(pair.picture, size, key=key) for pair, key in zip(found, keys, strict=True)]
        )
        tokens = self.data.tokenizer([pair.caption for pair in found])
        return images, tokens, torch.tensor([pair.replaced for pair in found])


class _Lanes(IterableDataset[Any]):
    """A worker's part of each step, from one to the end of the epoch."""

    def __init__(self, batches: CaptionBatches, epoch: int, first: int) -> None:
        self.batches, self.epoch, self.first = batches, epoch, first

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        lanes = self.batches.own_lanes.tensor_split(count)[number].tolist()
        for step in range(self.first, self.batches.steps_per_epoch):
            yield self.batches.part(self.epoch, step, lanes)
