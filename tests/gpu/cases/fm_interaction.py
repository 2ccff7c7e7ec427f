"""The FM interaction under the interpreter: its configurations, and the edits of its source that they must notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, DOUBLE, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import fm_interaction_case


def make(config: dict, dtype: torch.dtype) -> dict:
    B, F, D = config["shape"]
    layout, reduce_sum = config.get("layout", "contiguous"), config.get("reduce_sum", True)
    grad_out = strided([B, 1 if reduce_sum else D], dtype, layout)
    if config.get("expanded"):
        grad_out = strided([1, 1], dtype).expand(grad_out.shape)
    return {"x": strided([B, F, D], dtype, layout), "grad_out": grad_out, "reduce_sum": reduce_sum}


def forward(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return (module.fm_interaction(x, reduce_sum),)


def launch(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return *forward(module, x, grad_out, reduce_sum), module.fm_interaction_backward(grad_out, x, reduce_sum)


def expected(x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    x = x.requires_grad_()
    out = reference.fm_interaction(x, reduce_sum)
    return out, *torch.autograd.grad(out, x, grad_out)


FM = Interpreted(
    module="fm_interaction",
    huge=[fm_interaction_case(2**27, 39, 16), fm_interaction_case(3, 2**30, 4), fm_interaction_case(2, 3, 2**31 + 5)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, F, D), "layout": layout, "reduce_sum": reduce_sum}
        for B, F, D, layout in [
            (5, 39, 16, "contiguous"),
            (3, 26, 10, "sliced"),
            (2, 3, 8, "reversed"),
            (2, 5, 7, "stepped"),
            (2, 70, 65, "contiguous"),  # more values than the backward keeps on chip, and two blocks of columns
            (3, 67, 64, "sliced"),
            (2, 2, 300, "reversed"),
            (9, 1, 3, "contiguous"),
            (600, 1, 1, "contiguous"),
            (1, 1, 1, "stepped"),
            (3, 2, 5, "far samples"),
            (2, 3, 5, "far rows"),
            (0, 4, 8, "contiguous"),
            (3, 0, 8, "contiguous"),
            (3, 4, 0, "contiguous"),
        ]
        for reduce_sum in (True, False)
    ]
    + [{"shape": (5, 4, 12), "reduce_sum": reduce_sum, "expanded": True} for reduce_sum in (True, False)],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    streamed="x",
    streamed_configs=[{"shape": (3, 26, 10)}, {"shape": (2, 70, 65)}],
    forward=forward,
    counted_configs=[{"shape": (4, 39, 16)}, {"shape": (4, 26, 10)}, {"shape": (4, 5, 128), "reduce_sum": False}],
    mutations=[
        (
            "forward: a field too many",
            "F)[None, :, None]\n            b_x = tl.load(x_tile + f * stride_xf",
            "F + 1)[None, :, None]\n            b_x = tl.load(x_tile + f * stride_xf",
        ),
        (
            "forward: samples unmasked",
            "(o_b < B)[:, None] & (o_d < D)[None, :]\n        s =",
            "(o_b >= 0)[:, None] & (o_d < D)[None, :]\n        s =",
        ),
        ("forward: columns unmasked", "(o_d < D)[None, :]\n        s =", "(o_d >= 0)[None, :]\n        s ="),
        (
            "forward: a field's stride between samples",
            "o_b[:, None, None] * stride_xb + o_f[None, :, None] * stride_xf\n    total",
            "o_b[:, None, None] * stride_xf + o_f[None, :, None] * stride_xf\n    total",
        ),
        ("forward: reduced over samples", "tl.reduce((s, y), 1, _join)", "tl.reduce((s, y), 0, _join)"),
        ("forward: runs joined without their product", "y + other_y + s * other_s", "y + other_y"),
        ("forward: result of the wrong sample", "out_ptr + o_b, total", "out_ptr + o_b // 2, total"),
        (
            "backward: fields unmasked in one pass",
            "valid[:, None, :] & (o_f < F)[None, :, None]",
            "valid[:, None, :] & (o_f >= 0)[None, :, None]",
        ),
        (
            "backward: last fields missed in two passes",
            "s = tl.sum(runs, 1, keep_dims=True)\n            for f in tl.range(0, F,",
            "s = tl.sum(runs, 1, keep_dims=True)\n            for f in tl.range(0, F - BLOCK_F,",
        ),
        (
            "forward: offsets in 32 bits",
            "o_f[None, :, None] * stride_xf\n    total",
            "o_f[None, :, None] * tl.cast(stride_xf, tl.int32)\n    total",
        ),
        ("backward: columns unmasked", "(o_d < D)[None, :]\n        g_tile", "(o_d >= 0)[None, :]\n        g_tile"),
        ("backward: summed over samples", "tl.sum(b_x, 1, keep_dims=True)", "tl.sum(b_x, 0, keep_dims=True)"),
        ("backward: gradient of another sample", "o_b[:, None] * stride_gb", "o_b[:, None] * stride_gd"),
        (
            "backward: the last samples left out",
            "fm_interaction_backward_kernel, (triton.cdiv(B, BLOCK_B),)",
            "fm_interaction_backward_kernel, (B // BLOCK_B,)",
        ),
    ],
)
