"""Stochastic rounding of the CUDA kernels: bit for bit what the reference makes of the step of a float32 table."""

from __future__ import annotations

import torch

from rankkernels import reference
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, state_shapes

KEY, STEP = 3 << 32 | 0x89ABCDEF, 6


def stepped(kind: str, weights, states, grads, ids, own, key: int, live: bool) -> list[torch.Tensor]:
    """Two tables after a fused step, of which the second rounds to the nearest."""
    number, T = OPTIMIZERS.index(kind), len(weights)
    counts = [torch.full((1,), STEP - 1.0) for _ in weights]
    rate, one, zero = torch.full((), 0.1), torch.ones(()), torch.zeros(())
    lists = [[*states[t], counts[t], rate, one, zero] if live else states[t] for t in range(T)]
    hyper = [v for k in (key, 0) for v in (0.1, 0.9, 0.99, 1e-6, 0.01, STEP, 1.0, 0.0, float(k), *own)]
    weights_and_states = weights, [s for of_table in lists for s in of_table]
    features = ids, [], [], [0, 1], [0, 0], [-1, -1], [-1, -1], []
    torch.ops.rankkernels.embedding_bag_update.default(grads, *weights_and_states, *features, number, hyper)
    return weights


def check(kind: str, dtype: torch.dtype, D: int, live: bool) -> torch.Tensor:
    """No row is looked up twice, because sums of gradients are rounded to the table's dtype before the step."""
    R, own = 40, [{"lr_power": -0.5, "beta": 0.3, "l1": 0.2, "l2": 0.1, "ar_alpha": 1.5, "min_shrinkage": 0.2}[name]
                 for name in RULES[kind].settings]  # fmt: skip
    ids = [torch.randperm(R)[:30] for _ in range(2)]
    weights, grads = ([torch.randn(n, D).to(dtype) for _ in range(2)] for n in (R, 30))
    states = [[torch.full(shape, 0.1) for shape in state_shapes(kind, w.shape)] for w in weights]
    results = []
    for d in (torch.float32, dtype):
        own_states = [[s.clone() for s in of_table] for of_table in states]
        tables = [w.to(d, copy=True) for w in weights]
        results.append(stepped(kind, tables, own_states, [g.to(d) for g in grads], ids, own, KEY, live))
    (wide, other), narrow = results
    rows, right = ids[0].sort().values, weights[0].clone()
    bits = reference.rounding_bits(KEY, STEP, rows, D)
    right[rows] = reference.round_stochastically(wide[rows], dtype, bits)
    assert torch.equal(narrow[0], right), f"{kind}, {dtype}, {D} wide: not rounded as the reference does"
    assert torch.equal(narrow[1], other.to(dtype)), f"{kind}, {dtype}, {D} wide: not rounded to the nearest"
    return narrow[0]


def every_size(dtype: torch.dtype) -> None:
    """Subnormal numbers, the largest and beyond, infinities and NaN: of a step from 0, the rate times the gradient."""
    grads, rows = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1024, 64), torch.arange(1024)
    for lr in (1.0, 0.37, 1.0013, 3e-4):
        tables = torch.zeros(1024, 64), torch.zeros(1024, 64, dtype=dtype)
        for table in tables:
            hyper = [lr, 0.0, 0.0, 0.0, 0.0, STEP, 1.0, 0.0, float(KEY)]
            torch.ops.rankkernels.sparse_update.default(table, [], rows, grads.to(table.dtype), 0, hyper)
        wide, narrow = tables
        right = reference.round_stochastically(wide, dtype, reference.rounding_bits(KEY, STEP, rows, 64))
        numbers = ~wide.isnan()
        equal = torch.equal(narrow.isnan(), wide.isnan()) and torch.equal(narrow[numbers], right[numbers])
        assert equal, f"{dtype}, steps of {lr}: not rounded as the reference does"


def rounding(some: bool) -> list[torch.Tensor]:
    """The tables that were checked."""
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        every_size(dtype)
        for i, kind in enumerate(OPTIMIZERS[:: 3 if some else 1]):
            found += [check(kind, dtype, D, i % 2 == 0) for D in (5, 16, 24, 130)]
    return found
