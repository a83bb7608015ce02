"""MobileNetV1 for ImageNet (Howard et al. 2017), a student of Table V.

Source: mdistiller, parameter names included; pooled over whatever map there is, so that any picture size passes.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, register_model
from gkl.models.normalise import Normalisation, normaliser

# channels and stride of each depthwise block, by stage
STAGES = (
    ((64, 1), (128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)


def _convolution(width_in: int, width: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(width_in, width, size, stride, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU()]


class MobileNetV1(TappedClassifier):
    """A strided 3x3 convolution and thirteen blocks of a 3x3 depthwise and a 1x1 convolution; torch's initialisation."""

    classifier_name = "fc"

    def __init__(self, num_classes: int = 1000, normalisation: Normalisation = None) -> None:
        """normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=1024)
        self.normalise = normaliser(normalisation)
        layers = [nn.Sequential(*_convolution(3, 32, 3, stride=2))]
        before = 32
        for channels, stride in (block for stage in STAGES for block in stage):
            depthwise = _convolution(before, before, 3, stride, groups=before)
            layers.append(nn.Sequential(*depthwise, *_convolution(before, channels, 1)))
            before = channels
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(before, num_classes)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and four stages, and the last map (B, 1024, H / 32, W / 32)."""
        layers: Any = self.model
        stem, *blocks = layers
        after = [stem(self.normalise(x))]
        before = list(after)
        for stage in STAGES:
            *inner, last = blocks[: len(stage)]
            blocks = blocks[len(stage) :]
            before.append(last[:-1](nn.Sequential(*inner)(after[-1])))
            after.append(F.relu(before[-1]))
        return after, before, after[-1]

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage."""
        model: Any = self.model
        ends = (sum(len(stage) for stage in STAGES[: n + 1]) for n in range(len(STAGES)))
        return [model[end][-2] for end in ends]


@register_model
def mobilenet_v1(**options: Any) -> MobileNetV1:
    """4.23 million parameters at 1000 classes."""
    return MobileNetV1(**options)
