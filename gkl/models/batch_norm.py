"""Batch norm as several cards have it, and the modes of a network as context managers.

model = ghost_batch_norm(create("wrn_34_10", num_classes=100), groups=4)  # the published runs: four cards
with eval_mode(model), frozen_parameters(model):
    x_adv = attack(model, x)
with frozen_statistics(model):
    loss(model(x_adv)).backward()  # normalised by the batch, running statistics untouched
with auxiliary_batch_norm(split_batch_norm(model)):
    model(strongly_augmented)  # its own batch norm
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkl.distributed import world_size
from gkl.models.sync_batch_norm import SyncBatchNorm2d, normalised_across

HAS_TRITON = find_spec("triton") is not None
Activation = Callable[[Tensor], Tensor]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that cuts its batch as torch.chunk(x, groups), each chunk normalised by its own statistics.

    Running statistics follow the first chunk alone. Source: what nn.DataParallel does over `groups` cards,
    where only replica 0 shares its buffers with the network that is kept.
    """

    groups: int = 1
    across: bool = False  # whether each group is shared by several processes
    group_size: int = 0  # images in a chunk where it is not this batch's own share: see set_group_size

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(B, C, H, W) -> the same shape. activation: applied to the result.

        One pass over the map where `_fused` says so. Raises ValueError for a chunk of one value a channel, as torch.
        """
        by_batch = self.training or self.running_mean is None
        if self.across and by_batch and world_size() > 1:
            y = normalised_across(self, x, self.groups)
            return y if activation is None else activation(y)
        if _fused(self, x):
            return self._in_one_pass(x, by_batch, activation)
        y = self._chunk_by_chunk(x) if self.groups > 1 and by_batch else super().forward(x)
        return y if activation is None else activation(y)

    def _chunk_by_chunk(self, x: Tensor) -> Tensor:
        first, *others = x.split(self.group_size) if self.group_size else x.chunk(self.groups)
        normalised = [super().forward(first)]
        for chunk in others:
            normalised.append(
                F.batch_norm(chunk, None, None, self.weight, self.bias, training=True, eps=self.eps)
            )
        return torch.cat(normalised)

    def _in_one_pass(self, x: Tensor, by_batch: bool, activation: Activation | None) -> Tensor:
        # Imported when first wanted: a machine without a GPU may have no Triton.
        from gkl.models.triton_batch_norm import activation_number, batch_norm

        buffers: Any = (self.running_mean, self.running_var, self.num_batches_tracked)
        renewed = self.training and self.track_running_stats
        inside = activation_number(activation)
        y = batch_norm(
            x,
            self.weight,
            self.bias,
            buffers if renewed or not by_batch else None,
            images=_chunk_size(self, x),
            by_batch=by_batch,
            momentum=self.momentum if self.momentum is not None else 0.0,
            eps=self.eps,
            activation=inside or 0,
        )
        return y if activation is None or inside else activation(y)


def _chunk_size(norm: GhostBatchNorm2d, x: Tensor) -> int:
    """Images in each chunk but the last."""
    size = norm.group_size if norm.groups > 1 and norm.group_size else -(-x.shape[0] // norm.groups)
    return min(size, x.shape[0])


def _fused(norm: GhostBatchNorm2d, x: Tensor) -> bool:
    """Whether the Triton kernels do what torch would: x on a GPU that Triton knows, channels_last, no float64.

    Not under torch.compile, which makes one pass of the norm, its activation and what follows them.
    """
    if torch.compiler.is_compiling() or not (
        HAS_TRITON
        and x.is_cuda
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.dim() == 4
        and x.shape[1] == norm.num_features
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not norm._forward_hooks  # whoever listens sees what torch does
        and torch.cuda.get_device_properties(x.device).major >= 7
    ):
        return False
    tensors: list[Tensor | None] = [norm.weight, norm.bias]
    by_batch = norm.training or norm.running_mean is None
    if norm.training and norm.track_running_stats:
        if norm.momentum is None or norm.num_batches_tracked is None:
            return False  # torch's cumulative average, or a norm that counts no batches
        tensors += [norm.running_mean, norm.running_var]
    elif not by_batch:
        tensors += [norm.running_mean, norm.running_var]
    if by_batch:
        size = _chunk_size(norm, x)
        smallest = x.shape[0] % size or size
        if smallest * x.shape[2] * x.shape[3] == 1:
            return False  # torch says what is wrong with a chunk of one value
    return all(t is not None and t.dtype == torch.float32 and t.device == x.device for t in tensors)


def activated(norm: nn.Module, x: Tensor, activation: Activation) -> Tensor:
    """activation(norm(x)), in one pass over the map where the norm can; whoever hooks the norm sees norm(x)."""
    if isinstance(norm, GhostBatchNorm2d) and not norm._forward_hooks:
        return norm(x, activation)
    return activation(norm(x))


class GhostBatchNorm1d(GhostBatchNorm2d):
    """As GhostBatchNorm2d of (B, C) or (B, C, L)."""

    def _check_input_dim(self, input: Tensor) -> None:
        nn.BatchNorm1d._check_input_dim(self, input)  # type: ignore[arg-type]


class SplitBatchNorm2d(GhostBatchNorm2d):
    """Batch norm with a second set of weights and statistics, used inside `auxiliary_batch_norm`.

    The first set keeps the names and the state of the batch norm it was made from. Source: Xie et al. 2020; DAJAT.
    """

    auxiliary: GhostBatchNorm2d
    divert: bool = False

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(B, C, H, W) -> the same shape. activation: applied to the result."""
        return self.auxiliary(x, activation) if self.divert else super().forward(x, activation)


class GhostBatchNormAct2d(GhostBatchNorm2d):
    """timm's batch norm with what follows it inside, grouped. Source: timm.layers.BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(B, C, H, W) -> the same shape. activation: applied to the result, after its own."""
        y = self.act(self.drop(super().forward(x)))
        return y if activation is None else activation(y)


class SplitBatchNormAct2d(SplitBatchNorm2d, GhostBatchNormAct2d):
    """As SplitBatchNorm2d of timm's."""


class SplitBatchNorm1d(SplitBatchNorm2d, GhostBatchNorm1d):
    """As SplitBatchNorm2d of (B, C) or (B, C, L)."""


# A batch norm's class -> the one that groups it, and the one that splits it.
GROUPED: dict[type[nn.Module], type[GhostBatchNorm2d]] = {
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm1d: GhostBatchNorm1d,
    BatchNormAct2d: GhostBatchNormAct2d,
}
SPLIT: dict[type[nn.Module], type[SplitBatchNorm2d]] = {
    GhostBatchNorm2d: SplitBatchNorm2d,
    GhostBatchNorm1d: SplitBatchNorm1d,
    GhostBatchNormAct2d: SplitBatchNormAct2d,
}


def split_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm a second set of weights and statistics, initially equal; in place, returns the model.

    Raises ValueError for a class of batch norm that cannot have it.
    """
    if unknown := _ungrouped(model):
        raise ValueError(
            f"a second set of statistics needs a plain BatchNorm1d or 2d or timm's, got {unknown}"
        )
    ghost_batch_norm(model, 1)
    for module in [m for m in model.modules() if type(m) in SPLIT]:
        module.add_module("auxiliary", copy.deepcopy(module))
        module.__class__ = SPLIT[type(module)]
    return model


def _ungrouped(model: nn.Module) -> str | None:
    """The first batch norm whose own forward no class here has, None if there is none."""
    known = (*GROUPED, *GROUPED.values(), *SPLIT.values(), SyncBatchNorm2d)
    others = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and type(module) not in known
    ]
    return f"{type(others[0][1]).__name__} at {others[0][0]}" if others else None


@contextmanager
def auxiliary_batch_norm(model: nn.Module, divert: bool = True) -> Iterator[None]:
    """Inside, the model's split batch norms use their second set; divert=False leaves them as they are."""
    split = [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]
    for module in split:
        module.divert = divert
    try:
        yield
    finally:
        for module in split:
            module.divert = False


def ghost_batch_norm(model: nn.Module, groups: int, across: bool = False) -> nn.Module:
    """Make every BatchNorm1d and BatchNorm2d normalise its training batch in `groups` chunks; in place, returns the model.

    Parameters, buffers and their names stay, and so does eval mode. groups = 1 is plain batch norm. across: each chunk is shared by
    several processes, a multiple of `groups` in all, as gkl.distributed.Shard shares it; they exchange sums at each forward.
    Raises ValueError for groups < 1, and for groups > 1 or across of a class of batch norm whose own forward would be lost.
    """
    if groups < 1:
        raise ValueError(f"batch norm needs groups >= 1, got {groups}; 1 normalises the whole batch together")
    if (groups > 1 or across) and (unknown := _ungrouped(model)):
        raise ValueError(
            f"only a plain BatchNorm1d or 2d or timm's can be grouped, got {unknown}; set bn_groups=1 on one device, which leaves it as it is"
        )
    for module in model.modules():
        if type(module) in GROUPED:
            module.__class__ = GROUPED[type(module)]  # not a copy: parameters, buffers and hooks stay
        if isinstance(module, GhostBatchNorm2d):
            module.groups, module.across = groups, across
    return model


def set_group_size(model: nn.Module, size: int) -> None:
    """Cut batches into chunks of `size` images from now on (0: of batch / groups).

    A process that holds some of a larger batch's chunks then cuts where the whole batch would be cut.
    """
    for module in model.modules():
        if isinstance(module, GhostBatchNorm2d):
            module.group_size = size


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm in training mode normalises by the batch but leaves its running statistics alone."""
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards every module is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter needs a gradient: a backward pass goes to the images alone. None is left frozen that was not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
