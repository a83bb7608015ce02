"""The networks of the ImageNet tables: torchvision's own function, its names, and taps."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet as torchvision

from gkl.models import create
from gkl.models.classifier import TappedClassifier

# ours -> (torchvision's, parameters at 1000 classes, channels of stem and stages)
NETWORKS = {
    "imagenet_resnet_18": (torchvision.resnet18, {}, 11_689_512, (64, 64, 128, 256, 512)),
    "imagenet_resnet_34": (torchvision.resnet34, {}, 21_797_672, (64, 64, 128, 256, 512)),
    "imagenet_resnet_50": (torchvision.resnet50, {}, 25_557_032, (64, 256, 512, 1024, 2048)),
    "imagenet_resnet_101": (torchvision.resnet101, {}, 44_549_160, (64, 256, 512, 1024, 2048)),
    "imagenet_resnext_101_32x4d": (
        torchvision.resnet101,
        {"groups": 32, "width_per_group": 4},
        44_177_704,
        (64, 256, 512, 1024, 2048),
    ),
}


DEEPER = "imagenet_resnet_101"  # than ResNet-50, of the same blocks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name == DEEPER else name for name in NETWORKS]
)
def test_equal_to_torchvision(name: str) -> None:
    function, options, count, channels = NETWORKS[name]
    torch.manual_seed(0)
    reference, model = function(**options).double(), create(name, num_classes=1000).double()
    assert isinstance(model, TappedClassifier)
    assert sum(p.numel() for p in model.parameters()) == count
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    model.load_state_dict(reference.state_dict())
    for mode in (
        True,
        False,
    ):  # training first: then the running statistics are more than their initial values
        with torch.no_grad():
            expected = reference.train(mode)(x)
            taps = model.train(mode).forward_taps(x)
        torch.testing.assert_close(taps.logits, expected, rtol=0, atol=1e-10)
    assert [tuple(t.shape) for t in taps.features] == [
        (2, c, side, side) for c, side in zip(channels, (16, 16, 8, 4, 2), strict=True)
    ]
    assert all(torch.equal(F.relu(b), a) for b, a in zip(taps.preact_features, taps.features, strict=True))
    names = {module: at for at, module in model.named_modules()}
    depth = [
        len(stage) - 1 for stage in (reference.layer1, reference.layer2, reference.layer3, reference.layer4)
    ]
    norm = "bn2" if name.endswith(("18", "34")) else "bn3"
    assert [names[b] for b in model.batch_norms()] == [
        f"layer{n + 1}.{d}.{norm}" for n, d in enumerate(depth)
    ]


@pytest.mark.parametrize("name", ["imagenet_resnet_18", "imagenet_resnet_50"])
def test_initialised_as_torchvision(name: str) -> None:
    torch.manual_seed(3)
    reference = NETWORKS[name][0](num_classes=10).state_dict()
    torch.manual_seed(3)
    model = create(name, num_classes=10).state_dict()
    assert all(torch.equal(model[key], value) for key, value in reference.items())
