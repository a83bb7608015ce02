"""Kept batches are those of the very network, data and settings."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.evaluation import evaluate
from gkl.evaluation.kept import Kept, _Told, digest, fingerprint, looks, named
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
    kept, points = Kept(tmp_path, {"seed": 0}, torch.zeros(1)), torch.arange(3)
    outcome = {
        "robust": torch.tensor([True, False, True]).numpy(),
        "warnings": points.numpy()[:0].astype("U1"),
    }
    kept.write("apgd-ce", 0, points, outcome, 1.0)
    part = kept.read("apgd-ce", 0, points)
    assert part is not None and part["robust"].tolist() == [True, False, True]
    assert kept.read("apgd-ce", 0, points + 1) is None and kept.read("apgd-t", 0, points) is None
    assert Kept(tmp_path, {"seed": 1}, torch.zeros(1)).read("apgd-ce", 0, points) is None
    file = next(kept.folder.iterdir())
    file.write_bytes(file.read_bytes()[:40])
    assert kept.read("apgd-ce", 0, points) is None


def test_digest_sees_contents_shapes_and_types() -> None:
    x = torch.arange(6)
    assert digest(x) != digest(x.view(2, 3)) != digest(x.float()) and digest(x) == digest(x.clone())


SHIFT = 0.0


def network(body: Callable[..., Tensor], **attributes: object) -> nn.Module:
    """A network whose forward is the same, whatever it calls and holds."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            vars(self).update(attributes)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)  # type: ignore[operator, no-any-return]

    Net.body = body  # type: ignore[attr-defined]
    return Net().eval()


def shifted(self: nn.Module, x: Tensor) -> Tensor:
    return x + SHIFT


def inner(number: float) -> Callable[..., Tensor]:
    return {1.0: lambda self, x: (lambda t: t + 1.0)(x), 2.0: lambda self, x: (lambda t: t + 2.0)(x)}[number]


def hooked(factor: float) -> nn.Module:
    made = network(shifted)
    made.register_forward_hook(lambda module, x, y: y * factor)
    return made


@pytest.mark.parametrize(
    "one, other",
    [
        (network(lambda self, x: x * 2.0), network(lambda self, x: x * 3.0)),
        (network(inner(1.0)), network(inner(2.0))),
        (network(shifted, _scale=1.0), network(shifted, _scale=2.0)),
        (network(shifted, mean=torch.zeros(3)), network(shifted, mean=torch.ones(3))),
        (network(shifted, mean=np.zeros(3)), network(shifted, mean=np.ones(3))),
        (network(shifted, settings={"mean": 0.0}), network(shifted, settings={"mean": 1.0})),
        (network(shifted, dtype=torch.float16), network(shifted, dtype=torch.float32)),
        (hooked(1.0), hooked(2.0)),
    ],
    ids=["method", "function in a method", "private number", "tensor", "array", "dict", "dtype", "hook"],
)
def test_networks_of_one_forward_are_told_apart(one: nn.Module, other: nn.Module) -> None:
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_a_constant_of_its_file_is_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(network(shifted))
    monkeypatch.setitem(globals(), "SHIFT", 1.0)
    assert fingerprint(network(shifted)) != before


def test_a_fingerprint_is_the_same_in_every_process_and_after_a_look() -> None:
    """Processes share what is kept under it: else each would wait for the others in vain."""
    names = ("wrn_10_1", "vit_small_patch2_32")
    said = (
        "import torch; from gkl.models import create; from gkl.evaluation.kept import fingerprint\n"
        f"for name in {names}: torch.manual_seed(0); print(fingerprint(create(name, 10).eval()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", said], env=environment, check=True, capture_output=True, text=True
    )
    for name, found in zip(names, other.stdout.split(), strict=True):
        torch.manual_seed(0)
        made = create(name, 10).eval()
        before = fingerprint(made)
        with torch.no_grad():
            made(torch.rand(2, 3, 32, 32))
        assert before == fingerprint(made) == found


TABLE: dict[str, Callable[[Tensor], Tensor]] = {}


def of_table(x: Tensor, name: str) -> Tensor:
    return TABLE[name](x)


def twice(x: Tensor) -> Tensor:
    return of_table(x, "single") * 2.0


def test_a_table_of_functions_may_hold_what_names_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As registries of activations do. What the table holds is of the network."""
    monkeypatch.setitem(TABLE, "single", lambda x: x + 1.0)
    monkeypatch.setitem(TABLE, "twice", twice)
    made = network(lambda self, x: of_table(x, "twice"))
    before = fingerprint(made)
    assert before == fingerprint(made)
    monkeypatch.setitem(TABLE, "single", lambda x: x + 2.0)
    assert before != fingerprint(made)
    endless: list[object] = [1]
    endless.append(endless)
    assert fingerprint(network(shifted, held=endless)) == fingerprint(network(shifted, held=endless))


class Settings:
    """Of which no fingerprint tells what they hold."""

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Configured(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.settings, self.linear = Settings(factor), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        answers: Tensor = self.linear((self.settings.factor * x.flatten(1)).sin())
        return answers


def test_networks_that_no_fingerprint_tells_apart_are_attacked_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (24, 3, 4, 4), dtype=torch.uint8)
    one, other = same_weights(Configured(2.0), Configured(8.0))
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        labels = one(images / 255).argmax(-1)
    place = {"folder": tmp_path, "device": torch.device("cpu"), "version": "screen", "epsilon": 0.02}
    first, second = evaluate(one, images, labels, **place), evaluate(other, images, labels, **place)
    alone = evaluate(other, images, labels, **{**place, "folder": tmp_path / "alone"})
    assert second.clean_flags.equal(alone.clean_flags) and not second.clean_flags.equal(first.clean_flags)
    assert second.robust_flags.equal(alone.robust_flags)
    kept = {path.name for path in tmp_path.glob("*/*.npz")}
    again = evaluate(one, images, labels, **place)
    assert again.robust_flags.equal(first.robust_flags) and again.seconds == first.seconds
    assert kept == {path.name for path in tmp_path.glob("*/*.npz")}


def test_things_of_one_key_are_named_by_what_they_look_like(tmp_path: Path) -> None:
    seen = looks(torch.tensor([1.0, -3.0]), torch.tensor([2e-9]))
    first = named(tmp_path, {"seed": 0}, seen)
    assert first == named(tmp_path, {"seed": 0}, seen + 5e-4) != named(tmp_path, {"seed": 1}, seen)
    others = {named(tmp_path, {"seed": 0}, looks(torch.tensor([1.0, -3.1]), torch.tensor([2e-9]))),
              named(tmp_path, {"seed": 0}, looks(torch.tensor([1.01, -3.03]), torch.tensor([2e-9]))),
              named(tmp_path, {"seed": 0}, looks(torch.tensor([1.0, -3.0]), torch.tensor([3e-9])))}  # fmt: skip
    assert len(others | {first}) == 4
    (tmp_path / f"{first}.looks.npy").write_bytes(b"damaged")
    assert named(tmp_path, {"seed": 0}, seen) not in {*others, first}


def test_a_fingerprint_of_other_people_s_code_is_of_its_files() -> None:
    """Which is bounded: what functions of a large package name is most of it."""
    made = create("vit_tiny_patch16_224", 4, timm_options={"depth": 1, "img_size": 32})
    assert fingerprint(made) == fingerprint(made)
    code = _Told().code(timm.layers.Mlp.forward)
    assert code == f"Mlp.forward of {hashlib.sha256(Path(timm.layers.mlp.__file__).read_bytes()).hexdigest()}"
