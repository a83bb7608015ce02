"""USB's vision transformers: sizes, groups of layers, and a state dict under USB's names."""

import pytest
import torch
from timm.optim import param_groups_layer_decay

from gkl.models import create
from gkl.models.normalise import STATISTICS


@pytest.mark.parametrize(
    ("name", "side", "millions", "groups"),
    [
        ("vit_small_patch2_32", 32, 21.44, 28),
        ("vit_small_patch4_32", 32, 1.21, 16),
        ("vit_scan_patch2_8", 8, 0.137, 12),
    ],
)
def test_sizes_and_groups(name: str, side: int, millions: float, groups: int) -> None:
    """28 groups of ViT-S as USB's optimizer has them: embedding, 12 blocks and head, with and without weight decay."""
    model = create(name, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    network = model.model
    found = param_groups_layer_decay(
        network, 0.05, no_weight_decay_list=network.no_weight_decay(), layer_decay=0.5
    )
    assert len(found) == groups
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, side, side)).shape == (2, 10)


def test_names_are_usb_s() -> None:
    """The parameters of semilearn/nets/vit/vit.py, whose head is the one that a pretrained file leaves out."""
    names = {name.removeprefix("model.") for name, _ in create("vit_small_patch2_32", 100).named_parameters()}
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    wanted = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj",
        "norm",
        "head",
        *(f"blocks.{i}.{part}" for i in range(12) for part in block),
    }
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in names} == wanted


def test_its_normalisation_is_usb_s() -> None:
    mean, std = STATISTICS["cifar100_usb"]
    assert [round(255 * m, 1) for m in mean] == [129.3, 124.1, 112.4] and [
        round(255 * s, 1) for s in std
    ] == [68.2, 65.4, 70.4]
