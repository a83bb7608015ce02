"""MobileNetV2 for 32x32 pictures (Sandler et al. 2018), as distillation work on CIFAR-100 has it.

Source: RepDistiller and mdistiller, parameter names included.
"""

from typing import Any

from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, normal_, register_model
from gkl.models.normalise import Normalisation, normaliser

# expansion, channels at full width, blocks, stride of the first
SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
TAPPED = (1, 2, 4, 6)  # groups of blocks that end a stage


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.shortcut = stride == 1 and width_in == width
        self.conv = nn.Sequential(
            nn.Conv2d(width_in, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(TappedClassifier):
    """Seven groups of inverted residuals. Its stages end linear: what stands before their end is what comes after."""

    classifier_name = "classifier.0"

    def __init__(self, width: float, num_classes: int = 100, normalisation: Normalisation = None) -> None:
        """width: factor of the channels. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=1280)
        self.normalise = normaliser(normalisation)
        before = int(32 * width)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, before, 3, 2, padding=1, bias=False), nn.BatchNorm2d(before), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        for expansion, channels, count, stride in SETTINGS:
            after = int(channels * width)
            self.blocks.append(
                nn.Sequential(
                    InvertedResidual(before, after, stride, expansion),
                    *(InvertedResidual(after, after, 1, expansion) for _ in range(count - 1)),
                )
            )
            before = after
        self.conv2 = nn.Sequential(nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        normal_(self)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and four stages, and the last map (B, 1280, H / 16, W / 16)."""
        x = self.conv1(self.normalise(x))
        after = [x]
        for number, group in enumerate(self.blocks):
            x = group(x)
            if number in TAPPED:
                after.append(x)
        return after, list(after), self.conv2(x)

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage."""
        blocks: Any = self.blocks
        return [blocks[number][-1].conv[-1] for number in TAPPED]


@register_model
def mobilenet_v2_half(**options: Any) -> MobileNetV2:
    """Half as wide: 0.8 million parameters."""
    return MobileNetV2(0.5, **options)
