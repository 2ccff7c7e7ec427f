"""The bilinear interaction under the interpreter: its configurations, and the edits of the source that they must
notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.ops.bilinear_interaction import KINDS
from rankkernels.testing import bilinear_interaction_case

EACH, PAIR = "field_each", "field_interaction"


def make(config: dict, dtype: torch.dtype) -> dict:
    (B, F, D), kind, layout = config["shape"], config["kind"], config.get("layout", "contiguous")
    pairs = F * (F - 1) // 2
    n = {"field_all": 1, EACH: F - 1}.get(kind, pairs)
    weights = (torch.randn(n, D, 2 * D) * D**-0.5).to(dtype)[..., ::2]
    grad_out = strided([B, pairs, D], dtype, "contiguous" if layout.startswith("far") else layout)
    if config.get("expanded"):
        grad_out = strided([1, 1, 1], dtype).expand(B, pairs, D)
    return {"x": strided([B, F, D], dtype, layout), "weights": weights, "grad_out": grad_out, "kind": kind}


def forward(module: ModuleType, x: Tensor, weights: Tensor, grad_out: Tensor, kind: str) -> Sequence[Tensor]:
    return (module.bilinear_interaction(x, list(weights), KINDS.index(kind)),)


def launch(module: ModuleType, x: Tensor, weights: Tensor, grad_out: Tensor, kind: str) -> Sequence[Tensor]:
    module.PROGRAMS = 24  # so that few pairs of many samples are summed in parts
    grad_x, of_weights = module.bilinear_interaction_backward(grad_out, x, list(weights), KINDS.index(kind))
    of_weights = torch.stack(of_weights) if of_weights else weights
    return *forward(module, x, weights, grad_out, kind), grad_x, of_weights


def expected(x: Tensor, weights: Tensor, grad_out: Tensor, kind: str) -> Sequence[Tensor]:
    leaves = x.requires_grad_(), weights.requires_grad_()
    out = reference.bilinear_interaction(x, list(weights), kind)
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    return out, *(torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads))


BILINEAR = Interpreted(
    module="bilinear_interaction",
    huge=[bilinear_interaction_case(2**22, 39, 16), bilinear_interaction_case(2**15, 3, 2**15 + 1, "field_all")],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, F, D), "layout": layout, "kind": kind}
        for B, F, D, layout, kind in [
            (70, 5, 16, "contiguous", PAIR),
            (130, 3, 37, "sliced", PAIR),  # two blocks of columns, and of samples in parts
            (130, 3, 37, "stepped", EACH),
            (5, 4, 8, "reversed", "field_all"),
            (3, 9, 4, "contiguous", EACH),
            (2, 3, 4, "far samples", PAIR),
            (2, 3, 4, "far rows", EACH),
            (7, 2, 1, "contiguous", PAIR),
            (3, 1, 4, "contiguous", PAIR),
            (0, 4, 8, "contiguous", "field_all"),
        ]
    ]
    + [{"shape": (5, 3, 12), "kind": PAIR, "expanded": True}],
    dtypes=(SINGLE, HALF, BF16),
    tolerance={HALF: 2**-10, BF16: 2**-7, SINGLE: 2e-6},  # dz, too, is rounded before its products
    forward=forward,
    mutations=[
        ("forward: the first columns of x_f alone", "for d in range(0, D, BLOCK_D):", "for d in range(0, 1):"),
        ("forward: a matrix transposed", "tl.trans(b_weight), z", "b_weight, z"),
        ("forward: a field's matrix again", "weight_ptr = weights_ptr + f * stride_w", "weight_ptr = weights_ptr"),
        ("forward: a pair's matrix again", "weight_ptr = weights_ptr + pair * stride_w", "weight_ptr = weights_ptr"),
        ("forward: a pair left out", "for g in range(f + 1, F)", "for g in range(f + 2, F)"),
        ("forward: x_f for x_g", "rows + g * stride_xf + o_e[None, :] * stride_xd, mask=inside, other=0.0)"
         ".to(tl.float32)\n        tl.store", "rows + f * stride_xf + o_e[None, :] * stride_xd, mask=inside, other=0.0)"
         ".to(tl.float32)\n        tl.store"),
        ("forward: the first samples alone", "program // (F - 1) * BLOCK_B", "program // (F - 1)"),
        ("backward: another field's matrix", "weight_tile + h * stride_w", "weight_tile"),
        ("backward: another pair's matrix", "weight_tile + pair * stride_w", "weight_tile"),
        ("backward: matrices beyond the last", "if h < F - 1:", "if h < F:"),
        ("backward: the first of a pair alone", "for f in range(0, h)", "for f in range(0, 0)"),
        ("backward: dz of one pair", "grad_z += b_grad * b_x", "grad_z = b_grad * b_x"),
        ("backward: dz of the first columns", "if e == first:", "if e == 0:"),
        ("backward: the second's matrices again", "(pair if OF_PAIRS else f) * stride_w", "f * stride_w"),
        ("backward: columns of dz left out", "for e in range(0, D, BLOCK_D)", "for e in range(0, 1)"),
        ("weights: the fields exchanged", "f, g = fields_of(pair, F)", "g, f = fields_of(pair, F)"),
        ("weights: a block of samples a program", "tl.minimum(start + share, B), BLOCK_B)", "start + 1, BLOCK_B)"),
        ("weights: all samples in each part", "tl.minimum(start + share, B)", "B"),
        ("weights: of fields' first columns", "fields = x[:, :-1]", "fields = x[:, 1:]"),
    ],
)  # fmt: skip
