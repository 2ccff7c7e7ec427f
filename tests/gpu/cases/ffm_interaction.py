"""The field-aware interactions under the interpreter: configurations, and the edits of the source that they must
notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import ffm_interaction_case


def make(config: dict, dtype: torch.dtype) -> dict:
    B, F, D = config["shape"]
    layout, reduce_sum = config.get("layout", "contiguous"), config.get("reduce_sum", True)
    shape = [B, F * (F - 1) // 2, 1 if reduce_sum else D]
    grad_out = strided(shape, dtype, "contiguous" if layout.startswith("far") else layout)
    if config.get("expanded"):
        grad_out = strided([1, 1, 1], dtype).expand(shape)
    return {"x": strided([B, F, F, D], dtype, layout), "grad_out": grad_out, "reduce_sum": reduce_sum}


def forward(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return (module.ffm_interaction(x, reduce_sum),)


def launch(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return *forward(module, x, grad_out, reduce_sum), module.ffm_interaction_backward(grad_out, x, reduce_sum)


def expected(x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    x = x.requires_grad_()
    out = reference.ffm_interaction(x, reduce_sum)
    return out, *torch.autograd.grad(out, x, grad_out)


FFM = Interpreted(
    module="ffm_interaction",
    huge=[ffm_interaction_case(2**18, 39, 16), ffm_interaction_case(3, 2**14, 7, reduce_sum=False)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, F, D), "layout": layout, "reduce_sum": reduce_sum}
        for B, F, D, layout, reduce_sum in [
            (3, 39, 16, "contiguous", True),
            (70, 3, 8, "contiguous", False),  # a program has pairs of many samples
            (2, 5, 130, "sliced", True),  # two blocks of columns
            (2, 5, 130, "stepped", False),
            (3, 4, 10, "reversed", True),
            (2, 3, 5, "far samples", False),
            (2, 3, 5, "far rows", True),
            (9, 2, 1, "contiguous", False),
            (2, 1, 4, "contiguous", True),
            (0, 3, 4, "contiguous", True),
            (2, 3, 0, "contiguous", True),
        ]
    ]
    + [{"shape": (5, 4, 12), "reduce_sum": reduce_sum, "expanded": True} for reduce_sum in (True, False)],
    dtypes=(SINGLE, HALF, BF16),
    forward=forward,
    mutations=[
        ("places: of one sample", "b += pair // pairs", "b += 0"),
        ("places: beyond the last sample", "b, pair % pairs, b < B", "b, pair % pairs, b >= 0"),
        ("forward: one embedding twice", "product *= tl.load(x_gf", "product *= tl.load(x_fg"),
        ("forward: the last columns alone", "total += product", "total = product"),
        ("forward: results of the first sample", "(b * pairs + pair)[:, None] * D", "pair[:, None] * D"),
        ("backward: the diagonal's gradient", "of_pair = valid & (f < g)", "of_pair = valid & (f <= g)"),
        ("backward: the diagonal unwritten", "mask=valid[:, None] & (o_d < D)", "mask=inside"),
        ("backward: embeddings exchanged", "to_gf + o_d, b_grad * b_fg", "to_gf + o_d, b_grad * b_gf"),
        ("backward: another pair's gradient", "pair_of(f, g, F) * stride_gp", "place * stride_gp"),
        ("backward: the first column's gradient", "0 if reduce_sum else stride_gd", "0"),
    ],
)  # fmt: skip
