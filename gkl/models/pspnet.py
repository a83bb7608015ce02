"""PSPNet (Zhao et al. 2017) as APD has it: a dilated ResNet with a deep stem, pyramid pooling, an auxiliary head.

    maps = pspnet_18(num_classes=150).forward_maps(x)       # logits and auxiliary (B, 150, 60, 60), features (B, 512, 60, 60) of 473 pixels
    logits = model(x)                                       # (B, 150, 473, 473)

Parameters have the names of APD's own, so that its files are read as they are. Source: github.com/dvlab-research/APD, model/pspnet.py.
Maps are pooled and resized by products with matrices: torch's own backward passes add in an order that changes on a GPU.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from gkl.models.classifier import register_model
from gkl.models.normalise import Normalisation, normaliser
from gkl.models.timm_network import KeyedDropPath
from gkl.rng import uniform

BINS = (1, 2, 3, 6)
STAGES = ("layer1", "layer2", "layer3", "layer4")


class Maps(NamedTuple):
    """What a PSPNet shows of pictures: all an eighth of their size. logits, auxiliary: (B, C, h, w). features: (B, head, h, w), what is classified."""

    logits: Tensor
    auxiliary: Tensor
    features: Tensor


class PSPNet(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> logits (B, C, H, W). H and W are 8 n + 1, as corners are aligned."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int,
        normalisation: Normalisation = "imagenet",
        width: int = 64,
        head: int = 512,
        dropout: float = 0.1,
    ) -> None:
        """layers: blocks of each stage. width: channels of the first stage. head: of the map that is classified. dropout: of its channels."""
        super().__init__()
        self.num_classes, self.num_features = num_classes, head
        self.normalise = normaliser(normalisation)
        resnet: Any = ResNet(
            block, tuple(layers), stem_type="deep", stem_width=width, channels=tuple(width << n for n in range(4)),
            zero_init_last=False,
        )  # fmt: skip
        self.layer0 = nn.Sequential(*resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool)
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = dilated(resnet.layer3, 2), dilated(resnet.layer4, 4)
        inner, outer = (width * n * block.expansion for n in (4, 8))
        self.ppm = PyramidPooling(outer, head, dropout)
        self.cls = nn.Sequential(nn.Conv2d(head, num_classes, 1))
        self.aux = nn.Sequential(
            nn.Conv2d(inner, 4 * width, 3, padding=1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True),
            KeyedDropout2d(dropout, 1), nn.Conv2d(4 * width, num_classes, 1),
        )  # fmt: skip

    def forward_maps(self, x: Tensor) -> Maps:
        """Pictures (B, 3, H, W) in [0, 1] -> its maps."""
        x = self.layer2(self.layer1(self.layer0(self.normalise(x))))
        inner = self.layer3(x)
        features = self.ppm(self.layer4(inner))
        return Maps(self.cls(features), self.aux(inner), features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> what is classified, (B, head, h, w)."""
        x = self.layer2(self.layer1(self.layer0(self.normalise(x))))
        features: Tensor = self.ppm(self.layer4(self.layer3(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> logits (B, C, H, W)."""
        return resized(self.cls(self.forward_features(x)), x.shape[-2:])

    def backbone(self) -> nn.ModuleList:
        """What a classifier of ImageNet can have taught; the rest learns at a higher rate."""
        return nn.ModuleList([self.layer0, *(self.get_submodule(stage) for stage in STAGES)])

    def begin_from(self, classifier: "DeepResNet") -> None:
        """Take a classifier's stages."""
        state = classifier.state_dict()
        own = {
            **{
                f"layer0.{3 * n + k}": f"{kind}{n + 1}"
                for n in range(3)
                for k, kind in enumerate(("conv", "bn"))
            }
        }
        taken = {
            key.replace(a, b, 1): state[key]
            for b, a in own.items()
            for key in state
            if key.startswith(f"{a}.")
        }
        taken |= {key: value for key, value in state.items() if key.startswith(STAGES)}
        wanted = {name for name in self.state_dict() if name.startswith("layer")}
        if taken.keys() != wanted:
            raise ValueError(
                f"a PSPNet begins from a ResNet of its own depth and width; {len(wanted - taken.keys())} tensors are missing there, "
                f"{len(taken.keys() - wanted)} have no place"
            )
        self.load_state_dict(taken, strict=False)


def dilated(stage: nn.Sequential, dilation: int) -> nn.Sequential:
    """A stage of a ResNet that keeps the size of its map: no stride, and one convolution of each block dilated, a BasicBlock's first
    and a Bottleneck's second. timm's output_stride dilates others."""
    blocks: Any = stage
    for block in blocks:
        conv = block.conv1 if isinstance(block, BasicBlock) else block.conv2
        conv.dilation = conv.padding = (dilation, dilation)
        conv.stride = (1, 1)
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)
    return stage


class PyramidPooling(nn.Module):
    """The map beside its means over 1, 2 x 2, 3 x 3 and 6 x 6 parts, merged."""

    def __init__(self, channels: int, head: int, dropout: float) -> None:
        """channels: of the map that comes in. head: of the one that goes out."""
        super().__init__()
        reduced = channels // len(BINS)
        self.features = nn.ModuleList(
            nn.Sequential(
                Pool(n), nn.Conv2d(channels, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU(inplace=True)
            )
            for n in BINS
        )  # fmt: skip
        self.merge = nn.Sequential(
            nn.Conv2d(2 * channels, head, 3, padding=1, bias=False), nn.BatchNorm2d(head), nn.ReLU(inplace=True),
            KeyedDropout2d(dropout, 0),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, head, h, w)."""
        means = [resized(part(x), x.shape[-2:]) for part in self.features]
        merged: Tensor = self.merge(torch.cat([x, *means], 1))
        return merged


class Pool(nn.Module):
    """Means over n x n parts of a map, as torch's adaptive pooling cuts them."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c, n, n)."""
        rows, columns = (averaging(size, self.parts, x.dtype, x.device) for size in x.shape[-2:])
        return rows @ x @ columns.T


class KeyedDropout2d(KeyedDropPath):
    """Dropout of whole channels whose draws follow from a key a picture. Without keys none is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape, some channels zeroed and the others scaled up."""
        if not self.training or self.drop == 0.0 or self.keys is None:
            return x
        kept = (uniform(self.keys + self.number, x.shape[1]) >= self.drop).to(x.dtype) / (1.0 - self.drop)
        return x * kept[:, :, None, None]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) to (B, C, *size), bilinear, corners aligned."""
    rows, columns = (interpolating(a, b, x.dtype, x.device) for a, b in zip(x.shape[-2:], size, strict=True))
    return rows @ (x @ columns.T)


@cache
def interpolating(size: int, to: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What makes `to` values of `size`, linear between them, the first and last kept; (to, size)."""
    place = torch.arange(to, dtype=torch.float64) * ((size - 1) / max(1, to - 1))
    near = 1.0 - (place[:, None] - torch.arange(size, dtype=torch.float64)).abs()
    return near.clamp(min=0.0).to(device, dtype)


@cache
def averaging(size: int, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What makes means over `parts` parts, which overlap where they do not divide, of `size` values; (parts, size)."""
    first = torch.arange(parts) * size // parts
    last = -(-(torch.arange(parts) + 1) * size // parts)
    number = torch.arange(size)
    inside = (number >= first[:, None]) & (number < last[:, None])
    return (inside.double() / inside.sum(1, keepdim=True)).to(device, dtype)


class DeepResNet(nn.Module):
    """ImageNet's ResNet with three convolutions in its stem, by the names of the files that PSPNets begin from."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int,
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        self.num_classes, self.normalise = num_classes, normaliser(normalisation)
        resnet: Any = ResNet(block, tuple(layers), num_classes, stem_type="deep", stem_width=64)
        for n, (conv, norm) in enumerate(
            [(resnet.conv1[0], resnet.conv1[1]), (resnet.conv1[3], resnet.conv1[4]), (resnet.conv1[6], resnet.bn1)], 1
        ):  # fmt: skip
            self.add_module(f"conv{n}", conv)
            self.add_module(f"bn{n}", norm)
        for name in (*STAGES, "fc"):
            self.add_module(name, resnet.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> logits (B, num_classes)."""
        x = self.normalise(x)
        for n in (1, 2, 3):
            x = self.get_submodule(f"bn{n}")(self.get_submodule(f"conv{n}")(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for stage in STAGES:
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.get_submodule("fc")(x.mean((2, 3)))
        return logits


@register_model
def pspnet_18(num_classes: int = 150, normalisation: Normalisation = "imagenet", **options: Any) -> PSPNet:
    """PSPNet on ResNet-18, APD's student. options: width, head, dropout."""
    return PSPNet(BasicBlock, (2, 2, 2, 2), num_classes, normalisation, **options)


@register_model
def pspnet_18_w8(num_classes: int = 10, normalisation: Normalisation = "imagenet", **options: Any) -> PSPNet:
    """An eighth of its channels, for pages of scans."""
    return pspnet_18(
        num_classes=num_classes, normalisation=normalisation, **{"width": 8, "head": 64, **options}
    )  # type: ignore[return-value]


@register_model
def pspnet_18_w16(num_classes: int = 10, normalisation: Normalisation = "imagenet", **options: Any) -> PSPNet:
    """A quarter, which teaches it."""
    return pspnet_18(
        num_classes=num_classes, normalisation=normalisation, **{"width": 16, "head": 64, **options}
    )  # type: ignore[return-value]


@register_model
def pspnet_18_w32(num_classes: int = 20, normalisation: Normalisation = "imagenet", **options: Any) -> PSPNet:
    """Half, for one GPU."""
    return pspnet_18(
        num_classes=num_classes, normalisation=normalisation, **{"width": 32, "head": 256, **options}
    )  # type: ignore[return-value]


@register_model
def pspnet_50_w32(num_classes: int = 20, normalisation: Normalisation = "imagenet", **options: Any) -> PSPNet:
    """PSPNet on half a ResNet-50, which teaches it."""
    return PSPNet(
        Bottleneck, (3, 4, 6, 3), num_classes, normalisation, **{"width": 32, "head": 256, **options}
    )


@register_model
def pspnet_101(num_classes: int = 150, normalisation: Normalisation = "imagenet", **options: Any) -> PSPNet:
    """PSPNet on ResNet-101, APD's teacher."""
    return PSPNet(Bottleneck, (3, 4, 23, 3), num_classes, normalisation, **options)


@register_model
def deep_resnet_18(num_classes: int = 1000, normalisation: Normalisation = "imagenet") -> DeepResNet:
    """What pspnet_18 begins from."""
    return DeepResNet(BasicBlock, (2, 2, 2, 2), num_classes, normalisation)


@register_model
def deep_resnet_101(num_classes: int = 1000, normalisation: Normalisation = "imagenet") -> DeepResNet:
    """What pspnet_101 begins from."""
    return DeepResNet(Bottleneck, (3, 4, 23, 3), num_classes, normalisation)
