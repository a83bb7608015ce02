"""Which network of a person's own is meant: its name with the digest of its file or package, so that a run is known by the content.

name = named("net.py", "Net")           # Net@9f86d081884c7d65
keep("net.py", folder)                  # a copy, by its digest: what a run goes on with, whatever becomes of the file
make = maker(name, folder)              # the class or function Net of that file

A file is run only from the folder that `keep` puts it in, and only for a person who named it: `keep` notes its content in that person's
own folder, so that a folder of runs that came from elsewhere, frozen configurations and kept files and all, runs nothing. A package's
entry point (group `gkl.models`) is run only while the package is what it was.
"""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from gkl.atomic import atomically

GROUP = "gkl.models"  # of entry points
DIGITS = 16  # of a digest


def named(file: str | Path, name: str) -> str:
    """A network's name that says its content, too. Raises ValueError for no such file."""
    return f"{name}@{_digest(_read(file))}"


def keep(file: str | Path, folder: Path) -> None:
    """Copy a file to where `own` finds it, and note that this person has named it. Raises ValueError where neither can be written."""
    content = _read(file)
    path = folder / f"{_digest(content)}.py"
    if not path.is_file():
        with atomically(path) as temporary:
            temporary.write_bytes(content)
    note = _note(content)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError as error:
        raise ValueError(
            f"cannot note in {note.parent} that you named {file} ({error.strerror}); choose a folder of yours: XDG_STATE_HOME=..."
        ) from error


def _note(content: bytes) -> Path:
    """Where it is noted that a file of this content was named."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "gkl" / "networks" / hashlib.sha256(content).hexdigest()


def installed(name: str) -> str | None:
    """The whole name of an installed package's network, None where no package has one of that name."""
    found = _entry_point(name)
    return f"{name}@{_package_digest(found)}" if found else None


def maker(name: str, folder: Path) -> Callable[..., Any]:
    """What makes the network of a whole name. Raises ValueError where it is neither kept nor installed, or is not in its file."""
    short, _, digest = name.rpartition("@")
    path = folder / f"{digest}.py"
    if path.is_file():
        return _from_file(path, short, digest)
    found = _entry_point(short)
    if found and _package_digest(found) == digest:
        made: Callable[..., Any] = found.load()
        return made
    changed = (
        f"the package of {short} has changed since" if found else f"no network {name} is kept in {folder}"
    )
    raise ValueError(f"{changed}; name it on the command line, model=FILE.py:{short or 'NAME'}")


def _read(file: str | Path) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(
            f"no network's file {file} ({error.strerror}); name it as model=FILE.py:NAME"
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def _from_file(path: Path, name: str, digest: str) -> Callable[..., Any]:
    """What a kept file calls by this name. Raises ValueError."""
    content = path.read_bytes()
    if _digest(content) != digest:
        raise ValueError(f"the kept network {path} was changed; name its file on the command line again")
    if not _note(content).is_file():
        raise ValueError(
            f"the network {name} has not been named by you, and is not run; if you trust it, name it on the command line: model={path}:{name}"
        )
    key = f"gkl_own_{digest}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            exec(
                compile(content, str(path), "exec"), module.__dict__
            )  # what was looked at, and no bytecode beside it
        except Exception as error:
            del sys.modules[key]
            hint = (
                "; a network of several files is a package with an entry point gkl.models"
                if isinstance(error, ImportError)
                else ""
            )
            raise ValueError(
                f"the file of {name} cannot be run: {type(error).__name__}: {error}{hint}"
            ) from error
    made: Callable[..., Any] | None = getattr(sys.modules[key], name, None)
    if not callable(made):
        raise ValueError(
            f"the file of the network has no class or function {name!r}; name it as model=FILE.py:NAME"
        )
    return made


def _entry_point(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)


def _package_digest(found: EntryPoint) -> str:
    """Of the source of the package, which is not imported for it."""
    spec = importlib.util.find_spec(found.module.partition(".")[0])
    if spec is None:
        raise ValueError(
            f"the package of the network {found.name}, {found.module}, is not there; install it again"
        )
    roots = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [(str(f.relative_to(root)), f) for root in roots for f in sorted(root.rglob("*.py"))]
    files = files or [("", Path(str(spec.origin)))]  # a module of one file
    contents = [(name, file.read_bytes()) for name, file in files]
    return _digest(b"".join(f"{name}\0{len(content)}\0".encode() + content for name, content in contents))
