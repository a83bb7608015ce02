"""ShuffleNet V1 (Zhang et al. 2018) and V2 (Ma et al. 2018) for 32x32 pictures, with a 1x1 stem.

Source: RepDistiller and mdistiller, parameter names included.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, register_model, staged_blocks
from gkl.models.normalise import Normalisation, normaliser


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channel g of group c becomes channel c of group g. (B, C, H, W) -> the same shape."""
    batch, channels, height, width = x.shape
    return (
        x.reshape(batch, groups, channels // groups, height, width)
        .transpose(1, 2)
        .reshape(batch, channels, height, width)
    )


class GroupedBottleneck(nn.Module):
    """ShuffleNet V1's block: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    With stride 2 the pooled input is put beside the result, whose width is then what is left of `width`.
    """

    def __init__(self, width_in: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        own = width - width_in if stride == 2 else width
        inner = own // 4
        self.stride, self.groups = stride, 1 if width_in == 24 else groups
        self.conv1 = nn.Conv2d(width_in, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, own, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def before(self, x: Tensor) -> Tensor:
        """The block's output before its last ReLU. (B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = shuffled(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], dim=1)
        return out + x

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        return F.relu(self.before(x))


class ShuffleNetV1(TappedClassifier):
    """Three stages of grouped bottlenecks; torch's own initialisation."""

    classifier_name = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int],
        blocks: tuple[int, int, int],
        groups: int,
        num_classes: int = 100,
        normalisation: Normalisation = None,
    ) -> None:
        """widths, blocks: of each stage. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=widths[-1])
        self.normalise = normaliser(normalisation)
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                GroupedBottleneck(before, width, 2, groups),
                *(GroupedBottleneck(width, width, 1, groups) for _ in range(count - 1)),
            )
            for before, width, count in zip((24, *widths), widths, blocks, strict=False)
        )
        self.linear = nn.Linear(widths[-1], num_classes)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and three stages, and the last map (B, widths[-1], H / 8, W / 8)."""
        stem = F.relu(self.bn1(self.conv1(self.normalise(x))))
        return staged_blocks(stem, [self.layer1, self.layer2, self.layer3])


class HalvedBlock(nn.Module):
    """ShuffleNet V2's block: half of the channels pass, the others go through 1x1, depthwise 3x3, 1x1; then shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def before(self, x: Tensor) -> Tensor:
        """Both halves before the last ReLU, not yet shuffled. (B, width, H, W) -> the same shape."""
        passed, out = x.chunk(2, dim=1)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(out)))))
        return torch.cat([passed, self.bn3(self.conv3(out))], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W), nothing below 0 -> the same shape."""
        return shuffled(F.relu(self.before(x)), 2)  # the half that passed has no entry below 0


class DownBlock(nn.Module):
    """ShuffleNet V2's block of stride 2: two branches side by side, shuffled."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(width_in, width_in, 3, 2, padding=1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(width_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / 2, W / 2)."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffled(torch.cat([left, right], dim=1), 2)


class ShuffleNetV2(TappedClassifier):
    """Three stages of halved blocks; torch's own initialisation. A stage's `before` is not yet shuffled, as in mdistiller."""

    classifier_name = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        blocks: tuple[int, int, int],
        num_classes: int = 100,
        normalisation: Normalisation = None,
    ) -> None:
        """widths: of the stages and of the last 1x1 convolution. blocks: of stride 1 in each stage. normalisation: as above."""
        super().__init__(num_classes, num_features=widths[3])
        self.normalise = normaliser(normalisation)
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(DownBlock(before, width), *(HalvedBlock(width) for _ in range(count)))
            for before, width, count in zip((24, *widths), widths, blocks, strict=False)
        )
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = nn.Linear(widths[3], num_classes)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and three stages, and the last map (B, widths[3], H / 8, W / 8)."""
        stem = F.relu(self.bn1(self.conv1(self.normalise(x))))
        after, before = [stem], [stem]
        for stage in (self.layer1, self.layer2, self.layer3):
            last: Any = stage[-1]
            before.append(last.before(stage[:-1](after[-1])))
            after.append(shuffled(F.relu(before[-1]), 2))
        return after, before, F.relu(self.bn2(self.conv2(after[-1])))


@register_model
def shufflenet_v1(**options: Any) -> ShuffleNetV1:
    """Three groups: 0.9 million parameters."""
    return ShuffleNetV1((240, 480, 960), (4, 8, 4), 3, **options)


@register_model
def shufflenet_v2(**options: Any) -> ShuffleNetV2:
    """Width 1: 1.4 million parameters."""
    return ShuffleNetV2((116, 232, 464, 1024), (3, 7, 3), **options)
