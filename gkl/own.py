"""Which network of a person's own is meant: its name with the digest of its file or package, so that a run is known by the content.

name = named("net.py", "Net")           # Net@9f86d081884c7d65
keep("net.py", folder)                  # a copy, by its digest: what a run goes on with, whatever becomes of the file
make = maker(name, folder)              # the class or function Net of that file

A file is run only from the folder that `keep` puts it in, and only for a person who named it: `keep` notes its content in that person's
own folder, so that a folder of runs that came from elsewhere, frozen configurations and kept files and all, runs nothing. A package's
entry point (group `gkl.models`) is run only while the package is what it was, the settings beside its code included. Neither may import
or, while it makes a network, read further files that are not installed: two such files under one name would be one run.
"""

import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from gkl.atomic import atomically

GROUP = "gkl.models"  # of entry points
DIGITS = 16  # of a digest
KEPT = "gkl_own_"  # what a kept file's module is called


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
    """What makes the network of a whole name. Raises ValueError where it is neither kept nor installed, is not in its file, or
    imports files that its name says nothing of."""
    short, _, digest = name.rpartition("@")
    path = folder / f"{digest}.py"
    if path.is_file():
        with _imports_installed(short):
            return _guarded(_from_file(path, short, digest), short)
    found = _entry_point(short)
    if found and _package_digest(found) == digest:
        package = found.module.partition(".")[0]
        with _imports_installed(short, package):
            return _guarded(found.load(), short, package)
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
    key = f"{KEPT}{digest}"
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


def _guarded(make: Callable[..., Any], name: str, package: str = "") -> Callable[..., Any]:
    @wraps(make)
    def guarded(*args: Any, **options: Any) -> Any:
        with _imports_installed(name, package):
            return make(*args, **options)

    return guarded


@contextmanager
def _imports_installed(name: str, package: str = "") -> Iterator[None]:
    """Inside, what is imported is installed, or of the package, or this repository's own. Raises ValueError naming another file."""
    _listen()
    before, opened = set(sys.modules), list[str]()
    token = _OPENED.set(opened)
    try:
        yield
    finally:
        _OPENED.reset(token)
    known = ("gkl", "trainers", *([package] if package else []))
    new = sorted(set(sys.modules) - before)
    beside = {}
    for module in new:
        file = getattr(sys.modules[module], "__file__", None)
        if file and module.partition(".")[0] not in known and not module.startswith(KEPT):
            if not _is_installed(Path(file).resolve()):
                beside[module] = file
    if beside:
        for module in (m for m in new if m in beside or m.startswith(KEPT)):  # the next try finds them again
            del sys.modules[module]
        raise ValueError(
            f"the network {name} imports {next(iter(beside.values()))}, and a run would not be known by its content; put all of it into "
            "one file, or into a package with an entry point gkl.models"
        )
    home = importlib.util.find_spec(package) if package else None
    own_folders = [Path(place).resolve() for place in (home and home.submodule_search_locations) or ()]
    for file in opened:
        path = Path(file).resolve()
        inside = any(path.is_relative_to(folder) for folder in own_folders)
        if not inside and path.is_file() and not _is_installed(path) and not _is_passing(path):
            for module in (m for m in new if m.startswith(KEPT) or m.partition(".")[0] == package):
                del sys.modules[module]  # the next try reads it again
            raise ValueError(
                f"the network {name} reads {file}, and a run would not be known by its content; give what it says as model.options=..., "
                "weights as model.checkpoint=..., or put it into a package with an entry point gkl.models"
            )


_OPENED: ContextVar[list[str] | None] = ContextVar("opened", default=None)  # while a network is made


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: what is opened to be read, code apart."""
    if event == "open" and (opened := _OPENED.get()) is not None:
        file, mode, flags = arguments  # mode is None where os.open says how by flags
        writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else {*mode} & {*"wax"}
        if isinstance(file, str | bytes) and not writes:
            path = os.fsdecode(file)
            if not path.endswith((".py", ".pyc")):
                opened.append(path)


@cache
def _listen() -> None:
    """Once, and only where there is a person's network: each event of Python's comes by a hook."""
    sys.addaudithook(_note_opened)


def _is_passing(file: Path) -> bool:
    """Whether a system's file, a tool's settings at home, or in a cache of downloads (torch.hub, Hugging Face), known by their names."""
    caches = [os.environ[key] for key in ("TORCH_HOME", "HF_HOME", "XDG_CACHE_HOME") if os.environ.get(key)]
    places = [Path("/proc"), Path("/sys"), Path("/dev"), Path("/etc"), Path("/usr"), *map(Path, caches)]
    home = Path.home().resolve()
    hidden = file.is_relative_to(home) and file.relative_to(home).parts[0].startswith(".")
    return hidden or any(file.is_relative_to(place.resolve()) for place in places)


def _is_installed(file: Path) -> bool:
    """Whether Python's own, or one of a folder that pip installs into, this environment's or another's on the path."""
    places = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    places += [place for place in sys.path if any(Path(place).glob("*.dist-info"))]
    return bool({"site-packages", "dist-packages"} & {*file.parts}) or any(
        file.is_relative_to(Path(place).resolve()) for place in places
    )


def _entry_point(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)


def _package_digest(found: EntryPoint) -> str:
    """Of all that lies in the package, settings beside the code too; it is not imported for it."""
    spec = importlib.util.find_spec(found.module.partition(".")[0])
    if spec is None:
        raise ValueError(
            f"the package of the network {found.name}, {found.module}, is not there; install it again"
        )
    roots = [Path(place) for place in spec.submodule_search_locations or ()]
    files = [
        (str(f.relative_to(root)), f)
        for root in roots
        for f in sorted(root.rglob("*"))
        if _is_content(f, root)
    ]
    files = files or [("", Path(str(spec.origin)))]  # a module of one file
    digest = hashlib.sha256()
    for name, file in files:
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return digest.hexdigest()[:DIGITS]


def _is_content(file: Path, root: Path) -> bool:
    """Whether a file that a package may read: no bytecode, nothing hidden."""
    parts = file.relative_to(root).parts
    hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
    return not hidden and file.suffix != ".pyc" and file.is_file()
