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
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HAS_TRITON = find_spec("triton") is not None
Activation = Callable[[Tensor], Tensor]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that cuts its batch as torch.chunk(x, groups), each chunk normalised by its own statistics.

    Running statistics follow the first chunk alone. Source: what nn.DataParallel does over `groups` cards,
    where only replica 0 shares its buffers with the network that is kept.
    """

    groups: int = 1
    group_size: int = 0  # images in a chunk where it is not this batch's own share: see set_group_size

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(B, C, H, W) -> the same shape. activation: applied to the result.

        One pass over the map where `_fused` says so. Raises ValueError for a chunk of one value a channel, as torch.
        """
        by_batch = self.training or self.running_mean is None
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


class SplitBatchNorm2d(GhostBatchNorm2d):
    """Batch norm with a second set of weights and statistics, used inside `auxiliary_batch_norm`.

    The first set keeps the names and the state of the batch norm it was made from. Source: Xie et al. 2020; DAJAT.
    """

    auxiliary: GhostBatchNorm2d
    divert: bool = False

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """(B, C, H, W) -> the same shape. activation: applied to the result."""
        return self.auxiliary(x, activation) if self.divert else super().forward(x, activation)


def split_batch_norm(model: nn.Module) -> nn.Module:
    """Give every batch norm a second set of weights and statistics, initially equal; in place, returns the model."""
    ghost_batch_norm(model, 1)
    for module in [m for m in model.modules() if type(m) is GhostBatchNorm2d]:
        module.add_module("auxiliary", copy.deepcopy(module))
        module.__class__ = SplitBatchNorm2d
    return model


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


def ghost_batch_norm(model: nn.Module, groups: int) -> nn.Module:
    """Make every BatchNorm2d normalise its training batch in `groups` chunks; in place, returns the model.

    Parameters, buffers and their names stay, and so does eval mode. groups = 1 is plain batch norm.
    Raises ValueError for groups < 1, and for a subclass of BatchNorm2d, whose own forward would be lost.
    """
    if groups < 1:
        raise ValueError(f"batch norm needs groups >= 1, got {groups}; 1 normalises the whole batch together")
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and type(module) not in (
            nn.BatchNorm2d,
            GhostBatchNorm2d,
            SplitBatchNorm2d,
        ):
            kind = type(module).__name__
            raise ValueError(f"only a plain BatchNorm2d can be grouped, got {kind} at {name}; use groups=1")
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GhostBatchNorm2d  # in place of a copy: parameters, buffers and hooks stay
        if isinstance(module, GhostBatchNorm2d):
            module.groups = groups
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


def folded(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy for evaluation alone, in which each batch norm that is all that reads a convolution's output is part of that convolution.

    The same function up to rounding, without a pass over the maps per batch norm. network: in eval mode. example: images on which
    it is seen who reads what.
    """
    copied = copy.deepcopy(network)
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the outputs are kept, so that an id stays one tensor's
    readers: dict[int, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, int]] = []

    class Readers(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in made:
                    readers[id(leaf)] = readers.get(id(leaf), 0) + 1
            return func(*args, **(kwargs or {}))

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made and module.track_running_stats:
            pairs.append((made[id(inputs[0])][0], module, id(inputs[0])))

    hooks = [module.register_forward_hook(seen) for module in copied.modules()]
    with torch.no_grad(), Readers():
        copied(example)
    for hook in hooks:
        hook.remove()
    norms = [norm for _, norm, _ in pairs]
    convolutions = [convolution for convolution, _ in made.values()]
    for convolution, norm, output in pairs:
        once = norms.count(norm) == 1 and convolutions.count(convolution) == 1
        if readers[output] == 1 and once and norm.running_var is not None and norm.running_mean is not None:
            scale = (norm.running_var + norm.eps).rsqrt() * (
                1.0 if norm.weight is None else norm.weight.detach()
            )
            shift = (
                -norm.running_mean
                if convolution.bias is None
                else convolution.bias.detach() - norm.running_mean
            )
            shift = shift * scale + (0.0 if norm.bias is None else norm.bias.detach())
            convolution.weight.data = convolution.weight.detach() * scale[:, None, None, None]
            convolution.bias = nn.Parameter(shift, requires_grad=False)
            for parent in copied.modules():
                for name, child in parent.named_children():
                    if child is norm:
                        setattr(parent, name, nn.Identity())
    return copied


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
