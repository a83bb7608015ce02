"""A run is known by its pictures and not by where they lie."""

import os
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gkl.data.content import content, listing
from gkl.data.image_folder import image_files, image_folder
from gkl.data.imagenet import imagenet
from gkl.data.imagenet_lt import imagenet_lt
from trainers.errors import ConfigError
from trainers.runs.compose import compose, usual
from trainers.runs.identity import asked, config_hash, differences


def pictures(folder: Path, shade: int = 0) -> Path:
    """Two classes of two pictures each, in BMP: as many bytes whatever they show."""
    for number in range(8):
        part, label = ("train", "test")[number % 2], "ab"[number // 4]
        path = folder / part / label / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.full((4, 4, 3), 10 * number + shade, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


def packed(folder: Path, archive: Path, top: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*.bmp")):
            file.write(path, Path(top) / path.relative_to(folder))
    return archive


def test_content_is_of_files_wherever_they_lie(tmp_path: Path) -> None:
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other", shade=1)
    copy = Path(shutil.copytree(one, tmp_path / "elsewhere" / "copy"))
    found = content(one)
    assert (
        found
        == content(copy)
        == content(packed(one, tmp_path / "a.zip"))
        == content(packed(one, tmp_path / "b.zip", "top"))
    )
    assert content(other) != found and content(tmp_path / "nothing") is None
    (copy / "train" / "a" / "0.bmp").rename(copy / "train" / "b" / "0.bmp")
    assert content(copy) != found


def test_a_picture_overwritten_in_place_at_its_old_time_is_another(tmp_path: Path) -> None:
    """Its folder's note was once believed, and a run of other pictures was done already."""
    folder, kept = pictures(tmp_path / "one"), tmp_path / "digests"
    before = content(folder, kept)
    path = next(p for p in folder.rglob("*") if p.is_file())
    found, held = path.stat(), path.read_bytes()
    with open(path, "r+b") as file:
        file.write(bytes([held[0] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_ino == found.st_ino and content(folder, kept) == content(folder) != before


def test_a_note_of_unchanged_files_is_used_and_of_changed_ones_is_not(tmp_path: Path) -> None:
    folder, kept = pictures(tmp_path / "one"), tmp_path / "digests"
    found = content(folder, kept)
    (note,) = kept.iterdir()
    assert note.read_text() == found == content(folder, kept)
    note.write_text("0123456789abcdef")
    assert content(folder, kept) == "0123456789abcdef"  # so it is read
    file = folder / "train" / "a" / "0.bmp"
    before = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert content(folder, kept) not in (found, "0123456789abcdef")
    note.write_text("cut")
    assert len(content(folder, kept) or "") == 16


def test_two_folders_are_two_runs_and_a_copy_is_the_same(tmp_path: Path) -> None:
    """Once both were one run: the second said it was done, and showed the first's numbers."""
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other", shade=1)
    copy = Path(shutil.copytree(one, tmp_path / "copy"))

    def run(root: Path, data: str = "image_folder") -> str:
        return config_hash(
            compose("train", ["experiment=at/c100_basic_gkl", f"data={data}", f"data.root={root}"])
        )

    for data in ("image_folder", "image_files", "tiny_imagenet", "tiny_imagenet_files"):
        assert run(one, data) == run(copy, data) != run(other, data)


def test_files_that_cannot_be_read_end_a_composition_in_a_line(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "one")
    odd = folder / "train/a/odd.bmp"
    for make, message in (
        (
            lambda: odd.symlink_to("/nowhere"),
            r"odd\.bmp cannot be read \(No such file or directory\); bring it back or remove it",
        ),
        (lambda: os.mkfifo(odd), r"odd\.bmp is no regular file; remove it"),
        (lambda: odd.symlink_to(folder), r"odd\.bmp is a link to a folder that it lies in; remove it"),
    ):
        make()
        with pytest.raises(ConfigError, match=rf"^{folder}/train/a/{message} \(found for data\.content\)$"):
            compose("train", ["experiment=at/c100_basic_gkl", "data=image_folder", f"data.root={folder}"])
        odd.unlink()


def test_names_that_are_no_text_count_too(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "one")
    before = content(folder)
    with open(os.fsencode(folder / "train/a") + b"/\xff.bmp", "wb") as file:
        file.write((folder / "train/a/0.bmp").read_bytes())
    assert content(folder) != before and len(content(folder, tmp_path / "kept") or "") == 16
    assert len(image_folder(str(folder), 4).train_labels) == 5
    files = image_files(str(folder), 4, 4)
    assert len(files.sha256) == 64 and files.train.read(2, "pillow").size == (4, 4)  # type: ignore[union-attr, operator]


def test_pictures_that_changed_since_the_start_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "one")
    frozen = content(folder)
    assert len(image_folder(str(folder), 4, content=frozen).train_labels) == 4
    pictures(folder, shade=1)
    with pytest.raises(
        ValueError, match=r"the pictures at .*one have changed since this run was started \(content"
    ):
        image_folder(str(folder), 4, content=frozen)


@pytest.mark.parametrize("name, separator", [("pairs.tsv", "\t"), ("pairs.csv", ","), ("pairs.csv", ";")])
def test_a_table_is_known_by_the_pictures_that_it_names(name: str, separator: str, tmp_path: Path) -> None:
    """Once two folders of other pictures were one, where the same table lay beside them."""
    found = []
    for place, shade in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / place
        (folder / "all").mkdir(parents=True)
        Image.new("RGB", (4, 4), (shade,) * 3).save(folder / "all/0.png")
        (folder / name).write_text(separator.join(["filepath", "title\nall/0.png", 'a "sign", of 4"\n']))
        (folder / "beside.bin").write_bytes(bytes([len(found)]))  # not named
        found.append([content(folder / name), content(folder / name, tmp_path / "kept")])
    assert found[0] == found[1] and found[0] != found[2]
    assert all(one == other for one, other in found)


# --- too many to be read --------------------------------------------------------------------------------------------------


def test_a_listing_is_of_names_and_sizes_wherever_they_lie(tmp_path: Path) -> None:
    one = pictures(tmp_path / "one")
    found = listing(one)
    (one / "README.md").write_text("what these are")
    (one / ".hidden.bmp").write_bytes(b"none")
    os.utime(one / "train/a/0.bmp", ns=(10**18, 10**18))
    copy = Path(shutil.copytree(one, tmp_path / "elsewhere/copy"))
    assert found == listing(one) == listing(copy)
    assert (
        found == listing(packed(one, tmp_path / "a.zip")) == listing(packed(one, tmp_path / "b.zip", "top"))
    )
    assert found == listing(pictures(tmp_path / "other", shade=1))  # of equal sizes: that is all it says
    (copy / "train/a/0.bmp").rename(copy / "train/b/0.bmp")
    assert listing(copy) != found
    (one / "train/a/0.bmp").write_bytes(b"of another size")
    assert listing(one) != found
    (tmp_path / "damaged.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    assert [listing(tmp_path / name) for name in ("nothing", "damaged.zip", "empty")] == [None] * 3


@pytest.mark.parametrize("data", ["imagenet", "imagenet_strong", "imagenet_lt"])
def test_two_imagenets_are_two_runs_and_none_is_as_ever(data: str, tmp_path: Path) -> None:
    """Once whatever lay at data.root was one run."""
    one, other = pictures(tmp_path / "one"), pictures(tmp_path / "other")
    (other / "train/a/0.bmp").write_bytes(b"of another size")
    copy = Path(shutil.copytree(one, tmp_path / "copy"))

    def composed(root: Path, *more: str) -> dict[str, Any]:
        words = ["experiment=kd/in_vanilla", "model=resnet18", f"data={data}", f"data.root={root}", *more]
        return compose("train", words)

    assert config_hash(composed(one)) == config_hash(composed(copy)) != config_hash(composed(other))
    none = composed(tmp_path / "nothing")
    assert none["data"]["content"] is None and config_hash(none) != config_hash(composed(one))
    del none["data"]["content"]  # of a configuration from before there was the setting
    assert config_hash(none) == config_hash(composed(one, "data.content=null"))


def test_the_lists_of_imagenet_lt_count_by_content_and_not_by_place(tmp_path: Path) -> None:
    """Once a run was another where GKL_DATA was, and the same whatever its lists said."""
    for place, text in (("a", "one 1"), ("b", "one 1"), ("c", "two 1")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "ImageNet_LT_train.txt").write_text(text)

    def hashed(*more: str) -> str:
        words = ["experiment=kd/lt_gkl/resnext101_resnet18", f"data.root={tmp_path}/nothing", *more]
        return config_hash(compose("train", words))

    a, b, c = (hashed(f"data.lists={tmp_path / place}") for place in "abc")
    assert a == b != c
    before = "4fc98497739a"  # when lists had no content
    assert (
        hashed("data.lists=nowhere")
        == hashed("data.lists=data/ImageNet_LT", "data.lists_content=null")
        == before
    )
    assert asked([f"data.lists={tmp_path}", "data.root=b"]) == ["data.lists=PATH", "data.root=PATH"]


@pytest.mark.parametrize("data", ["imagenet", "imagenet_lt"])
def test_an_imagenet_that_changed_since_the_start_is_refused(data: str, tmp_path: Path) -> None:
    one, lists = pictures(tmp_path / "one"), tmp_path / "lists"
    lists.mkdir()
    (lists / "ImageNet_LT_train.txt").write_text("train/a/0.bmp 0\n")
    made = {"imagenet": imagenet, "imagenet_lt": partial(imagenet_lt, lists=str(lists))}[data]
    known = listing(one)
    with pytest.raises(ValueError, match="is not the whole of ImageNet|is not the published list"):
        made(str(one), content=known)  # looked at, and gone on from
    (one / "train/a/0.bmp").unlink()
    if data == "imagenet":
        with pytest.raises(
            ValueError, match=rf"^the pictures at {one} have changed since this run was started \(content"
        ):
            made(str(one), content=known)
    else:
        with pytest.raises(
            ValueError, match=rf"^the lists at {lists} have changed since this run was started \(content"
        ):
            made(str(one), content=known, lists_content="0123456789abcdef")


def test_the_paper_s_data_at_another_place_is_no_departure(tmp_path: Path) -> None:
    """A table would show its runs in a section of their own."""
    root = pictures(tmp_path / "one")
    words = ["experiment=kd/lt_vanilla/imagenet_resnet_18", f"data.root={root}"]
    there = compose("train", words)
    assert there["data"]["content"] and differences(usual(there), there) == {}
    other = compose("train", [*words, "data=image_files", "data.image_size=16", "data.resize=16"])
    assert differences(usual(other), other)["data.content"] == [None, other["data"]["content"]]
