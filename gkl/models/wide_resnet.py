"""Wide residual networks of the adversarial-training literature (Zagoruyko & Komodakis 2016).

Two families. WideResNet: ReLU, images taken as they are; the runs without generated data. SwishWideResNet:
SiLU and normalisation inside; the runs with generated data. Each has the parameter names of its published
checkpoints, so those load here, and weights trained here load in the authors' code and in RobustBench.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.batch_norm import activated
from gkl.models.classifier import Classifier, TappedClassifier, register_model
from gkl.models.normalise import Normalisation, normaliser


class Block(nn.Module):
    """Pre-activation basic block; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.convShortcut = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        return self.after_relu(x, activated(self.bn1, x, F.relu))

    def after_relu(self, x: Tensor, out: Tensor) -> Tensor:
        """The same for whoever has relu(bn1(x)) already."""
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = activated(self.bn2, self.conv1(out), F.relu)
        return shortcut + self.conv2(out)


class Stage(nn.Module):
    """Blocks of one width; the first one changes width and resolution."""

    def __init__(self, blocks: int, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        rest = [Block(width, width, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(Block(width_in, width, stride), *rest)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, width_in, H, W) -> the input as the first block normalises it, and (B, width, H / stride, W / stride)."""
        first: Any = self.layer[0]
        normalised = first.bn1(x)
        return normalised, self.layer[1:](first.after_relu(x, F.relu(normalised)))


class WideResNet(TappedClassifier):
    """WRN-depth-width with ReLU, for image sizes divisible by 4. Source: the authors' and TRADES' network."""

    classifier_name = "fc"

    def __init__(
        self, depth: int, width: int, num_classes: int = 10, normalisation: Normalisation = None
    ) -> None:
        """depth: 6 n + 4, n blocks in each of three stages. width: times 16, 32 and 64 channels in them.

        normalisation: None takes images as they are; a name in STATISTICS shifts and scales them first.
        """
        super().__init__(num_classes, num_features=64 * width)
        blocks = _blocks(depth)
        self.normalise = normaliser(normalisation)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(blocks, 16, 16 * width, 1)
        self.block2 = Stage(blocks, 16 * width, 32 * width, 2)
        self.block3 = Stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        _initialise(self)

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(B, 3, H, W) in [0, 1] -> stem and three stages, and the last map (B, 64 * width, H / 4, W / 4).

        A stage ends where the next one normalises it: `before` is the output of that batch norm.
        """
        stem = self.conv1(self.normalise(x))
        _, one = self.block1(stem)
        one_normalised, two = self.block2(one)
        two_normalised, three = self.block3(two)
        three_normalised = self.bn1(three)
        before = [stem, one_normalised, two_normalised, three_normalised]
        return [stem, one, two, three], before, F.relu(three_normalised)

    def forward_features(self, x: Tensor) -> Tensor:
        """As `staged` without what it keeps, so that each batch norm and its ReLU may be one pass."""
        stem = self.conv1(self.normalise(x))
        three = self.block3.layer(self.block2.layer(self.block1.layer(stem)))
        return activated(self.bn1, three, F.relu)

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """Of each stage, the batch norm with which the next one begins."""
        following: list[Any] = [self.block2.layer[0], self.block3.layer[0], self]
        return [block.bn1 for block in following]


class SwishBlock(nn.Module):
    """As Block, with SiLU, batch-norm momentum 0.01, stride-2 convolutions padded right and below alone."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
        self.batchnorm_0 = nn.BatchNorm2d(width_in, momentum=0.01)
        self.conv_0 = nn.Conv2d(width_in, width, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(width, momentum=0.01)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None if width_in == width else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        out = activated(self.batchnorm_0, x, F.silu)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv_0(F.pad(out, self.pad))
        return shortcut + self.conv_1(activated(self.batchnorm_1, out, F.silu))


class SwishStage(nn.Module):
    """Blocks of one width; the first one changes width and resolution."""

    def __init__(self, blocks: int, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        rest = [SwishBlock(width, width, 1) for _ in range(blocks - 1)]
        self.block = nn.Sequential(SwishBlock(width_in, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, H / stride, W / stride)."""
        return self.block(x)


class SwishWideResNet(Classifier):
    """WRN-depth-width with SiLU and the data set's normalisation inside.

    Source: Wang et al. 2023 (DM-AT), after Gowal et al. 2020; DMWideResNet in RobustBench.
    """

    classifier_name = "logits"

    def __init__(
        self, depth: int, width: int, num_classes: int = 10, normalisation: Normalisation = None
    ) -> None:
        """depth, width: as in WideResNet. normalisation: None takes the one of as many classes."""
        super().__init__(num_classes, num_features=64 * width)
        try:
            self.normalise = normaliser(normalisation or f"cifar{num_classes}")
        except ValueError as error:
            raise ValueError(
                f"{error}; with {num_classes} classes say which, as in normalisation=cifar10"
            ) from None
        blocks = _blocks(depth)
        self.init_conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer = nn.Sequential(
            SwishStage(blocks, 16, 16 * width, 1),
            SwishStage(blocks, 16 * width, 32 * width, 2),
            SwishStage(blocks, 32 * width, 64 * width, 2),
        )
        self.batchnorm = nn.BatchNorm2d(64 * width, momentum=0.01)
        self.logits = nn.Linear(64 * width, num_classes)
        _initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 64 * width, H / 4, W / 4)."""
        out = self.layer(self.init_conv(self.normalise(x)))
        return activated(self.batchnorm, out, F.silu)


def _blocks(depth: int) -> int:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a wide residual network has depth 6 n + 4 (10, 16, 22, 28, 34), got {depth}")
    return (depth - 4) // 6


def _initialise(model: Classifier) -> None:
    """Convolutions N(0, 2 / (k^2 c_out)), classifier bias 0; the rest is torch's. Source: TRADES, DM-AT."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


@register_model
def wrn_34_10(**options: Any) -> WideResNet:
    """The paper's adversarial training: 46.2 million parameters."""
    return WideResNet(34, 10, **options)


@register_model
def wrn_34_20(**options: Any) -> WideResNet:
    """Twice as wide as wrn_34_10."""
    return WideResNet(34, 20, **options)


@register_model
def wrn_40_2(**options: Any) -> WideResNet:
    """A teacher of the CIFAR-100 distillation tables: 2.3 million parameters."""
    return WideResNet(40, 2, **options)


@register_model
def wrn_40_1(**options: Any) -> WideResNet:
    """A student of the CIFAR-100 distillation tables: 0.6 million parameters."""
    return WideResNet(40, 1, **options)


@register_model
def wrn_16_4(**options: Any) -> WideResNet:
    """Small: 2.7 million parameters."""
    return WideResNet(16, 4, **options)


@register_model
def wrn_16_2(**options: Any) -> WideResNet:
    """Small: 0.7 million parameters; the scale `small`, and a student of the CIFAR-100 distillation tables."""
    return WideResNet(16, 2, **options)


@register_model
def wrn_10_1(**options: Any) -> WideResNet:
    """Tiny: 0.08 million parameters; the scale `smoke`."""
    return WideResNet(10, 1, **options)


@register_model
def wrn_28_10_swish(**options: Any) -> SwishWideResNet:
    """The runs with generated data: 36.5 million parameters."""
    return SwishWideResNet(28, 10, **options)


@register_model
def wrn_16_2_swish(**options: Any) -> SwishWideResNet:
    """Small: 0.7 million parameters; the scale `small` of the runs with generated data."""
    return SwishWideResNet(16, 2, **options)


@register_model
def wrn_10_1_swish(**options: Any) -> SwishWideResNet:
    """Tiny: 0.08 million parameters; the scale `smoke` of the runs with generated data."""
    return SwishWideResNet(10, 1, **options)
