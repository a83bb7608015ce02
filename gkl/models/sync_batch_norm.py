"""Batch norm over the pictures of several processes: the whole batch, or a part of it, however many share it.

model = synchronised(create("pspnet_18", num_classes=150))
y = normalised_across(norm, x, groups=1)       # what that does, for any batch norm
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gkl.distributed import all_sum, rank, world_size


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the statistics of all processes' pictures, with gradient through them; with one process as torch's own.

    torch's SyncBatchNorm does the same and is for GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        return normalised_across(self, x, groups=1)


def synchronised(model: nn.Module) -> nn.Module:
    """Make every plain BatchNorm2d one of all processes' pictures; in place, returns the model. Parameters and buffers stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


@torch.compiler.disable
def normalised_across(norm: _BatchNorm, x: Tensor, groups: int) -> Tensor:
    """x (B, C, ...) normalised by its group's statistics, of which each of `groups` is shared by as many processes as the others.

    Running statistics follow the first group, on every process. All processes must call it together.
    """
    y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rest, shape = (0, *range(2, y.dim())), (-1, *[1] * (y.dim() - 2))
    group = rank() * groups // world_size()
    mine = (torch.arange(groups, device=y.device) == group).to(y.dtype)[:, None]  # (groups, 1)
    count = y.new_full((1,), y.numel() / y.shape[1])
    sums = all_sum(mine * torch.cat([y.sum(rest), count]))
    means, counts = sums[:, :-1] / sums[:, -1:], sums[:, -1:].detach()
    centred = y - means[group].view(shape)
    variances = all_sum(mine * centred.square().sum(rest)) / counts
    if norm.training and norm.track_running_stats:
        _follow(norm, means[0].detach(), (variances * counts / (counts - 1))[0].detach())
    scale = torch.rsqrt(variances[group] + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    out = centred * scale.view(shape)
    return (out if norm.bias is None else out + norm.bias.view(shape)).to(x.dtype)


def _follow(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """One step of the running statistics; without a momentum they are the average of all batches."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    for running, new in ((norm.running_mean, mean), (norm.running_var, variance)):
        weight = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        running.add_((new.to(running.dtype) - running) * weight)
