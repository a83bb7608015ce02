"""ResNet-18 for small images (He et al. 2016), the companion networks of LBGAT and LAS-AT."""

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from gkl.models.classifier import Classifier, without_timm_bookkeeping


class BasicBlock(nn.Module):
    """Two convolutions; a 1x1 convolution with batch norm on the shortcut where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(Classifier):
    """Four stages of two blocks, widths 64 to 512, a 3x3 stem; images taken as they are; torch's initialisation.

    Source: kuangliu/pytorch-cifar by way of LAS-AT (strides 1, 2, 2, 2) and LBGAT (1, 1, 2, 2), with their parameter names.
    """

    classifier_name = "linear"

    def __init__(self, strides: tuple[int, int, int, int], num_classes: int = 10) -> None:
        """strides: of each stage's first block."""
        super().__init__(num_classes, num_features=512)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        stages = [
            nn.Sequential(BasicBlock(before, width, stride), BasicBlock(width, width, 1))
            for before, width, stride in zip(widths, widths[1:], strides, strict=False)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(512, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 512, h, w)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(out))))


@register_model
def resnet_18(**options: Any) -> ResNet18:
    """ResNet-18 at 1/8 of the resolution: LAS-AT's strategy network. 11.2 million parameters."""
    return ResNet18((1, 2, 2, 2), **without_timm_bookkeeping(options))


@register_model
def resnet_18_fine(**options: Any) -> ResNet18:
    """ResNet-18 at 1/4 of the resolution: LBGAT's natural network."""
    return ResNet18((1, 1, 2, 2), **without_timm_bookkeeping(options))
