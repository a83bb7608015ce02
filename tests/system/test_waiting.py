"""A step asks its device for nothing: on a GPU each question waits for all that was launched before it. The device is pretended."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.pretended import DEVICE, Pretended, There, pretended
from tests.trainers.methods import test_clip, test_segmentation, test_semi_supervised
from tests.trainers.methods.test_adversarial import task_of
from tests.trainers.methods.test_distillation import make_task

__all__ = ["pretended"]  # a fixture


def test_what_waits_is_noted(pretended: Pretended) -> None:
    x = torch.arange(4.0)
    with pretended:
        there = x.to(DEVICE, non_blocking=True)
        assert there.add(1).mul_(2).sum().device == DEVICE and not pretended.waits
        (
            float(there.sum()),
            there.cpu(),
            x.to(DEVICE),
            torch.tensor([1.0], device=DEVICE),
            there[there > 1],
            there.nonzero(),
        )
        there.copy_(x)
    assert [wait.split()[0] for wait in pretended.waits] == [
        "_local_scalar_dense", "_to_copy", "_to_copy", "_to_copy", "index", "nonzero", "copy_",
    ]  # fmt: skip


def test_a_tensor_that_was_left_behind_is_noted(pretended: Pretended) -> None:
    x = torch.arange(4.0)
    with pretended:
        there = x.to(DEVICE)
        there[torch.arange(2)], there * torch.tensor(2.0), there.copy_(x)  # as a GPU takes them
        assert pretended.strays == []
        torch.maximum(there, x), torch.cat([there, x])
    assert [stray.split()[0] for stray in pretended.strays] == ["maximum", "cat"]


AT = [
    "c100_basic_gkl",
    "c100_basic_kl",
    "c100_autoaug",
    "c100_acat",
    "c100_dajat",
    "c100_dm",
    "c10_rice",
    "c100_awp",
    "c100_lbgat_awp",
]


@pytest.mark.parametrize("experiment", AT)
def test_an_adversarial_step_waits_for_nothing(experiment: str, tmp_path: Path, pretended: Pretended) -> None:
    """All but LAS-AT, whose strategy network says how many steps an attack takes."""
    own = [f"generated.root={tmp_path}"] if experiment == "c100_dm" else []
    with pretended:
        _, task = task_of(f"at/{experiment}", "epochs=200", *own, device=str(DEVICE))
        task.start_epoch(60)
        pretended.waits.clear()
        for step in range(2):
            scalars = task.train_step(60, step)
    assert all(isinstance(value, There) for value in scalars.values())
    assert pretended.waits == [] and pretended.strays == []


KD = ["kd", "gkl", "ikl", "dkd", "fitnet", "rkd", "crd", "ofd", "reviewkd"]


@pytest.mark.parametrize("method", KD)
def test_a_distillation_step_waits_for_nothing(method: str, tmp_path: Path, pretended: Pretended) -> None:
    with pretended:
        task = make_task(method, tmp_path, device=str(DEVICE))
        task.start_epoch(3)
        for _ in range(2):  # at first the teacher's kept logits are not there yet, and are written
            pretended.waits.clear()
            for step in range(2):
                task.train_step(3, step)
    assert pretended.waits == [] and pretended.strays == []


OTHERS = {
    "fixmatch_gkl": test_semi_supervised, "mean_teacher_gkl": test_semi_supervised, "baseline": test_segmentation,
    "apd_gkl": test_segmentation,
}  # fmt: skip


@pytest.mark.parametrize("row", OTHERS)
def test_a_step_with_few_labels_or_of_maps_waits_for_nothing(row: str, pretended: Pretended) -> None:
    with pretended:
        task = OTHERS[row].make_task(row, device=str(DEVICE))
        task.start_epoch(1)
        task.train_step(1, 0)
        pretended.waits.clear()
        task.train_step(1, 1)
    assert pretended.waits == [] and pretended.strays == []


@pytest.mark.parametrize("row", ["baseline", "gkl"])
def test_a_clip_step_waits_for_nothing(row: str, tmp_path: Path, pretended: Pretended) -> None:
    pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
    with pretended:
        task = test_clip.make_task(row, tmp_path, device=str(DEVICE))
        task.start_epoch(1)
        task.train_step(1, 0)
        pretended.waits.clear()
        task.train_step(1, 1)
    assert pretended.waits == [] and pretended.strays == []


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # which is done all the same
@pytest.mark.parametrize(("made", "epoch"), [("language_task", 1), ("make_task", 1), ("make_task", 2)])
def test_a_language_model_s_step_leaves_nothing_behind(
    made: str, epoch: int, tmp_path: Path, pretended: Pretended
) -> None:
    """Alone, and LLaVA's in either phase; it waits for which tokens are answers."""
    test_llava = import_module("tests.trainers.methods.test_llava")  # which skips without the extra llava
    with pretended:
        task = getattr(test_llava, made)(tmp_path, device=str(DEVICE))
        task.start_epoch(epoch)
        shares = [task.train_step(epoch, step) for step in range(2)]
    assert all(isinstance(value, There) for share in shares for value in share.values())
    assert pretended.strays == [] and any("language.py" in wait for wait in pretended.waits)
