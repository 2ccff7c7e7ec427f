"""The cross network under the interpreter: its configurations, and the edits of its source that they must notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, DOUBLE, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import cross_network_case


def make(config: dict, dtype: torch.dtype) -> dict:
    (B, D), L, layout = config["shape"], config["layers"], config.get("layout", "contiguous")
    weights = (torch.randn(L, 1, D) * max(D, 1) ** -0.5).to(dtype)
    return {
        "x": strided([B, D], dtype, layout), "weights": weights, "biases": torch.randn(L, D).to(dtype),
        "grad_out": strided([1, D], dtype).expand(B, D) if config.get("expanded") else strided([B, D], dtype, layout),
    }  # fmt: skip


def forward(module: ModuleType, x: Tensor, weights: Tensor, biases: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
    return module.cross_network(x, list(weights), list(biases))


def launch(module: ModuleType, x: Tensor, weights: Tensor, biases: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
    out, projections = forward(module, x, weights, biases, grad_out)
    grad_x, *lists = module.cross_network_backward(grad_out, projections, x, list(weights), list(biases))
    empty = [x.new_empty(0, x.size(1))]
    return out, projections, grad_x, *(torch.cat([*empty, *(t.view(1, -1) for t in each)]) for each in lists)


def expected(x: Tensor, weights: Tensor, biases: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
    leaves = [t.requires_grad_() for t in (x, weights, biases)]
    out = reference.cross_network(x, list(weights), list(biases))
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    grad_x, grad_weights, grad_biases = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads))
    return out, x @ weights.flatten(1).t(), grad_x, grad_weights.flatten(1), grad_biases


CROSS = Interpreted(
    module="cross_network",
    huge=[cross_network_case(2**24, 429, 2), cross_network_case(2**20 + 3, 4096, 1)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, D), "layers": L, "layout": layout}
        for B, D, L, layout in [
            (37, 67, 3, "contiguous"),
            (5, 8, 6, "sliced"),
            (3, 300, 2, "stepped"),
            (9, 16, 1, "reversed"),
            (300, 1, 2, "contiguous"),
            (2, 5, 3, "far samples"),
            (4, 10, 0, "contiguous"),
            (0, 8, 2, "contiguous"),
            (3, 0, 2, "contiguous"),
        ]
    ]
    + [{"shape": (5, 12), "layers": 2, "expanded": True}],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    tolerance={HALF: 2**-11, BF16: 2**-8, SINGLE: 2e-6, DOUBLE: 1e-14},
    streamed="x",
    streamed_configs=[{"shape": (37, 67), "layers": 3}],
    forward=forward,
    mutations=[
        (
            "forward: a layer's weights again",
            "weights_ptr + layer * D + o_d, mask=o_d < D, other=0.0)\n        p",
            "weights_ptr + o_d, mask=o_d < D, other=0.0)\n        p",
        ),
        (
            "forward: constants left out",
            "alpha * p + tl.load(constants_ptr + layer)\n    beta",
            "alpha * p\n    beta",
        ),
        ("forward: beta left out", "alpha[:, None] * b_x + beta[None, :]", "alpha[:, None] * b_x"),
        ("forward: rows unmasked", "o_b * L + layer, p, mask=o_b < B", "o_b * L + layer, p"),
        (
            "forward: columns unmasked",
            "mask=inside, other=0.0).to(dtype)\n    alpha",
            "mask=(o_b < B)[:, None]).to(dtype)\n    alpha",
        ),
        (
            "forward: the last rows left out",
            'cross_network_kernel[(triton.cdiv(B, blocks["BLOCK_B"]),)]',
            'cross_network_kernel[(B // blocks["BLOCK_B"],)]',
        ),
        (
            "alphas: constants left out",
            "alpha * p + tl.load(constants_ptr + layer)\n    tl.store",
            "alpha * p\n    tl.store",
        ),
        ("alphas: one too late", "o_b * (L + 1) + layer, alpha", "o_b * (L + 1) + layer + 1, alpha"),
        ("backward: layers from the first", "layer = L - 1 - i", "layer = i"),
        ("backward: the recurrence left out", "a += a * tl.load(projections_ptr", "a += 0 * tl.load(projections_ptr"),
        ("backward: alpha left out", "b_grad *= tl.load(", "b_grad += 0 * tl.load("),
        ("backward: a gradient of another row", "o_b[:, None] * stride_gb", "o_b[:, None] * stride_gd"),
        ("backward: weights left out", "b_grad += grad_p[:, None] * weight[None, :]", "b_grad += 0.0"),
    ],
)
