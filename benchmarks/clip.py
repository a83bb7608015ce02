"""A distilled CLIP step against a plain one and the teacher's forward, counted and timed; and the memory of a pair.

    python benchmarks/clip.py [--device cuda] [--rounds 5]

Counted: floating-point operations of whole steps of Table VII's smoke networks, and gigabytes on one of eight cards that share 8,192 pairs
in parts of 128: weights, gradients, Adam's averages, the teacher, and what autograd keeps of 128 pairs in bfloat16, found on the real
ViT-B/16 for two and for four. Timed: batch 64, the networks of scale=small (64 pixels), whose steps take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from table5 import Nowhere
from timing import Row, explained, interleaved, report
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gkl.data.augment import to_float
from gkl.data.captions import CaptionBatch, CaptionData, TestSet
from gkl.data.files import Split
from gkl.data.pairs import Listed
from gkl.data.tokens import bpe, imagenet_names, imagenet_templates
from gkl.models.clip import Clip, clip
from trainers.loop.training import Training
from trainers.runs.compose import compose
from trainers.runs.settings import build
from trainers.runs.targets import instantiate
from trainers.runs.teacher import Teacher

CARDS, PAIRS, PART = 8, 8192, 128


class Untrained(Teacher):
    """The teacher's network as it is made."""

    def load(self, num_classes: int) -> tuple[torch.nn.Module, dict[str, str]]:
        return self.network(num_classes=num_classes), {"sha256": "none"}


def made(row: str, folder: Path, device: torch.device, *own: str) -> Training:
    """A training of smoke scale, or of other networks on its data's place."""
    words = [
        f"experiment=clip/{row}",
        "scale=smoke",
        "channels_last=false",
        "workers=0",
        f"data.root={folder}/digits",
        *own,
    ]
    config = compose("train", words)
    given: dict[str, Any] = {}
    if config.get("teacher"):
        given["teacher"] = Untrained(**vars(instantiate(config["teacher"])))
    torch.manual_seed(0)
    return build(config, device=device, data=instantiate(config["data"]), **given)


def on_noise(row: str, device: torch.device, *own: str) -> Training:
    """A training at the paper's scale on random pairs, always the same."""
    config = compose("train", [f"experiment=clip/{row}", "schedule.warmup=0", *own])
    pairs, side, length = config["batch_size"], config["data"]["image_size"], config["data"]["context_length"]
    part = Split(Nowhere(Path("nowhere")), np.array([b""]), torch.zeros(1, dtype=torch.int64))
    tests = {"imagenet": TestSet(part, torch.ones(1000, dtype=torch.bool))}
    listed = Listed(pairs, lambda n: Image.new("RGB", (side, side)), lambda n, key: "", "none")
    data = CaptionData(
        "noise", listed, bpe(length), imagenet_names(), imagenet_templates(), tests, side, "pillow"
    )
    given: dict[str, Any] = {}
    if config.get("teacher"):
        given["teacher"] = Untrained(**vars(instantiate(config["teacher"])))
    torch.manual_seed(0)
    task = build(config, device=device, data=data, **given)
    task.start_epoch(1)
    tokens = torch.randint(1, data.tokenizer.vocab_size - 1, (pairs, length))
    tokens[:, -1] = data.tokenizer.vocab_size - 1  # the end, whose place is a text's feature
    images = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8)
    there = [x.to(device) for x in (images, tokens, torch.zeros((), dtype=torch.int64))]
    batch = CaptionBatch(there[0], there[1], torch.arange(pairs), there[2])
    task.batch, task.group_size = lambda epoch, step: batch, pairs  # type: ignore[method-assign]
    return task


def counted(call: Callable[[], object]) -> float:
    """Operations of a call, attention as the products that it is."""
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    torch.backends.mha.set_fastpath_enabled(True)
    return float(counter.get_total_flops())


def forward(task: Training, batch: CaptionBatch) -> None:
    """The teacher's."""
    with torch.no_grad():
        task.method.features(task.method.taught_by, to_float(batch.images), batch.tokens)


def flops(folder: Path) -> Row:
    """Of a distilled step, against a plain one and the teacher's forward."""
    cpu = torch.device("cpu")
    plain, taught = made("baseline", folder, cpu), made("gkl", folder, cpu)
    for task in (plain, taught):
        task.start_epoch(1)
    teacher = counted(lambda: forward(taught, taught.batch(1, 0)))
    alone, both = (counted(lambda task=task: task.train_step(1, 0)) for task in (plain, taught))
    return Row(
        "operations of a distilled step / a plain one and the teacher's forward",
        [both / (alone + teacher)],
        at_most=1.02,
    )


def kept(network: Clip, pairs: int) -> int:
    """Bytes that autograd keeps of so many pairs in bfloat16, beside the parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    held: dict[int, tuple[int, object]] = {}  # the storages too, so that none is freed and its place taken

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    x, tokens = torch.rand(pairs, 3, 224, 224), torch.ones(pairs, 77, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        _ = network(x, tokens)
    return sum(size for size, _ in held.values())


def memory() -> Row:
    """Gigabytes of one card."""
    student = clip("ViT-B-16")
    with torch.device("meta"):
        teacher = sum(p.numel() for p in clip("ViT-L-14").parameters())
    two, four = kept(student, 2), kept(student, 4)
    each, once = (four - two) / 2, 2 * two - four  # once: the weights in bfloat16
    numbers = sum(p.numel() for p in student.parameters())
    parts = {
        "student, gradients, Adam": 16 * numbers,
        "teacher in float32 and bfloat16": 6 * teacher,
        "weights in bfloat16": once,
        f"activations of {PART} pairs": PART * each,
        "similarities, their losses and gradients": 4 * 4 * 4 * PAIRS * PAIRS // CARDS,
        "pictures and features of all its pairs": PAIRS // CARDS * (3 * 224**2 * 5 + 4 * 2 * (2 * 512 + 768)),
    }
    row = Row(
        f"GB on each of {CARDS} cards, {PAIRS} pairs in parts of {PART}",
        [sum(parts.values()) / 1e9],
        at_most=24,
    )
    row.equal = (
        ", ".join(f"{name} {size / 1e9:.2g}" for name, size in parts.items())
        + f"; {each / 1e6:.0f} MB a pair"
    )
    return row


def timed(folder: Path, device: torch.device, rounds: int) -> list[Row]:
    """Steps of the small scale's networks on random pairs."""
    sizes = [
        "model.name=clip_64px_128",
        "data.context_length=32",
        "data.image_size=64",
        "augment.scale=[0.9,1.0]",
    ]
    small = {"plain": made("baseline", folder, device, *sizes)}
    for name, own in {"gkl": (), "kl": (), "gkl in four parts": ("accumulate=4",)}.items():
        small[name] = made(
            name.split()[0], folder, device, *sizes, "teacher.network.name=clip_64px_256", *own
        )
    steps: dict[str, Callable[[], object]] = {}
    for name, task in small.items():
        task.start_epoch(1)
        steps[name] = partial(task.train_step, 1, 0)
        batch = task.batch(1, 0)
        task.batch = lambda epoch, step, batch=batch: batch  # type: ignore[method-assign]
        task.group_size = 8
    steps["teacher"] = partial(forward, small["gkl"], small["gkl"].batch(1, 0))
    times = interleaved(steps, device, rounds)
    rows = []
    for name in ("gkl", "kl"):
        both = [a + b for a, b in zip(times["plain"], times["teacher"], strict=True)]
        ratio = [a / b for a, b in zip(times[name], both, strict=True)]
        rows.append(
            explained(
                Row(f"time of a step taught by {name} / a plain one and the teacher's forward", ratio),
                steps[name],
                device,
            )
        )
    parts = [a / b for a, b in zip(times["gkl in four parts"], times["gkl"], strict=True)]
    return [*rows, Row("time of a step in four parts / whole, gkl", parts)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    with TemporaryDirectory() as folder:
        rows = [flops(Path(folder)), memory(), *timed(Path(folder), device, arguments.rounds)]
    report(
        "clip", "Table VII: what a distilled step costs beside a plain one, and what it holds", rows, device
    )


if __name__ == "__main__":
    main()
