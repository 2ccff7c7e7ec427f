"""Batch normalizations as the ops run them: with the statistics of one process's rows, or of all processes'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn._transparency import is_plain
from rankkernels.ops._sync_norm import synchronized_norm_activation
from rankkernels.ops._tracing import is_tensor


@torch.no_grad()
def update_running_stats(norms: Sequence[nn.Module], batch_stats: Tensor) -> None:
    """What ``nn.BatchNorm1d`` does with a batch's mean and unbiased variance."""
    stats = iter(batch_stats.split([n.num_features for n in norms for _ in range(2)]))
    for norm in norms:
        norm.num_batches_tracked.add_(1)
        running = [norm.running_mean, norm.running_var]
        batch = [next(stats).to(r.dtype) for r in running]
        if norm.momentum is None:  # the mean over all batches
            share = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
            for r, b in zip(running, batch):
                r.lerp_(b, share)
        else:
            torch._foreach_lerp_(running, batch, norm.momentum)


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """Whose rows ``norm`` normalizes by, if not by those of this process alone: a synchronized one in training."""
    if type(norm) is nn.BatchNorm1d or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if norm.process_group is None else norm.process_group
    return group if dist.get_world_size(group) > 1 else None


def group_name_of(norm: nn.Module) -> str:
    """The name of ``group_of``, none where there is none."""
    group = group_of(norm)
    return "" if group is None else group.group_name


def normalized(norm: nn.Module, x: Tensor, activation: str, alpha: Tensor | None, dice_eps: float = 0.0) -> Tensor:
    """``norm_activation`` of x [N, H] with ``norm`` as if it had been called, running statistics included."""
    settings = {"activation": activation, "norm_eps": norm.eps, "dice_eps": dice_eps}
    group = group_of(norm)
    if group is None:
        out, batch_stats = ops.norm_activation(
            x, norm.weight, norm.bias, alpha, norm.running_mean, norm.running_var,
            batch_norm=True, training=norm.training, **settings,
        )  # fmt: skip
    else:
        running = norm.running_mean, norm.running_var
        out, batch_stats = synchronized_norm_activation(x, norm.weight, norm.bias, alpha, running, group, **settings)
    if norm.training and norm.track_running_stats:
        update_running_stats([norm], batch_stats)
    return out


class SyncBatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` of x [N, H] with the statistics of the rows of all processes, in training.

    What ``nn.SyncBatchNorm`` is to a GPU's modules, also on the CPU, where torch's raises and
    ``DistributedDataParallel`` refuses it. Processes may have different numbers of rows, and none. Either kind runs as
    one op with the activation behind it, in DIN's attention on a CPU with all of that. Differentiable once. ``convert``
    puts it there.
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
        return super().forward(input) if group_of(self) is None else normalized(self, input, "linear", None)


#: The classes that the ops may stand for.
BATCH_NORMS = {nn.BatchNorm1d, nn.SyncBatchNorm, SyncBatchNorm1d}
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}


def is_served(norm: nn.Module) -> bool:
    """Whether ``norm`` is plain and one of ``BATCH_NORMS``, with settings the ops know: running statistics, all of
    them, and both of weight and bias or neither."""
    kind = type(norm)
    if kind not in BATCH_NORMS or not is_plain(norm, kind) or not norm.track_running_stats:
        return False
    parameters, buffers = norm._parameters, norm._buffers  # ten times as fast as attributes
    if "weight" not in parameters or "bias" not in parameters or not _STATISTICS <= buffers.keys():
        return False
    affine = parameters["weight"], parameters["bias"]
    if affine[0] is None and affine[1] is None:
        affine = ()
    return all(map(is_tensor, (*affine, *map(buffers.get, _STATISTICS))))
