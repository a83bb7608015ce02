"""What every network of this package can do: timm's methods, so that one caller serves both."""

from typing import Any

from torch import Tensor, nn


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


def without_timm_bookkeeping(options: dict[str, Any]) -> dict[str, Any]:
    """The options meant for the network. Raises ValueError if timm was asked for pretrained weights."""
    if options.get("pretrained"):
        raise ValueError("no pretrained weights to download; load a file with gkl.models.load_checkpoint")
    own = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in options.items() if key not in own}
