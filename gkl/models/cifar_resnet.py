"""Residual networks of depth 6 n + 2 for 32x32 pictures (He et al. 2016), as distillation work on CIFAR-100 has them.

Source: RepDistiller and mdistiller, parameter names included, so that their teachers load here.
"""

import itertools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, kaiming_, register_model, staged_blocks
from gkl.models.normalise import Normalisation, normaliser


class BasicBlock(nn.Module):
    """Two convolutions; a 1x1 convolution with batch norm on the shortcut where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def before(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU. (B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return out + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        return F.relu(self.before(x), inplace=True)  # before() made it, and nothing else has it


class CifarResNet(TappedClassifier):
    """Three stages of n basic blocks. "x4" networks are four times as wide in the stages, twice in the stem."""

    classifier_name = "fc"

    def __init__(
        self,
        depth: int,
        widths: tuple[int, int, int, int],
        num_classes: int = 100,
        normalisation: Normalisation = None,
    ) -> None:
        """widths: of stem and stages. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=widths[3])
        blocks = (depth - 2) // 6
        self.normalise = normaliser(normalisation)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                BasicBlock(before, width, 1 if number == 0 else 2),
                *(BasicBlock(width, width, 1) for _ in range(blocks - 1)),
            )
            for number, (before, width) in enumerate(itertools.pairwise(widths))
        )
        self.fc = nn.Linear(widths[3], num_classes)
        kaiming_(self)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and three stages, and the last map (B, widths[3], H / 4, W / 4)."""
        stem = F.relu(self.bn1(self.conv1(self.normalise(x))), inplace=True)
        return staged_blocks(stem, [self.layer1, self.layer2, self.layer3])

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage; the shortcut is added to what it gives."""
        return [stage[-1].bn2 for stage in (self.layer1, self.layer2, self.layer3)]  # type: ignore[misc]


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)


@register_model
def resnet_20(**options: Any) -> CifarResNet:
    """0.3 million parameters."""
    return CifarResNet(20, NARROW, **options)


@register_model
def resnet_32(**options: Any) -> CifarResNet:
    """0.5 million parameters."""
    return CifarResNet(32, NARROW, **options)


@register_model
def resnet_56(**options: Any) -> CifarResNet:
    """0.9 million parameters."""
    return CifarResNet(56, NARROW, **options)


@register_model
def resnet_110(**options: Any) -> CifarResNet:
    """1.7 million parameters."""
    return CifarResNet(110, NARROW, **options)


@register_model
def resnet_8x4(**options: Any) -> CifarResNet:
    """1.2 million parameters."""
    return CifarResNet(8, WIDE, **options)


@register_model
def resnet_32x4(**options: Any) -> CifarResNet:
    """7.4 million parameters."""
    return CifarResNet(32, WIDE, **options)
