"""timm's own networks where this package's are expected: pictures in [0, 1] go in, logits are seen of them and no more."""

import re
from collections.abc import Sequence
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from gkl.models.classifier import TappedClassifier, Taps
from gkl.models.normalise import Normalisation, normaliser
from gkl.rng import uniform

POSITIONS = re.compile(r"(^|[._])(pos|position|rel_pos|relative_position)_(embed|embedding|bias)")


class TimmNetwork(TappedClassifier):
    """A network of timm's behind its normalisation; feature methods find no stages in it."""

    def __init__(self, model: Any, normalisation: Normalisation) -> None:
        """model: as timm makes it. normalisation: a name in STATISTICS."""
        super().__init__(model.num_classes, model.num_features)
        self.model: Any = keyed_drop_path(model)
        self.normalise = normaliser(normalisation)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes)."""
        logits: Tensor = self.model(self.normalise(x))
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> what timm's network calls its features."""
        features: Tensor = self.model.forward_features(self.normalise(x))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits (B, num_classes), or what stands before the classifier with pre_logits."""
        out: Tensor = self.model.forward_head(features, pre_logits=pre_logits)
        return out

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        classifier: nn.Module = self.model.get_classifier()
        return classifier

    def forward_taps(self, x: Tensor) -> Taps:
        """Images (B, 3, H, W) in [0, 1] -> logits, and nothing of the stages."""
        logits = self(x)
        return Taps([], [], logits[:, :0], logits)


class KeyedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) whose draws follow from a key a picture, not from torch's generator.

    So a step is the same after a restart and on any number of processes. Without keys no path is dropped.
    """

    keys: Tensor | None = None

    def __init__(self, drop: float, number: int) -> None:
        """drop: the probability. number: of the module in its network."""
        super().__init__()
        self.drop, self.number = drop, number

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape, whole pictures zeroed and the others scaled up."""
        if not self.training or self.drop == 0.0 or self.keys is None:
            return x
        kept = (uniform(self.keys + self.number, 1) >= self.drop).to(x.dtype) / (1.0 - self.drop)
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def keyed_drop_path(model: nn.Module) -> nn.Module:
    """Replace timm's DropPath modules; in place, returns the model."""
    found = [(m, n, c) for m in model.modules() for n, c in m.named_children() if isinstance(c, DropPath)]
    for number, (parent, name, child) in enumerate(found):
        setattr(parent, name, KeyedDropPath(child.drop_prob, number))
    return model


def set_sample_keys(model: nn.Module, keys: Tensor) -> None:
    """What the next batch's draws inside the network follow from. keys: (B,) from gkl.rng."""
    for module in model.modules():
        if isinstance(module, KeyedDropPath):
            module.keys = keys


def of_another_size(mismatched: Sequence[str]) -> str:
    """What to do where a file's positions are those of pictures of another size, empty otherwise. mismatched: of a LoadReport."""
    if not any(POSITIONS.search(told.partition(":")[0]) for told in mismatched):
        return ""
    return (
        "having positions of pictures of another size; give the size that it was trained with, "
        "'model.timm_options={img_size:224}' data.image_size=224 say, or resample them before (timm.layers.resample_abs_pos_embed)"
    )
