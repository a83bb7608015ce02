"""Vision transformers for small pictures, as USB has them (Wang et al. 2022): timm's, of another size.

timm's VisionTransformer takes USB's state dicts; stochastic depth follows from keys (gkl.models.timm_network).
"""

from typing import Any

from timm.models import VisionTransformer, register_model

from gkl.models.timm_network import TimmNetwork


def _vit(num_classes: int, normalisation: str | None, **options: Any) -> TimmNetwork:
    model = VisionTransformer(num_classes=num_classes, **options)
    model.reset_classifier(num_classes)  # torch's initialisation, as USB leaves it
    return TimmNetwork(model, normalisation)


@register_model
def vit_small_patch2_32(
    num_classes: int = 100,
    normalisation: str | None = "cifar100_usb",
    drop_path_rate: float = 0.2,
    **options: Any,
) -> TimmNetwork:
    """ViT-S with patches of 2 pixels for pictures of 32: 256 tokens, 21.4 million parameters."""
    size = {"img_size": 32, "patch_size": 2, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _vit(num_classes, normalisation, drop_path_rate=drop_path_rate, **size)


@register_model
def vit_scan_patch2_8(
    num_classes: int = 10, normalisation: str | None = None, drop_path_rate: float = 0.0, **options: Any
) -> TimmNetwork:
    """A tiny one for scans of 8 pixels: 16 tokens, 0.1 million parameters; their mean is classified, since denoising teaches them."""
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    return _vit(num_classes, normalisation, drop_path_rate=drop_path_rate, global_pool="avg", **size)


@register_model
def vit_small_patch4_32(
    num_classes: int = 10,
    normalisation: str | None = "cifar100_usb",
    drop_path_rate: float = 0.1,
    **options: Any,
) -> TimmNetwork:
    """For one GPU or a patient CPU: 64 tokens of 32-pixel pictures, 1.2 million parameters."""
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
    return _vit(num_classes, normalisation, drop_path_rate=drop_path_rate, global_pool="avg", **size)
