"""Batch norm over the pictures of all processes: the whole batch, however many share it.

model = synchronised(create("pspnet_18", num_classes=150))
"""

import torch
from torch import Tensor, nn

from gkl.distributed import all_sum, world_size


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the statistics of all processes' pictures, with gradient through them; with one process as torch's own.

    torch's SyncBatchNorm does the same and is for GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if world_size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(x)
        y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        count = y.new_full((1,), y.numel() / y.shape[1])
        sums = all_sum(torch.cat([y.sum((0, 2, 3)), count]))
        mean, items = sums[:-1] / sums[-1], sums[-1].detach()
        centred = y - mean[:, None, None]
        variance = all_sum(centred.square().sum((0, 2, 3))) / items
        if self.training and self.track_running_stats:
            self._follow(mean.detach(), variance.detach() * items / (items - 1))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def synchronised(model: nn.Module) -> nn.Module:
    """Make every plain BatchNorm2d one of all processes' pictures; in place, returns the model. Parameters and buffers stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
