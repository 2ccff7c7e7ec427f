"""The experts of low rank under the interpreter: their configurations, and the edits of the source that they must
notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import mixed_experts_case


def make(config: dict, dtype: torch.dtype) -> dict:
    (B, E, rank), layout = config["shape"], config.get("layout", "contiguous")
    weight = (torch.randn(E, rank, 2 * rank) * max(rank, 1) ** -0.5).to(dtype)[..., ::2]
    grad_out = strided([B, E * rank], dtype, layout)
    if config.get("expanded"):
        grad_out = strided([1, 1], dtype).expand(B, E * rank)
    projections = strided([B, E * rank + E], dtype, layout)
    if config.get("small"):  # where a tanh by way of e^x has lost its digits
        projections *= 2**-10
    return {"projections": projections, "weight": weight, "grad_out": grad_out}


def forward(module: ModuleType, projections: Tensor, weight: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
    return (module.mixed_experts(projections, weight),)


def launch(module: ModuleType, projections: Tensor, weight: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
    module.PROGRAMS = 3  # so that blocks are of different sizes
    grads = module.mixed_experts_backward(grad_out, projections, weight)
    return *forward(module, projections, weight, grad_out), *grads


def expected(projections: Tensor, weight: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
    leaves = projections.requires_grad_(), weight.requires_grad_()
    out = reference.mixed_experts(*leaves)
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    return out, *(torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads))


EXPERTS = Interpreted(
    module="mixed_experts",
    huge=[mixed_experts_case(2**24, 4, 32)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, E, rank), "layout": layout}
        for B, E, rank, layout in [
            (70, 4, 32, "contiguous"),  # three blocks of samples, forward and backward
            (70, 3, 5, "sliced"),
            (37, 1, 17, "stepped"),
            (5, 5, 8, "reversed"),
            (300, 2, 3, "contiguous"),  # blocks of 128 samples in the backward
            (3, 2, 64, "contiguous"),
            (2, 3, 4, "far samples"),
            (2, 1, 1, "far rows"),
            (0, 2, 3, "contiguous"),
            (2, 3, 0, "contiguous"),
            (3, 0, 0, "contiguous"),
        ]
    ]
    + [{"shape": (5, 3, 12), "expanded": True}, {"shape": (5, 3, 12), "small": True}],
    dtypes=(SINGLE, HALF, BF16),
    tolerance={HALF: 2**-10, BF16: 2**-7, SINGLE: 1e-6},  # h and dz, too, are rounded before their products
    streamed="projections",
    streamed_configs=[{"shape": (37, 4, 32)}],
    forward=forward,
    counted_configs=[{"shape": (5, 3, 20)}],
    mutations=[
        ("tanh of small values by way of e^x", "tl.abs(x) < 0.55", "tl.abs(x) < 0"),
        ("tanh of large values by the polynomial", "tl.abs(x) < 0.55", "tl.abs(x) < 1"),
        ("gates that are not there", 'tl.where(o_e < E, gates, float("-inf"))', "gates"),
        ("gates of another sample", "gates_ptr + o_b * stride_b", "gates_ptr + o_b * stride_d"),
        ("all shares together", "tl.where(this, weights, 0.0)", "weights"),
        ("the first expert's columns", "(e * rank + o_r)[None, :] * stride_d", "o_r[None, :] * stride_d"),
        ("rows of another sample", "ptr + o_b * stride_b + (e", "ptr + o_b * stride_d + (e"),
        ("the first expert's matrix", "weight_ptr + (e * rank + o_r[:, None])", "weight_ptr + o_r[:, None]"),
        ("forward: a matrix transposed", "tl.trans(C), tl.zeros_like(h), PRECISION))\n        tl.store",
         "C, tl.zeros_like(h), PRECISION))\n        tl.store"),
        ("forward: the first rows again", "_rows(projections_ptr, e + 1, E,", "_rows(projections_ptr, 0, E,"),
        ("forward: the first matrix again", "_matrix(weight_ptr, e + 1,", "_matrix(weight_ptr, 0,"),
        ("forward: the first expert alone", "for e in range(E):", "for e in range(1):"),
        ("forward: the first expert's share", "_share(weights, o_e == e)", "_share(weights, o_e == 0)"),
        ("forward: the first samples alone", "(tl.program_id(0).to(tl.int64) * BLOCK_B +", "(0 * tl.program_id(0) +"),
        ("forward: samples beyond the last", "inside, gates_ptr = (o_b < B) &", "inside, gates_ptr = (o_b >= 0) &"),
        ("backward: a matrix transposed", "tl.trans(C), tl.zeros_like(h), PRECISION))\n        this",
         "C, tl.zeros_like(h), PRECISION))\n        this"),
        ("backward: the first gradients again", "b_grad = _rows(grad_out_ptr, next_e, E, next_b",
         "b_grad = _rows(grad_out_ptr, 0, E, first"),
        ("backward: the first matrix again", "_matrix(weight_ptr, next_e", "_matrix(weight_ptr, 0"),
        ("backward: the next expert too early", "(i + 1) // BLOCKS", "i // BLOCKS + 1"),
        ("backward: one block of samples again", "next_b = first + block * BLOCK_B, first + next_block",
         "next_b = first + block * BLOCK_B, first + 0 * next_block"),
        ("backward: of one expert", "grad_weights += ", "grad_weights = "),
        ("backward: of all experts", "tl.where(this, tl.sum(grad * q, 1)", "tl.where(o_e >= 0, tl.sum(grad * q, 1)"),
        ("backward: of all blocks", "(o_e == e) & (o_block == block)", "(o_e == e) & (o_block >= 0)"),
        ("backward: gates for themselves", "(grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))",
         "grad_weights"),
        ("backward: shares left out", "_share(weights, this) * grad", "grad"),
        ("backward: the derivative at q", "(1 - q * q)", "1.0"),
        ("backward: the derivative at h", "grad_h * (1 - h * h)", "grad_h"),
        ("backward: a product with C", "product(grad_z, C,", "product(grad_z, tl.trans(C),"),
        ("backward: the factors exchanged", "product(tl.trans(grad_z), h,", "product(tl.trans(h), grad_z,"),
        ("backward: a sum that goes on", "tl.where(block == 0, 0.0, total)", "total"),
        ("backward: the last block alone", "tl.where(block == 0, 0.0, total)", "tl.zeros_like(total)"),
        ("backward: sums in one place", "((program * E + e) * rank", "(e * rank"),
        ("backward: the first programs alone", "sums.sum(0)", "sums[0]"),
        ("backward: the gates of one block", "+ o_block * BLOCK_B", "+ o_block * 0"),
        ("backward: the gates a column further", "E * rank + o_e\n", "E * rank + 1 + o_e\n"),
        ("backward: the last samples left out", "programs = triton.cdiv(B,", "programs = (lambda a, b: a // b)(B,"),
    ],
)  # fmt: skip
