"""A network for evaluation alone with fewer passes over its maps: batch norms inside the convolutions before them.

answering = folded(teacher.eval(), images)
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gkl.models.batch_norm import GROUPED


def folded(network: nn.Module, example: Tensor) -> nn.Module:
    """A copy for evaluation alone, in which each batch norm that is all that reads a convolution's output is part of that convolution.

    The same function up to rounding, without a pass over the maps per batch norm. network: in eval mode. example: images on which
    it is seen who reads what.
    """
    copied = copy.deepcopy(network)
    foldable = (*GROUPED, *GROUPED.values())
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
        if type(module) is nn.Conv2d:  # others may do more with their weights than convolve
            made[id(output)] = (module, output)
        elif (
            isinstance(module, nn.BatchNorm2d)
            and type(module) in foldable
            and id(inputs[0]) in made
            and module.track_running_stats
        ):
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
                        setattr(parent, name, getattr(norm, "act", nn.Identity()))
    return copied
