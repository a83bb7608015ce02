"""Where a teacher, or what a run begins with, comes from."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from trainers.errors import ConfigError


class Source(Protocol):
    """Where a teacher comes from. cache: folder for its logits on each view of each picture, None: they are computed in every step."""

    @property
    def cache(self) -> str | None:
        """See above."""

    def load(self, num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
        """The network with its weights, and what a record says of it, their sha256 among it."""


def check_same_teacher(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError where a checkpoint was trained with another teacher. before, now: what records say of them."""
    other = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if other:
        raise ConfigError(
            f"this run was started with another teacher ({', '.join(f'teacher.{key}' for key in other)} differs); bring that one "
            "back, or move the run's folder away to start anew"
        )
