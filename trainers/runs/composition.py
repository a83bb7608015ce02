"""Hydra's composition of configs/, with what compositions have in common done once.

    config, chosen = composition(CONFIGS, "train", ["experiment=at/c100_basic_gkl", "scale=smoke", "loss.gamma=0.3"])

The steps and their functions are those of hydra.compose, which alone would read every file again for each composition and merge
the settings of Hydra's launchers, logging and help into it, which nothing here asks for: half a minute for the runs of a table.
"""

import copy
import os
import pickle
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import hydra
import omegaconf.base
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from trainers.errors import ConfigError

# Every composition asks for the same interpolations, and to read one takes ANTLR milliseconds; what it comes to is never changed.
omegaconf.base.parse = cache(omegaconf.base.parse)  # type: ignore[attr-defined]

Choices = dict[str, Any]  # group -> what is chosen of it
Times = dict[Path, int]  # file -> when it was written
ROWS = "pair"  # a group of plain values that no other file changes: put in last, its choices share all that comes before


class Files(CachingConfigRepository):
    """The files of a folder, each read once, and again when it has changed."""

    def __init__(self, folder: Path) -> None:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            loader = cast(ConfigLoaderImpl, GlobalHydra.instance().config_loader())
        super().__init__(loader.repository)
        self.folder = folder
        self.times = Times()
        self.merged: dict[tuple[str, ...], tuple[Times, bytes, Choices]] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        """A file's content, which is never changed."""
        path = self.path(config_path)
        if (time := _time(path)) != self.times.get(path):
            self.cache.pop(f"config_path={config_path}", None)
            self.times[path] = time
        return super().load_config(config_path)

    def path(self, config_path: str) -> Path:
        """Where a file lies."""
        return self.folder / f"{config_path}.yaml"


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


@cache
def _files(folder: Path) -> Files:
    return Files(folder)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def parsed(words: Sequence[str]) -> list[Override]:
    """Overrides by Hydra's grammar. Raises ConfigError naming the first that it cannot read."""
    return [copy.copy(_parsed(word)) for word in words]


@cache
def _parsed(word: str) -> Override:
    try:
        return _parser().parse_overrides([word])[0]
    except HydraException:
        raise ConfigError(_unread(word)) from None


def _unread(word: str) -> str:
    """Why Hydra's grammar cannot read an override, and what helps."""
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is no setting; write name=value, the whole in quotes if it has spaces"
    if any(value.count(opening) != value.count(closing) for opening, closing in ("[]", "{}", "()")):
        return f"cannot read {word!r}: a bracket is not closed; in a name that has one, quote it: '{key}=\"{value}\"'"
    if value.startswith("~"):
        return f"cannot read {word!r}: no shell spells out a ~ within a word; write {key}={os.path.expanduser(value)}"
    if value[:1] in "'\"" or '"' in value:
        return f"cannot read {word!r}: a quote is not closed, or something follows it"
    return f"cannot read {word!r}: quote a value with spaces, brackets or = in it: '{key}=\"{value}\"'"


def composition(folder: Path, entry: str, words: Sequence[str]) -> tuple[DictConfig, Choices]:
    """<folder>/<entry>.yaml with the overrides applied, interpolations as they stand, and each group's choice.

    Raises what Hydra and OmegaConf raise.
    """
    files = _files(folder)
    overrides = parsed(words)
    groups = [o for o in overrides if files.group_exists(o.key_or_group) and not isinstance(o.value(), dict)]
    row = _row(files, groups)
    config, chosen = _merged(files, entry, [o for o in groups if o is not row])
    if row is not None:
        loaded = files.load_config(f"{ROWS}/{row.value()}")
        assert loaded is not None
        config[ROWS], chosen[ROWS] = loaded.config, row.value()
    OmegaConf.set_struct(config, True)
    ConfigLoaderImpl._apply_overrides_to_config([o for o in overrides if o not in groups], config)
    return config, chosen


def _row(files: Files, groups: Sequence[Override]) -> Override | None:
    """The override that chooses one of ROWS that is there; any other that concerns ROWS is Hydra's to judge."""
    found = [o for o in groups if o.key_or_group == ROWS]
    if len(found) != 1 or found[0].input_line != f"{ROWS}={found[0].value()}":
        return None
    return found[0] if files.config_exists(f"{ROWS}/{found[0].value()}") else None


def _merged(files: Files, entry: str, groups: Sequence[Override]) -> tuple[DictConfig, Choices]:
    """What choices of groups come to, a copy: merged once for the same choices of unchanged files."""
    key = (entry, *(str(override.input_line) for override in groups))
    if key not in files.merged or any(_time(path) != time for path, time in files.merged[key][0].items()):
        found = create_defaults_list(files, entry, list(groups), prepend_hydra=False, skip_missing=False)
        made, times = OmegaConf.create(), Times()
        for default in found.defaults:
            path = str(default.config_path)
            loaded = files.load_config(path)
            assert loaded is not None
            made.merge_with(ConfigLoaderImpl._embed_result_config(loaded, default.package).config)
            times[files.path(path)] = files.times[files.path(path)]
        files.merged[key] = (times, pickle.dumps(made), found.overrides.known_choices)
    _, config, chosen = files.merged[key]
    return pickle.loads(config), dict(chosen)  # a fifth of the time of copy.deepcopy
