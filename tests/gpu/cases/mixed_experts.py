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
    streamed="projections",
    streamed_configs=[{"shape": (37, 4, 32)}],
    forward=forward,
    counted_configs=[{"shape": (5, 3, 20)}],
    mutations=[
        ("tanh of small values by way of e^x", "tl.abs(x) < 0.55", "tl.abs(x) < 0"),
        ("tanh of large values by the polynomial", "tl.abs(x) < 0.55", "tl.abs(x) < 1"),
        ("gates that are not there", 'tl.where(o_e < E, gates, float("-inf"))', "gates"),
        ("gates of the first columns", "gates_ptr + o_e * stride", "gates_ptr + 0 * o_e * stride"),
        ("a matrix transposed", "tl.trans(b_C)", "b_C"),
        ("the first expert's matrix", "weight_ptr + (e * rank + o_r[:, None]) * rank", "weight_ptr + o_r[:, None] * rank"),
        ("the first expert's columns", "rows + (e * rank + o_r)[None, :] * stride", "rows + o_r[None, :] * stride"),
        ("forward: the first expert alone", "for e in range(E):\n        _, q, _", "for e in range(1):\n        _, q, _"),
        ("forward: the first expert's weight", "weight = tl.sum(tl.where(o_e == e", "weight = tl.sum(tl.where(o_e == 0"),
        ("forward: the first samples alone", "(tl.program_id(0).to(tl.int64) * BLOCK_B +", "(0 * tl.program_id(0) +"),
        ("forward: samples beyond the last", "inside = projections_ptr + o_b * stride_pb, (o_b < B) &",
         "inside = projections_ptr + o_b * stride_pb, (o_b >= 0) &"),
        ("backward: a gradient of the first expert", "grads + (e * rank + o_r)", "grads + (0 * e + o_r)"),
        ("backward: one expert's share of the gates", "grad_weights += ", "grad_weights = "),
        ("backward: a share of all experts", "tl.where(o_e == e, tl.sum(b_grad * q", "tl.where(o_e >= 0, tl.sum(b_grad * q"),
        ("backward: all of the gates", "(grad_weights - tl.sum(weights * grad_weights, 1, keep_dims=True))",
         "grad_weights"),
        ("backward: weights left out", "grad_z = tl.sum(tl.where(o_e == e, weights, 0.0), 1, keep_dims=True) * b_grad",
         "grad_z = b_grad"),
        ("backward: q without its tanh", "(1 - q * q)", "1.0"),
        ("backward: h without its tanh", "grad_h * (1 - h * h)", "grad_h"),
        ("backward: a product with C", "product(grad_z, b_C,", "product(grad_z, tl.trans(b_C),"),
        ("backward: the factors exchanged", "product(tl.trans(grad_z), h,", "product(tl.trans(h), grad_z,"),
        ("backward: parts in one place", "(program * E + e)", "e"),
        ("backward: the first part alone", "sums.sum(0)", "sums[0]"),
        ("backward: gates of the next sample", "tl.store(to + E * rank + o_e", "tl.store(to + E * rank + E + o_e"),
        ("backward: the last samples left out", "parts = triton.cdiv(B, blocks", "parts = (lambda a, b: a // b)(B, blocks"),
    ],
)  # fmt: skip
