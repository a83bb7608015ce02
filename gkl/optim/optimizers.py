"""Optimizers as the recipes use them."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.optim import Lamb, param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    decay_batch_norm: bool = True,
    heads: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD; weight decay reaches all parameters, biases too, as in the published runs.

    decay_batch_norm: False keeps it from batch norm's own (DM-AT). heads: what is not of a network's `backbone()` learns at so many
    times the rate (APD).
    """
    groups: list[dict[str, object]] = [{"params": list(model.parameters())}]
    if heads != 1.0:
        below: list[nn.Module] = [
            network.backbone()
            for network in cast(Iterable[Any], model.modules())
            if hasattr(network, "backbone")
        ]
        taken = {id(p) for backbone in below for p in backbone.parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) in taken]},
            {"params": [p for p in model.parameters() if id(p) not in taken], "lr": heads * lr},
        ]
    if not decay_batch_norm:
        own = {id(p) for m in model.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in own]},
            {"params": [p for p in model.parameters() if id(p) in own], "weight_decay": 0.0},
        ]
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def lamb(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """timm's LAMB (You et al. 2020), no weight decay on biases and norms: strong ImageNet recipes."""
    return Lamb(param_groups_weight_decay(model, weight_decay), lr=lr)


def adamw(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW, no weight decay on biases, norms, class token and positions; a transformer's layers learn at lr * layer_decay ** depth.

    depth: how many layers lie above (Bao et al. 2022). Source: USB's get_optimizer, whose groups timm's are.
    """
    groups: list[dict[str, Any]] = []
    taken: set[int] = set()
    networks: Any = (
        m for m in model.modules() if hasattr(m, "group_matcher")
    )  # timm's, which know their layers
    for network in networks:
        if any(id(p) in taken for p in network.parameters()):
            continue  # part of another
        plain: Any = getattr(network, "no_weight_decay", tuple)()  # most convolutional ones name none
        found = param_groups_layer_decay(
            network, weight_decay, no_weight_decay_list=plain, layer_decay=layer_decay
        )
        groups += [{**group, "lr": lr * group.pop("lr_scale")} for group in found]
        taken |= {id(p) for group in found for p in group["params"]}
    if rest := [p for p in model.parameters() if id(p) not in taken]:
        groups.append({"params": rest})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def clip_adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.98, 1e-6), no weight decay on tensors of fewer than two dimensions, norms, biases and the logit scale.

    Source: OpenCLIP's training, which tells them by their names.
    """
    gains: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        (gains if plain else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": gains, "weight_decay": 0.0},
        {"params": others, "weight_decay": weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)


def llava_adamw(
    model: nn.Module, *, lr: float, projector_lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """torch's AdamW (0.9, 0.999, 1e-8) in two groups: a LLaVA's projector, then its adapters. lr: of these.

    Source: LLaVA's create_optimizer; its launch scripts clip no gradient, as their DeepSpeed files name no bound.
    """
    network: Any = model
    groups: list[dict[str, Any]] = [
        {"params": list(network.projector.parameters()), "lr": projector_lr},
        {"params": network.adapters()},
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
