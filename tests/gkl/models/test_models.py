"""Networks and batch norm, against restatements with plain torch."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import gkl.models
from gkl.models.batch_norm import (
    GhostBatchNorm2d,
    activated,
    auxiliary_batch_norm,
    eval_mode,
    frozen_statistics,
    ghost_batch_norm,
    set_group_size,
    split_batch_norm,
)
from gkl.models.folding import folded
from gkl.models.normalise import STATISTICS
from gkl.models.wide_resnet import SwishWideResNet, WideResNet
from tests.gkl.models.test_distillation_models import NETWORKS
from tests.gkl.models.test_imagenet_models import NETWORKS as IMAGENET_NETWORKS
from trainers.runs.compose import compose, families

MODELS = Path(__file__).parents[3] / "configs" / "model"
TIMM = {
    "beitv2_large": "beitv2_large_patch16_224",
    "timm_resnet_50": "resnet50",
}  # timm's networks have names like ours

PARAMETERS = {  # (name, classes): recipes of the paper for the first four, the field's networks for the rest
    ("wrn_34_10", 10): 46_160_474,
    ("wrn_34_10", 100): 46_218_164,
    ("wrn_28_10_swish", 10): 36_479_194,
    ("wrn_28_10_swish", 100): 36_536_884,
    ("preact_resnet_18", 10): 11_172_170,
    ("wrn_34_20", 10): 184_531_674,
    ("wrn_16_4", 10): 2_748_890,
    ("wrn_16_2", 10): 691_674,
    ("wrn_10_1", 10): 77_850,
    ("wrn_16_2_swish", 10): 691_674,
    ("wrn_10_1_swish", 10): 77_850,
    ("resnet_18", 10): 11_173_962,
    ("resnet_18_fine", 10): 11_173_962,
}


def pictures(batch: int, size: int = 8) -> Tensor:
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def lively(model: nn.Module) -> nn.Module:
    """In float64, with batch norms that are not the identity, as after training."""
    generator = torch.Generator().manual_seed(2)
    model.double()
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator), alpha=0.3)
    return model


@pytest.mark.parametrize(("name", "num_classes"), PARAMETERS)
def test_parameter_counts(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        model = gkl.models.create(name, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, num_classes]


KNOWN = {name for name, _ in PARAMETERS} | NETWORKS.keys() | IMAGENET_NETWORKS.keys()
FAMILIES = {  # MobileNetV1 is a student on ImageNet; WRN-16-2 is adversarial training's at scale=small, too, which sees images as they are
    "cifar100_kd": NETWORKS.keys() - {"mobilenet_v1", "wrn_16_2"},
    "imagenet": IMAGENET_NETWORKS.keys() | {"mobilenet_v1"},
    "plain": set(),
    "own": set(),  # a person's
}


@pytest.mark.parametrize("name", sorted(KNOWN | TIMM.keys()))
def test_every_network_is_composed_by_its_name(name: str) -> None:
    """With the statistics that its data is normalised by, whichever file makes it."""
    statistics = next(
        (kind for kind, names in FAMILIES.items() if name in names), "imagenet" if name in TIMM else None
    )
    for scale in ("paper", "small", "smoke"):
        given = ["experiment=at/c100_basic_gkl", f"model={name}", f"scale={scale}"]
        config = compose("train", given)["model"]
        assert config.pop("_target_") == "model/create"
        with torch.device("meta"):
            model = gkl.models.create(**config, num_classes=10)
            side = 32 if scale == "smoke" or name != "beitv2_large" else 224
            assert model(torch.empty(2, 3, side, side)).shape == (2, 10)
        assert scale != "paper" or config["name"] == TIMM.get(name, name)
        assert config.get("normalisation") == statistics
        assert ("swish" in config["name"]) == ("swish" in name)  # a network of the same family at every scale


def test_a_config_has_a_network_of_its_own_or_names_those_it_makes() -> None:
    assert {file: {*names} for file, names in families().items()} == FAMILIES
    made = {path.stem for path in MODELS.glob("*.yaml") if not path.stem.endswith("_base")}
    assert made - FAMILIES.keys() <= KNOWN | TIMM.keys() | {
        "vit_small_patch2_32",
        "pspnet_18",
        "pspnet_101",
        "clip_b16",
        "clip_l14",
        "llama",
        "llava",
    }  # the last: tests/gkl/models/test_vit.py, test_pspnet.py, test_clip.py, test_llava.py


def small_networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        WideResNet(10, 2, num_classes=7),
        SwishWideResNet(10, 2, num_classes=7, normalisation="cifar100"),
        gkl.models.create("preact_resnet_18", num_classes=7),
    ]


@pytest.mark.parametrize("model", small_networks(), ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("size", [8, 12, 32, 64])
def test_any_size_divisible_by_four(model: nn.Module, size: int) -> None:
    model = lively(copy.deepcopy(model)).eval()
    x = pictures(2, size)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    stride = 8 if model.num_features == 512 else 4
    assert features.shape == (2, model.num_features, math.ceil(size / stride), math.ceil(size / stride))
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled), rtol=0, atol=0)
    torch.testing.assert_close(
        pooled, F.avg_pool2d(features, features.shape[-1]).flatten(1), rtol=1e-12, atol=0
    )
    assert model.num_classes == model(x).shape[1] == 7


def restated_wide_resnet(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """WideResNet in eval mode, by the published parameter names."""

    def bn_relu(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.relu(F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5))

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for i in range(blocks):
            at, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
            activated = bn_relu(f"{at}.bn1", x)
            out = F.conv2d(activated, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(bn_relu(f"{at}.bn2", out), state[f"{at}.conv2.weight"], padding=1)
            if f"{at}.convShortcut.weight" in state:
                x = F.conv2d(activated, state[f"{at}.convShortcut.weight"], stride=stride)
            x = x + out
    x = F.avg_pool2d(bn_relu("bn1", x), 8).flatten(1)
    return F.linear(x, state["fc.weight"], state["fc.bias"])


def restated_swish(state: dict[str, Tensor], x: Tensor, blocks: int, normalisation: str) -> Tensor:
    """SwishWideResNet in eval mode, by the published parameter names."""

    def bn_silu(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        x = F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)
        return x * torch.sigmoid(x)

    mean, std = (torch.tensor(values).double().view(1, 3, 1, 1) for values in STATISTICS[normalisation])
    x = F.conv2d((x - mean) / std, state["init_conv.weight"], padding=1)
    for stage in range(3):
        for i in range(blocks):
            at, stride = f"layer.{stage}.block.{i}", 2 if stage and i == 0 else 1
            activated = bn_silu(f"{at}.batchnorm_0", x)
            padded = F.pad(activated, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            out = F.conv2d(padded, state[f"{at}.conv_0.weight"], stride=stride)
            out = F.conv2d(bn_silu(f"{at}.batchnorm_1", out), state[f"{at}.conv_1.weight"], padding=1)
            if f"{at}.shortcut.weight" in state:
                x = F.conv2d(activated, state[f"{at}.shortcut.weight"], stride=stride)
            x = x + out
    x = F.avg_pool2d(bn_silu("batchnorm", x), 8).flatten(1)
    return F.linear(x, state["logits.weight"], state["logits.bias"])


def test_wide_resnet_equals_its_restatement() -> None:
    model = lively(WideResNet(16, 2, num_classes=10)).eval()
    x = pictures(3, 32)
    expected = restated_wide_resnet(model.state_dict(), x, blocks=2)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalisation", ["cifar10", "cifar100"])
def test_swish_wide_resnet_equals_its_restatement(normalisation: str) -> None:
    model = lively(SwishWideResNet(16, 2, num_classes=10, normalisation=normalisation)).eval()
    x = pictures(3, 32)
    expected = restated_swish(model.state_dict(), x, blocks=2, normalisation=normalisation)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_swish_momentum_and_statistics() -> None:
    model = SwishWideResNet(10, 1, num_classes=100)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}
    assert model.normalise.mean.flatten().tolist() == pytest.approx([0.5071, 0.4865, 0.4409])
    assert model.normalise.std.flatten().tolist() == pytest.approx([0.2673, 0.2564, 0.2762])
    assert not any("normalise" in key for key in model.state_dict())
    assert SwishWideResNet(10, 1, num_classes=10).normalise.mean.flatten()[0].item() == pytest.approx(0.4914)


@pytest.mark.parametrize("model", [WideResNet(10, 4), SwishWideResNet(10, 4)], ids=["relu", "swish"])
def test_initialisation(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 20_000:
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(std, rel=0.03)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (model.get_classifier().bias == 0).all() and model.get_classifier().weight.std() > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"name": "WRN-34-11", "num_classes": 10}, "no network is called 'WRN-34-11'.*wrn_34_10"),
        ({"name": "wrn_10_1", "num_classes": 1}, "num_classes >= 2, got 1"),
        ({"name": "wrn_10_1", "num_classes": 10, "pretrained": True}, "no pretrained weights"),
        (
            {"name": "wrn_28_10_swish", "num_classes": 200},
            "cifar10, cifar100, cifar100_kd, cifar100_usb, imagenet, openai, half, got cifar200; with 200 classes",
        ),
        ({"name": "wrn_28_10_swish", "num_classes": 10, "normalisation": "svhn"}, "got svhn"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        gkl.models.create(**arguments)
    assert "\n" not in str(caught.value)


def test_a_misspelt_option_is_not_ignored() -> None:
    with pytest.raises(TypeError, match="normalization"):
        gkl.models.create("wrn_28_10_swish", num_classes=10, normalization="cifar100")


@pytest.mark.parametrize(
    ("options", "why"),
    [({"output_stride": 3}, "AssertionError"), ({"nothing": 1}, "TypeError: .*'nothing'")],
)
def test_what_timm_cannot_make_is_one_line(options: dict[str, int], why: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^timm cannot make resnet10t with .* \({why}.*timm_options=[^\n]*$"
    ):
        gkl.models.create("resnet10t", num_classes=10, timm_options=options)


def test_a_depth_that_is_none() -> None:
    for depth in (4, 12, 35):
        with pytest.raises(ValueError, match=f"depth 6 n \\+ 4 .*got {depth}"):
            WideResNet(depth, 1)


def test_channels_last_gives_the_same() -> None:
    for model in small_networks():
        lively(model)
        reference = copy.deepcopy(model)
        x = pictures(4, 16)
        model = model.to(memory_format=torch.channels_last)
        out = ghost_batch_norm(model, 2)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, ghost_batch_norm(reference, 2)(x), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_compiled_gives_the_same() -> None:
    model = lively(ghost_batch_norm(WideResNet(10, 1, num_classes=5), 2))
    reference, compiled = copy.deepcopy(model), torch.compile(model, backend="aot_eager")
    x = pictures(4)
    for frozen in (False, True):
        for network, kept in ((compiled, model), (reference, reference)):
            kept.zero_grad()
            if frozen:
                with frozen_statistics(kept):
                    network(x).square().sum().backward()
            else:
                network(x).square().sum().backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
        assert_same_state(model, reference)
    with eval_mode(model), eval_mode(reference):
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-10, atol=1e-12)


def assert_same_state(model: nn.Module, reference: nn.Module, rtol: float = 1e-12) -> None:
    ours, theirs = model.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=rtol, atol=rtol / 100), name


@pytest.mark.parametrize("batch", [8, 7, 5, 3, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_groups_equal_replicas(batch: int, groups: int, momentum: float | None) -> None:
    """As DataParallel has it: copies, each on its chunk; gradients add up, replica 0's statistics stay."""
    norm = nn.BatchNorm2d(4, momentum=momentum)
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1)))
    replica_zero = copy.deepcopy(model)
    parameters = list(model.parameters())
    assert ghost_batch_norm(model, groups) is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for step in range(3):
        x = pictures(batch) + step
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        replicas = [replica_zero, *(copy.deepcopy(replica_zero) for _ in range(groups - 1))]
        chunks = torch.chunk(x_theirs, groups)
        expected = torch.cat([replica(chunk) for replica, chunk in zip(replicas, chunks, strict=False)])
        out = model(x_ours)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        model.zero_grad()
        (out * slope + out**2).sum().backward()
        (expected * slope + expected**2).sum().backward()
        torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-10, atol=1e-10)
        for i, ours in enumerate(model.parameters()):
            total = sum(list(r.parameters())[i].grad for r in replicas[: len(chunks)])
            torch.testing.assert_close(ours.grad, total, rtol=1e-10, atol=1e-10)
        replica_zero.zero_grad()
        assert_same_state(model, replica_zero)
    torch.testing.assert_close(model.eval()(x), replica_zero.eval()(x), rtol=1e-12, atol=1e-12)


def test_groups_of_one_are_plain_batch_norm_bit_for_bit() -> None:
    plain = lively(WideResNet(10, 1))
    grouped = ghost_batch_norm(copy.deepcopy(plain), 1)
    assert torch.equal(plain(pictures(6)), grouped(pictures(6)))
    assert_same_state(grouped, plain, rtol=0)


@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
def test_a_network_computes_what_its_taps_show(mode: str) -> None:
    """Bit for bit, statistics too, though plain classification keeps no map before its activation."""
    model = ghost_batch_norm(lively(WideResNet(16, 1, num_classes=5)), 2).train(mode != "eval")
    other = copy.deepcopy(model)
    with frozen_statistics(model), frozen_statistics(other):
        if mode == "frozen":
            assert model(pictures(6)).equal(other.forward_taps(pictures(6)).logits)
    assert model(pictures(6)).equal(other.forward_taps(pictures(6)).logits)
    assert_same_state(model, other, rtol=0)


def test_an_activation_goes_with_its_batch_norm() -> None:
    """As it did without: the same bits and gradients, in whichever set of a split batch norm."""
    for model in (
        ghost_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 2),
        split_batch_norm(nn.Sequential(nn.BatchNorm2d(3))),
    ):
        lively(model)
        for divert in (False, True):
            with auxiliary_batch_norm(model, divert):
                found = []
                for layer in (copy.deepcopy(model[0]), copy.deepcopy(model[0])):
                    x = (pictures(5) - 0.5).requires_grad_()
                    y = F.silu(layer(x)) if found else activated(layer, x, F.silu)
                    found.append([y.detach(), *torch.autograd.grad(y.square().sum(), x), *layer.buffers()])
                assert all(a.equal(b) for a, b in zip(*found, strict=True))


def test_groups_can_be_set_again() -> None:
    model = lively(nn.Sequential(nn.BatchNorm2d(3)))
    x = pictures(4)
    whole = model(x)
    assert not torch.allclose(ghost_batch_norm(model, 2)(x), whole)
    torch.testing.assert_close(ghost_batch_norm(model, 1)(x), whole, rtol=0, atol=0)


def test_a_process_cuts_its_share_as_the_whole_batch_is_cut() -> None:
    """80 pictures in 4 groups of 20: a process that holds the first two groups must not cut them in 4."""
    whole = ghost_batch_norm(lively(nn.Sequential(nn.BatchNorm2d(3))), 4)
    share = copy.deepcopy(whole)
    set_group_size(share, 20)
    x = pictures(80)
    torch.testing.assert_close(share(x[:40]), whole(x)[:40], rtol=1e-12, atol=0)
    assert_same_state(share, whole)
    set_group_size(share, 0)
    torch.testing.assert_close(share(x), whole(x), rtol=0, atol=0)


def test_a_chunk_of_one_value_raises_as_torch_does() -> None:
    model = ghost_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.rand(3, 3, 1, 1))
    assert model(torch.rand(4, 3, 1, 1)).shape == (4, 3, 1, 1)
    assert model.eval()(torch.rand(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_grouping_refuses_what_it_cannot_do() -> None:
    class Fused(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="groups >= 1, got 0"):
        ghost_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), 0)
    model = nn.Sequential(nn.BatchNorm2d(3), Fused(3))
    with pytest.raises(ValueError, match="got Fused at 1"):
        ghost_batch_norm(model, 2)
    assert not any(isinstance(m, GhostBatchNorm2d) for m in model)


@pytest.mark.parametrize("groups", [1, 2])
def test_frozen_statistics(groups: int) -> None:
    model = ghost_batch_norm(lively(WideResNet(10, 1)), groups)
    tracking = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    x = pictures(4)
    with frozen_statistics(model):
        frozen = model(x)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        with eval_mode(model):
            torch.testing.assert_close(model(x), copy.deepcopy(tracking).eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(frozen, tracking(x), rtol=0, atol=0)
    model(x)
    assert_same_state(model, tracking, rtol=0)
    assert not torch.equal(before["bn1.running_mean"], model.state_dict()["bn1.running_mean"])


def test_frozen_statistics_comes_back_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(RuntimeError, match="inside"), frozen_statistics(model):
        raise RuntimeError("inside")
    assert [m.track_running_stats for m in model] == [True, False]
    with frozen_statistics(model):
        with frozen_statistics(model):
            pass
        assert not model[0].track_running_stats
    assert model[0].track_running_stats


def test_eval_mode_gives_each_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1][0].eval()  # a frozen part in a model that trains
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), eval_mode(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == modes == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet_32x4", 0), ("wrn_16_2", 6), ("vgg_8", 0), ("shufflenet_v1", 0), ("mobilenet_v2_half", 0)],
)
def test_folded_batch_norm_is_the_same_function(name: str, left: int) -> None:
    """All of a network's, but a wide ResNet's that read a sum of two branches: of its 13 the last, and the first of five blocks."""
    torch.manual_seed(0)
    network = gkl.models.create(name, num_classes=10).double()
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -1.0, 1.0)
    with torch.no_grad():
        network.train()(x)
        network.eval()
        lean = folded(network, x[:2])
        torch.testing.assert_close(lean(x), network(x), rtol=1e-11, atol=1e-11)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in lean.modules()) == left < len(norms)
    assert [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)] == norms


# --- timm's batch norm, which has its activation inside ---------------------------------------------------------------


def with_activation() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        BatchNormAct2d(4, act_layer=nn.SiLU),
        nn.Conv2d(4, 2, 3, bias=False),
        BatchNormAct2d(2),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_timm_s_batch_norm_is_grouped_with_its_activation(groups: int) -> None:
    model = with_activation()
    grouped = ghost_batch_norm(copy.deepcopy(model), groups)
    x = torch.rand(4, 3, 8, 8)
    wanted = torch.cat([model[:2](chunk) for chunk in x.chunk(groups)])
    torch.testing.assert_close(grouped[:2](x), wanted, rtol=1e-5, atol=1e-6)


def test_timm_s_batch_norm_in_eval_mode_and_split() -> None:
    model = lively(with_activation()).eval()
    x = torch.rand(4, 3, 8, 8).double()
    grouped = ghost_batch_norm(copy.deepcopy(model), 2)
    assert torch.equal(grouped(x), model(x))
    split = split_batch_norm(copy.deepcopy(model)).eval()
    assert {*grouped.state_dict()} < {*split.state_dict()}
    assert torch.equal(split(x), model(x))
    with torch.no_grad():
        split[1].auxiliary.bias += 1.0  # type: ignore[operator, union-attr]
    assert torch.equal(split(x), model(x))
    with auxiliary_batch_norm(split):
        assert not torch.equal(split(x), model(x))


def test_a_batch_norm_of_another_class_cannot_have_a_second_set() -> None:
    class Fused(nn.BatchNorm2d):
        pass

    assert type(ghost_batch_norm(nn.Sequential(Fused(3)), 1)[0]) is Fused  # as it is
    with pytest.raises(ValueError, match="needs a plain BatchNorm1d or 2d or timm's, got Fused at 0"):
        split_batch_norm(nn.Sequential(Fused(3)))
    with pytest.raises(
        ValueError, match="got Fused at 0; set bn_groups=1 on one device, which leaves it as it is"
    ):
        ghost_batch_norm(nn.Sequential(Fused(3)), 2)


class Standardised(nn.Conv2d):
    """A convolution that does more with its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


class Shifted(nn.BatchNorm2d):
    """A batch norm that does more than normalise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def test_folding_keeps_what_a_layer_does_beside() -> None:
    others = nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), Shifted(4))
    x = torch.rand(2, 3, 8, 8).double()
    for model in (lively(with_activation()).eval(), lively(others).eval()):
        torch.testing.assert_close(folded(model, x)(x), model(x), rtol=1e-5, atol=1e-6)
