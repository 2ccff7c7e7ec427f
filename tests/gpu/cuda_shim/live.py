"""Steps of the CUDA kernels: those that read what changes from step to step on the device, and one to count."""

from __future__ import annotations

import torch

from rankkernels.ops.embedding_bag_update import OPTIMIZERS


def live_steps(features, grad_outs, kind: int, weights, states, own: list[float]) -> list[torch.Tensor]:
    """Steps that read learning rate, number and loss scale where the tables are, with the same arguments each time as a
    CUDA graph has them: one taken, one skipped, one taken, and one with a sparse gradient. -> the tables' counts."""
    T, each = len(weights), len(states) // len(weights)
    lr, scale, skip = (torch.full((), value) for value in (0.05, 4.0, 0.0))
    counts = [torch.full((1,), 3.0 + t) for t in range(T)]
    lists = [[*states[t * each : t * each + each], counts[t], lr, scale, skip] for t in range(T)]
    hyper = [0.0, 0.9, 0.99, 1e-6, 0.01, 0.0, 0.0, 0.7, 0.0, *own]
    for skipped in (0.0, 1.0, 0.0):
        skip.fill_(skipped)
        lr.mul_(0.5)
        torch.ops.rankkernels.embedding_bag_update.default(
            grad_outs, weights, [s for of_table in lists for s in of_table], *features, kind, hyper * T
        )
    rows, width = torch.arange(0, weights[0].size(0), 3), weights[0].size(1)
    values = torch.linspace(-1, 1, rows.numel() * width, dtype=torch.float64).view(-1, width).to(weights[0].dtype)
    torch.ops.rankkernels.sparse_update.default(weights[0], lists[0], rows, values, kind, hyper)
    assert [int(c) for c in counts] == [6, *range(6, 5 + T)]
    return counts


def one_update(case, grad_outs: list[torch.Tensor]) -> None:
    weights, *features = case.arguments(*case.inputs())[:-1]
    hyper = [0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0] * len(weights)
    torch.ops.rankkernels.embedding_bag_update.default(
        grad_outs, weights, [], *features, OPTIMIZERS.index("sgd"), hyper
    )


def launches_of(case) -> None:
    inputs = case.inputs(requires_grad=True)
    out = case.function(*inputs)
    print("done", flush=True)
    torch.autograd.grad(out, [t for t in inputs if t.requires_grad], torch.ones_like(out))
    print("done", flush=True)
    if case.op == "embedding_bag":
        one_update(case, list(torch.ones_like(out).split(4, 1)))
        print("done", flush=True)
