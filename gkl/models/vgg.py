"""VGG with batch norm for small images (Simonyan & Zisserman 2015), as distillation work on CIFAR-100 has it.

Source: RepDistiller and mdistiller, parameter names included, so that their teachers load here.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, normal_, register_model
from gkl.models.normalise import Normalisation, normaliser

WIDTHS = (64, 128, 256, 512, 512)


class VGG(TappedClassifier):
    """Five blocks of 3x3 convolutions, pooled between; the last two at one resolution for pictures below 64 pixels."""

    classifier_name = "classifier"

    def __init__(
        self,
        convolutions: tuple[int, int, int, int, int],
        num_classes: int = 100,
        normalisation: Normalisation = None,
    ) -> None:
        """convolutions: in each block. normalisation: None takes images as they are; else a name in STATISTICS."""
        super().__init__(num_classes, num_features=WIDTHS[-1])
        self.normalise = normaliser(normalisation)
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _block(count, before, width)
            for count, before, width in zip(convolutions, (3, *WIDTHS), WIDTHS, strict=False)
        )
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        normal_(self)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> five blocks, the first as the stem, and the last map (B, 512, h, w)."""
        pooled_before = (self.block1, self.block2, self.block3) + ((self.block4,) if x.shape[2] >= 64 else ())
        stem = F.relu(self.block0(self.normalise(x)))
        after, before = [stem], [stem]
        for block in (self.block1, self.block2, self.block3, self.block4):
            inputs = F.max_pool2d(after[-1], 2) if block in pooled_before else after[-1]
            before.append(block(inputs))
            after.append(F.relu(before[-1]))
        return after, before, after[-1]

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """The last layer of each block but the first."""
        return [block[-1] for block in (self.block1, self.block2, self.block3, self.block4)]  # type: ignore[misc]


def _block(convolutions: int, width_in: int, width: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU, ..., without the last ReLU."""
    layers: list[nn.Module] = []
    for number in range(convolutions):
        layers += [
            nn.Conv2d(width if number else width_in, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1])


@register_model
def vgg_8(**options: Any) -> VGG:
    """One convolution a block: 4.0 million parameters."""
    return VGG((1, 1, 1, 1, 1), **options)


@register_model
def vgg_13(**options: Any) -> VGG:
    """Two convolutions a block: 9.5 million parameters."""
    return VGG((2, 2, 2, 2, 2), **options)
