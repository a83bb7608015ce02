"""Zero-shot classification as OpenCLIP does it: a class is the mean direction of sentences that name it.

weights = class_weights(network.text_features, tokenizer, names, templates, device)      # (D, C)
right = (100.0 * network.image_features(x) @ weights).masked_fill(~among, -inf).argmax(1) == y
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 100.0  # of the logits, whatever the network's own


def class_weights(
    encode: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
    at_once: int = 10,
) -> Tensor:
    """(D, C): each class's sentences of length 1, their mean, again of length 1. A class is its place in names.

    encode: tokens (n, L) to features (n, D) of length 1. at_once: classes that are encoded together.
    """
    found = []
    with torch.no_grad():
        for first in range(0, len(names), at_once):
            few = names[first : first + at_once]
            texts = [template(name) for name in few for template in templates]
            features = encode(tokenizer(texts).to(device)).view(len(few), len(templates), -1)
            found.append(F.normalize(features.mean(1), dim=1))
    return torch.cat(found).T


def predicted(features: Tensor, weights: Tensor, among: Tensor) -> Tensor:
    """Classes (B,) of pictures' features (B, D), the likeliest of those that are told apart. among: (C,) bool."""
    logits = SCALE * features @ weights  # (B, C)
    return logits.masked_fill(~among.to(logits.device), float("-inf")).argmax(1)
