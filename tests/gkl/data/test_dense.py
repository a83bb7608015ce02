"""A label for each pixel: crops and their labels move together, draws by key, ADE20K's folders looked at file by file."""

import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gkl.data.ade20k import ade20k
from gkl.data.content import content
from gkl.data.dense import (
    BORDER,
    IGNORED,
    DenseCrop,
    DenseData,
    DenseViews,
    MemoryPages,
    blurred,
    cut,
    turned,
    zoomed,
    zoomed_labels,
)
from gkl.data.mosaics import digits_mosaics
from gkl.data.stores import PictureError
from gkl.distributed import Shard
from tests.gkl.data.test_decoding import png

# --- views ------------------------------------------------------------------------------------------------------------


def ramp(height: int, width: int) -> Tensor:
    """A picture that says where each pixel was, linear, so that interpolation is exact."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, rows + columns]).float()


def test_zooming_is_opencv_s() -> None:
    """Numbers that cv2.resize gives: linear of [0, 10, 20, 30] by 1.5, its nearest by 1.5 and 0.6, and rounded sizes."""
    x = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 4)
    found = zoomed(x.expand(1, 4, 4), 1.5)
    assert found.shape == (1, 6, 6)
    torch.testing.assert_close(
        found[0, 0], torch.tensor([0.0, 5.0, 35 / 3, 55 / 3, 25.0, 30.0]), rtol=0, atol=1e-5
    )
    labels = torch.arange(4, dtype=torch.uint8).expand(4, 4)
    assert zoomed_labels(labels, 1.5)[0].tolist() == [0, 0, 1, 2, 2, 3]
    assert zoomed_labels(labels, 0.6)[0].tolist() == [0, 1]  # round(2.4) pixels: floor(0), floor(1.67)
    assert zoomed(torch.zeros(3, 427, 640), 0.77).shape == (3, 329, 493)


def test_turning_takes_picture_and_labels_alike() -> None:
    x = ramp(40, 50)
    labels = torch.zeros(40, 50, dtype=torch.uint8)
    labels[:, 25:] = 7
    for degrees in (0.0, 10.0, -10.0):
        made, marked = turned(x - 0.0, labels, degrees)
        angle = np.deg2rad(degrees)
        row, column = 15, 30  # of the turned picture; its source by the inverse rotation about (20, 25)
        wanted = 20 + np.sin(angle) * (column - 25) + np.cos(angle) * (row - 20)
        assert made[0, row, column].item() == pytest.approx(wanted, abs=1e-4)
        right = 25 + np.cos(angle) * (column - 25) - np.sin(angle) * (row - 20)
        assert made[1, row, column].item() == pytest.approx(right, abs=1e-4)
        assert marked[row, column] == (7 if right >= 24.5 else 0)
    made, marked = turned(x + 1.0, labels, 10.0)
    assert made[:, 0, 0].abs().max() == 0 and marked[0, 0] == IGNORED  # beyond the picture


def test_blurring_keeps_the_mean_and_reflects() -> None:
    x = torch.zeros(1, 9, 9)
    x[0, 4, 4] = 256.0
    assert blurred(x)[0, 4, 2:7].tolist() == [6.0, 24.0, 36.0, 24.0, 6.0]
    torch.testing.assert_close(blurred(torch.full((3, 7, 8), 0.3)), torch.full((3, 7, 8), 0.3))


def test_a_small_picture_is_surrounded_by_mean_grey_without_labels() -> None:
    x, labels = torch.ones(3, 10, 12) - BORDER, torch.full((10, 12), 3, dtype=torch.uint8)
    view, marked = cut(x, labels, 17, None)
    assert view.shape == (3, 17, 17) and marked.shape == (17, 17)
    assert (marked == 3).sum() == 120 and (marked[3:13, 2:14] == 3).all()  # 7 // 2 and 5 // 2 before it
    (
        torch.testing.assert_close(view[:, 0, 0], BORDER.flatten()),
        torch.testing.assert_close(view[:, 8, 8], torch.ones(3)),
    )


def test_a_view_follows_from_its_key() -> None:
    crop, data = DenseCrop(), digits_mosaics(3, 1)
    one, other, again = (crop(*data.train.read(0), 33, random.Random(k)) for k in (1, 2, 1))
    assert one[0].equal(again[0]) and one[1].equal(again[1]) and not one[0].equal(other[0])
    assert one[0].dtype == torch.float32 and 0.0 <= one[0].min() and one[0].max() <= 1.0 + 1e-6
    with pytest.raises(ValueError, match=r"augment\.zoom must be \[a, b\] with 0 < a <= b, got \[2, 1\]"):
        DenseCrop(zoom=(2, 1))


def pages(labelled: list[bool]) -> MemoryPages:
    labels = torch.full((len(labelled), 20, 20), IGNORED, dtype=torch.uint8)
    labels[torch.tensor(labelled)] = 4
    return MemoryPages(torch.zeros(len(labelled), 3, 20, 20, dtype=torch.uint8), labels)


def test_a_crop_without_labels_is_another_picture_s() -> None:
    views = DenseViews(pages([False, True, False]), DenseCrop(), 17)
    for key in range(5):
        made: Any = views[0, key]
        assert made[2] == 1 and (made[1] == 4).any()
        again: Any = views[0, key]
        assert made[0].equal(again[0])
    none: Any = DenseViews(pages([False]), DenseCrop(), 17)[0, 0]
    assert isinstance(none, PictureError) and "100 crops in a row show no labelled pixel" in str(none)


def batches(workers: int = 0, groups: int = 2) -> Any:
    made = digits_mosaics(10, 2, image_size=33).batches(
        augment=DenseCrop(), device=torch.device("cpu"), shard=Shard(groups), batch_size=4, drop_last=True, seed=3, workers=workers,
        views_together=False, held_out=0.0, held_out_by_class=False, generated=None, generated_share=0.0,
    )  # fmt: skip
    made.start_epoch(2)
    return made


def test_a_step_follows_from_seed_epoch_and_step_alone() -> None:
    one, other = batches(), batches(workers=2)
    wanted = [one.batch(2, step) for step in range(2)]
    found = other.batch(2, 1)
    assert (
        one.steps_per_epoch == 2 and found.labels.shape == (4, 33, 33) and found.labels.dtype == torch.int64
    )
    assert all(a.equal(b) for a, b in zip(wanted[1], found, strict=True))
    other.start_epoch(3)
    assert not other.batch(3, 1).images.equal(found.images)


def test_pages_of_digits() -> None:
    data = digits_mosaics(12, 6)
    assert data.num_classes == 10 and data.train.read(0)[0].shape == (3, 65, 65)
    labels = data.train.read(0)[1]
    assert len(labels.unique()) <= 5 and 0.01 < (labels == IGNORED).float().mean() < 0.05
    assert data.sha256 == digits_mosaics(12, 6).sha256 != digits_mosaics(13, 6).sha256
    x, y = next(data.test_batches(torch.arange(2), 2))
    assert x.shape == (2, 3, 65, 65) and y[0].equal(data.test.read(0)[1])
    torch.testing.assert_close(x[1], data.test.read(1)[0] / 255.0)


# --- ADE20K -----------------------------------------------------------------------------------------------------------

SIZES = [(40, 30), (24, 36)]


def write(root: Path, change: dict[str, Any] | None = None) -> Path:
    """Two pictures of each part, with label maps of 0 to 150. change: name -> another array to save there, None to leave it out."""
    generator = np.random.default_rng(0)
    for part in ("training", "validation"):
        for number, (width, height) in enumerate(SIZES):
            stem = f"ADE_{part[:5]}_{number:08d}"
            for folder, ending, shape, high in (
                ("images", "jpg", (height, width, 3), 256),
                ("annotations", "png", (height, width), 151),
            ):
                name = f"{folder}/{part}/{stem}.{ending}"
                values = (change or {}).get(name, generator.integers(0, high, shape).astype(np.uint8))
                if values is None:
                    continue
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(values, bytes):
                    (root / name).write_bytes(values)
                else:
                    Image.fromarray(values).save(root / name)
    return root


MAP = "annotations/training/ADE_train_00000001.png"


def test_it_is_read_as_it_is_distributed(tmp_path: Path) -> None:
    root = write(tmp_path / "ADEChallengeData2016")
    data = ade20k(str(root))
    assert len(data.train) == len(data.test) == 2 and data.num_classes == 150
    image, labels = data.train.read(1)
    raw = torch.from_numpy(np.array(Image.open(root / MAP)))
    assert image.shape == (3, 36, 24) and labels.shape == (36, 24)
    assert labels[raw == 0].unique().tolist() == [255]
    assert labels[raw > 0].equal(raw[raw > 0] - 1)
    archive = tmp_path / "ADEChallengeData2016.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in root.rglob("*.*"):
            file.write(path, str(path.relative_to(tmp_path)))
    assert ade20k(str(archive)).train.read(1)[1].equal(labels)
    assert content(archive) == content(root)


def test_prepared_label_maps(tmp_path: Path) -> None:
    raw = np.full((36, 24), 149, np.uint8)
    raw[0] = 255
    root = write(
        tmp_path,
        {
            f"annotations/{part}/ADE_{part[:5]}_{n:08d}.png": raw if n else np.zeros((30, 40), np.uint8)
            for part in ("training", "validation")
            for n in range(2)
        },
    )
    labels = ade20k(str(root), coding="from_zero").train.read(1)[1]
    assert labels.unique().tolist() == [149, 255]
    with pytest.raises(
        ValueError, match="holds 255, and labels are 0 .none. to 150; set data.coding=from_zero"
    ):
        ade20k(str(root))


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        (MAP, None, r"1 of 2 files have no label map in annotations/training/, the first is images/training/ADE_train_00000001\.jpg"),
        (MAP.replace("annotations", "images").replace("png", "jpg"), None, r"1 of 2 files have no picture in images/training/, the first is .*00000001\.png"),
        (MAP, np.zeros((24, 36), np.uint8), r"label map annotations/training/ADE_train_00000001\.png is of 36 x 24 pixels and its picture of 24 x 36"),
        (MAP, np.zeros((36, 24, 3), np.uint8), r"ADE_train_00000001\.png is RGB-coded, and a label map has one number of 8 bits a pixel"),
        (MAP, np.zeros((36, 24), np.uint16), r"has pixels of mode I;16"),
        (MAP, np.full((36, 24), 151, np.uint8), r"holds 151, and labels are 0 \(none\) to 150; set data\.classes"),
        (MAP, b"no png", r"ADE_train_00000001\.png is damaged \(it is no picture that is read here\); replace"),
        (MAP, png(20_000, 20_000, 8, 0, b"\0" * 1000), r"label map annotations/training/ADE_train_00000001\.png says that it has more than 178,956,970 pixels"),
        (MAP.replace("annotations", "images").replace("png", "jpg"), png(20_000, 20_000, 8, 2, b"\0" * 1000), r"00000001\.jpg says that it has more than"),
        (MAP.replace("annotations", "images").replace("png", "jpg"), b"no jpeg", r"picture images/training/ADE_train_00000001\.jpg is damaged"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_one_line_at_the_start(
    tmp_path: Path, name: str, values: Any, told: str
) -> None:
    root = write(tmp_path, {name: values})
    with pytest.raises(ValueError, match=told) as caught:
        ade20k(str(root))
    assert "\n" not in str(caught.value) and str(root) in str(caught.value)


def masks(root: Path, *values: int) -> Path:
    """Of two values each, in the pictures of `write`."""
    drawn = np.full((36, 24), values[0], np.uint8)
    drawn[4:20, 4:20] = values[-1]
    whole = np.full((30, 40), values[0], np.uint8)
    whole[10:] = values[-1]
    return write(
        root,
        {
            f"annotations/{part}/ADE_{part[:5]}_{n:08d}.png": drawn if n else whole
            for part in ("training", "validation")
            for n in range(2)
        },
    )


def test_masks_of_0_and_255_are_no_two_classes(tmp_path: Path) -> None:
    """With 255 for none they are one class, which is predicted right everywhere."""
    root, cache = masks(tmp_path / "a", 0, 255), tmp_path / "kept"
    with pytest.raises(
        ValueError, match="holds 255, .*; save a mask of 0 and 255 as 1 and 2, or as 0 and 1 with"
    ):
        ade20k(str(root), classes=2)
    for _ in range(2):  # nothing is noted of it
        with pytest.raises(
            ValueError, match="together hold class 0 alone, .* is to be saved as 0 and 1"
        ) as told:
            ade20k(str(root), classes=2, coding="from_zero", content=content(root), cache=str(cache))
        assert "\n" not in str(told.value) and str(root) in str(told.value)
    with pytest.raises(ValueError, match="together hold no class at all"):
        ade20k(str(masks(tmp_path / "b", 0, 0)), classes=2)
    assert ade20k(str(masks(tmp_path / "c", 0, 1)), classes=2, coding="from_zero").noticed is None
    assert ade20k(str(masks(tmp_path / "d", 1, 2)), classes=2).noticed is None


def test_classes_that_no_picture_has_are_told_each_time(tmp_path: Path) -> None:
    root, cache = masks(tmp_path / "a", 1, 3), tmp_path / "kept"
    for _ in range(2):
        data = ade20k(str(root), classes=12, content=content(root), cache=str(cache))
        assert data.noticed is not None
        assert (
            "has 10 of data.classes=12, counted from 0 (1, 3, 4, 5, 6, ...); each counts in the mean IoU"
            in data.noticed
        )


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no ADE20K at .*; set data\.root=\.\.\. to ADEChallengeData2016"
    ):
        ade20k(str(tmp_path / "none"))
    (tmp_path / "images").mkdir()
    with pytest.raises(
        ValueError,
        match=r"has no pictures in images/training/ with label maps in annotations/training/; set data\.root",
    ):
        ade20k(str(tmp_path))


def test_what_has_been_looked_at_is_noted_by_content(tmp_path: Path) -> None:
    """Other files have other content, and are looked at."""
    root, cache = write(tmp_path / "a"), tmp_path / "kept"
    ade20k(str(root), content=content(root), cache=str(cache))
    assert len(list(cache.iterdir())) == 1
    Image.fromarray(np.full((36, 24), 200, np.uint8)).save(root / MAP)
    with pytest.raises(ValueError, match="holds 200"):
        ade20k(str(root), content=content(root), cache=str(cache))
    assert len(list(cache.iterdir())) == 1


def test_a_picture_that_goes_while_training_is_named(tmp_path: Path) -> None:
    root = write(tmp_path)
    data: DenseData = ade20k(str(root), image_size=17)
    (root / MAP).unlink()
    made: Any = DenseViews(data.train, DenseCrop(), 17)[1, 0]
    assert isinstance(made, PictureError)
    assert f"label map {MAP} cannot be read (No such file or directory); bring it back" in str(made)
