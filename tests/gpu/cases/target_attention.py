"""The attention by dot products under the interpreter: configurations, and the edits of the source that they must
notice."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import target_attention_case

FORMS = "lengths", "mask", "offsets", "history_index"


def make(config: dict, dtype: torch.dtype) -> dict:
    """``config``: B, L, H and D; the form of the histories, and ``users`` that share them."""
    (B, L, H, D), form, layout = config["shape"], config.get("form"), config.get("layout", "contiguous")
    users = config.get("users", B)
    counts = torch.randint(0, L + 1, (users,))
    counts[:1], counts[1:][-1:] = 0, L
    given = {
        "lengths": counts.int(),
        "offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        "mask": (torch.rand(users, 2 * L) < 0.5)[:, ::2] & (torch.arange(L) < counts[:, None]),
    }
    rows = [int(counts.sum()), D] if form == "offsets" else [users, L, D]
    history = strided(rows, dtype, "sliced" if form == "offsets" and layout.startswith("far") else layout)
    others = "contiguous" if layout.startswith("far") else layout
    query = strided([B, H, D], dtype, others) * D**-0.5
    return {
        "query": query, "history": history, **{name: given[name] if name == form else None for name in FORMS[:3]},
        "history_index": (torch.arange(B) * 7 % users) if "users" in config else None,
        "grad_out": strided([1] * 3, dtype).expand(B, H, D) if form == "lengths" else strided([B, H, D], dtype, others),
    }  # fmt: skip


def forward(module: ModuleType, grad_out: Tensor, **inputs: Tensor | None) -> Sequence[Tensor]:
    module.PROGRAMS, module.SHARE = 12, 32  # so that long histories are read in shares
    return module.target_attention(**inputs)


def launch(module: ModuleType, grad_out: Tensor, **inputs: Tensor | None) -> Sequence[Tensor]:
    out, stats = forward(module, grad_out, **inputs)
    return out, *module.target_attention_backward(grad_out, out, stats, **inputs)


def expected(query: Tensor, history: Tensor, grad_out: Tensor, **form: Tensor | None) -> Sequence[Tensor]:
    leaves = query.requires_grad_(), history.requires_grad_()
    out = reference.target_attention(query, history, **form)
    grads = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    return out, *(torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads))


TARGET = Interpreted(
    module="target_attention",
    huge=[target_attention_case(2**20, 4, 50, 64), target_attention_case(2, 4, 2**25, 64)],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (B, L, H, D), "layout": layout} | more
        for B, L, H, D, layout, more in [
            (3, 70, 4, 17, "contiguous", {}),
            (2, 200, 3, 64, "contiguous", {"form": "mask"}),  # shares of rows
            (3, 150, 35, 9, "sliced", {"form": "lengths"}),  # two blocks of queries
            (4, 90, 2, 8, "contiguous", {"form": "offsets"}),
            (9, 90, 2, 8, "stepped", {"form": "offsets", "users": 3}),
            (7, 33, 1, 100, "contiguous", {"form": "mask", "users": 2}),
            (7, 5, 3, 4, "reversed", {"form": "lengths", "users": 4}),
            (3, 5, 1, 1, "contiguous", {"users": 1}),
            (2, 3, 2, 4, "far samples", {}),
            (2, 3, 2, 4, "far rows", {"form": "mask"}),
            (2, 0, 2, 4, "contiguous", {}),
            (0, 3, 2, 4, "contiguous", {"form": "lengths"}),
            (2, 3, 0, 4, "contiguous", {}),
        ]
    ],
    dtypes=(SINGLE, HALF, BF16),
    tolerance={HALF: 2**-9, BF16: 2**-6, SINGLE: 5e-6},  # weights, too, are rounded before their products
    streamed="history",
    streamed_configs=[{"shape": (3, 70, 4, 17)}, {"shape": (2, 200, 3, 64), "form": "mask"}],
    forward=forward,
    mutations=[
        ("form: rows beyond the length", "valid = tl.maximum(tl.minimum(tl.load(rows_ptr + u), L), 0).to(tl.int32)",
         "valid = end"),
        ("form: the first history's rows", "start = tl.maximum(tl.load(rows_ptr + u).to(tl.int64), 0)",
         "start = tl.maximum(tl.load(rows_ptr).to(tl.int64), 0)"),
        ("form: histories in the samples' order", "tl.where(known, u, 0), known", "b % users, known"),
        ("forward: the mask left out", "tl.where(shown[None, :], score,", "tl.where(there[None, :], score,"),
        ("forward: hidden rows weigh nothing", "tl.where(there, HIDDEN, -float(\"inf\"))[None, :]", "-float(\"inf\")"),
        ("forward: what was pooled not scaled", "pooled * scale[:, None], PRECISION", "pooled, PRECISION"),
        ("forward: the sum not scaled", "total * scale + tl.sum(weight, 1)", "total + tl.sum(weight, 1)"),
        ("forward: the queries' first block", "pooled, mask=(o_h < H)[:, None]", "pooled, mask=(o_h < 16)[:, None]"),
        ("join: shares not scaled", "pooled * before[:, None] + scale[:, None] * b_pooled", "pooled + b_pooled"),
        ("join: the first share again", "(b * splits + split) * H * D", "(b * splits) * H * D"),
        ("join: sums not scaled", "total = total * before + scale * tl.load", "total = total + tl.load"),
        ("backward: <g, out> left out", "weight * (grad - along[None, :])", "weight * grad"),
        ("backward: hidden rows' scores", "tl.where(shown[:, None], weight * (", "tl.where(there[:, None], weight * ("),
        ("backward: a share stored in the first's place", "(split * tl.cast(B, tl.int64) + b) * H", "b * H"),
        ("backward: weights' part left out", "total = product(weight, b_grad, total, PRECISION)", "total += 0"),
        ("backward: the first queries alone", "o_h = h + tl.arange(0, BLOCK_H)", "o_h = tl.arange(0, BLOCK_H)"),
        ("backward: the first sample alone", "tl.where(row < valid, past", "tl.where(row < valid, begin + 1"),
        ("backward: samples unsorted", "b = tl.load(order_ptr + i)", "b = i"),
        ("backward: rows in the first history's place", "grad_start = u * L * D", "grad_start = u * 0"),
    ],
)  # fmt: skip
