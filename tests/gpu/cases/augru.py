"""DIEN's recurrence under the interpreter: its configurations, and the edits of the source that they must notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import augru_case


def make(config: dict, dtype: torch.dtype) -> dict:
    """``config``: B, L, D and K inputs; whether there are lengths and an attention."""
    (B, L, D, K), layout = config["shape"], config.get("layout", "contiguous")
    lengths = torch.randint(0, L + 1, (2 * B,))[::2] if config.get("lengths") else None
    grad_out = strided([B, L, D], dtype, layout)
    return {
        "x": strided([B, L, K], dtype, layout),
        "input_weight": (torch.randn(K, 3 * D) * max(K, 1) ** -0.5).to(dtype).t(),
        "weight": (torch.randn(D, 3 * D) * D**-0.5).to(dtype).t(),
        "bias": torch.randn(D, 4).to(dtype).t(),
        "attention": torch.rand(L, B).to(dtype).t() if config.get("attention") else None,
        "lengths": lengths,
        "grad_out": strided([1] * 3, dtype).expand(B, L, D) if config.get("expanded") else grad_out,
    }


def forward(module: ModuleType, grad_out: Tensor, **inputs: Tensor | None) -> Sequence[Tensor]:
    return (module.augru(**inputs),)


def launch(module: ModuleType, grad_out: Tensor, **inputs: Tensor | None) -> Sequence[Tensor]:
    (out,) = forward(module, grad_out, **inputs)
    return out, *module.augru_backward(grad_out, out, **inputs)


def expected(grad_out: Tensor, lengths: Tensor | None, **learnt: Tensor | None) -> Sequence[Tensor]:
    leaves = [t.requires_grad_() for t in learnt.values() if t is not None]
    out = reference.augru(**learnt, lengths=lengths)
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    grads = [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads)]
    return out, *grads, *([grad_out.new_empty(0, out.size(1))] if learnt["attention"] is None else [])


AUGRU = Interpreted(
    module="augru",
    huge=[augru_case(2**21, 50, 32, 32, form="padded")],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, L, D, K), "layout": layout, "attention": attention, "lengths": lengths}
        for B, L, D, K, layout, attention, lengths in [
            (19, 4, 9, 5, "contiguous", True, True),
            (3, 5, 16, 16, "sliced", False, False),
            (17, 3, 33, 8, "stepped", True, False),
            (5, 2, 1, 3, "reversed", False, True),
            (2, 3, 4, 0, "contiguous", True, False),
            (2, 0, 4, 4, "contiguous", True, True),
            (0, 3, 4, 4, "contiguous", False, True),
        ]
    ]
    + [{"shape": (3, 4, 6, 6), "attention": True, "lengths": True, "expanded": True}],
    dtypes=(SINGLE, HALF, BF16),
    tolerance={HALF: 2**-9, BF16: 2**-6, SINGLE: 5e-6},  # in the backward h is the rounded ``out``
    forward=forward,
    mutations=[
        ("lengths: of all samples the longest", "tl.load(lengths_ptr + o_b, mask=o_b < B, other=0), L)", "L, L)"),
        ("attention: left out", "tl.load(attention_ptr + place, mask=there, other=0.0).to(tl.float32)", "1.0"),
        ("forward: the update gate's weight for the reset gate", "product(h, weight_r, r, PRECISION)",
         "product(h, weight_u, r, PRECISION)"),
        ("forward: the reset gate left out", "tl.sigmoid(r) * (product", "(product"),
        ("forward: b_c outside the reset gate", "zeros, PRECISION) + b_c)", "zeros, PRECISION)) + b_c"),
        ("forward: states unmasked", "tl.where(there, h, 0.0)", "h"),
        ("forward: beyond the longest unwritten", "for step in range(steps, L):\n        tl.store(out_ptr",
         "for step in range(steps, steps):\n        tl.store(out_ptr"),
        ("backward: from the first position", "step = steps - 1 - i", "step = i"),
        ("backward: beyond the longest unwritten", "for step in range(steps, L):\n        tile",
         "for step in range(steps, steps):\n        tile"),
        ("backward: of the state alone", "e += tl.load(grad_out_ptr", "e += 0 * tl.load(grad_out_ptr"),
        ("backward: the update gate's part left out", "e = product(grad_u, weight_u, e, PRECISION)", "e += 0"),
        ("backward: the new state's part left out", "e = product(grad_c, weight_n, e, PRECISION)", "e += 0"),
        ("backward: the state's own part", "e * (1 - a * u), 0.0)", "e * (1 - u), 0.0)"),
        ("backward: c's gradient for r's", "p * c * r * (1 - r), p * r", "p * r, p * r"),
        ("backward: the state after for the one before", "(0, 0, 1, 0)", "(0, 0, 0, 1)"),
        ("backward: dc for dg", "[flat[:, : 2 * D], flat[:, 3 * D :]]", "[flat[:, : 3 * D]]"),
    ],
)  # fmt: skip
