"""CLIP's losses over gathered features: OpenCLIP's own side by side on 1, 2 and 3 processes, and GKL in a slow restatement."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.distributed import all_reduce, rank, world_size
from gkl.losses.contrastive import (
    SimilarityGKL,
    SimilarityLoss,
    SoftCrossEntropy,
    both_ways,
    contrastive,
    similarities,
)
from tests.processes import on_processes

pytest.importorskip("open_clip", reason="needs open_clip_torch, the extra clip")
PAIRS, OWN, THEIRS = 6, 5, 7  # widths of the student's and the teacher's features
GKL = SimilarityGKL(alpha=2.0, beta=0.7, gamma=0.3, temperature=8.0)


def drawn() -> dict[str, Tensor]:
    """Features of a whole batch in float64: the student's not normalised yet, so that its gradients are those of free numbers."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"images": OWN, "texts": OWN, "their_images": THEIRS, "their_texts": THEIRS}
    made = {
        k: torch.randn(PAIRS, width, generator=generator, dtype=torch.float64) for k, width in sizes.items()
    }
    return {k: F.normalize(v, dim=1) if k.startswith("their") else v for k, v in made.items()}


def mine(parts: int, number: int) -> dict[str, Tensor]:
    """A process's features and logit scale, the student's wanting a gradient."""
    own = {k: v.chunk(parts)[number].clone() for k, v in drawn().items()}
    own["log_scale"] = torch.tensor(2.6, dtype=torch.float64)
    for name in ("images", "texts", "log_scale"):
        own[name].requires_grad_()
    return own


def ours(own: dict[str, Tensor], loss: SimilarityLoss) -> tuple[Tensor, Tensor]:
    """This process's shares of both losses."""
    images, texts = F.normalize(own["images"], dim=1), F.normalize(own["texts"], dim=1)
    student = similarities(images, texts, own["log_scale"].exp())
    teacher = similarities(own["their_images"], own["their_texts"], torch.tensor(100.0).double())
    return contrastive(student).sum() / PAIRS, both_ways(loss, student, teacher).sum() / PAIRS


def upstream(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """OpenCLIP's, whose mean over a process's rows is the share times the number of processes."""
    from open_clip.loss import DistillClipLoss

    count = world_size()
    module = DistillClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=count)
    images, texts = F.normalize(own["images"], dim=1), F.normalize(own["texts"], dim=1)
    teacher = own["their_images"], own["their_texts"], torch.tensor(100.0).double()
    both = module(images, texts, own["log_scale"].exp(), *teacher)
    return both[0] / count, both[1] / count


def result(make: Any, *arguments: Any) -> dict[str, Tensor]:
    """Values over all processes, and this process's gradients of a weighted sum of both."""
    own = mine(world_size(), rank())
    first, second = make(own, *arguments)
    (first + 1.7 * second).backward()
    return {
        "contrastive": all_reduce(first), "distillation": all_reduce(second), "images": own["images"].grad,
        "texts": own["texts"].grad, "log_scale": all_reduce(own["log_scale"].grad),
    }  # fmt: skip


def compare(folder: str | None = None) -> None:
    """Ours beside OpenCLIP's; with a folder GKL's parts are left there."""
    one, other = result(ours, SoftCrossEntropy()), result(upstream)
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-13, atol=1e-15, msg=name)
    if folder:
        torch.save(result(ours, GKL), f"{folder}/gkl{rank()}.pt")


def test_one_process_is_openclip() -> None:
    compare()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])  # each imports OpenCLIP
def test_processes_are_openclip_and_gkl_on_them_is_that_on_one(count: int, tmp_path: Path) -> None:
    on_processes(compare, tmp_path, str(tmp_path), count=count)
    whole = result(ours, GKL)
    parts = [torch.load(tmp_path / f"gkl{n}.pt", weights_only=True) for n in range(count)]
    for name in ("images", "texts"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole[name], rtol=1e-12, atol=1e-15)
    for name in ("contrastive", "distillation", "log_scale"):
        assert all(part[name].item() == pytest.approx(whole[name].item(), rel=1e-13) for part in parts), name


def test_gkl_in_a_slow_restatement() -> None:
    """Eq. 13 pair by pair of columns on logits / t, each direction with a mean of W^2 of its own."""
    own = mine(1, 0)
    images, texts = F.normalize(own["images"], dim=1), F.normalize(own["texts"], dim=1)
    values = []
    for rows in range(2):
        pair = (images, texts) if rows == 0 else (texts, images)
        theirs = (own["their_images"], own["their_texts"])[:: 1 if rows == 0 else -1]
        s = own["log_scale"].exp() * pair[0] @ pair[1].T / 8.0
        t = 100.0 * theirs[0] @ theirs[1].T / 8.0
        w = t.softmax(1) ** 0.3
        wmse = torch.zeros(PAIRS, dtype=torch.float64)
        for j in range(PAIRS):
            for k in range(PAIRS):
                gap = (t[:, j] - t[:, k]) - (s[:, j] - s[:, k])
                wmse = wmse + 0.25 * w[:, j] * w[:, k] * gap**2
        soft = -(t.softmax(1) * s.log_softmax(1)).sum(1)
        values.append(2.0 * wmse / (w.sum(1) ** 2).mean() + 0.7 * soft)
    expected = (values[0] + values[1]).mean() / 2
    (1.7 * expected).backward()
    again = mine(1, 0)
    found = ours(again, GKL)[1]
    (1.7 * found).backward()
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    for name in ("images", "texts", "log_scale"):
        torch.testing.assert_close(again[name].grad, own[name].grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t", [1.0, 8.0])
def test_the_temperature_divides_both_sides_and_each_has_its_own_scale(t: float) -> None:
    own = mine(1, 0)
    images, texts = F.normalize(own["images"], dim=1), F.normalize(own["texts"], dim=1)
    student = own["log_scale"].exp() * images @ texts.T / t
    teacher = 100.0 * own["their_images"] @ own["their_texts"].T / t
    one = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    other = -(teacher.T.softmax(1) * student.T.log_softmax(1)).sum(1).mean()
    found = ours(own, SoftCrossEntropy(temperature=t))[1]
    torch.testing.assert_close(found, (one + other) / 2, rtol=1e-13, atol=1e-14)
    assert not torch.isclose(found, one), "one direction alone would do"


def test_wmse_on_undivided_similarities_would_be_another_loss() -> None:
    """Raw similarities of 100 times a cosine: weights nearly one-hot, a loss of other size."""
    teacher = similarities(
        drawn()["their_images"], drawn()["their_texts"], torch.tensor(100.0).double()
    ).image
    assert teacher.softmax(1).amax(1).mean() > 0.9 > (teacher / 8.0).softmax(1).amax(1).mean()


def test_gamma_is_checked_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"loss.gamma must lie in \[0, 1\], got 1.5"):
        SimilarityGKL(alpha=1.0, beta=1.0, gamma=1.5, temperature=8.0)
