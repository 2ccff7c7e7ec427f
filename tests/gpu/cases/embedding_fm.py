"""Lookup, FM and linear term under the CPU shim, beside the op's TEST_CASES, and in Triton under the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases import embedding_bag
from gpu.cases.base import BF16, DOUBLE, HALF, ROUNDED_ONCE, SINGLE, Interpreted
from torch import Tensor

from rankkernels import reference
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, ROUNDING
from rankkernels.testing import embedding_fm_case

CASES = [
    # Groups of every number of lanes, packed and not, with fewer and more features than a warp has groups.
    *(embedding_fm_case([7], d, [0] * 3, ["none", "sum", "max"], B=9, L=2) for d in (1, 2, 12, 16, 40, 136, 300)),
    embedding_fm_case([7, 5], 4, [0, 1] * 9, ["none", "mean"] * 9, B=11, padding_idx=2),
    # More features than go with one launch, and more samples than a part of the linear weights' gradient.
    embedding_fm_case([3] * 90, 8, list(range(90)), ["sum", "none"] * 45, B=10),
    embedding_fm_case([3] * 90, 5, list(range(90)), ["none", "mean"] * 45, B=2, linear=False),
    embedding_fm_case([7], 4, [0, 0], ["none", "none"], B=4100, dense=3),
]


def make(config: dict, dtype: torch.dtype) -> dict:
    """``config``: as embedding_bag's; ``given`` gradients, of embeddings, FM and linear term, which may have ``dense``
    columns behind them or be ``expanded``."""
    arguments = embedding_bag.make(config, dtype)
    for name in ("grad_outs", "concat", "given"):
        del arguments[name]
    B, width, more = config["B"], len(config["tables"]) * config["dims"][0], config.get("dense", 0)
    gradients = [torch.randn(B, n).to(dtype) for n in (width + more, 1, 1)]
    if config.get("expanded"):
        gradients = [g[:1, :1].expand(g.shape) for g in gradients]
    gradients[0] = gradients[0][:, :width]
    gradients = [g if name in config["gradients"] else None for g, name in zip(gradients, ("all", "fm", "linear"))]
    linear_weight = None if config.get("weightless") else torch.randn(1, width).to(dtype)
    return {**arguments, "gradients": gradients, "linear_weight": linear_weight, "more": more}


def looked_up(module: ModuleType, weights, features, more: int) -> tuple[Tensor, Tensor]:
    """The embeddings, with columns behind them, and the FM."""
    out = weights[0].new_empty(features.indices[0].size(0), len(features.indices) * weights[0].size(1))
    fm = module.embedding_fm(weights, features, out)
    return torch.cat([out, out[:, :more]], 1)[:, : out.size(1)], fm


def forward(module: ModuleType, weights, features, more, **_) -> Sequence[Tensor]:
    return looked_up(module, weights, features, more)


def launch(
    module: ModuleType, weights, features, gradients, linear_weight, more, way, states, hyper, live
) -> Sequence[Tensor]:
    assert module.supports(weights, features)
    (embeddings, fm), n = looked_up(module, weights, features, more), len(weights)
    if way == "dense":
        grad_x = embeddings.new_empty(embeddings.size(0), len(features.indices), weights[0].size(1))
        module.lookup_gradients(gradients, embeddings, linear_weight, grad_x)
        return embeddings, fm, grad_x
    given = states, live
    stepped, states, live = ([t.clone() for t in tensors] for tensors in (weights, states, live))
    every = [s for t in range(n) for kind in (states, live) for s in embedding_bag.of_tables(kind, t, n)]
    module.embedding_fm_update(
        gradients, embeddings, linear_weight, stepped, every, features, OPTIMIZERS.index(way), hyper
    )
    right = []
    if hyper[ROUNDING]:
        grads = embeddings.new_empty(embeddings.size(0), len(features.indices), weights[0].size(1))
        module.lookup_gradients(gradients, embeddings, linear_weight, grads)
        right = embedding_bag.rounded(module, features, grads.unbind(1), False, way, hyper, weights, given, stepped)
    return embeddings, fm, *stepped, *states, *live, *right


def rows_of(weights, features) -> list[tuple[Tensor, Tensor]]:
    """Each feature's rows, 0 for ids outside the table, which contribute nothing, and which ones are none of these."""
    found = []
    for ids, t in zip(features.as_rows().indices, features.tables):
        inside = (ids >= 0) & (ids < weights[t].size(0))
        found.append((ids.where(inside, 0).long(), inside))
    return found


def expected(weights, features, gradients, linear_weight, more, way, states, hyper, live) -> Sequence[Tensor]:
    rows, n, of_tables = rows_of(weights, features), len(weights), embedding_bag.of_tables
    fields = torch.stack([weights[t][i] * inside[:, None] for (i, inside), t in zip(rows, features.tables)], 1)
    embeddings = fields.flatten(1).requires_grad_()
    fm, linear = reference.fm_and_linear(embeddings, fields.size(2), linear_weight)
    pairs = [(o, g) for o, g in zip((embeddings, fm, linear), gradients) if o is not None and g is not None]
    (grad,) = torch.autograd.grad([o for o, _ in pairs], embeddings, [g for _, g in pairs])
    outs, grad = (embeddings.detach(), fm.detach()), grad.view(fields.shape)
    if way == "dense":
        return *outs, grad
    weights, states, live = ([t.detach().clone() for t in tensors] for tensors in (weights, states, live))
    for t, weight in enumerate(weights):
        of_table, looked_up = torch.zeros_like(weight), []
        for f, (i, inside) in enumerate(rows):
            if features.tables[f] == t:
                keep = inside & (i != features.frozen_rows[t])
                of_table.index_add_(0, i[keep], grad[keep, f])
                looked_up.append(i[keep])
        mine = [of_tables(values, t, n) for values in (states, hyper, live)]
        embedding_bag.step(way, weight, mine[0], of_table, torch.cat(looked_up).unique(), *mine[1:])
    right = [torch.ones_like(w) for w in weights] if hyper[ROUNDING] else []
    return *outs, *weights, *states, *live, *right


def config(rows: Sequence[int], D: int, tables: Sequence[int], B: int, gradients: str = "all fm linear", **options):
    return {
        "rows": rows, "dims": [D] * len(rows), "tables": tables, "modes": ["none"] * len(tables), "B": B, "L": 1,
        "shape": (B, D), "gradients": gradients.split(), **options,
    }  # fmt: skip


TWO = [7, 40], 16, [0, 1, 0]
MANY = [5] * 26, 16, list(range(26))

EMBEDDING_FM = Interpreted(
    module="embedding_fm",
    huge=[embedding_fm_case([2**27, 5], 20, [0, 1, 0], ["none"] * 3, B=2**27)],
    make=make,
    launch=launch,
    expected=expected,
    forward=forward,
    configs=[
        config(*TWO, 19, dense=3),
        config(*TWO, 19, "fm", narrow=True),
        config(*TWO, 9, "all linear", known="hash", padding=1),
        config(*TWO, 9, "linear", outside=True, gap=3),
        config(*TWO, 9, "all fm", known="row", weightless=True),
        config(*TWO, 5, expanded=True),
        config([7], 10, [0] * 11, 37, way="sgd", clips=True),
        config(*MANY, 33, way="adam", padding=0),
        config(*MANY, 9, way="adam", live=True),  # more numbers than one launch brings
        config([40, 3], 300, [0, 1, 1], 5, way="rowwise_adagrad", dense=1),
        config([40], 3, [0], 70, way="adagrad", gap=1),
        config([5] * 60, 64, list(range(60)), 2, "all", way="sgd"),
        config([1], 1, [0], 600),
        *(
            config(*TWO, 9, way=way, rounds=True, live=n % 2 == 1, dtypes=(HALF, BF16))
            for n, way in enumerate(OPTIMIZERS)
        ),
    ],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    # A step takes gradients that are rounded, and Adam their squares.
    tolerance={dtype: 2 * tolerance for dtype, tolerance in ROUNDED_ONCE.items()},
    mutations=[
        (
            "forward: ids of the feature before",
            "numbers[step * BLOCK_F + k]",
            "numbers[step * BLOCK_F + (k - 1) % BLOCK_F]",
        ),
        ("forward: the first step's rows", "f = step * BLOCK_F + o_f", "f = o_f"),
        ("forward: samples unmasked", "there = (o_b < B)[:, None] &", "there = (o_b >= 0)[:, None] &"),
        ("forward: columns unmasked", "of_row = (o_d < D)", "of_row = (o_d >= 0)"),
        ("forward: a feature too many", "(f < n)[None, :]", "(f <= n)[None, :]"),
        ("forward: an embedding's square", "y += b_x * s\n            s += b_x", "s += b_x\n            y += b_x * s"),
        ("dense: the last columns alone", "total += tl.sum(y, 1)", "total = tl.sum(y, 1)"),
        ("backward: of the whole sum", "(tl.sum(b_x, 1, keep_dims=True) - b_x)", "tl.sum(b_x, 1, keep_dims=True)"),
        ("backward: summed over samples", "tl.sum(b_x, 1, keep_dims=True)", "tl.sum(b_x, 0, keep_dims=True)"),
        (
            "backward: fields unmasked",
            "(o_f < F)[None, :, None] & (o_d < D)[None, None, :]\n        column",
            "(o_f >= 0)[None, :, None] & (o_d < D)[None, None, :]\n        column",
        ),
        ("backward: the embeddings' gradient alone", "grad += tl.load(grad_tile", "grad = tl.load(grad_tile"),
        ("backward: the first field's linear weights", "linear_weight_ptr + column", "linear_weight_ptr + column % D"),
        ("backward: the linear term of the first sample", "o_b * stride_lb", "o_b * 0"),
        ("rowwise_adagrad: numbers of the second program", "if tl.program_id(0) == 0:", "if tl.program_id(0) == 1:"),
        ("way: a number too few", "(B, F, D, *strides, len(brought),", "(B, F, D, *strides, len(brought) - 1,"),
        ("live: no more numbers", "write(numbers, values, AT_ONCE)", "pass"),
        ("expanded: rows as wide as they are", "o_b[:, None, None] * stride_gb", "o_b[:, None, None] * (F * D)"),
    ],
)
