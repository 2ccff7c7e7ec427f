"""Normalizations with the statistics of the rows of several processes, beside those of one process with all rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from joint_batches import JOINT, joint_batch, make, mean_loss, part_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankkernels as rk
from rankkernels import ops
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops._sync_norm import synchronized_norm_activation

#: The rows of each process: none, one, many; and their columns.
ROWS, H = (0, 1, 40), 7
CASES = [(name, affine, torch.float64) for name in ACTIVATIONS for affine in (True, False)]
CASES += [(name, True, dtype) for name in ("dice", "relu") for dtype in (torch.float32, torch.bfloat16)]
#: A batch with padding alone in one process, and two of which one process has nothing.
STEPS = (1, 2, 7)


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def inputs(case, processes: int) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """All rows of all processes and their gradient; weight, bias, alpha."""
    name, affine, dtype = case
    generator = torch.Generator().manual_seed(0)
    rows = sum(ROWS[-processes:])
    # A mean a hundred times the deviation, as sums of squares would not bear it.
    x, grad = (torch.randn(rows, H, dtype=torch.float64, generator=generator) for _ in range(2))
    weight, bias, alpha = (torch.rand(H, generator=generator, dtype=torch.float64) for _ in range(3))
    learnt = [weight if affine else None, bias if affine else None, alpha if ACTIVATIONS[name] else None]
    shifted = x + 100 * torch.rand(H, generator=generator, dtype=torch.float64)
    return shifted.to(dtype), grad.to(dtype), [None if p is None else p.to(dtype) for p in learnt]


def of_case(case, processes: int, rank: int | None) -> dict[str, Tensor]:
    """Out, statistics, gradients: of a process's rows, or with None of all by the op."""
    x, grad, learnt = inputs(case, processes)
    if rank is not None:
        x, grad = (t.split(ROWS[-processes:])[rank] for t in (x, grad))
    x, *learnt = (None if p is None else p.clone().requires_grad_() for p in (x, *learnt))
    settings = {"activation": case[0], "norm_eps": 1e-5, "dice_eps": 1e-3}
    if rank is None:
        out, stats = ops.norm_activation(x, *learnt, batch_norm=True, training=True, **settings)
    else:
        out, stats = synchronized_norm_activation(x, *learnt, (None, None), dist.group.WORLD, **settings)
    out.backward(grad)
    grads = {name: p.grad for name, p in zip(("weight", "bias", "alpha"), learnt) if p is not None}
    return {"out": out.detach(), "stats": stats, "grad_x": x.grad, **grads}


def model_of(kind: str) -> nn.Module:
    """With torch's synchronized norms, whose own ``forward`` raises on the CPU."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(make(kind))


def step(kind: str, number: int, rank: int, processes: int) -> dict[str, Tensor]:
    """Gradients, averaged, and running statistics after a step on this process's part."""
    model = model_of(kind)
    (processes * mean_loss(model, part_of(joint_batch(number), number, rank, processes), JOINT)).backward()
    found = {}
    for name, p in model.named_parameters():
        dist.all_reduce(p.grad)
        found[name] = p.grad / processes
    return found | dict(model.named_buffers())


def buffers_after_no_rows() -> dict[str, Tensor]:
    """The running statistics, ones at first, after a batch without rows in any process."""
    layers = rk.SyncBatchNorm1d.convert(rk.MLP(H, dims=[5], activation="dice"))
    for name, buffer in layers.named_buffers():
        buffer.fill_(0 if name.endswith("num_batches_tracked") else 1)
    layers(torch.randn(0, H)).sum().backward()
    return dict(layers.named_buffers())


def synchronized(rank: int, processes: int) -> dict:
    """What this process has of all cases and steps."""
    cases = [of_case(case, processes, rank) for case in CASES]
    steps = {(m, s): step(m, s, rank, processes) for m in ("DeepFM", "DIN") for s in STEPS}
    return {"cases": cases, "steps": steps, "of no rows": buffers_after_no_rows()}


def joint_step(kind: str, number: int, processes: int) -> dict[str, Tensor]:
    """The same by one process with all parts."""
    model = make(kind)
    parts = [part_of(joint_batch(number), number, rank, processes) for rank in range(processes)]
    mean_loss(model, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, JOINT).backward()
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
