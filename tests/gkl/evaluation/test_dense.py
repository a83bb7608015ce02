"""mIoU against its definition, and windows against a picture looked at whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkl.data.dense import BORDER, IGNORED
from gkl.evaluation.dense import Counts, places, segmented


def test_counts_are_the_definition() -> None:
    torch.manual_seed(0)
    predicted, labels = torch.randint(0, 4, (2, 3, 20, 20))
    labels[torch.rand(labels.shape) < 0.2] = IGNORED
    labels[labels == 3] = 2
    predicted[predicted == 3] = 0  # class 3 is nowhere
    found = Counts.of(predicted, labels, 4)
    counted = labels != IGNORED
    wanted = []
    for c in range(4):
        one, other = (predicted == c) & counted, (labels == c) & counted
        union = (one | other).sum().item()
        wanted.append(100 * (one & other).sum().item() / union if union else 0.0)
    assert found.iou() == pytest.approx(wanted) and wanted[3] == 0.0
    assert found.miou() == pytest.approx(sum(wanted) / 4)
    assert found.pixel_accuracy() == pytest.approx(
        100 * (predicted == labels)[counted].float().mean().item(), rel=1e-5
    )
    parts = [Counts.of(p, y, 4).rows() for p, y in zip(predicted, labels, strict=True)]
    assert Counts.from_rows(torch.stack(parts).sum(0)).iou() == found.iou()
    none = Counts.of(predicted, torch.full_like(labels, IGNORED), 4)
    assert none.miou() == none.pixel_accuracy() == 0.0


@pytest.mark.parametrize(
    ("size", "window", "wanted"),
    [(512, 473, [0, 39]), (473, 473, [0]), (1200, 473, [0, 316, 632, 727]), (33, 17, [0, 12, 16])],
)
def test_windows_cover_a_picture(size: int, window: int, wanted: list[int]) -> None:
    """Stride ceil(2/3 473) = 316; the last window ends with the picture."""
    assert places(size, window) == wanted
    assert math.ceil(473 * 2 / 3) == 316


def pointwise(x: Tensor) -> Tensor:
    """Logits that depend on a pixel alone, so that windows and mirroring change nothing."""
    return torch.stack([3 * x[:, 0] - x[:, 1], x[:, 1] + 0.1, 2 * x[:, 2] - 0.2], 1)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (9, 30)])
def test_windows_and_mirror_images_are_averaged(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.rand(3, *shape, dtype=torch.float64)
    seen = []

    def logits(x: Tensor) -> Tensor:
        seen.append(x)
        return pointwise(x)

    found = segmented(logits, image, 3, window=17, long_side=max(shape))
    assert all(x.shape == (2, 3, 17, 17) and x[0].equal(x[1].flip(-1)) for x in seen)
    assert found.equal(pointwise(image[None]).softmax(1)[0].argmax(0))
    seen.clear()
    assert segmented(logits, image, 3, 17, max(shape), mirrored=False).equal(found)
    assert all(x.shape == (1, 3, 17, 17) for x in seen)
    if min(shape) < 17:  # beyond it mean grey
        torch.testing.assert_close(seen[0][0, :, 0, 0], BORDER.flatten().double())


def test_a_picture_is_resized_by_its_long_side_and_back() -> None:
    torch.manual_seed(0)
    image = torch.rand(3, 30, 50, dtype=torch.float64)
    found = segmented(pointwise, image, 3, window=25, long_side=25)
    small = F.interpolate(image[None], (15, 25), mode="bilinear")
    probs = F.interpolate(pointwise(small).softmax(1), (30, 50), mode="bilinear")[0]
    assert found.shape == (30, 50) and found.equal(probs.argmax(0))


def test_the_side_of_a_window_matters_to_a_network_that_sees_it() -> None:
    """What windows overlap is their mean, not the last one's."""
    image = torch.rand(3, 17, 29, dtype=torch.float64)

    def logits(x: Tensor) -> Tensor:
        made = torch.zeros(len(x), 2, 17, 17, dtype=x.dtype)
        made[:, 1] = torch.linspace(-1, 1, 17, dtype=x.dtype) * 4 + 0.5  # by column
        return made

    window = logits(image[None, :, :, :17]).softmax(1)
    each = (window + window.flip(-1))[0] / 2
    total, times = torch.zeros(2, 17, 29, dtype=torch.float64), torch.zeros(29)
    for place in places(29, 17):
        total[:, :, place : place + 17] += each
        times[place : place + 17] += 1
    assert segmented(logits, image, 2, window=17, long_side=29).equal((total / times).argmax(0))
