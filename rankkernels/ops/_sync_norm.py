"""``norm_activation`` in training with the statistics of the rows of several processes.

Two passes over the rows, forward and backward, as in one process: one for the sums, which all processes exchange, and
one that the op makes with statistics given, as in eval. Over the network go two numbers a column each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rankkernels.ops._activations import number_of
from rankkernels.ops._checks import wide
from rankkernels.ops._ranks import of_every_process
from rankkernels.ops.norm_activation import Flags, Inputs


class _Statistics(NamedTuple):
    """Of the rows of all processes: mean and biased variance [H], and how many rows there are, a scalar, 1 for none."""

    mean: Tensor
    var: Tensor
    rows: Tensor


def _statistics(x: Tensor, running: Sequence[Tensor | None], group: dist.ProcessGroup) -> _Statistics:
    """Those of x [N, H], of which each process has an N of its own; the ``running`` ones where nobody has any."""
    N, H = x.shape
    # torch's own pass for this is ten times as fast as var_mean.
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0) if N else x.new_zeros(2, H)
    every = of_every_process(torch.cat([x.new_tensor([N]), mean, N * var]), group)
    counts, means, squares = every.split([1, H, H], 1)
    some, rows = counts.sum() > 0, counts.sum().clamp(min=1)
    mean = (counts * means).sum(0) / rows
    var = (squares + counts * (means - mean).square()).sum(0) / rows
    if running[0] is not None:
        mean, var = (torch.where(some, own, kept.to(own.dtype)) for own, kept in zip((mean, var), running))
    return _Statistics(mean, var, rows)


class _Synchronized(torch.autograd.Function):
    """-> out, and what the op calls ``batch_stats``. Parameters get this process's gradients, as from torch's modules:
    a reducer averages them."""

    @staticmethod
    def forward(ctx, x, weight, bias, alpha, running, flags, group):
        accumulated = wide(x.dtype)
        stats = _statistics(x.to(accumulated), running, group)
        ctx.is_affine, ctx.flags, ctx.group = weight is not None, flags, group
        if ctx.is_affine:
            weight, bias = weight.to(accumulated), bias.to(accumulated)
        else:
            weight, bias = torch.ones_like(stats.mean), torch.zeros_like(stats.mean)
        inputs = Inputs(x, weight, bias, alpha, stats.mean, stats.var)
        out, _ = torch.ops.rankkernels.norm_activation.default(*inputs, *flags)
        batch_stats = torch.cat([stats.mean, stats.var * (stats.rows / (stats.rows - 1).clamp(min=1))])
        ctx.save_for_backward(stats.rows, *inputs)
        ctx.mark_non_differentiable(batch_stats)
        return out, batch_stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        rows, *inputs = ctx.saved_tensors
        x, weight, _, _, mean, var = inputs = Inputs(*inputs)
        grad_x, grad_params = torch.ops.rankkernels.norm_activation_backward.default(
            grad_out, mean.new_empty(0), *inputs, *ctx.flags
        )
        grad_weight, grad_bias, grad_alpha = inputs.spread(grad_params)
        # What the op leaves out in eval: the gradient's way through the mean and the variance, which is
        # -scale (mean of grad_y + n mean of grad_y n) for n = (x - mean) r.
        sums = of_every_process(torch.cat([grad_weight, grad_bias]), ctx.group).sum(0)
        of_weight, of_bias = (sums / rows).chunk(2)
        r = (var + ctx.flags.norm_eps).rsqrt()
        slope, scale = weight * r * r * of_weight, weight * r
        grad_x.sub_(torch.addcmul(scale * of_bias - slope * mean, x, slope))
        grads = Inputs(grad_x, *((grad_weight, grad_bias) if ctx.is_affine else (None, None)), grad_alpha, None, None)
        return grads.x, grads.weight, grads.bias, grads.alpha, None, None, None


def synchronized_norm_activation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: Tensor | None,
    running: Sequence[Tensor | None],
    group: dist.ProcessGroup,
    *,
    activation: str,
    norm_eps: float,
    dice_eps: float,
) -> tuple[Tensor, Tensor]:
    """``norm_activation`` with ``batch_norm`` and ``training``, and the statistics of the rows of all processes of
    ``group``, which all call it. A process may have one row or none; where all have none, ``batch_stats`` are the
    ``running`` mean and variance [H]. Differentiable once."""
    number = number_of("norm_activation", activation)
    flags = Flags(number, batch_norm=True, training=False, norm_eps=norm_eps, dice_eps=dice_eps)
    return _Synchronized.apply(x, weight, bias, alpha, running, flags, group)
