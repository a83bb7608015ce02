"""CIFAR-10 and CIFAR-100 from torchvision's files, verified by its checksums."""

import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from gkl.data.memory import ImageData


def cifar10(root: str, mirror: str | None = None, download: bool = True) -> ImageData:
    """CIFAR-10 from torchvision's files under root, fetched when missing. See `cifar100` for the arguments."""
    return _cifar(datasets.CIFAR10, "cifar10", root, mirror, download)


def cifar100(root: str, mirror: str | None = None, download: bool = True) -> ImageData:
    """CIFAR-100 from torchvision's files under root, fetched when missing.

    mirror: where to take the archive from instead of its home page: a URL or a local file or folder. Whatever comes
    from there must have torchvision's md5. download: False only looks at what is there.
    Raises FileNotFoundError when the files are missing and cannot be had, ValueError when they are damaged.
    """
    return _cifar(datasets.CIFAR100, "cifar100", root, mirror, download)


def _cifar(kind: type[Any], name: str, root: str, mirror: str | None, download: bool) -> ImageData:
    folder, archive = Path(root) / kind.base_folder, Path(root) / kind.filename
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    if not folder.is_dir():
        if not archive.exists():
            _fetch(kind, archive, mirror, download)
        if not check_integrity(str(archive), kind.tgz_md5):
            raise ValueError(f"{archive} is damaged (md5 is not {kind.tgz_md5}); delete it and start again")
        shutil.unpack_archive(archive, root, filter="data")
    for file, md5 in files:
        if not check_integrity(str(folder / file), md5):
            state = "is damaged" if (folder / file).exists() else "is missing"
            raise ValueError(f"{folder / file} {state} (md5 must be {md5}); delete {folder} and start again")
    parts = [
        kind(root, train=train, download=False) for train in (True, False)
    ]  # checks every md5 before it unpickles
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return ImageData(
        name, len(parts[0].classes), images[0], labels[0], images[1], labels[1], tuple(parts[0].classes)
    )


def _fetch(kind: type[Any], archive: Path, mirror: str | None, download: bool) -> None:
    source = mirror or kind.url
    local = Path(source.removeprefix("file://"))
    if local.is_dir():
        local = local / kind.filename
    help_line = (
        f"put {kind.filename} or the folder {kind.base_folder} into {archive.parent} (GKL_DATA or data.root=...), or name "
        "a copy with data.mirror=URL-or-path"
    )
    if not (download or mirror):
        raise FileNotFoundError(f"no {kind.__name__} in {archive.parent}; {help_line}")
    temporary = archive.with_suffix(".part")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        if local.is_file():
            shutil.copyfile(local, temporary)
        else:
            with urllib.request.urlopen(source, timeout=30) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
    except (OSError, ValueError, urllib.error.URLError) as error:
        temporary.unlink(missing_ok=True)
        raise FileNotFoundError(
            f"no {kind.__name__} in {archive.parent} and {source} cannot be read ({error}); {help_line}"
        ) from error
    if not check_integrity(str(temporary), kind.tgz_md5):
        temporary.unlink()
        raise ValueError(
            f"{source} is no byte-identical copy of {kind.filename} (md5 must be {kind.tgz_md5}); {help_line}"
        )
    temporary.rename(archive)
