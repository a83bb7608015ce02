"""Few labels beside many pictures: which they are, what a batch holds, and the strong view to the pixel."""

import importlib.util
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gkl.data.augment import Views
from gkl.data.digits import digits
from gkl.data.few_labels import Draws, FewLabels, WeakStrong, digits_few, few_labels, labelled_pictures
from gkl.data.randaugment import rand_augment
from gkl.distributed import Shard

FORK = "Semi-supervised-learning-dkl/semilearn/datasets"
needs_fork = pytest.mark.skipif(
    "DKL_REF" not in os.environ, reason="needs DKL_REF, a checkout of the authors' code"
)


def fork(file: str) -> Any:
    path = Path(os.environ["DKL_REF"]) / "DKLv1" / FORK / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# In a data set of 100 classes in turns, 500 pictures each: of the first six classes, and the sum of all 200 numbers.
CHOSEN = {
    "usb": ([9000, 25400, 27701, 30701, 5202, 3402, 1803, 16203, 39904, 43704, 35205, 40605], 5_206_000),
    "dkl": ([28300, 10000, 44001, 41201, 5202, 3402, 1803, 16203, 39904, 43704, 35205, 40605], 5_236_700),
}


@pytest.mark.parametrize("draws", ["usb", "dkl"])
def test_the_labelled_pictures(draws: Draws) -> None:
    """Numbers made once by USB's loop and by the authors' copy of it, which has drawn twice before."""
    found = labelled_pictures(torch.arange(50_000) % 100, 2, draws, seed=0)
    first, total = CHOSEN[draws]
    assert found[:12].tolist() == first and int(found.sum()) == total and len(found) == 200


@needs_fork
@pytest.mark.parametrize("draws", ["usb", "dkl"])
def test_the_labelled_pictures_are_the_fork_s(
    draws: Draws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = fork("utils.py")
    monkeypatch.setattr(utils, "base_dir", str(tmp_path))
    generator = np.random.RandomState(0)
    monkeypatch.setattr(utils.np.random, "shuffle", generator.shuffle)
    if draws == "dkl":
        generator.randn(2, 4)
        generator.uniform(32)
    settings = SimpleNamespace(dataset="cifar100", num_labels=200, lb_imb_ratio=1, ulb_imb_ratio=1, seed=0)
    labels = np.arange(50_000) % 100
    theirs, others = utils.sample_labeled_unlabeled_data(settings, labels, labels, 100, 200, load_exist=False)
    assert labelled_pictures(torch.from_numpy(labels), 2, draws, seed=0).tolist() == theirs.tolist()
    assert len(others) == 49_800


@needs_fork
def test_the_strong_view_is_the_fork_s_to_the_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fork("augmentation/randaugment.py")
    image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (32, 32, 3), np.uint8).repeat(1, 0))
    smooth = image.resize((4, 4)).resize((32, 32), Image.Resampling.BICUBIC)
    theirs = module.RandAugment(3, 5)
    for key in range(300):
        drawn = random.Random(key)
        monkeypatch.setattr(module, "random", drawn)
        monkeypatch.setattr(module.np.random, "uniform", lambda low, drawn=drawn: drawn.uniform(low, 1.0))
        for picture in (image, smooth):
            drawn.seed(key)
            wanted = np.asarray(theirs(picture))
            assert np.array_equal(np.asarray(rand_augment(picture, random.Random(key))), wanted), key


def test_numpy_s_uniform_of_one_number_goes_down_to_one() -> None:
    """Why Cutout's point is drawn as it is."""
    drawn = np.random.RandomState(0).uniform(32, size=10_000)
    assert 1.0 < drawn.min() < 1.1 and 31.9 < drawn.max() <= 32.0


# --- batches ----------------------------------------------------------------------------------------------------------


def data(unlabelled: int = 2) -> FewLabels:
    return digits_few(labels=20, draws="usb", seed=0, steps_per_epoch=7, unlabelled=unlabelled)


def batches(groups: int = 4, **change: Any) -> Any:
    made = data().batches(
        augment=WeakStrong(padding=1, flip=0.5), device=torch.device("cpu"), shard=Shard(groups), batch_size=8, seed=3,
        drop_last=True, views_together=False, held_out_by_class=False, generated_share=0.0, **change,
    )  # fmt: skip
    made.start_epoch(2)
    return made


def test_a_batch_is_labelled_and_unlabelled_in_permutations_of_their_own() -> None:
    made, few = batches(), data()
    seen, others = [], []
    for step in range(made.steps_per_epoch):
        batch = made.batch(2, step)
        assert batch.labelled.shape == (8, 3, 8, 8) and batch.weak.shape == batch.strong.shape == (
            16,
            3,
            8,
            8,
        )
        assert batch.labels.equal(few.train_labels[batch.sample]) and batch.hidden.equal(
            few.train_labels[batch.other]
        )
        assert len(batch.keys.unique()) == 8 + 32
        seen.append(batch.sample)
        others.append(batch.other)
    order = torch.cat(seen)
    assert order[:20].sort().values.equal(few.labelled.sort().values)  # each once, then again
    assert order[20:40].sort().values.equal(few.labelled.sort().values) and not order[:20].equal(order[20:40])
    assert len(torch.cat(others).unique()) == 7 * 16


def test_a_step_follows_from_seed_epoch_and_step_alone() -> None:
    one, other = batches(), batches()
    wanted = [one.batch(2, step) for step in range(3)]
    again = other.batch(2, 2)
    assert all(a.equal(b) for a, b in zip(wanted[2], again, strict=True))
    other.start_epoch(3)
    assert not other.batch(3, 2).other.equal(again.other)


def test_a_picture_that_comes_twice_is_seen_otherwise() -> None:
    few = few_labels(digits(), labels=10, draws="usb", seed=0, steps_per_epoch=20)
    made = few.batches(
        augment=WeakStrong(padding=1), device=torch.device("cpu"), shard=Shard(1), batch_size=10, seed=0
    )
    made.start_epoch(1)
    views = [made.batch(1, step) for step in range(20)]
    first = int(few.labelled[0])
    pictures = torch.stack([batch.labelled[batch.sample == first][0] for batch in views])
    assert len(pictures.flatten(1).unique(dim=0)) > 5


def test_bad_input_is_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"data\.labels=25 cannot be shared by 10 classes; choose a multiple"
    ):
        digits_few(labels=25, draws="usb", seed=0, steps_per_epoch=1)
    with pytest.raises(ValueError, match="class 0 has .* pictures, and 300 are to keep their label"):
        digits_few(labels=3000, draws="usb", seed=0, steps_per_epoch=1)
    whole = digits()
    tests_alone = replace(whole, train_images=whole.train_images[:0], train_labels=whole.train_labels[:0])
    with pytest.raises(ValueError, match="digits has no pictures to train with, only to test with"):
        few_labels(tests_alone, 20, "usb", seed=0, steps_per_epoch=1)
    with pytest.raises(ValueError, match=r"data\.labels=0 cannot be shared by 10 classes"):
        few_labels(whole, 0, "usb", seed=0, steps_per_epoch=1)
    for change, message in (({"batch_size": 24}, "batch_size=24 is more than the 20 labelled pictures"),):
        with pytest.raises(ValueError, match=message):
            data().batches(augment=WeakStrong(), device=torch.device("cpu"), shard=Shard(1), seed=0, **change)
    with pytest.raises(ValueError, match="takes no held_out"):
        batches(held_out=0.5)
    with pytest.raises(ValueError, match="needs augment=basic or autoaug, got int"):
        data().batches(augment=3)


def test_for_pretraining_it_is_as_any_other_data() -> None:
    made = data().batches(
        augment=Views(padding=1),
        device=torch.device("cpu"),
        shard=Shard(1),
        batch_size=100,
        seed=0,
        drop_last=True,
    )
    made.start_epoch(1)
    assert made.steps_per_epoch == 14 and made.batch(1, 0).images.shape == (100, 3, 8, 8)
