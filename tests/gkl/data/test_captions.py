"""Pairs of pictures and captions: tars on lanes, whichever process or worker reads them; lists; and what is wrong with them, in a line."""

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gkl.data.caption_sets import (
    CaptionData,
    caption_files,
    datacomp,
    digits_captions,
    imagenet_tests,
    tiny_imagenet_captions,
)
from gkl.data.captions import CaptionBatches
from gkl.data.crops import ResizedCrop
from gkl.data.pairs import Draw, Shards, members
from gkl.data.stores import PictureError
from gkl.data.tokens import Words
from gkl.distributed import Shard
from trainers.runs.compose import compose
from trainers.runs.identity import config_hash, training_hash

pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
WHOLE = ResizedCrop((1.0, 1.0), (1.0, 1.0), flip=0.0)


def picture(level: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def shards(folder: Path, counts: tuple[int, ...] = (9, 5, 14, 7)) -> Path:
    """Each picture of one level, which its caption says: 0 to 34."""
    folder.mkdir()
    level = 0
    for number, count in enumerate(counts):
        files = {}
        for key in range(count):
            files |= {
                f"{key:04d}.png": picture(level),
                f"{key:04d}.txt": f"level {level}".encode(),
                f"{key:04d}.json": b"{}",
            }
            level += 1
        shard(folder / f"{number:05d}.tar", files)
    return folder


def made(pairs: Any, words: Words) -> CaptionData:
    return CaptionData("tars", pairs, words, ("a",), (str,), {}, 8, "pillow")


WORDS = Words(["level", *map(str, range(40))], 4)


def batches(
    folder: Path, workers: int = 0, groups: int = 1, batch_size: int = 8, lanes: int = 4, **own: Any
) -> CaptionBatches:
    source = Shards(folder, samples=48, lanes=lanes, shuffle=3, decoder="pillow")
    return made(source, WORDS).batches(
        augment=own.pop("augment", WHOLE), device=torch.device("cpu"), shard=Shard(groups), workers=workers, batch_size=batch_size,
        drop_last=True, seed=5, **own,
    )  # fmt: skip


def levels(batch: Any) -> list[int]:
    """Of a batch's pictures, whose captions must say them."""
    found = batch.images[:, 0, 0, 0].tolist()
    assert batch.tokens.equal(WORDS([f"level {n}" for n in found]))
    return found


@pytest.mark.long  # worker processes, begun again and again
def test_workers_and_the_place_to_begin_change_nothing(tmp_path: Path) -> None:
    folder = shards(tmp_path / "tars")
    whole = batches(folder)
    assert whole.steps_per_epoch == 6
    epochs = {epoch: [levels(whole.batch(epoch, step)) for step in range(6)] for epoch in (1, 2)}
    assert epochs[1] != epochs[2] and len({n for step in epochs[1] for n in step}) > 15
    for workers, first in ((2, 0), (3, 0), (0, 3), (3, 4), (9, 5)):
        other = batches(folder, workers=workers)
        assert [levels(other.batch(1, step)) for step in range(first, 6)] == epochs[1][first:], (
            workers,
            first,
        )
    assert levels(whole.batch(1, 2)) == epochs[1][2]  # also after a later one


def test_a_lane_reads_whole_shards_drawn_with_replacement(tmp_path: Path) -> None:
    folder = shards(tmp_path / "tars")
    source = Shards(folder, samples=48, lanes=4, shuffle=3, decoder="pillow")
    counts, first = [9, 5, 14, 7], [0, 9, 14, 28]
    drawn = set()
    for lane in range(4):
        said = [int(p.caption.split()[1]) for p in source.take(Draw(5, 1), [lane], 4, 0, 100)]
        while said:
            number = max(n for n in range(4) if first[n] <= said[0])
            here, said = said[: counts[number]], said[counts[number] :]
            whole = list(range(first[number], first[number] + counts[number]))
            for block in range(0, len(here), 3):  # shuffled within blocks of three
                part = whole[block : block + 3]
                assert {*here[block : block + 3]} <= {*part} and (
                    not said or len(here[block : block + 3]) == len(part)
                )
            drawn.add((lane, number))
    assert len({number for _, number in drawn}) == 4
    assert source.take(Draw(6, 1), [0], 4, 0, 9) != source.take(Draw(5, 1), [0], 4, 0, 9)


def test_processes_share_a_batch_lane_by_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "tars")
    alone = levels(batches(folder, groups=4).batch(1, 3))
    parts = []
    for rank in range(2):
        for name in ("gkl.distributed", "gkl.data.captions"):
            monkeypatch.setattr(f"{name}.world_size", lambda: 2)
        monkeypatch.setattr("gkl.distributed.rank", lambda rank=rank: rank)
        batch = batches(folder, groups=4).batch(1, 3)
        parts += levels(batch)
        assert batch.sample.tolist() == list(range(24 + 4 * rank, 28 + 4 * rank))
    assert parts == alone
    with pytest.raises(
        ValueError, match="data.lanes=1 must divide batch_size=8 and be a multiple of the 2 processes"
    ):
        batches(folder, lanes=1)


def test_a_damaged_picture_is_replaced_by_the_next_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    files = {"a.png": b"no picture", "a.txt": b"level 1", "b.png": picture(2), "b.txt": b"level 2"}
    shard(folder / "0.tar", files)
    batch = batches(folder, batch_size=4, lanes=2).batch(1, 0)
    assert levels(batch) == [2, 2, 2, 2] and batch.replaced.item() == 2
    shard(folder / "0.tar", {"a.png": b"no picture", "a.txt": b"level 1"})
    with pytest.raises(
        PictureError, match=r"0.tar: none of its 1 pairs can be decoded, the last is damaged|it is no picture"
    ):
        batches(folder, batch_size=4, lanes=2, workers=2).batch(1, 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.png": picture(1), "b.png": picture(2), "a.json": b"{}"},
            "has 2 pictures and 0 captions and no pair of them",
        ),
        ({"a.txt": b"level 1"}, "has 0 pictures and 1 captions and no pair of them"),
        ({"a.png": picture(1), "b.txt": b"level 1"}, "has 1 pictures and 1 captions and no pair of them"),
    ],
)
def test_tars_without_pairs_are_a_line_before_anything_starts(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    shard(tmp_path / "0.tar", files)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, 48, 4, 3, "pillow")


def test_no_tars_and_damaged_ones(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder of tar shards at .*set data.root="):
        Shards(tmp_path / "nowhere", 48, 4, 3, "pillow")
    with pytest.raises(ValueError, match="has no .tar files in it"):
        Shards(tmp_path, 48, 4, 3, "pillow")
    (tmp_path / "0.tar").write_bytes(b"\1" * 2000)
    with pytest.raises(ValueError, match="damaged or no plain tar"):
        Shards(tmp_path, 48, 4, 3, "pillow")


def test_a_lone_picture_or_caption_is_no_pair(tmp_path: Path) -> None:
    files = {"a.png": picture(1), "b.png": picture(2), "b.txt": b"level 2", "c.txt": b"level 3"}
    assert len(members(shard(tmp_path / "0.tar", files))) == 1


# --- lists ------------------------------------------------------------------------------------------------------------


def imagenet_below(root: Path) -> dict[str, str | None]:
    """A thousand classes of one picture each, as ImageNet's validation and V2 are laid out."""
    for number in range(1000):
        for folder in (f"val/n{number:08d}", f"v2/{number}"):
            (root / folder).mkdir(parents=True)
            (root / folder / "0.png").write_bytes(picture(number % 251, 2))
    return {
        "root": str(root),
        "imagenet": "val",
        "imagenet_v2": "v2",
        "imagenet_sketch": None,
        "imagenet_r": None,
    }


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return imagenet_below(tmp_path_factory.mktemp("imagenet"))


def test_a_class_is_its_place_also_where_folders_are_numbers(tests: dict[str, str | None]) -> None:
    """ImageNet-V2's folders 0 to 999 would be 0, 1, 10, 100, ... in the order of their names."""
    found = imagenet_tests(tests, 1000)
    for test in found.values():
        for name, label in zip(
            test.pictures.names[:40].tolist(), test.pictures.labels[:40].tolist(), strict=True
        ):
            assert int(name.decode().split("/")[0].lstrip("n")) == label
        assert test.among.all() and len(test.pictures.labels) == 1000


def test_renditions_are_told_apart_among_their_own(tests: dict[str, str | None]) -> None:
    root = Path(str(tests["root"]))
    for number in range(3, 203):
        (root / f"r/n{number:08d}").mkdir(parents=True, exist_ok=True)
        (root / f"r/n{number:08d}/0.png").write_bytes(picture(1, 2))
    among = imagenet_tests({**tests, "imagenet_r": "r"}, 1000)["imagenet_r"].among
    assert among.nonzero().squeeze(1).tolist() == list(range(3, 203))
    with pytest.raises(
        ValueError, match="no pictures to test with: imagenet_sketch at .*data.tests.imagenet_sketch=null"
    ):
        imagenet_tests({**tests, "imagenet_sketch": "nowhere"}, 1000)
    with pytest.raises(
        ValueError, match="needs the 1000 class folders of ImageNet's validation pictures.*got 200"
    ):
        imagenet_tests({**tests, "imagenet": "r"}, 1000)


def test_a_table_and_a_folder_with_captions(tmp_path: Path, tests: dict[str, str | None]) -> None:
    for number in range(6):
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / f"all/{number}.png").write_bytes(picture(number))
        (tmp_path / f"all/{number}.txt").write_text(f"level {number}\n")
    rows = "".join(f"all/{n}.png\tlevel {n}\n" for n in range(6))
    (tmp_path / "pairs.tsv").write_text(f"filepath\ttitle\n{rows}")
    settings = {"tests": tests, "image_size": 8, "context_length": 16, "tokenizer": "words"}
    seen = []
    for root in ("pairs.tsv", "all"):
        data = caption_files(str(tmp_path / root), **settings)  # type: ignore[arg-type]
        made = data.batches(
            augment=WHOLE,
            device=torch.device("cpu"),
            shard=Shard(1),
            workers=0,
            batch_size=3,
            drop_last=True,
            seed=5,
        )
        got = [made.batch(1, step) for step in range(2)]
        assert sorted(torch.cat([b.images[:, 0, 0, 0] for b in got]).tolist()) == list(range(6))
        for batch in got:
            assert batch.tokens.equal(
                data.tokenizer([f"level {n}" for n in batch.images[:, 0, 0, 0].tolist()])
            )
        seen.append([b.images for b in got])
    assert all(one.equal(other) for one, other in zip(*seen, strict=True))
    for name, content, message in (
        (
            "a.tsv",
            "picture\ttitle\nall/0.png\tlevel\n",
            "has no column 'filepath' but picture, title; set data.picture=",
        ),
        (
            "b.tsv",
            "filepath\ttitle\nall/0.png\t\n",
            "1 lines lack a picture or a caption, the first is line 2",
        ),
        (
            "c.tsv",
            "filepath\ttitle\nall/9.png\tlevel 9\n",
            "1 of 1 captions have no picture, the first is all/9.png",
        ),
        (
            "d.tsv",
            "filepath\ttitle\nall/0.png\tcaf\xe9\n",
            r"d\.tsv is no text in UTF-8 \(.* at byte 28\); save it as UTF-8",
        ),
    ):
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            caption_files(str(tmp_path / name), **settings)  # type: ignore[arg-type]
    (tmp_path / "excel.csv").write_text("filepath,title\nall/0.png,level 0\n", encoding="utf-8-sig")
    assert len(caption_files(str(tmp_path / "excel.csv"), **settings).pairs or ()) == 1  # type: ignore[arg-type]
    (tmp_path / "all/3.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 6 pictures have no caption beside them, the first is 3.png"):
        caption_files(str(tmp_path / "all"), **settings)  # type: ignore[arg-type]


def test_digits_say_what_they_are(tmp_path: Path) -> None:
    data = digits_captions(str(tmp_path / "digits"))
    counts = {name: (len(test.pictures.labels), int(test.among.sum())) for name, test in data.tests.items()}
    assert counts == {
        "imagenet": (180, 10),
        "imagenet_v2": (180, 10),
        "imagenet_sketch": (360, 10),
        "imagenet_r": (182, 5),
    }
    halves = [{*data.tests[name].pictures.names.tolist()} for name in ("imagenet", "imagenet_v2")]
    assert not halves[0] & halves[1]
    assert len(data.train_labels) == 1437 and data.sha256 == digits_captions(str(tmp_path / "digits")).sha256
    datas = {data.sha256}
    object.__setattr__(data, "templates", data.templates[:7])
    data.__dict__.pop("sha256")
    assert data.sha256 not in datas


def test_datacomp_by_its_configuration(tmp_path: Path, tests: dict[str, str | None]) -> None:
    data = datacomp(str(shards(tmp_path / "tars")), samples=40, lanes=2, shuffle=5, tests=tests)
    assert data.name == "datacomp" and len(data.train_labels) == 40 and data.num_classes == 1000
    assert data.train_labels.untyped_storage().nbytes() == 8  # a billion pairs have no labels
    x, y = next(data.test_batches(torch.tensor([5, 7]), 2))
    assert x.shape == (2, 3, 224, 224) and y.tolist() == [5, 7]


def test_tiny_imagenet_says_its_classes_by_name(tmp_path: Path) -> None:
    top = tmp_path / "tiny-imagenet-200"
    for number, wnid in enumerate(("n02", "n01")):
        (top / "train" / wnid / "images").mkdir(parents=True)
        for k in range(3):
            (top / "train" / wnid / "images" / f"{wnid}_{k}.png").write_bytes(picture(10 * number + k, 64))
    (top / "val/images").mkdir(parents=True)
    (top / "val/images/val_0.png").write_bytes(picture(99, 64))
    (top / "val/val_annotations.txt").write_text("val_0.png\tn02\t0\t0\t63\t63\n")
    (top / "wnids.txt").write_text("n02\nn01\n")
    with pytest.raises(ValueError, match="has no words.txt with the names of its classes"):
        tiny_imagenet_captions(str(tmp_path))
    (top / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttench\nn99\tno class\n")
    data = tiny_imagenet_captions(str(tmp_path))
    assert data.class_names == ("goldfish", "tench") and data.image_size == 64
    assert data.test_labels.tolist() == [1] and data.tests.keys() == {"imagenet"}
    loaded = data.batches(
        augment=WHOLE,
        device=torch.device("cpu"),
        shard=Shard(1),
        workers=0,
        batch_size=6,
        drop_last=True,
        seed=0,
    )
    seen = [loaded.batch(epoch, 0) for epoch in range(1, 7)]
    templates = {
        name: {data.tokenizer([t(name)]).numpy().tobytes() for t in data.templates}
        for name in data.class_names
    }
    for batch in seen:
        for level, tokens in zip(batch.images[:, 0, 0, 0].tolist(), batch.tokens, strict=True):
            assert tokens.numpy().tobytes() in templates["tench" if level < 10 else "goldfish"]
    assert len({batch.tokens.numpy().tobytes() for batch in seen}) == 6  # another template in every epoch


def test_two_folders_of_shards_are_two_runs(tmp_path: Path, tests: dict[str, str | None]) -> None:
    """Once both were one run; and shards that have changed since a run was composed are refused."""
    one, other = (shards(tmp_path / name, counts) for name, counts in (("one", (3, 4)), ("other", (5, 2, 9))))
    copy = Path(shutil.copytree(one, tmp_path / "copy"))

    def composed(root: Path) -> dict[str, Any]:
        return compose(
            "train", ["experiment=clip/baseline", "scale=small", "data=datacomp", f"data.root={root}"]
        )

    assert config_hash(composed(one)) == config_hash(composed(copy)) != config_hash(composed(other))
    known = composed(one)["data"]["content"]
    given = {"samples": 8, "lanes": 2, "shuffle": 5, "tests": tests}
    assert datacomp(str(one), **given, content=known).name == "datacomp"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the shards at .*other have changed since this run was started"):
        datacomp(str(other), **given, content=known)  # type: ignore[arg-type]


@pytest.mark.parametrize("data", ["datacomp", "caption_files", "imagenet_zero_shot"])
def test_other_tests_measure_the_same_training_anew(
    data: str, tmp_path: Path, tests: dict[str, str | None]
) -> None:
    """Once whatever lay at data.tests.root was one run; and no test is read in a training."""
    folder = imagenet_below(tmp_path / "other")
    (tmp_path / "other/v2/7/0.png").write_bytes(picture(7, 64))
    root = shards(tmp_path / "tars") if data == "datacomp" else tmp_path
    (tmp_path / "pairs.csv").write_text("filepath,title\n")

    def composed(at: object, *more: str) -> dict[str, Any]:
        known = [
            "data.tests.imagenet=val",
            "data.tests.imagenet_v2=v2",
            "data.tests.imagenet_sketch=null",
            "data.tests.imagenet_r=null",
        ]
        place = {"datacomp": [f"data.root={root}"], "caption_files": [f"data.root={root}/pairs.csv"]}.get(
            data, []
        )
        words = [
            "experiment=clip/baseline",
            "scale=small",
            f"data={data}",
            *place,
            f"data.tests.root={at}",
            *known,
            *more,
        ]
        return compose("train", words)

    copy = shutil.copytree(str(tests["root"]), tmp_path / "copy")
    one, again, other, none = (composed(at) for at in (tests["root"], copy, folder["root"], "nowhere"))
    assert config_hash(one) == config_hash(again) != config_hash(other)
    assert (
        training_hash(one)
        == training_hash(other)
        == training_hash(composed(copy, "data.tests.imagenet_v2=null"))
    )
    assert none["data"]["tests"]["content"] is None
    assert config_hash(none) == config_hash(composed(copy, "~data.tests.content"))
    assert imagenet_tests(other["data"]["tests"], 1000).keys() == {"imagenet", "imagenet_v2"}
    (tmp_path / "other/v2/8/0.png").unlink()
    with pytest.raises(
        ValueError, match=r"^the pictures to test with below .*other have changed since this run was started"
    ):
        imagenet_tests(other["data"]["tests"], 1000)
