"""What every network of this package can do: timm's methods, so that one caller serves both."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import load_pretrained, resolve_pretrained_cfg
from timm.models import register_model as timm_register_model
from torch import Tensor, nn


class Taps(NamedTuple):
    """What a distillation method may see of a network: every stage's map, the pooled feature, the logits.

    features: the stem's output, then each stage's, as the next one takes it, (B, c, h, w) each. preact_features: the same maps
    before the activation that ends the stage; a stage that ends without one stands there as it is. pooled: (B, F). logits: (B, C).
    """

    features: list[Tensor]
    preact_features: list[Tensor]
    pooled: Tensor
    logits: Tensor


def dtype_of(model: nn.Module) -> torch.dtype:
    """What a network takes its pictures in: the dtype of its first weights that are real numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class Classifier(nn.Module):
    """A feature map, its mean over the picture, a linear layer; subclasses give the first and the last."""

    classifier_name: str  # attribute of the linear layer

    def __init__(self, num_classes: int, num_features: int) -> None:
        """num_features: channels of the last feature map, inputs of the classifier."""
        super().__init__()
        self.num_classes, self.num_features = num_classes, num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> last feature map (B, num_features, h, w)."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_features")

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map -> logits (B, num_classes), or its mean (B, num_features) with pre_logits."""
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.get_classifier()(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.get_submodule(self.classifier_name)


class TappedClassifier(Classifier):
    """A classifier whose stages a distillation method can see; subclasses give `staged` in place of forward_features."""

    def staged(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> Taps' features and preact_features, and the last feature map (B, num_features, h, w)."""
        raise NotImplementedError(f"{type(self).__name__} must define staged")

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """Of each stage but the stem, the batch norm that feeds the activation at its end (OFD's margins).

        Raises ValueError for a network whose stages end otherwise.
        """
        raise ValueError(
            f"{type(self).__name__} has no batch norm before the activation of each stage, which OFD needs of a teacher"
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> last feature map (B, num_features, h, w)."""
        return self.staged(x)[2]

    def forward_taps(self, x: Tensor) -> Taps:
        """Images (B, 3, H, W) in [0, 1] -> logits and what stands before them."""
        after, before, last = self.staged(x)
        pooled = self.forward_head(last, pre_logits=True)
        return Taps(after, before, pooled, self.get_classifier()(pooled))


def staged_blocks(stem: Tensor, stages: Sequence[nn.Sequential]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What `staged` returns for stages whose last block ends in a ReLU and gives what stands `before` it."""
    after, before = [stem], [stem]
    for stage in stages:
        last: Any = stage[-1]
        before.append(last.before(stage[:-1](after[-1])))
        after.append(F.relu(before[-1]))
    return after, before, after[-1]


def kaiming_(model: nn.Module) -> None:
    """Convolutions N(0, 2 / (k^2 c_out)); batch norm and the classifier are torch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def normal_(model: nn.Module) -> None:
    """Convolutions N(0, 2 / (k^2 c_out)), also grouped ones, biases 0; classifier N(0, 0.01^2), bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            size = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / size))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a network with timm, which then also loads the weights that `scripts/release.py` packs for it.

    timm.create_model("wrn_34_10", num_classes=100); timm.create_model("hf-hub:NAME/REPO", pretrained=True), or "local-dir:FOLDER".
    Raises ValueError when timm is asked for pretrained weights without saying where they are.
    """

    @functools.wraps(build)
    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        pretrained_model_args: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        model = build(**options)
        if pretrained:
            source = resolve_pretrained_cfg(build.__name__, pretrained_cfg, pretrained_cfg_overlay).to_dict()
            if not any(source.get(key) for key in ("file", "hf_hub_id", "url")):
                raise ValueError(
                    "no pretrained weights to download; load a file with gkl.models.load_checkpoint"
                )
            load_pretrained(
                model,
                source,
                num_classes=options.get("num_classes", source["num_classes"]),
                cache_dir=cache_dir,
            )
        return model

    return timm_register_model(entry)
