"""Pre-activation ResNet for small images (He et al. 2016), the small network of the robustness literature."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.batch_norm import activated
from gkl.models.classifier import Classifier, register_model
from gkl.models.normalise import Normalisation, normaliser


class PreActBlock(nn.Module):
    """Pre-activation basic block; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut: nn.Sequential | None = None  # a Sequential of one, for the published parameter names
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = activated(self.bn1, x, F.relu)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(activated(self.bn2, self.conv1(out), F.relu))


class PreActResNet(Classifier):
    """Four stages of widths 64 to 512; torch's own initialisation.

    Source: the PreActResNet of DM-AT (after kuangliu/pytorch-cifar), parameter names included.
    """

    classifier_name = "linear"

    def __init__(
        self, blocks: tuple[int, int, int, int], num_classes: int = 10, normalisation: Normalisation = None
    ) -> None:
        """blocks: in each stage. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=512)
        self.normalise = normaliser(normalisation)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(blocks[0], 64, 64, 1)
        self.layer2 = _stage(blocks[1], 64, 128, 2)
        self.layer3 = _stage(blocks[2], 128, 256, 2)
        self.layer4 = _stage(blocks[3], 256, 512, 2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 512, H / 8, W / 8)."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalise(x))))))
        return activated(self.bn, out, F.relu)


def _stage(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        PreActBlock(width_in, width, stride), *(PreActBlock(width, width, 1) for _ in range(blocks - 1))
    )


@register_model
def preact_resnet_18(**options: Any) -> PreActResNet:
    """PreActResNet-18: 11.2 million parameters."""
    return PreActResNet((2, 2, 2, 2), **options)
