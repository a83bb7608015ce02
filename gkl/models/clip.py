"""CLIP's two towers, OpenCLIP's own (open_clip_torch): pictures in [0, 1] and tokens to features of one space.

    network = clip("ViT-B-16")
    images, texts = network(x, tokens)                  # (B, D) each, of length 1
    logits = network.logit_scale.exp() * images @ texts.T

Weights come from a file as those of any network do (gkl.models.load_checkpoint). The package is imported when a network is first made.
"""

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gkl.models.normalise import Normalisation, normaliser

LARGEST_LOGIT_SCALE = 4.605170185988092  # ln 100
KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}  # of a network of two plain towers


def _scan(width: int, depth: int) -> dict[str, Any]:
    """For scans of 8 pixels and captions of few words."""
    heads = {"width": width, "layers": depth, "mlp_ratio": 2.0}
    return {
        "embed_dim": width,
        "vision_cfg": {"image_size": 8, "patch_size": 2, "head_width": 16, **heads},
        "text_cfg": {"context_length": 12, "vocab_size": 64, "heads": width // 16, **heads},
    }


def _pixels_64(width: int, depth: int) -> dict[str, Any]:
    """For pictures of 64 pixels and captions of OpenCLIP's words."""
    return {
        "embed_dim": width,
        "vision_cfg": {
            "image_size": 64, "patch_size": 8, "width": width, "layers": depth, "head_width": 32,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": width, "heads": width // 32, "layers": depth},
    }  # fmt: skip


# What the smaller scales train, beside OpenCLIP's own names.
NETWORKS = {
    "clip_scan_48": _scan(48, 2), "clip_scan_96": _scan(96, 4), "clip_64px_128": _pixels_64(128, 4), "clip_64px_256": _pixels_64(256, 6),
}  # fmt: skip


class Tokenizer(Protocol):
    """Texts to tokens (n, context_length) int64; the last of each text has the largest number, and is where a tower reads."""

    vocab_size: int
    context_length: int

    def __call__(self, texts: list[str]) -> Tensor:
        """See above."""
        ...


def open_clip() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        return import_module("open_clip")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"CLIP's networks, tokenizer and class names are OpenCLIP's, and {error.name} is missing: pip install 'gkl[clip]'"
        ) from error


class Clip(nn.Module):
    """OpenCLIP's network behind its normalisation; its features have length 1, computed in float32 or better."""

    def __init__(self, name: str, model: Any, normalisation: Normalisation) -> None:
        super().__init__()
        self.name = name
        self.model: Any = model
        self.normalise = normaliser(normalisation)

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of what multiplies cosines."""
        scale: nn.Parameter = self.model.logit_scale
        return scale

    @property
    def image_size(self) -> int:
        """Pixels a side that its pictures have."""
        return int(self.model.visual.image_size[0])

    def image_features(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, D)."""
        return _unit(self.model.encode_image(self.normalise(x)))

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> (B, D)."""
        return _unit(self.model.encode_text(tokens))

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of images and of texts; without tokens, of as many empty texts."""
        if tokens is None:
            tokens = torch.zeros(len(x), self.model.context_length, dtype=torch.int64, device=x.device)
        return self.image_features(x), self.text_features(tokens)

    def check_fits(self, tokenizer: Tokenizer, image_size: int, place: str = "model") -> None:
        """Raises ValueError where it takes other tokens, or pictures of another size. place: of the network in a configuration."""
        words, length = self.model.vocab_size, self.model.context_length
        if tokenizer.vocab_size > words or tokenizer.context_length != length:
            raise ValueError(
                f"{place}={self.name} takes texts of {length} tokens out of {words:,}, and data.tokenizer makes texts of "
                f"{tokenizer.context_length} out of {tokenizer.vocab_size:,}; choose a tokenizer that fits, or data.context_length={length}"
            )
        if self.image_size != image_size:
            raise ValueError(
                f"{place}={self.name} takes pictures of {self.image_size} pixels, got data.image_size={image_size}"
            )


def _unit(features: Tensor) -> Tensor:
    half = features.dtype in (torch.float16, torch.bfloat16)
    return F.normalize(features.float() if half else features, dim=-1)


def clip(name: str, num_classes: int = 0, normalisation: Normalisation = "openai") -> Clip:
    """A network, freshly initialised. name: OpenCLIP's ("ViT-B-16"), or one of NETWORKS. num_classes: of nothing, a caption is no class.

    Raises ValueError for an unknown name, and for networks of other parts than two plain towers.
    """
    package = open_clip()
    config: Mapping[str, Any] | None = copy.deepcopy(NETWORKS.get(name) or package.get_model_config(name))
    if config is None:
        known = ", ".join([*NETWORKS, "ViT-B-32", "ViT-B-16", "ViT-L-14"])
        raise ValueError(
            f"OpenCLIP has no network {name!r}; there are {known}, and others (open_clip.list_models())"
        )
    towers = {**config["text_cfg"], **config["vision_cfg"]}
    other = sorted({*config} - KEYS) + [
        k for k in ("hf_model_name", "timm_model_name", "patch_dropout") if towers.get(k)
    ]
    other += ["a ResNet's layers"] if not isinstance(config["vision_cfg"]["layers"], int) else []
    if other:  # no batch norm and nothing drawn: a batch may be taken in parts, and forward twice
        raise ValueError(
            f"{name} has {', '.join(other)}, and networks here are two plain towers, as ViT-B-16 and ViT-L-14 are"
        )
    return Clip(name, package.CLIP(**config), normalisation)
