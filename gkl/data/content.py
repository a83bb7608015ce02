"""What pictures are, whatever their place: a digest of the files below a folder, of a zip archive, of tar shards, or of a table's.

    content("pictures.zip") == content("pictures/")        # the same files, packed and unpacked

Names count from where the files' common folder ends, contents by size and CRC-32, which an archive has written down; of pictures
too many to be read before each run `listing` takes names and sizes alone. What systems and editors leave among pictures (`hidden`) counts nowhere.
"""

import csv
import hashlib
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from gkl.atomic import atomically
from gkl.data.decoding import PICTURES
from gkl.lines import one_line

CHUNK = 1 << 20
TABLES = (".csv", ".tsv")
SEPARATORS = ",\t;|"
LEFT_BY_SYSTEMS = {
    "__macosx", "@eadir", "$recycle.bin", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
}  # fmt: skip


def hidden(name: str) -> bool:
    """Whether a file or a folder above it begins with a point or is what a system has put there: no picture, no class."""
    parts = name.split("/")
    return any((p.startswith(".") and p.strip(".")) or p.lower() in LEFT_BY_SYSTEMS for p in parts)


def in_bytes(name: str) -> bytes:
    """A file's name in UTF-8, also one of bytes that are none."""
    return name.encode(errors="surrogateescape")


def backslashed(archive: zipfile.ZipFile) -> bool:
    """Whether backslashes part its folders, as older .NET and PowerShell write them: there is no slash then in any name."""
    return not any("/" in name for name in archive.namelist())


def members(archive: zipfile.ZipFile) -> list[tuple[str, zipfile.ZipInfo]]:
    """What lies in an archive, folders too, each with its name, whose folders are parted by slashes and which end with one."""
    parted = backslashed(archive)
    return [(i.filename.replace("\\", "/") if parted else i.filename, i) for i in archive.infolist()]


def content(root: str | Path, kept: Path | None = None) -> str | None:
    """16 hexadecimal digits, None where there is nothing at root. Raises ValueError or OSError for files that cannot be read.

    kept: a folder in which the digest of a folder's files is written down, under their names, sizes, times and inodes, so
    that unchanged files are read once.
    """
    path = Path(root)
    if path.is_dir():
        return _of_folder(path, kept)
    if not path.is_file():
        return None
    if path.suffix.lower() in TABLES:
        return _of_files(path.parent, dict(sorted(_in_table(path))), kept)
    try:
        with zipfile.ZipFile(path) as archive:
            files = {n: (i.file_size, i.CRC) for n, i in members(archive) if not n.endswith("/")}
            return _digest({n: found for n, found in files.items() if not hidden(n)})
    except Exception:  # zipfile's own and others', of files that are no whole archives
        return _digest({path.name: (path.stat().st_size, _crc(path))})


def _of_folder(path: Path, kept: Path | None) -> str:
    return _of_files(path, dict(sorted(_below(path))), kept)


def _in_table(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """A table and every file that it names from its folder on, whatever tells its columns apart."""
    yield path.name, path.stat()
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    for separator in SEPARATORS:
        there = False
        with suppress(csv.Error):  # of what tells its columns apart otherwise
            for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator):
                for cell in row:
                    with suppress(OSError, ValueError):  # no name of a file
                        if cell and stat.S_ISREG((found := os.stat(path.parent / cell)).st_mode):
                            there = True
                            yield os.path.relpath(path.parent / cell, path.parent), found
        if there:
            return


def _of_files(path: Path, files: Mapping[str, os.stat_result], kept: Path | None) -> str:
    state = hashlib.sha256()
    for name, at in files.items():
        # The time of its last change, too, which nobody sets back: cp -p and rsync --inplace leave size, time and inode.
        times = f"{at.st_mtime_ns}\0{at.st_ctime_ns}"
        state.update(in_bytes(f"{name}\0{at.st_size}\0{times}\0{at.st_ino}\0{at.st_dev}\n"))
    note = kept / state.hexdigest()[:32] if kept else None
    if note is not None and note.is_file() and len(text := note.read_text(encoding="utf-8").strip()) == 16:
        return text
    found = _digest({name: (at.st_size, _crc(path / name)) for name, at in files.items()})
    if note is not None and os.access(
        note.parent.parent if not note.parent.exists() else note.parent, os.W_OK
    ):
        with atomically(note) as temporary:
            temporary.write_text(found, encoding="utf-8")
    return found


def walk(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `path` on, "" first, and the names of its files; nothing hidden. Links are followed.

    Raises OSError for a folder that cannot be read, ValueError for a link to a folder that it lies in.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, followlinks=True, onerror=refuse):
        folders[:] = [f for f in folders if not hidden(f)]
        for link in (os.path.join(folder, f) for f in folders if os.path.islink(os.path.join(folder, f))):
            if Path(folder).resolve().is_relative_to(Path(link).resolve()):
                raise ValueError(f"{one_line(link)} is a link to a folder that it lies in; remove it")
        at = os.path.relpath(folder, path)
        yield "" if at == "." else at, [name for name in names if not hidden(name)]


def _below(path: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file that is not hidden and not made by this package, by its path from `path` on."""
    for at, names in walk(path):
        for name in names:
            if name != "gkl-shards.npz":
                file = os.path.join(at, name)
                yield file, _state(os.path.join(path, file))


def _state(file: str) -> os.stat_result:
    try:
        found = os.stat(file)
    except OSError as error:
        raise ValueError(
            f"{one_line(file)} cannot be read ({error.strerror}); bring it back or remove it"
        ) from error
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        raise ValueError(f"{one_line(file)} is no regular file; remove it")
    return found


def _digest(files: dict[str, tuple[int, int]]) -> str:
    shared = os.path.commonpath([os.path.dirname(name) for name in files]) if files else ""
    lines = sorted(
        f"{os.path.relpath(name, shared or '.')}\0{size}\0{crc}" for name, (size, crc) in files.items()
    )
    return hashlib.sha256(in_bytes("\n".join(lines))).hexdigest()[:16]


def _crc(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def listing(*roots: str | Path) -> str | None:
    """16 hexadecimal digits of the names and sizes of the pictures and tars at each root, a folder or zip archive; None where one has none.

    For ImageNet and its like, whose 150 GB cannot be read before each run: a picture exchanged for another of as many bytes under its
    name is not told. A million sizes are looked up in a quarter of a minute on a local disk, so nothing is kept and read back.
    Raises ValueError or OSError for files that cannot be looked at.
    """
    if len(roots) > 1:
        each = [listing(root) for root in roots]
        return None if None in each else hashlib.sha256(" ".join(map(str, each)).encode()).hexdigest()[:16]
    path = Path(roots[0])
    if path.is_dir():
        names = [os.path.join(at, name) for at, names in walk(path) for name in names if _listed(name)]
        some = [names[first : first + 1000] for first in range(0, len(names), 1000)]
        with ThreadPoolExecutor(16) as pool:  # a disk in a network answers many at once
            sizes = [size for found in pool.map(lambda part: _sizes(path, part), some) for size in found]
    else:
        names, sizes = _packed(path)
    if not names:
        return None
    shared = os.path.commonpath({os.path.dirname(name) for name in names})
    start = len(shared) + 1 if shared else 0
    lines = sorted(f"{name[start:]}\0{size}" for name, size in zip(names, sizes, strict=True))
    return hashlib.sha256(in_bytes("\n".join(lines))).hexdigest()[:16]


def _listed(name: str) -> bool:
    return name.lower().endswith((*PICTURES, ".tar"))


def _packed(path: Path) -> tuple[list[str], list[int]]:
    """Names and sizes of an archive's pictures, none of what is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [i for i in archive.infolist() if _listed(i.filename) and not hidden(i.filename)]
    except Exception:  # zipfile's own and others'
        return [], []
    return [os.path.normpath(i.filename) for i in members], [i.file_size for i in members]


def _sizes(path: Path, names: Sequence[str]) -> list[int]:
    return [_state(os.path.join(path, name)).st_size for name in names]


def check_content(root: str, expected: str | None) -> None:
    """check_same of `content`."""
    check_same(f"the pictures at {root}", expected, lambda: content(root))


def check_same(what: str, expected: str | None, find: Callable[[], str | None]) -> None:
    """Raises ValueError where data are others than a configuration was made for, in one line. expected: None: any."""
    if expected is not None and (found := find()) != expected:
        raise ValueError(
            f"{what} have changed since this run was started (content {found}, was {expected}); bring those back, or start anew with the "
            "same command"
        )
