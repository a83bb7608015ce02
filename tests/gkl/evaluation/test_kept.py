"""Kept batches are those of the very network, data and settings."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.evaluation import evaluate
from gkl.evaluation.kept import Kept, digest, fingerprint
from gkl.models import create


class Slope(nn.Module):
    """A network whose plain number, whose function, or whose tensor outside the state dict may differ."""

    def __init__(
        self, slope: float = 0.1, act: Callable[[Tensor], Tensor] = F.relu, mean: float = 0.0
    ) -> None:
        super().__init__()
        self.slope, self.act = slope, act
        self.linear = nn.Linear(3 * 4 * 4, 5)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * self.act(self.linear(x.flatten(1) - self.mean))


def same_weights(*networks: nn.Module) -> list[nn.Module]:
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    return [network.eval() for network in networks]


@pytest.mark.parametrize(
    "one, other",
    [
        (Slope(), Slope(slope=0.2)),
        (Slope(), Slope(act=F.silu)),
        (Slope(act=lambda x: x.relu()), Slope(act=lambda x: x.sigmoid())),
        (Slope(), Slope(mean=0.5)),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())),
        (create("wrn_10_1", 10), create("wrn_10_1", 10, normalisation="cifar10")),
    ],
    ids=["number", "function", "lambda", "buffer", "activation", "normalisation"],
)
def test_networks_of_one_state_dict_are_told_apart(one: nn.Module, other: nn.Module) -> None:
    one, other = same_weights(one, other)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_a_network_loaded_anew_or_trained_meanwhile_is_itself() -> None:
    first, second = same_weights(create("wrn_10_1", 10), create("wrn_10_1", 10))
    second.train()(torch.rand(8, 3, 8, 8))
    second.load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second.eval())


def test_a_second_network_is_attacked_itself(tmp_path: Path) -> None:
    """Once its kept batches were the first network's, whose weights it has."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 4, 4), dtype=torch.uint8)
    one, other = same_weights(Slope(), Slope(mean=0.5))
    with torch.no_grad():
        labels = one(images / 255).argmax(-1)
    place = {"folder": tmp_path, "device": torch.device("cpu"), "version": "screen", "epsilon": 0.02}
    first = evaluate(one, images, labels, **place)
    second = evaluate(other, images, labels, **place)
    alone = evaluate(other, images, labels, **{**place, "folder": tmp_path / "alone"})
    assert second.clean_flags.equal(alone.clean_flags) and not second.clean_flags.equal(first.clean_flags)
    assert second.robust_flags.equal(alone.robust_flags)


def test_damaged_and_other_batches_are_not_read(tmp_path: Path) -> None:
    kept, points = Kept(tmp_path, {"seed": 0}), torch.arange(3)
    outcome = {
        "robust": torch.tensor([True, False, True]).numpy(),
        "warnings": points.numpy()[:0].astype("U1"),
    }
    kept.write("apgd-ce", 0, points, outcome, 1.0)
    part = kept.read("apgd-ce", 0, points)
    assert part is not None and part["robust"].tolist() == [True, False, True]
    assert kept.read("apgd-ce", 0, points + 1) is None and kept.read("apgd-t", 0, points) is None
    assert Kept(tmp_path, {"seed": 1}).read("apgd-ce", 0, points) is None
    file = next(kept.folder.iterdir())
    file.write_bytes(file.read_bytes()[:40])
    assert kept.read("apgd-ce", 0, points) is None


def test_digest_sees_contents_shapes_and_types() -> None:
    x = torch.arange(6)
    assert digest(x) != digest(x.view(2, 3)) != digest(x.float()) and digest(x) == digest(x.clone())
