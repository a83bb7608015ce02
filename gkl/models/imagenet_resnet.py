"""Residual networks for ImageNet (He et al. 2016, Xie et al. 2017): torchvision's, with taps for distillation.

Layers, initialisation and parameter names are torchvision's, so that its published weights load.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as torchvision

from gkl.models.classifier import TappedClassifier, register_model, staged_blocks
from gkl.models.normalise import Normalisation, normaliser


class BasicBlock(torchvision.BasicBlock):  # type: ignore[misc]
    """torchvision's, in two parts."""

    def before(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU. (B, c, H, W) -> (B, c', H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return out + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c', H / stride, W / stride)."""
        return F.relu(self.before(x))


class Bottleneck(torchvision.Bottleneck):  # type: ignore[misc]
    """torchvision's, in two parts."""

    def before(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU. (B, c, H, W) -> (B, c', H / stride, W / stride)."""
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c', H / stride, W / stride)."""
        return F.relu(self.before(x))


class ImageNetResNet(TappedClassifier):
    """A 7x7 stem with max pooling and four stages of widths 64 to 512, times the block's expansion."""

    classifier_name = "fc"

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: list[int],
        groups: int = 1,
        width_per_group: int = 64,
        num_classes: int = 1000,
        normalisation: Normalisation = None,
    ) -> None:
        """blocks: of each stage. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=512 * block.expansion)
        self.normalise = normaliser(normalisation)
        made = torchvision.ResNet(block, blocks, num_classes, groups=groups, width_per_group=width_per_group)
        self.conv1, self.bn1, self.maxpool = made.conv1, made.bn1, made.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            made.layer1,
            made.layer2,
            made.layer3,
            made.layer4,
        )
        self.fc = made.fc

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and four stages, and the last map (B, num_features, H / 32, W / 32)."""
        stem = self.maxpool(F.relu(self.bn1(self.conv1(self.normalise(x)))))
        return staged_blocks(stem, [self.layer1, self.layer2, self.layer3, self.layer4])

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage; the shortcut is added to what it gives."""
        last: list[Any] = [stage[-1] for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]
        return [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in last]


@register_model
def imagenet_resnet_18(**options: Any) -> ImageNetResNet:
    """11.7 million parameters at 1000 classes."""
    return ImageNetResNet(BasicBlock, [2, 2, 2, 2], **options)


@register_model
def imagenet_resnet_34(**options: Any) -> ImageNetResNet:
    """21.8 million parameters at 1000 classes."""
    return ImageNetResNet(BasicBlock, [3, 4, 6, 3], **options)


@register_model
def imagenet_resnet_50(**options: Any) -> ImageNetResNet:
    """25.6 million parameters at 1000 classes."""
    return ImageNetResNet(Bottleneck, [3, 4, 6, 3], **options)


@register_model
def imagenet_resnet_101(**options: Any) -> ImageNetResNet:
    """44.5 million parameters at 1000 classes."""
    return ImageNetResNet(Bottleneck, [3, 4, 23, 3], **options)


@register_model
def imagenet_resnext_101_32x4d(**options: Any) -> ImageNetResNet:
    """44.2 million parameters at 1000 classes: the teacher of the ImageNet-LT tables."""
    return ImageNetResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, **options)
