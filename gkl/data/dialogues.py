"""Conversations about pictures to train with, phase by phase, and benchmarks to be asked: LLaVA's data.

    data = digits_questions("outputs/digits", "outputs/digits_questions")
    batches = data.batches(device=device, shard=Shard(8), batch_size=64, seed=0, ...)
    batch = batches.batch(epoch=1, step=0)                       # a DialogueBatch

A phase has conversations of its own, a form in which they are read, a view of their pictures, epochs and a batch size.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gkl.data.batches import epoch_order
from gkl.data.conversations import IGNORED, Conversation, Form, asked, check_length, collate, grouped_batches
from gkl.data.crops import PaddedSquare
from gkl.data.decoding import Decoder, decode
from gkl.data.stores import PictureError, Store
from gkl.data.workers import loader
from gkl.distributed import Shard
from gkl.evaluation.vqa_files import Benchmark


@dataclass(frozen=True)
class Phase:
    """form: gkl.data.conversations.plain or vicuna_v1. view: of a picture (gkl.data.crops), None for the training's.

    batch_size: None for the training's. grouped: batches of about equal lengths, with pictures or without.
    """

    conversations: Sequence[Conversation]
    form: Form
    view: Any
    epochs: int
    batch_size: int | None = None
    grouped: bool = False


class Asked(NamedTuple):
    """A benchmark, and where its pictures are; None where its questions bring them."""

    benchmark: Benchmark
    store: Store | None


@dataclass(frozen=True)
class DialogueData:
    """phases: of the training, in turn. store: of the pictures of all of them, None where there are none. asked: benchmarks by name.

    places: that a picture takes among the tokens. length: of a text at most.
    cards: among which a batch is shared out, each with its own mean. content: digest of the pictures, for the data's own.
    """

    name: str
    phases: tuple[Phase, ...]
    tokenizer: Any
    store: Store | None
    asked: Mapping[str, Asked]
    asked_view: Any
    image_size: int
    places: int
    length: int
    cards: int
    decoder: Decoder
    content: str | None = None

    in_memory: ClassVar[bool] = False
    shots: ClassVar[None] = None
    num_classes: ClassVar[int] = 0

    @property
    def epochs(self) -> int:
        """Of all phases."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def train_labels(self) -> Tensor:
        """A conversation has no class; as many zeros as there are, which take no memory."""
        return torch.zeros(1, dtype=torch.int64).expand(sum(len(p.conversations) for p in self.phases))

    @property
    def test_labels(self) -> Tensor:
        """As many zeros as there are questions."""
        count = sum(len(each.benchmark.questions) for each in self.asked.values())
        return torch.zeros(1, dtype=torch.int64).expand(count)

    @cached_property
    def sha256(self) -> str:
        """Digest of all that is said, asked and answered, of the tokens it is made of, and of the pictures where `content` is known."""
        digest = hashlib.sha256(f"{self.content} {self.places} {self.length}".encode())
        for phase in self.phases:
            digest.update(f"{phase.form.__name__} {phase.epochs} {phase.batch_size} {phase.grouped}".encode())
            for each in phase.conversations:
                digest.update(json.dumps([each.picture, *each.turns]).encode())
        for name, (benchmark, _) in self.asked.items():
            digest.update(f"{name} {benchmark!r}".encode())
        digest.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return digest.hexdigest()

    @cached_property
    def trained_on(self) -> str:
        """Digest without the questions: of all that a training reads."""
        return replace(self, asked={}).sha256

    def batches(self, *, augment: Any, **settings: Any) -> "DialogueBatches":
        """A training's batches. Raises ValueError for settings that conversations cannot have."""
        idle = ("generated", "generated_share", "held_out", "held_out_by_class", "views_together")
        if any([settings.pop(name, None) for name in idle]):
            raise ValueError(
                f"{self.name} has conversations and no classes: no generated pictures, none held out, one view; leave them out"
            )
        if settings.pop("drop_last"):
            raise ValueError(f"{self.name} is read to its end, as LLaVA's training does; set drop_last=false")
        if not isinstance(augment, PaddedSquare):
            raise ValueError(
                f"{self.name} needs augment=padded_square, whole pictures, got {type(augment).__name__}"
            )
        return DialogueBatches(self, augment, **settings)

    def questions(self, name: str, batch_size: int) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
        """Numbers of a benchmark's questions, their pictures (b, 3, S, S) uint8 and tokens (L,), those of like length together.

        Raises PictureError.
        """
        benchmark, store = self.asked[name]
        tokens = [asked(question.text, self.tokenizer, self.places) for question in benchmark.questions]
        order = sorted(range(len(tokens)), key=lambda n: (len(tokens[n]), n))
        for few in (order[first : first + batch_size] for first in range(0, len(order), batch_size)):
            views = [self.picture(benchmark.questions[n].picture, store) for n in few]
            yield few, torch.stack(views), [tokens[n] for n in few]

    def picture(self, picture: str | bytes, store: Store | None) -> Tensor:
        """A question's picture as it is looked at, (3, S, S) uint8. Raises PictureError."""
        if isinstance(picture, bytes):
            try:
                whole = decode(picture, decoder="pillow")
            except ValueError as error:
                raise PictureError(f"{self.name}: a question's picture {error}") from error
        else:
            assert store is not None
            whole = store.picture(picture, "pillow")
        view: Tensor = self.asked_view(whole, self.image_size)
        return view


class DialogueBatch(NamedTuple):
    """This process's part of a step, on the device.

    images: (k, 3, S, S) uint8 views, of the texts that have one. tokens, labels: (b, L). there: (b, L) bool. shown: (b,) bool, which
    texts have a picture. card: (b,) of the published run. sample: (b,) places in the epoch, on the CPU.
    """

    images: Tensor
    tokens: Tensor
    labels: Tensor
    there: Tensor
    shown: Tensor
    card: Tensor
    sample: Tensor

    def part(self, of: slice) -> "DialogueBatch":
        """Some of its texts."""
        first, count = int(self.shown[: of.start or 0].sum()), int(self.shown[of].sum())
        rest = (each[of] for each in self[1:])
        return DialogueBatch(self.images[first : first + count], *rest)


class DialogueBatches:
    """Texts put together as they are wanted, pictures read ahead by worker processes."""

    generated = None

    def __init__(
        self, data: DialogueData, augment: PaddedSquare, *, device: torch.device, shard: Shard, workers: int, batch_size: int, seed: int
    ) -> None:  # fmt: skip
        """workers: processes that read and decode."""
        self.data, self.device, self.shard, self.workers, self.seed = data, device, shard, workers, seed
        self.batch_size, self.augment = batch_size, augment
        self.labels, self.held_out = data.train_labels, torch.arange(0)
        for phase in (phase for phase in data.phases if phase.epochs):
            check_length(phase.conversations, phase.form, data.tokenizer, data.places, data.length)
        self.start_epoch(1)

    def phase(self, epoch: int) -> tuple[Phase, int, int]:
        """That of an epoch, with its first and last one."""
        first = 1
        for phase in self.data.phases:
            if epoch < first + phase.epochs:
                return phase, first, first + phase.epochs - 1
            first += phase.epochs
        raise ValueError(f"{self.data.name} has {first - 1} epochs, got epoch {epoch}")

    def size(self, epoch: int) -> int:
        """A batch's texts, over all processes."""
        return self.phase(epoch)[0].batch_size or self.batch_size

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch."""
        return -(-len(self.phase(epoch)[0].conversations) // self.size(epoch))

    def start_epoch(self, epoch: int) -> None:
        """Put the conversations in the epoch's order. Every batch has them so that parts of it are of about the same length."""
        phase, size = self.phase(epoch)[0], self.size(epoch)
        if phase.grouped:
            words = torch.tensor([each.words for each in phase.conversations])
            pictured = torch.tensor([each.picture is not None for each in phase.conversations])
            found = grouped_batches(words, pictured, size, seed=self.seed, epoch=epoch)
        else:
            found = list(epoch_order(len(phase.conversations), self.seed, epoch).split(size))
        shares = [[batch[n :: self.data.cards] for n in range(self.data.cards)] for batch in found]
        self.order = [torch.cat(share) for share in shares]
        self.cards = [torch.cat([torch.full_like(p, n) for n, p in enumerate(share)]) for share in shares]
        self.epoch, self.steps_per_epoch = epoch, len(self.order)
        self.next: tuple[int, int] = (0, 0)
        self.stream: Iterator[Any] = iter(())

    def samples(self, step: int) -> int:
        """How many texts a step takes, over all processes."""
        return len(self.order[step])

    def items(self, step: int) -> int:
        """As many."""
        return self.samples(step)

    def own(self, step: int) -> Tensor:
        """Places in a step's batch of this process's texts."""
        return self.shard.mine(self.samples(step))

    def batch(self, epoch: int, step: int) -> DialogueBatch:
        """This process's part of a step. Raises PictureError."""
        phase, own = self.phase(epoch)[0], self.own(step)
        said = [phase.conversations[int(number)] for number in self.order[step][own]]
        data = self.data
        made = [phase.form(each, data.tokenizer, data.places, data.length) for each in said]
        if not any((labels[1:] != IGNORED).any() for _, labels in made) and len(said) == self.samples(step):
            raise PictureError(
                f"no text of epoch {epoch}, step {step} has an answer to learn ({said[0].name} is one); data.length={data.length} cuts them off"
            )
        shown = torch.tensor([each.picture is not None for each in said])
        images = self._pictures(epoch, step) if data.store is not None else None
        if images is None:
            images = torch.zeros(0, 3, data.image_size, data.image_size, dtype=torch.uint8)
        found = (images, *(collate(made) if made else _none()), shown, self.cards[step][own])
        images, tokens, labels, there, shown, card = (t.to(self.device, non_blocking=True) for t in found)
        place = sum(len(self.order[n]) for n in range(step)) + own
        return DialogueBatch(images, tokens, labels, there, shown, card, place)

    def see(self, images: Tensor, view: Any, draws: Any) -> Tensor:
        """The images, views that they are."""
        return images

    def _pictures(self, epoch: int, step: int) -> Tensor | None:
        """Views of this process's pictures of a step, None where it has none."""
        if self.next != (epoch, step):
            self.stream = self._read(step)
        self.next = (0, 0)  # unless it comes
        found: Tensor | None = next(self.stream)
        self.next = (epoch, step + 1)
        if step + 1 == self.steps_per_epoch:
            self.stream = iter(())  # as in FileBatches
        return found

    def _read(self, first: int) -> Iterator[Tensor | None]:
        """From a step on."""
        phase = self.phase(self.epoch)[0]
        wanted = [
            [(int(n), 0) for n in self.order[step][self.own(step)] if phase.conversations[int(n)].picture is not None]
            for step in range(first, self.steps_per_epoch)
        ]  # fmt: skip
        views = _Views(phase, self.data, phase.view or self.augment)
        stream = loader(views, [few for few in wanted if few], self.workers)
        for few in wanted:
            yield next(stream)[0] if few else None


def _none() -> tuple[Tensor, ...]:
    return (empty := torch.zeros(0, 1, dtype=torch.int64)), empty, empty.bool()


class _Views(torch.utils.data.Dataset[Any]):
    """A phase's pictures as they are looked at, by the numbers of their conversations."""

    def __init__(self, phase: Phase, data: DialogueData, view: Any) -> None:
        self.phase, self.data, self.view = phase, data, view

    def __getitem__(self, item: tuple[int, int]) -> Any:
        number, _ = item
        name, store = self.phase.conversations[number].picture, self.data.store
        assert name is not None and store is not None
        try:
            return self.view(store.picture(name, self.data.decoder), self.data.image_size), number
        except PictureError as error:
            return error
