"""What follows a product of DCN v2 under the interpreter: its configurations, and the edits that they must notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import cross_layer_case


def make(config: dict, dtype: torch.dtype) -> dict:
    shape, layout = config["shape"], config.get("layout", "contiguous")
    x0, product, x, grad_out = (strided(shape, dtype, layout) for _ in range(4))
    if config.get("expanded"):
        grad_out = strided([1, 1], dtype).expand(shape)
    bias = torch.randn(2 * shape[1]).to(dtype)[::2] if config.get("bias", True) else None
    return {"x0": x0, "product": product, "x": x, "bias": bias, "grad_out": grad_out}


def forward(module: ModuleType, x0, product, x, bias, grad_out) -> Sequence[Tensor]:
    return (module.cross_layer(x0, product, x, bias),)


def launch(module: ModuleType, x0, product, x, bias, grad_out) -> Sequence[Tensor]:
    module.PROGRAMS = 3  # so that a program has several blocks of rows
    *grads, of_bias = module.cross_layer_backward(grad_out, x0, product, bias is not None)
    return *forward(module, x0, product, x, bias, grad_out), *grads, *of_bias


def expected(x0, product, x, bias, grad_out) -> Sequence[Tensor]:
    leaves = [t.requires_grad_() for t in (x0, product, bias) if t is not None]
    out = reference.cross_layer(x0, product, x, bias)
    return out, *torch.autograd.grad(out, leaves, grad_out)


LAYER = Interpreted(
    module="cross_layer",
    huge=[cross_layer_case(2**24, 429), cross_layer_case(2**9, 2**22 + 1)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, D), "layout": layout, "bias": bias}
        for B, D, layout, bias in [
            (37, 300, "contiguous", True),  # two blocks of columns, several of rows for a program
            (70, 67, "sliced", True),
            (5, 8, "stepped", False),
            (9, 16, "reversed", True),
            (2500, 1, "contiguous", False),
            (2, 5, "far samples", True),
            (0, 8, "contiguous", True),
            (3, 0, "contiguous", True),
        ]
    ]
    + [{"shape": (5, 12), "expanded": True}],
    dtypes=(SINGLE, HALF, BF16),
    streamed="x0",
    streamed_configs=[{"shape": (37, 300)}],
    forward=forward,
    counted_configs=[{"shape": (5, 300)}],
    mutations=[
        ("forward: x left out", "b_x0 * b_product + out, mask", "b_x0 * b_product, mask"),
        ("forward: the bias left out", "out += tl.load(bias_ptr", "out += 0 * tl.load(bias_ptr"),
        ("forward: x0 of another row", "x0_ptr + o_b * stride_0b + o_d * stride_0d, mask=inside, other=0.0)"
         ".to(tl.float32)\n    b_product", "x0_ptr + o_b * stride_0d + o_d * stride_0d, mask=inside, other=0.0)"
         ".to(tl.float32)\n    b_product"),
        ("forward: the first columns alone", "(tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D))"
         "[None, :]\n    inside", "tl.arange(0, BLOCK_D)[None, :]\n    inside"),
        ("forward: rows unmasked", "(o_b < B) & (o_d < D)\n    out", "(o_b >= 0) & (o_d < D)\n    out"),
        ("forward: the last rows left out", 'grid = triton.cdiv(B, blocks', 'grid = (lambda a, b: a // b)(B, blocks'),
        ("backward: the factors exchanged", "b_grad * b_product, mask", "b_grad * b_x0, mask"),
        ("backward: one block of rows a program", "range(program * BLOCK_B, B, step)",
         "range(program * BLOCK_B, tl.minimum(B, (program + 1) * BLOCK_B), step)"),
        ("backward: the first block's sums alone", "total += b_grad", "total = b_grad"),
        ("backward: a gradient of another row", "o_b * stride_gb", "o_b * stride_gd"),
        ("backward: sums of one place", "sums_ptr + program * D", "sums_ptr"),
    ],
)  # fmt: skip
