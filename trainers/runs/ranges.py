"""What every number of a configuration may be, by its name: checked before anything starts.

A number that stands in configs/ has its range here; one of a person's own must at least be finite.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from trainers.errors import ConfigError


class Range(NamedTuple):
    """From low to high; open: neither may be reached itself, low_open, high_open: that one."""

    low: float
    high: float
    low_open: bool = False
    high_open: bool = False
    hint: str = ""

    def holds(self, value: float) -> bool:
        """Whether a value lies in it."""
        low = self.low < value if self.low_open else self.low <= value
        return low and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.low_open else 'at least'} {self.low:g}"
        return (
            f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"
        )


COUNT, FROM_ZERO, ABOVE_ZERO = Range(1, math.inf), Range(0, math.inf), Range(0, math.inf, low_open=True)
SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, high_open=True)
PIXELS = Range(0, 1, low_open=True, hint="; pixels are in [0, 1]: 8 levels of 255 are '${px:8}', 0.0314")
WORKERS = Range(0, 512)  # processes; more than any machine has cores for
SEED = Range(0, 2**18)  # the generators' seeds are this one's bits, the epoch's and the step's
ANY = Range(-math.inf, math.inf)

RANGES: dict[str, Range] = {
    **dict.fromkeys(
        ("batch_size", "bn_groups", "devices", "accumulate", "steps", "step_sizes", "epsilons", "interval", "repeats",
         "image_size", "images", "largest", "smallest", "classes", "train_per_class", "test_per_class", "of", "drops",
         "awp_start_epoch", "dim", "negatives", "kernel_size", "max_width", "nodes", "array", "cpus_per_device", "perplexity",
         "eighths", "resize", "restarts", "labels", "steps_per_epoch", "unlabelled",
         "samples", "lanes", "long_side", "train_pages", "test_pages", "shuffle", "context_length", "rank", "cards", "longest_answer",
         "caption_epochs", "told_epochs", "caption_batch_size", "patch_size"), COUNT),
    **dict.fromkeys(
        ("epochs", "alpha", "beta", "gamma", "weight", "angle_weight", "distance_weight", "inter", "intra", "js_weight", "label_weight",
         "view_weights", "weight_decay", "warmup", "padding", "layer", "offset", "length", "awp_gamma", "mixup", "cutmix", "start", "start_epoch", "operations",
         "end", "peak", "factor", "first", "start_std", "noise", "many", "few", "gpus", "requeues", "warning_seconds", "patience",
         "checkpoint_minutes", "wait_minutes", "aux_weight", "divergence_weight", "centres_weight", "align_weight", "power"), FROM_ZERO),
    **dict.fromkeys(
        ("lr", "temperature", "prior_temperature", "weights_temperature", "clip_gradient", "ratio", "minutes", "memory_gb",
         "step_size", "heads", "sharpness", "transform_lr", "projector_lr", "zoom"), ABOVE_ZERO),
    **dict.fromkeys(("flip", "label_smoothing", "smoothing", "rise", "confidence", "hidden", "blur"), SHARE),
    **dict.fromkeys(("held_out", "generated_share", "momentum", "decay", "dropout"), BELOW_ONE),
    **dict.fromkeys(("class_share", "scale", "layer_decay"), Range(0, 1, low_open=True)),
    **dict.fromkeys(("robust_reward", "clean_reward", "mean"), ANY),
    "epsilon": PIXELS,
    "seed": SEED,
    "workers": WORKERS,
    "rotation": Range(0, 180),
}  # fmt: skip
FREE = ("timm_options", "extra")  # what others check


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the first number out of its range."""
    for where, value in numbers(config):
        name = next(part for part in reversed(where.split(".")) if not part.isdigit())
        wanted = RANGES.get(name, ANY)
        if (
            name == "epsilon" and _section(config, where).get("norm") == "l2"
        ):  # a length, of all pixels together
            wanted = ABOVE_ZERO
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be a finite number, got {value}")
        if not wanted.holds(value):
            raise ConfigError(f"{where} must be {wanted}, got {value:g}{wanted.hint}")


def _section(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What a setting lies in, as far as that is settings by name."""
    node: Any = config
    for part in where.split(".")[:-1]:
        node = node.get(part, {}) if isinstance(node, Mapping) else {}
    return node if isinstance(node, Mapping) else {}


def numbers(node: Any, where: str = "") -> list[tuple[str, float]]:
    """Every number of a configuration with its dotted name."""
    if isinstance(node, bool) or node is None or isinstance(node, str):
        return []
    if isinstance(node, int | float):
        return [(where, node)]
    named = node.items() if isinstance(node, Mapping) else enumerate(node)
    return [
        found
        for key, child in named
        if key not in FREE
        for found in numbers(child, f"{where}.{key}".lstrip("."))
    ]
