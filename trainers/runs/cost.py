"""What a run costs: forward-equivalents of its recipe × FLOPs of one forward of its network / the rate that a device sustains.

    needed_flops(config, SIZES["cifar100"]) / measured_rate(records, machine, "paper", "at").flops_an_hour

The rate is the median over the runs recorded on the same kind of device, at the same scale, of the same kind of training, and says
how far these runs lie from what it would have foretold; without such records it is an assumption, and is called one.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from gkl.evaluation.chosen import LIST_LENGTH
from trainers.runs.records import Record
from trainers.runs.targets import instantiate, locate


class Size(NamedTuple):
    """Of a data set: images, pixels a side, classes."""

    train: int
    test: int
    side: int
    classes: int


# Sizes that cannot be looked up without the data, by name of the data function.
SIZES = {
    "ade20k": Size(20_210, 2_000, 473, 150),
    "cifar10": Size(50_000, 10_000, 32, 10),
    "cifar100": Size(50_000, 10_000, 32, 100),
    "cifar100_few": Size(50_000, 10_000, 32, 100),
    "datacomp": Size(15_000_000, 50_000, 224, 1000),
    "digits": Size(1_437, 360, 8, 10),
    "digits_captions": Size(1_437, 180, 8, 10),
    "digit_questions": Size(2_874, 2_400, 8, 0),
    "digit_texts": Size(5_600, 0, 8, 0),
    "digits_few": Size(1_437, 360, 8, 10),
    "digits_mosaics": Size(800, 100, 65, 10),
    "digits_files": Size(514, 360, 32, 10),
    "imagenet": Size(1_281_167, 50_000, 224, 1000),
    "imagenet_lt": Size(115_846, 50_000, 224, 1000),
    "llava_data": Size(1_223_426, 35_500, 224, 0),
    "imagenet_zero_shot": Size(0, 50_000, 224, 1000),
    "tiny_imagenet_captions": Size(100_000, 10_000, 64, 200),
}
# Per attacked test image, in forward passes: what AutoAttack takes to prove a survivor, and the share that survives.
AUTOATTACK_FORWARDS, SURVIVORS = 9755, 0.35


@dataclass(frozen=True)
class Rate:
    """What one device sustains, and where that comes from. factor: half of the recorded runs took within it of the forecast."""

    tflops: float
    machine: str | None = None
    what: str = ""
    runs: int = 0
    factor: float = 1.0

    @property
    def flops_an_hour(self) -> float:
        """Floating-point operations in an hour."""
        return self.tflops * 3600e12

    def __str__(self) -> str:
        if self.runs:
            return (
                f"at {self.tflops:.2g} TFLOP/s, the median of {self.runs} recorded runs ({self.what}) on {self.machine}; half of them "
                f"took within a factor {self.factor:.2f} of what it says"
            )
        return f"at {self.tflops:g} TFLOP/s sustained" + (f" by {self.machine}" if self.machine else "")


ASSUMED = Rate(10.0, "a 3090-class card, an assumption (tflops=... for yours)")


class Uncounted(Exception):
    """A network cannot be made here, or not computed without weights: other people's code may be anything."""


def measured_rate(records: Sequence[Record], machine: str, scale: str, task: str) -> Rate | None:
    """The rate of such runs on such a device. task: at, kd. None where fewer than three were recorded."""
    achieved = []
    for record in records:
        if (record["hardware"]["name"], record["scale"], record["experiment"].split("/")[0]) == (
            machine,
            scale,
            task,
        ):
            device_seconds = record["cost"]["seconds"] * record["hardware"]["count"]
            with suppress(Uncounted):  # of a person's own, whose file is not known from a record
                achieved.append(needed_flops(record["config"], recorded_size(record)) / device_seconds / 1e12)
    if len(achieved) < 3:
        return None
    median = statistics.median(achieved)
    factor = math.exp(statistics.median(abs(math.log(rate / median)) for rate in achieved))
    return Rate(median, machine, f"{task}, scale {scale}", len(achieved), factor)


def recorded_size(record: Record) -> Size:
    """The size of the data a record's run was trained on."""
    data = record["config"]["data"]
    known = SIZES.get(data["_target_"].rpartition("/")[2], SIZES["cifar10"])
    return Size(
        record["data"]["train"], record["data"]["test"], data.get("image_size") or known.side, known.classes
    )


def needed_flops(
    config: Mapping[str, Any],
    size: Size,
    *,
    trained: bool = False,
    recorded: bool = False,
    further_attacks: int = 0,
) -> float:
    """FLOPs of what is missing of a run: what its method's `forwards` counts for each image and epoch, the selection and the clean
    accuracy after each, unless it is trained; AutoAttack for the record, unless it is there; and as often as an assessment asks.

    Raises Uncounted.
    """
    autoattack = 0.0
    if config.get("evaluation"):
        images = config["evaluation"]["images"] or size.test
        attacked = LIST_LENGTH if images == "robustbench" else images
        autoattack = attacked * SURVIVORS * AUTOATTACK_FORWARDS
    forwards = {"model": autoattack * (further_attacks + (not recorded))}
    counted = config["data"].get("steps_per_epoch") if config.get("consistency") else None
    phases = 2 if "caption_epochs" in config["data"] else 1  # of LLaVA's: an epoch has the texts of one
    drawn = config["data"].get("samples") or size.train / phases
    shown = counted * config["batch_size"] if counted else drawn  # pictures of an epoch
    if not trained:
        epochs = config["epochs"]
        attack = instantiate(config["attack"]) if config.get("attack") else None
        count = locate(config["method"]["_target_"]).forwards  # type: ignore[attr-defined]
        chosen = 0.0
        if selection := config.get("selection"):
            images = size.test if selection["images"] == "test" else size.train * config["held_out"]
            chosen = images * (2 * selection["steps"] + 1)
        for epoch in range(1, epochs + 1):
            steps = attack.budget(epoch, epochs)["steps"] if attack else 0
            for network, each in count(config, epoch, steps).items():
                forwards[network] = forwards.get(network, 0.0) + shown * each
        forwards["model"] += epochs * (size.test + chosen)
    return sum(
        n * forward_flops(_at(config, network), size.side, size.classes) for network, n in forwards.items()
    )


def forward_flops(network: Mapping[str, Any], side: int, num_classes: int) -> float:
    """FLOPs (two per multiply-add) of one image's forward pass, counted on the network itself without computing it."""
    return _flops(json.dumps(network, sort_keys=True), side, num_classes)


@cache
def _flops(text: str, side: int, num_classes: int) -> float:
    model: Any = _network(text, num_classes)
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # counts for nothing, and takes two thirds of the counting
            module.forward = _unchanged  # type: ignore[method-assign]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        side = getattr(model, "image_size", side)  # CLIP's have one size that they take
        given = (
            model.example_inputs() if hasattr(model, "example_inputs") else (torch.empty(1, 3, side, side),)
        )
        try:
            model(*given)
        except Exception as error:
            raise Uncounted(str(error)) from error
    return float(counter.get_total_flops())


def _unchanged(input: Tensor) -> Tensor:
    return input


@cache
def _network(text: str, num_classes: int) -> nn.Module:
    """A network without weights; text: its node as JSON. Raises Uncounted."""
    left_out = ("_partial_", "checkpoint", "checkpoint_key", "checkpoint_sha256")
    node = {key: value for key, value in json.loads(text).items() if key not in left_out}
    try:
        with torch.device("meta"):
            return cast(nn.Module, instantiate(node, num_classes=num_classes).eval())
    except Exception as error:
        raise Uncounted(str(error)) from error


def _at(config: Mapping[str, Any], dotted: str) -> Any:
    """The entry of a configuration that a dotted name leads to."""
    for key in dotted.split("."):
        config = config[key]
    return config


def disk_bytes(config: Mapping[str, Any]) -> float:
    """Rough size of a run's folder: two checkpoints (weights, momentum, averages) and the exported weights. Raises Uncounted."""
    size = SIZES.get(config["data"]["_target_"].rpartition("/")[2], SIZES["cifar10"])
    model = _network(json.dumps(config["model"], sort_keys=True), size.classes)
    networks = 1 + len(config["averages"])
    kept = sum(value.numel() for value in model.state_dict().values())  # what is frozen, LLaVA leaves out
    return 4.0 * kept * (2 * (networks + 1) + networks)
