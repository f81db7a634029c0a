"""Batch normalisation over all processes, on CPUs too, where PyTorch has none."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.distributed.process import world_size


class _Sum(torch.autograd.Function):
    """Sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override]
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total)
        return total


class HostSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm with any back end; the processes' batches may differ in size. Statistics are full precision."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x, dims = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input, (0, 2, 3)
        sums = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])  # (C + 1,)
        sums = cast(Tensor, _Sum.apply(sums))
        count, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = x - mean[:, None, None]
        var = cast(Tensor, _Sum.apply(centred.square().sum(dims))) / count
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
        normed = centred * (var + self.eps).rsqrt()[:, None, None]
        if self.weight is not None:
            normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.to(input.dtype)


def statistics(model: nn.Module) -> list[Tensor]:
    """The running statistics of every batch norm."""
    return [buffer for m in model.modules() if isinstance(m, _BatchNorm) for buffer in m.buffers()]


def convert(model: nn.Module, device: torch.device) -> nn.Module:
    """Share the statistics of every BatchNorm2d over all processes; nothing changes on one process."""
    if world_size() == 1:
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = HostSyncBatchNorm
    return model
