"""AutoAugment gives Pillow's own pixels: each operation, each picture's draw of the policy, and the authors' code where it is at hand."""

import importlib.util
import math
import os
import platform
import random
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from gkl.data.augment import Views, crop_flip
from gkl.data.autoaugment import CIFAR10_POLICY, OPERATIONS, apply, autoaugment
from gkl.data.digits import digits
from gkl.rng import integers, sample_keys, uniform
from tests.pretended import DEVICE, Pretended, pretended

__all__ = ["pretended"]  # a fixture

# Pillow's builds for other processors may fuse a product and a sum; its pixels then differ where a result lies at a whole number.
EXACT = platform.machine().lower() in ("x86_64", "amd64")
SIZES = [(8, 8), (32, 32), (24, 40), (2, 5), (1, 1)]
ENHANCEMENTS = {
    "brightness": ImageEnhance.Brightness, "color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}  # fmt: skip
SIGNED = {"shear_y", "translate_x", "translate_y", *ENHANCEMENTS}


@lru_cache
def pictures(height: int, width: int) -> Tensor:
    """Noise, gradients, few and extreme greys, one grey, photographs and digits, (N, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (12, 3, height, width), generator=generator)
    dim = torch.randint(100, 130, (4, 3, height, width), generator=generator)
    extreme = torch.randint(0, 2, (4, 3, height, width), generator=generator) * 255
    one = torch.tensor([0, 1, 128, 254, 255])[:, None, None, None].expand(-1, 3, height, width).clone()
    almost = one.clone()
    almost[..., 0, 0] = 77
    down = torch.linspace(0, 255, height)[:, None].expand(3, height, width)
    across = torch.linspace(255, 0, width).expand(3, height, width)
    channels = torch.stack([down[0], across[0], (down[0] + across[0]) / 2])
    gradients = torch.stack([down, across, (down + across) / 2, channels])
    photographs = []
    for photograph in load_sample_images().images:
        whole = Image.fromarray(photograph)
        corners = torch.randint(0, 300, (6, 2), generator=generator).tolist()
        for picture in [
            whole.resize((width, height)),
            *(whole.crop((x, y, x + width, y + height)) for x, y in corners),
        ]:
            photographs.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    drawn = [
        torch.from_numpy(np.array(as_pillow(image).resize((width, height), Image.Resampling.BILINEAR)))
        for image in digits().train_images[:10]
    ]
    parts = [noise, dim, extreme, one, almost, gradients, torch.stack(photographs), torch.stack(drawn).permute(0, 3, 1, 2)]  # fmt: skip
    return torch.cat([part.to(torch.uint8) for part in parts])


def as_pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def stacked(made: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in made])


def pillows(operation: str, picture: Image.Image, level: int, negative: bool) -> Image.Image:
    """What Pillow gives for the authors' calls of it. Source: Adv-training-dkl/autoaug.py of their code."""
    sign = -1 if negative else 1
    size, grey = picture.size, (128, 128, 128)
    share, thirty, shear = (np.linspace(0, last, 10)[level] for last in (150 / 331, 30, 0.3))

    def affine(*matrix: float, **options: Image.Resampling) -> Image.Image:
        return picture.transform(size, Image.Transform.AFFINE, matrix, **options, fillcolor=grey)

    match operation:
        case "shear_y":
            return affine(1, 0, 0, shear * sign, 1, 0, resample=Image.Resampling.BICUBIC)
        case "translate_x":
            return affine(1, 0, share * size[0] * sign, 0, 1, 0)
        case "translate_y":
            return affine(1, 0, 0, 0, 1, share * size[1] * sign)
        case "rotate":
            turned = picture.convert("RGBA").rotate(thirty)
            return Image.composite(turned, Image.new("RGBA", size, (128,) * 4), turned).convert("RGB")
        case "posterize":
            return ImageOps.posterize(picture, np.round(np.linspace(8, 4, 10), 0).astype(int)[level])
        case "solarize":
            return ImageOps.solarize(picture, np.linspace(256, 0, 10)[level])
        case "autocontrast" | "equalize" | "invert":
            return getattr(ImageOps, operation)(picture)
    return ENHANCEMENTS[operation](picture).enhance(1 + np.linspace(0, 0.9, 10)[level] * sign)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
    if EXACT:
        assert ours.equal(theirs), f"{(ours != theirs).sum()} of {ours.numel()} differ"
    else:
        apart = (ours.int() - theirs.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_an_operation_is_pillow_s(operation: str, size: tuple[int, int]) -> None:
    """At the policy's levels; at size 32 at every level."""
    images = pictures(*size)
    before = images.clone()
    levels = {level for sub in CIFAR10_POLICY for name, _, level in sub if name == operation}
    for level in range(10) if size == (32, 32) else sorted(levels):
        for negative in (False, True):
            if operation in SIGNED or not negative:
                theirs = stacked([pillows(operation, as_pillow(image), level, negative) for image in images])
            assert_same(apply(operation, images, level, negative), theirs)
    assert images.equal(before)


def test_the_operations_are_the_policy_s() -> None:
    assert {*OPERATIONS} == {operation for sub in CIFAR10_POLICY for operation, _, _ in sub}


def test_policy_is_the_published_one() -> None:
    published = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    spelling = {"sheary": "shear_y", "translatex": "translate_x", "translatey": "translate_y"}
    theirs = tuple(
        tuple((spelling.get(n.lower(), n.lower()), p, m or 0) for n, p, m in sub) for sub in published
    )
    ours = tuple(
        tuple((n, p, 0 if n in ("autocontrast", "equalize", "invert") else m) for n, p, m in sub)
        for sub in CIFAR10_POLICY
    )
    assert ours == theirs


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_picture_gets_what_it_draws(size: tuple[int, int]) -> None:
    """Sub-policy, whether each operation happens, and signs, from the keys as they always were."""
    images = pictures(*size).repeat(8, 1, 1, 1)
    keys = sample_keys(seed=0, epoch=1, index=torch.arange(len(images)), stream="autoaugment/0")
    drawn = integers(keys, 1, 25).squeeze(1).tolist()
    chances, negatives = uniform(keys + 1, 2).tolist(), integers(keys + 2, 2, 2).bool().tolist()
    theirs, happened = [], 0
    for image, number, chance, negative in zip(images, drawn, chances, negatives, strict=True):
        picture = as_pillow(image)
        for place, (operation, probability, level) in enumerate(CIFAR10_POLICY[number]):
            if chance[place] < probability:
                picture = pillows(operation, picture, level, negative[place])
                happened += 1
        theirs.append(picture)
    assert len({*drawn}) == 25 and happened > len(images) / 2
    assert_same(autoaugment(images, keys), stacked(theirs))


@pytest.mark.parametrize("count", [0, 1])
def test_few_pictures(count: int) -> None:
    images = pictures(32, 32)[:count]
    keys = sample_keys(0, 1, torch.arange(count), "autoaugment/0")
    assert autoaugment(images, keys).shape == (count, 3, 32, 32)


def test_every_sub_policy_is_drawn_and_probabilities_hold() -> None:
    """An image whose sub-policy's operations are both not drawn is unchanged: as often as the policy says."""
    images = pictures(32, 32)[:1].expand(5000, -1, -1, -1).contiguous()
    keys = sample_keys(seed=0, epoch=1, index=torch.arange(5000), stream="autoaugment/0")
    out = autoaugment(images, keys)
    drawn = integers(keys, 1, 25).squeeze(1)
    unchanged = (out == images).flatten(1).all(1)
    for number, sub in enumerate(CIFAR10_POLICY):
        expected = math.prod(1 - p for _, p, _ in sub)
        mine = unchanged[drawn == number].float()
        assert len(mine) > 120
        slack = 5 * math.sqrt(max(expected * (1 - expected), 0.01) / len(mine))
        assert mine.mean() >= expected - slack, (number, mine.mean(), expected)


def test_dajat_s_view_is_the_same_policy_before_the_crop() -> None:
    """Its authors take the same file of the policy and crop afterwards."""
    images = pictures(32, 32)
    index = torch.arange(len(images))
    [view] = Views(["autoaugment_first"])(images, seed=0, epoch=1, index=index)
    strong = autoaugment(images, sample_keys(0, 1, index, "autoaugment/0"))
    assert view.equal(crop_flip(strong, sample_keys(0, 1, index, "crop_flip/0"), padding=4, flip=0.5))


def test_a_device_is_asked_for_nothing(pretended: Pretended) -> None:
    images = pictures(32, 32).repeat(4, 1, 1, 1)
    index = torch.arange(len(images))
    keys = sample_keys(0, 1, index, "autoaugment/0")
    with pretended:
        there = images.to(DEVICE, non_blocking=True)
        views = Views(["autoaugment", "autoaugment_first"])(there, seed=0, epoch=1, index=index)
        out = autoaugment(there, keys)
    assert {view.device for view in (*views, out)} == {DEVICE}
    assert pretended.waits == [] and pretended.strays == []
    with pretended:
        assert out.cpu().equal(autoaugment(images, keys))


# --- against the authors' code ------------------------------------------------------------------------------------------


def reference() -> ModuleType:
    """Their module, out of a checkout of their repository or of its DKLv2."""
    root, file = Path(os.environ["DKL_REF"]), "Adv-training-dkl/autoaug.py"
    path = next(path for path in (root / file, root / "DKLv2" / file) if path.is_file())
    spec = importlib.util.spec_from_file_location("reference_autoaug", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("DKL_REF" not in os.environ, reason="needs DKL_REF, a checkout of the authors' code")
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (24, 40)])
def test_policy_equals_the_authors(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their policy and sub-policies as they are, told our draws where they ask for theirs."""
    monkeypatch.setattr(np, "int", int, raising=False)  # numpy had it when they wrote
    policy = reference().CIFAR10Policy()
    images = pictures(*size).repeat(12, 1, 1, 1)
    keys = sample_keys(seed=0, epoch=1, index=torch.arange(len(images)), stream="autoaugment/0")
    drawn = integers(keys, 1, 25).squeeze(1).tolist()
    chances, negatives = uniform(keys + 1, 2).tolist(), integers(keys + 2, 2, 2).tolist()
    theirs = []
    for image, number, chance, negative in zip(images, drawn, chances, negatives, strict=True):
        asked = iter(zip(chance, negative, strict=True))
        told = {"number": number, "negative": 0}

        def of_place(asked: object = asked, told: dict[str, int] = told) -> float:
            happens, told["negative"] = next(asked)  # type: ignore[call-overload]
            return happens

        monkeypatch.setattr(random, "randint", lambda low, high, told=told: told["number"])
        monkeypatch.setattr(random, "random", of_place)
        monkeypatch.setattr(random, "choice", lambda signs, told=told: sorted(signs)[1 - told["negative"]])
        theirs.append(policy(as_pillow(image)))
    monkeypatch.undo()
    assert_same(autoaugment(images, keys), stacked(theirs))


@pytest.mark.skipif("DKL_REF" not in os.environ, reason="needs DKL_REF, a checkout of the authors' code")
def test_sub_policies_equal_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operations of each, with both signs: what draws of the policy seldom give is there too."""
    monkeypatch.setattr(np, "int", int, raising=False)
    policies = reference().CIFAR10Policy().policies
    images = pictures(32, 32)
    assert len(policies) == len(CIFAR10_POLICY)
    for theirs, ours in zip(policies, CIFAR10_POLICY, strict=True):
        assert (theirs.p1, theirs.p2) == (ours[0][1], ours[1][1])
        for negative in (False, True):
            monkeypatch.setattr(random, "random", lambda: -1.0)  # below a probability of 0, too
            monkeypatch.setattr(random, "choice", lambda signs, negative=negative: -1 if negative else 1)
            made = stacked([theirs(as_pillow(image)) for image in images])
            out = images
            for operation, _, level in ours:
                out = apply(operation, out, level, negative)
            assert_same(out, made)
