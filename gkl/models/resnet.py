"""Residual networks with a 3x3 stem and four stages for small images (He et al. 2016).

ResNet-18: the companion networks of LBGAT and LAS-AT. ResNet-50: a teacher of the CIFAR-100 distillation tables.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, kaiming_, register_model, staged_blocks
from gkl.models.normalise import Normalisation, normaliser


class BasicBlock(nn.Module):
    """Two convolutions; a 1x1 convolution with batch norm on the shortcut where the shape changes."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(width_in, width, stride)

    def before(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU. (B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return out + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        return F.relu(self.before(x))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, the last four times as wide; shortcut as in BasicBlock."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        """width: of the 3x3 convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(width_in, 4 * width, stride)

    def before(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU. (B, width_in, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(out)) + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        return F.relu(self.before(x))


def _shortcut(width_in: int, width: int, stride: int) -> nn.Sequential:
    if stride == 1 and width_in == width:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ResNet(TappedClassifier):
    """Four stages of widths 64 to 512, times the block's expansion.

    Source: kuangliu/pytorch-cifar by way of LAS-AT (strides 1, 2, 2, 2), LBGAT (1, 1, 2, 2) and mdistiller, with their
    parameter names.
    """

    classifier_name = "linear"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        strides: tuple[int, int, int, int],
        num_classes: int = 10,
        normalisation: Normalisation = None,
    ) -> None:
        """blocks, strides: of each stage. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=512 * block.expansion)
        self.normalise = normaliser(normalisation)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        stages = []
        before = 64
        for count, width, stride in zip(blocks, (64, 128, 256, 512), strides, strict=True):
            after = width * block.expansion
            stages.append(
                nn.Sequential(
                    block(before, width, stride), *(block(after, width, 1) for _ in range(count - 1))
                )
            )
            before = after
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(before, num_classes)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and four stages, and the last map (B, num_features, h, w)."""
        stem = F.relu(self.bn1(self.conv1(self.normalise(x))))
        return staged_blocks(stem, [self.layer1, self.layer2, self.layer3, self.layer4])

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage; the shortcut is added to what it gives."""
        last = [stage[-1] for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]
        return [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in last]  # type: ignore[misc]


@register_model
def resnet_18(**options: Any) -> ResNet:
    """ResNet-18 at 1/8 of the resolution, torch's initialisation: LAS-AT's strategy network. 11.2 million parameters."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (1, 2, 2, 2), **options)


@register_model
def resnet_18_fine(**options: Any) -> ResNet:
    """ResNet-18 at 1/4 of the resolution, torch's initialisation: LBGAT's natural network."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (1, 1, 2, 2), **options)


@register_model
def resnet_50(**options: Any) -> ResNet:
    """ResNet-50 at 1/8 of the resolution: 23.7 million parameters."""
    model = ResNet(Bottleneck, (3, 4, 6, 3), (1, 2, 2, 2), **options)
    kaiming_(model)
    return model
