"""Batch normalization over the rows of all processes, on any device and backend of torch.distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankkernels.nn.layers import update_running_stats
from rankkernels.ops._exchange import all_gather


class _Normalize(torch.autograd.Function):
    """x [N, H], each process its own N, normalized by the statistics of all their rows. Weight and bias get this
    process's gradients, as from torch's module: a reducer averages them.

    -> out [N, H]; mean and biased variance [H]; the number of rows, a scalar.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        N, H = wide.shape
        mean = wide.mean(0) if N else wide.new_zeros(H)
        own = torch.cat([wide.new_tensor([N]), mean, (wide - mean).square().sum(0)])
        every = own.new_empty(dist.get_world_size(group) * own.numel())
        all_gather(every, own, group=group)
        # In the order of the ranks, so that all processes find the same bits.
        counts, means, squares = every.view(-1, own.numel()).split([1, H, H], 1)
        rows = counts.sum().clamp(min=1)
        mean = (counts * means).sum(0) / rows
        var = (squares + counts * (means - mean).square()).sum(0) / rows
        scale = (var + eps).rsqrt()
        normal = (wide - mean) * scale
        ctx.save_for_backward(normal, scale, weight, rows)
        ctx.group, ctx.dtype = group, x.dtype
        ctx.mark_non_differentiable(mean, var, rows)
        return (normal if weight is None else normal * weight + bias).to(x.dtype), mean, var, rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, *_):
        normal, scale, weight, rows = ctx.saved_tensors
        grad = grad_out.to(normal.dtype)
        own = torch.stack([grad.sum(0), (grad * normal).sum(0)])
        sums = own.clone()
        dist.all_reduce(sums, group=ctx.group)
        of_bias, of_weight = sums / rows
        grad_x = scale * (grad - of_bias - normal * of_weight)
        if weight is None:
            return grad_x.to(ctx.dtype), None, None, None, None
        grad_bias, grad_weight = own.to(weight.dtype)
        return (weight * grad_x).to(ctx.dtype), grad_weight, grad_bias, None, None


class SyncBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` of x [N, H] with the statistics of the rows of all processes, in training.

    What ``nn.SyncBatchNorm`` is to a GPU's modules, also on the CPU, where torch's raises and
    ``DistributedDataParallel`` refuses it. Processes may have different numbers of rows, and none. The layers around
    one run module by module, not fused; ``convert`` puts it there.
    """

    process_group: dist.ProcessGroup | None = None

    @classmethod
    def convert(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """Makes every ``nn.BatchNorm1d`` in ``module`` such a one, in place, hooks and all. Returns ``module``.

        Args:
            module: the model, not yet in ``DistributedDataParallel``.
            process_group: of the processes that take part, the default group if None.
        """
        for m in module.modules():
            if type(m) is nn.BatchNorm1d:
                m.__class__, m.process_group = cls, process_group
        return module

    def forward(self, input: Tensor) -> Tensor:
        """input [N, H] -> [N, H].

        Raises:
            ValueError: another shape.
        """
        if input.dim() != 2 or input.size(1) != self.num_features:
            raise ValueError(f"SyncBatchNorm1d: input must be [N, {self.num_features}], got shape {list(input.shape)}")
        alone = not (dist.is_available() and dist.is_initialized())
        if not self.training or alone or dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        group = dist.group.WORLD if self.process_group is None else self.process_group
        out, mean, var, rows = _Normalize.apply(input, self.weight, self.bias, self.eps, group)
        if self.track_running_stats:
            unbiased = var * (rows / (rows - 1).clamp(min=1))
            update_running_stats([self], torch.cat([mean, unbiased]))
        return out
