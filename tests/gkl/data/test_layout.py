"""Class folders as people have them: what is no picture is no class, what would be left out is refused by name, test/ alone is enough."""

import io
import os
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gkl.data.augment import Views
from gkl.data.content import content
from gkl.data.crops import ResizedCrop
from gkl.data.decoding import PICTURES, UNREAD
from gkl.data.files import ImageFiles, other_pictures
from gkl.data.image_folder import image_files, image_folder
from gkl.data.imagenet import imagenet
from gkl.data.memory import ImageData
from gkl.data.stores import PictureError, Shards, Zip, open_store
from gkl.distributed import Shard


def picture(shade: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes, two training pictures and one test picture each."""
    for part, count in (("train", 2), ("val", 1)):
        for number, name in enumerate(("cat", "dog")):
            for shade in range(count):
                put(tmp_path / f"pictures/{part}/{name}/{shade}.png", picture(100 * number + shade))
    return tmp_path / "pictures"


def put(path: Path, data: bytes = b"x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def zipped(root: Path, archive: Path) -> Path:
    """With its folders, as zip -r has them."""
    return Path(shutil.make_archive(str(archive), "zip", root.parent, root.name))


def backslashed(root: Path, archive: Path) -> Path:
    """As .NET before 4.6.1 and PowerShell's Compress-Archive write it."""
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted(root.rglob("*")):
            entry = zipfile.ZipInfo()
            entry.create_system, entry.filename = 0, "\\".join(file.relative_to(root.parent).parts)
            if file.is_dir():
                entry.filename += "\\"
            packed.writestr(entry, b"" if file.is_dir() else file.read_bytes())
    return archive


def sharded(root: Path, target: Path, **change: bytes) -> Path:
    """A shard for each part, labels by the order of classes. change: contents of further members by name, in the shard train.tar."""
    target.mkdir()
    for part in ("train", "val"):
        with tarfile.open(target / f"{part}.tar", "w") as tar:
            members = {}
            for file in sorted((root / part).rglob("*.png")):
                key = f"./{file.parent.name}_{file.stem}"
                members |= {
                    f"{key}.png": file.read_bytes(),
                    f"{key}.cls": str(int(file.parent.name == "dog")).encode(),
                }
            for name, data in (members | (change if part == "train" else {})).items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return target


def shades(data: ImageData | ImageFiles) -> tuple[list[int], list[int]]:
    if isinstance(data, ImageData):
        return [data.train_images[:, 0, 4, 4].tolist(), data.test_images[:, 0, 4, 4].tolist()]  # type: ignore[return-value]
    return [
        [int(np.asarray(part.read(n, "pillow"))[4, 4, 0]) for n in range(len(part.names))]
        for part in (data.train, data.test)
    ]  # type: ignore[return-value]


LEFT_BEHIND = (
    ".DS_Store", "Thumbs.db", "train/cat/._0.png", "train/cat/.DS_Store", "train/cat/Thumbs.db", "train/cat/desktop.ini",
    "train/cat/notes.txt", "train/cat/.ipynb_checkpoints/0-checkpoint.png", "train/.ipynb_checkpoints/0-checkpoint.png",
    "val/.hidden/0.png", "__MACOSX/train/cat/._0.png", "__MACOSX/pictures/val/dog/._0.png", "train/dog/@eaDir/0.png/THUMB.jpg",
    ".git/train/cow/0.png",
)  # fmt: skip


def test_an_archive_whose_folders_are_parted_by_backslashes_is_the_folder(root: Path, tmp_path: Path) -> None:
    put(root / "train/cat/.DS_Store")
    at = backslashed(root, tmp_path / "windows.zip")
    for data in (image_folder(str(at), 8), image_files(str(at), 8, 8)):
        assert data.class_names == ("cat", "dog") and shades(data) == [[0, 1, 100, 101], [0, 100]]
    assert content(at) == content(root)
    (root / "train/cow").mkdir()
    with pytest.raises(ValueError, match="cow"):
        image_folder(str(backslashed(root, tmp_path / "empty.zip")), 8)


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_systems_leave_among_pictures_is_no_picture_and_no_class(
    form: str, root: Path, tmp_path: Path
) -> None:
    plain = content(root)
    for name in LEFT_BEHIND:
        put(root / name)
    at = root if form == "folder" else zipped(root, tmp_path / "packed")
    for data in (image_folder(str(at), 8), image_files(str(at), 8, 8)):
        assert data.class_names == ("cat", "dog") and shades(data) == [[0, 1, 100, 101], [0, 100]]
    (root / "train/cat/notes.txt").unlink()  # the one of them that a person may have written
    at = root if form == "folder" else zipped(root, tmp_path / "packed")
    assert content(at) == plain, "nor does it make another data set"


def test_what_systems_leave_in_shards_is_no_picture(root: Path, tmp_path: Path) -> None:
    tars = sharded(
        root,
        tmp_path / "tars",
        **{"._cat_0.png": b"x", "__MACOSX/._cat_0.png": b"x", ".DS_Store": b"x", "cat_0.json": b"{}"},
    )
    shutil.copy(tars / "train.tar", tars / "._train.tar")
    assert shades(image_files(str(tars), 8, 8)) == [[0, 1, 100, 101], [0, 100]]


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "GIF", "WEBP"])
def test_every_ending_is_read_in_memory_and_in_files(kind: str, root: Path) -> None:
    ending = {"TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    for file in list((root / "train").rglob("*.png")):
        shade = int(np.asarray(Image.open(file))[0, 0, 0])
        file.with_suffix(ending.upper() if shade else ending).write_bytes(picture(shade, kind))
        file.unlink()
    memory, files = image_folder(str(root), 8), image_files(str(root), 8, 8)
    assert memory.train_labels.tolist() == files.train_labels.tolist() == [0, 0, 1, 1]
    views = torch.stack([torch.as_tensor(files.train.read(n, "torchvision")) for n in range(4)])  # type: ignore[arg-type]
    assert torch.equal(memory.train_images[:, 0].sort(0).values, views[:, 0].sort(0).values)


def in_train(name: str) -> Callable[[Path], object]:
    return lambda root: put(root / "train" / name, picture(0))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an ending that is not read": (in_train("cat/0.heic"), r"1 pictures in train/ have endings .* first is (pictures/)?train/cat/0\.heic; save"),
    "no ending": (in_train("cat/n02123045_7"), r"1 pictures in train/ have endings .*, or none, the first is (pictures/)?train/cat/n02123045_7; save"),
    "an ending of a download": (in_train("cat/0.jpg.1"), r"1 pictures in train/ have endings .* first is (pictures/)?train/cat/0\.jpg\.1; save"),
    "nested folders": (in_train("cat/tabby/0.png"), r"1 pictures lie deeper than train/<class>/, the first is \S*train/cat/tabby/0\.png; move"),
    "no class": (in_train("0.png"), r"1 pictures lie in train/ itself, the first is \S*train/0\.png; sort them into train/<class>/"),
    "an empty class": (lambda root: (root / "train/cow").mkdir(), "1 folders of train/ have no picture in them, the first is train/cow; remove"),
    "a class of other files": (lambda root: put(root / "val/cow/a.txt"), "1 folders of val/ have no picture in them, the first is val/cow"),
    "two roots": (lambda root: shutil.copytree(root / "train", root / "copy/train"), "has 2 folders train/, in .* and in .*copy; set data.root"),
    "no test pictures": (lambda root: shutil.rmtree(root / "val"), "needs pictures .* got none to test with"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "zip"])
@pytest.mark.parametrize("fault", REFUSED)
def test_what_would_be_left_out_is_refused_by_name(fault: str, form: str, root: Path, tmp_path: Path) -> None:
    harm, message = REFUSED[fault]
    put(root / "train/cat/notes.odt")  # no picture, and left alone
    harm(root)
    if form == "zip" and fault == "a class of other files":
        (root / "val/cow/.keep").touch()
    at = root if form == "folder" else zipped(root, tmp_path / "packed")
    for load in (image_folder, image_files):
        with pytest.raises(ValueError, match=message) as raised:
            load(str(at), 8)
        assert "\n" not in str(raised.value)


def test_every_format_that_pillow_knows_is_read_or_refused() -> None:
    """Once .ico, .pcx, .sgi and others were left out without a word."""
    Image.init()
    no_pictures = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib"}
    assert {*Image.registered_extensions()} - no_pictures <= {*PICTURES, *UNREAD}


@pytest.mark.parametrize("kind", ["ico", "pcx", "sgi", "dds"])
def test_a_picture_of_an_icon_or_a_scanner_is_refused(kind: str, root: Path) -> None:
    Image.new("RGB", (16, 16)).save(root / f"train/cat/9.{kind}")
    with pytest.raises(ValueError, match=rf"1 pictures in train/ have endings .* train/cat/9\.{kind}; save"):
        image_folder(str(root), 8)


def test_a_flat_val_of_imagenet_gets_the_line_that_says_how_to_sort_it(root: Path) -> None:
    shutil.rmtree(root / "val")
    for number in range(3):
        put(root / f"val/ILSVRC2012_val_{number:08d}.JPEG", picture(0, "JPEG"))
    message = r"3 pictures lie in val/ itself, the first is val/ILSVRC2012_val_00000000\.JPEG; sort them into val/<class>/ .*valprep\.sh"
    for load in (image_files, image_folder):
        with pytest.raises(ValueError, match=message):
            load(str(root), 8)
    with pytest.raises(ValueError, match=message):
        imagenet(str(root))
    put(root / "test/ILSVRC2012_test_00000000.JPEG", picture(0, "JPEG"))
    with pytest.raises(ValueError, match=message):
        imagenet(str(root))


def test_imagenet_s_own_test_pictures_stay_aside(root: Path) -> None:
    put(root / "test/ILSVRC2012_test_00000000.JPEG", picture(0, "JPEG"))
    data = image_files(str(root), 8, 8)
    assert len(data.test_labels) == 2
    assert data.noticed == f"{root} is tested with val/; the 1 pictures of test/ are left out"


@pytest.mark.parametrize("load", [lambda root: image_folder(root, 8), lambda root: image_files(root, 8, 8)])
def test_of_test_and_val_one_is_taken_and_the_other_named(
    load: Callable[[str], ImageData | ImageFiles], root: Path
) -> None:
    """As Tiny-ImageNet has it with a sorted val/, and a split of three parts."""
    assert load(str(root)).noticed is None
    for number in range(3):
        put(root / f"test/images/{number}.png", picture(7))
    data = load(str(root))
    assert data.num_classes == 2 and list(shades(data)) == [[0, 1, 100, 101], [0, 100]]
    assert data.noticed == f"{root} is tested with val/; the 3 pictures of test/ are left out"
    shutil.rmtree(root / "test")
    for number, name in enumerate(("cat", "dog")):
        put(root / f"test/{name}/0.png", picture(50 + number))
    data = load(str(root))
    assert list(shades(data)) == [[0, 1, 100, 101], [50, 51]]
    (root / "val").rename(root / "validation")
    assert (
        load(str(root)).noticed == f"{root} is tested with test/; the 2 pictures of validation/ are left out"
    )
    (root / "test").rename(root / "elsewhere")
    assert list(shades(load(str(root)))) == [[0, 1, 100, 101], [0, 100]]
    (root / "elsewhere").rename(root / "test")
    (root / "validation").rename(root / "val")
    data = load(str(root))
    assert data.noticed == f"{root} is tested with test/; the 2 pictures of val/ are left out"
    (root / "test/dog").rename(root / "test/wolf")
    (root / "val/dog").rename(root / "val/fox")
    with pytest.raises(ValueError, match="only train/ has dog; only test/ has wolf; sort test/ into train's"):
        load(str(root))
    shutil.rmtree(root)
    put(root / "data/train-00000-of-00001.parquet")
    with pytest.raises(
        ValueError, match="got data/train-00000-of-00001.parquet: save the pictures as PNG or JPEG in"
    ):
        load(str(root))


@pytest.mark.parametrize("form", ["folder", "zip", "shards"])
def test_an_evaluation_needs_test_pictures_alone(form: str, root: Path, tmp_path: Path) -> None:
    tars = sharded(root, tmp_path / "tars")
    (tars / "train.tar").unlink()
    shutil.rmtree(root / "train")
    at = {"folder": root, "zip": zipped(root, tmp_path / "packed"), "shards": tars}[form]
    loaded: list[ImageData | ImageFiles] = [image_files(str(at), 8, 8)]
    if form != "shards":
        loaded.append(image_folder(str(at), 8))
    for data in loaded:
        assert (
            data.num_classes == 2
            and data.test_labels.tolist() == [0, 1]
            and not len(data.train_labels)
            and data.sha256
        )
        (batch,) = data.test_batches(torch.arange(2), 4)
        assert batch[0].shape == (2, 3, 8, 8) and batch[0].dtype == torch.uint8
        augment = Views() if isinstance(data, ImageData) else ResizedCrop()
        with pytest.raises(
            ValueError, match="has no pictures to train with, only to test with; put them in train/<class>/"
        ):
            data.batches(
                augment=augment,
                device=torch.device("cpu"),
                shard=Shard(1),
                batch_size=2,
                drop_last=False,
                seed=0,
                workers=0,
            )


def test_other_pictures_are_laid_out_the_same_way(root: Path) -> None:
    put(root / "train/cat/._0.png")
    found, among = other_pictures(root / "train", ("cat", "cow", "dog"))
    assert found.labels.tolist() == [0, 0, 2, 2] and among.tolist() == [True, False, True]
    put(root / "train/0.png")
    with pytest.raises(ValueError, match=r"1 pictures lie in train/ itself, the first is 0\.png"):
        other_pictures(root / "train", ("cat", "cow", "dog"))


# --- archives, links and other files -----------------------------------------------------------------------------------


def marked(archive: Path, name: str, flags: int = 0, method: int | None = None) -> None:
    """Write into a member's two headers that it is encrypted, or packed by another method."""
    data, coded = bytearray(archive.read_bytes()), name.encode()
    for magic, flag_at, name_at in ((b"PK\3\4", 6, 30), (b"PK\1\2", 8, 46)):
        at = -1
        while (at := data.find(magic, at + 1)) >= 0:
            if data[at + name_at : at + name_at + len(coded)] == coded:
                data[at + flag_at] |= flags
                if method is not None:
                    data[at + flag_at + 2] = method
    archive.write_bytes(data)


@pytest.mark.parametrize(("settings", "message"), [
    ({"flags": 1}, "1 of 6 pictures are encrypted, the first is pictures/train/cat/1.png; pack them anew"),
    ({"method": 97}, "1 of 6 pictures are packed in an unknown way, the first is pictures/train/cat/1.png; pack them"),
])  # fmt: skip
def test_archives_that_cannot_be_unpacked_are_refused_at_once(
    settings: dict[str, int], message: str, root: Path, tmp_path: Path
) -> None:
    archive = zipped(root, tmp_path / "packed")
    marked(archive, "pictures/train/cat/1.png", **settings)
    for load in (image_folder, image_files):
        with pytest.raises(ValueError, match=message):
            load(str(archive), 8)


def test_links_in_an_archive_are_called_so(root: Path, tmp_path: Path) -> None:
    """As zip -y packs them: their bytes are a path."""
    archive = zipped(root, tmp_path / "packed")
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("pictures/train/cat/9.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "../dog/0.png")
    with pytest.raises(
        ValueError, match="1 of 7 pictures are links, the first is .*9.png; .* with what links lead to"
    ):
        image_folder(str(archive), 8)


def test_damaged_members_are_named_by_their_path_in_the_archive(root: Path, tmp_path: Path) -> None:
    archive = zipped(root, tmp_path / "packed")
    with zipfile.ZipFile(archive) as file:
        at = file.getinfo("pictures/train/dog/0.png").header_offset
    data = bytearray(archive.read_bytes())
    data[at + 30 + len("pictures/train/dog/0.png") + 20] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(
        PictureError, match=r"packed\.zip: picture pictures/train/dog/0\.png cannot be unpacked \("
    ):
        image_folder(str(archive), 8)
    files = image_files(str(archive), 8, 8)
    with pytest.raises(
        PictureError, match=r"packed\.zip: picture pictures/train/dog/0\.png cannot be unpacked \("
    ):
        files.train.read(2, "torchvision")
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="neither a folder nor a zip archive"):
        image_folder(str(archive), 8)


def test_bytes_of_an_archive_that_were_changed_give_pictures_or_a_line(root: Path, tmp_path: Path) -> None:
    archive = zipped(root, tmp_path / "packed")
    whole, generator = archive.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 3):
            data[place] = generator.integers(0, 256)
        archive.write_bytes(data)
        assert len(content(archive) or "") == 16
        try:
            store = open_store(archive)
            for name in store.names:
                store.picture(name, "pillow")
        except ValueError as error:
            assert "\n" not in str(error)


def test_pictures_that_vanish_or_cannot_be_read_are_named(root: Path) -> None:
    data = image_files(str(root), 8, 8)
    (root / "train/cat/0.png").unlink()
    with pytest.raises(
        PictureError,
        match=r"picture train/cat/0\.png cannot be read \(No such file or directory\); bring it back",
    ):
        data.train.read(0, "pillow")
    os.mkfifo(root / "train/cat/0.png")
    with pytest.raises(PictureError, match=r"train/cat/0\.png is no regular file"):
        data.train.read(0, "pillow")
    with open(root / "train/cat/1.png", "wb") as file:
        file.truncate(2 << 30)  # of holes
    with pytest.raises(
        PictureError, match=r"train/cat/1\.png has 2,147,483,648 bytes, more than a picture's"
    ):
        data.train.read(1, "pillow")


def test_a_link_into_itself_is_named_and_others_are_followed(root: Path, tmp_path: Path) -> None:
    shutil.move(root / "train/dog", tmp_path / "elsewhere")
    (root / "train/dog").symlink_to(tmp_path / "elsewhere")
    assert len(image_files(str(root), 8, 8).train_labels) == 4
    (root / "train/cat/again").symlink_to(root)
    for look in (open_store, content):
        with pytest.raises(
            ValueError, match=r"train/cat/again is a link to a folder that it lies in; remove it"
        ):
            look(root)


def test_an_archive_that_is_written_anew_under_a_run_is_noticed(root: Path, tmp_path: Path) -> None:
    """By the next worker process that opens it, instead of other bytes at the places of before."""
    archive, tars = Zip(zipped(root, tmp_path / "packed")), Shards(sharded(root, tmp_path / "tars"))
    name = tars.names[0]
    shutil.rmtree(tmp_path / "tars")
    sharded(root, tmp_path / "tars")
    os.utime(tmp_path / "tars/train.tar", ns=(0, 0))
    with pytest.raises(PictureError, match=r"is in an archive that was written anew since this run began"):
        tars.picture(name, "pillow")
    archive._opened = None  # another process
    os.utime(archive.path, ns=(0, 0))
    with pytest.raises(PictureError, match=r"is in an archive that was written anew since this run began"):
        archive.picture(archive.names[0], "pillow")


@pytest.mark.parametrize(("change", "message"), [
    ({"./cat_0.cls": b"-1"}, r"train\.tar: \./cat_0\.cls needs a class, a number from 0 on, got '-1'"),
    ({"./cat_0.cls": b"cat"}, r"train\.tar: \./cat_0\.cls needs a class, a number from 0 on, got 'cat'"),
    ({"./cat_0.cls": b"9" * 30}, r"train\.tar: \./cat_0\.cls needs a class"),
    ({"./dog_1.cls": b"3"}, r"1 of 4 classes have no training picture, the first is 2; number classes from 0 on"),
    ({"cow.heic": b"x", "cow.cls": b"0"}, r"train\.tar: picture cow\.heic has an ending that is not read"),
    ({"./cat_0.jpg": b"x"}, r"train\.tar has two pictures of one key, \./cat_0\.png and \./cat_0\.jpg"),
])  # fmt: skip
def test_wrong_shards_are_refused(change: dict[str, bytes], message: str, root: Path, tmp_path: Path) -> None:
    tars = sharded(root, tmp_path / "tars", **change)
    with pytest.raises(ValueError, match=message):
        image_files(str(tars), 8, 8)


def test_a_shard_s_pictures_are_for_what_its_own_path_says(root: Path, tmp_path: Path) -> None:
    """Once a test picture called bullet_train was trained on, and a shard's number was its class in memory."""
    for part in ("train", "val"):
        (root / part / "dog").rename(root / part / "train_valley")
        (root / part / "cat").rename(root / part / "a")
    tars = sharded(root, tmp_path / "tars")
    for part in ("train", "val"):
        put(tars / part / "00000.tar", (tars / f"{part}.tar").read_bytes())
        (tars / f"{part}.tar").unlink()
    for data in (image_files(str(tars), 8, 8), image_folder(str(tars), 8)):
        assert data.class_names == ("0",) and shades(data) == [[0, 1, 100, 101], [0, 100]]
    (tars / "val" / "00000.tar").rename(tars / "val" / "intrain.tar")
    with pytest.raises(
        ValueError, match="val/intrain.tar has train and val in its path; say with one of them"
    ):
        image_files(str(tars), 8, 8)


def test_the_archives_that_class_folders_came_in_may_lie_beside_them(root: Path) -> None:
    plain = shades(image_folder(str(root), 8))
    for name in ("ILSVRC2012_img_train.tar", "train/cat.tar"):
        with tarfile.open(root / name, "w") as tar:
            tar.add(root / "train/cat", "cat")
        for data in (image_folder(str(root), 8), image_files(str(root), 8, 8)):
            assert data.class_names == ("cat", "dog") and shades(data) == plain


def test_cut_and_packed_shards_are_refused(root: Path, tmp_path: Path) -> None:
    tars = sharded(root, tmp_path / "tars")
    whole = (tars / "train.tar").read_bytes()
    at = whole.index(b"./dog_0.png")
    flipped = (
        whole[:at] + b"x" + whole[at + 1 :]
    )  # in a header: once the pictures from there on were left out without a word
    for data in (whole[:1600], whole[:700], b"no tar at all" * 100, flipped, whole + whole):
        (tars / "train.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"train\.tar is damaged"):
            image_files(str(tars), 8, 8)


def test_labels_that_are_no_classes_are_refused() -> None:
    pictures, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"x train labels must lie in 0\.\.1, got -1\.\.1"):
        ImageData("x", 2, pictures, torch.tensor([-1, 1]), pictures, labels, ("a", "b"))


def test_classes_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    for part, form in (("train", "NFC"), ("test", "NFD")):
        folder = tmp_path / part / unicodedata.normalize(form, "caf\u00e9")
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "0.png")
    with pytest.raises(ValueError, match=r"must have the same classes; .*two look alike .*\(NFC, and NFD"):
        image_folder(str(tmp_path), image_size=4)
