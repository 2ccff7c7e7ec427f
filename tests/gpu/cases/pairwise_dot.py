"""The pairwise dots under the interpreter: their configurations, and the edits of the source that they must notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, DOUBLE, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import pairwise_dot_case


def make(config: dict, dtype: torch.dtype) -> dict:
    B, F, D = config["shape"]
    layout, pairs = config.get("layout", "contiguous"), F * (F - 1) // 2
    grad_out = strided([B, pairs], dtype, "contiguous" if layout.startswith("far") else layout)
    weights = torch.randn(2 * pairs).to(dtype)[::2] if config.get("weighted") else None
    return {"x": strided([B, F, D], dtype, layout), "weights": weights, "grad_out": grad_out}


def forward(module: ModuleType, x: Tensor, weights: Tensor | None, grad_out: Tensor) -> Sequence[Tensor]:
    return (module.pairwise_dot(x, weights),)


def launch(module: ModuleType, x: Tensor, weights: Tensor | None, grad_out: Tensor) -> Sequence[Tensor]:
    grad_x, of_weights = module.pairwise_dot_backward(grad_out, x, weights)
    return *forward(module, x, weights, grad_out), grad_x, *of_weights


def expected(x: Tensor, weights: Tensor | None, grad_out: Tensor) -> Sequence[Tensor]:
    leaves = [t.requires_grad_() for t in (x, weights) if t is not None]
    out = reference.pairwise_dot(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad_out)


PAIRS = Interpreted(
    module="pairwise_dot",
    huge=[pairwise_dot_case(2**22, 39, 16), pairwise_dot_case(3, 2**15, 2**16)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, F, D), "layout": layout, "weighted": weighted}
        for B, F, D, layout, weighted in [
            (3, 39, 16, "contiguous", True),
            (2, 18, 10, "sliced", False),
            (2, 3, 7, "stepped", True),
            (2, 70, 5, "reversed", False),  # two blocks of fields
            (1, 5, 130, "contiguous", True),  # three blocks of columns
            (3, 2, 1, "contiguous", False),
            (2, 3, 4, "far samples", False),
            (2, 3, 4, "far rows", False),
            (2, 1, 4, "contiguous", False),
            (0, 4, 8, "contiguous", True),
            (3, 4, 0, "contiguous", False),
        ]
    ],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    forward=forward,
    mutations=[
        ("forward: a field too many", "& (o_g < F)[None, :]\n        pair", "& (o_g < F + 1)[None, :]\n        pair"),
        ("forward: the diagonal, too", "(o_f[:, None] < o_g[None, :])", "(o_f[:, None] <= o_g[None, :])"),
        (
            "forward: the first columns only",
            "for d in range(0, D, BLOCK_D):\n            o_d",
            "for d in range(0, 1):\n            o_d",
        ),
        ("forward: the first block of fields only", "for g in range(f, F, BLOCK_F)", "for g in range(f, f + 1)"),
        (
            "forward: weights left out",
            "tile *= tl.load(weights_ptr + pair, mask=above, other=0.0)",
            "tile *= tl.full([1, 1], 1.0, dtype)",
        ),
        ("forward: results of the first sample", "out_ptr + b * pairs + pair", "out_ptr + pair"),
        ("pairs in another order", "f * (2 * F - f - 1) // 2", "f * (2 * F - f + 1) // 2"),
        (
            "backward: weights left out",
            "s *= tl.load(weights_ptr + pair, mask=of_pair, other=0.0)",
            "s *= tl.full([1, 1], 1.0, dtype)",
        ),
        ("backward: half of the pairs", "(o_f[:, None] != o_g[None, :])", "(o_f[:, None] < o_g[None, :])"),
        ("backward: gradient of another sample", "grad_out_ptr += b * stride_gb", "grad_out_ptr += b * stride_gp"),
        ("backward: the first block of fields only", "for g in range(0, F, BLOCK_F)", "for g in range(0, 1)"),
        ("backward: stored in the first sample", "(b * F + o_f[:, None]) * D", "o_f[:, None] * D"),
    ],
)
