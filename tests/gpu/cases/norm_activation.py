"""A layer's normalization and activation under the interpreter: configurations, and the edits that they must notice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from gpu.cases.base import BF16, DOUBLE, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.testing import norm_activation_case


def make(config: dict, dtype: torch.dtype) -> dict:
    """``config``: N and H, activation, layout, and whether there is a normalization, an affine one, in training."""
    N, H = config["shape"]
    activation, layout = config["activation"], config.get("layout", "contiguous")
    batch_norm, training = config.get("batch_norm", True), config.get("training", True)
    affine = batch_norm and config.get("affine", True)
    alpha = {"prelu": 1, "dice": 1, "dice_batch_norm": H}.get(activation)
    wide = DOUBLE if dtype == DOUBLE else SINGLE
    x = strided([N, H], dtype, layout)
    x += config.get("mean", 0)
    return {
        "x": x,
        "grad_out": strided([N, H], dtype, layout),
        "weight": torch.randn(H, dtype=wide) if affine else None,
        "bias": torch.randn(H, dtype=wide) if affine else None,
        "alpha": None if alpha is None else torch.randn(alpha, dtype=wide),
        "running_mean": torch.randn(H, dtype=wide) if batch_norm and not training else None,
        "running_var": torch.rand(H, dtype=wide) + 0.5 if batch_norm and not training else None,
        "flags": (activation, batch_norm, training, 1e-5, 1e-3),
    }


def outputs(out: Tensor, stats: Tensor, grad_x: Tensor, grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of the vectors as one."""
    return out, stats, grad_x, torch.cat([g.flatten() for g in grads]) if grads else stats


def launch(module, x, grad_out, weight, bias, alpha, running_mean, running_var, flags):
    module.PROGRAMS = 3  # so that a program has several blocks of rows, and not every block of programs is full
    inputs = x, weight, bias, alpha, running_mean, running_var, *flags
    out, batch_stats = module.norm_activation(*inputs)
    return outputs(out, batch_stats, *module.norm_activation_backward(grad_out, batch_stats, *inputs))


def expected(x, grad_out, weight, bias, alpha, running_mean, running_var, flags):
    activation, batch_norm, training, norm_eps, dice_eps = flags
    wanted = [t.requires_grad_() for t in (x, weight, bias, alpha) if t is not None]
    norm = reference.BatchNorm(weight, bias, running_mean, running_var, norm_eps) if batch_norm else None
    out, stats = reference.norm_activation(x, norm, activation, alpha, training, dice_eps)
    grads = torch.autograd.grad(out, wanted, grad_out)
    return outputs(out, x.new_empty(0) if stats is None else torch.cat(stats), grads[0], grads[1:])


NORM = Interpreted(
    module="norm_activation",
    huge=[norm_activation_case(2**27, 40), norm_activation_case(2**20, 4096, "dice_batch_norm")],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (301, 20), "activation": "dice"},
        {"shape": (700, 10), "activation": "dice_batch_norm", "layout": "sliced"},
        {"shape": (700, 10), "activation": "dice_batch_norm", "affine": False},
        {"shape": (5, 300), "activation": "dice", "training": False},
        {"shape": (9, 33), "activation": "dice_batch_norm", "training": False, "layout": "reversed"},
        {"shape": (70, 65), "activation": "sigmoid", "layout": "stepped"},
        {"shape": (600, 16), "activation": "sigmoid", "mean": 30},
        {"shape": (40, 130), "activation": "relu", "training": False},
        {"shape": (40, 13), "activation": "leakyrelu", "training": False, "affine": False},
        {"shape": (40, 13), "activation": "prelu", "batch_norm": False},
        {"shape": (40, 70), "activation": "linear"},
        {"shape": (1, 7), "activation": "dice", "batch_norm": False},
        {"shape": (3, 4096), "activation": "dice", "batch_norm": False},
        {"shape": (3, 5), "activation": "sigmoid", "training": False, "layout": "far samples"},
        {"shape": (3, 5), "activation": "sigmoid", "layout": "far rows"},
        {"shape": (0, 5), "activation": "relu", "training": False},
        {"shape": (3, 0), "activation": "relu"},
    ],
    dtypes=(SINGLE, HALF, BF16, DOUBLE),
    mutations=[
        ("statistics: rows of the next program", "end = tl.minimum(start + rows, N)", "end = N"),
        (
            "statistics: rows unmasked",
            "inside = (o_n < end)[:, None] & (o_h < H64)",
            "inside = (o_n >= 0)[:, None] & (o_h < H64)",
        ),
        ("statistics: partial ones with the wrong stride", "program * 2 * H64", "program * H64"),
        ("statistics: summed over columns, too", "b_mean = tl.sum(b_x, 0) / here", "b_mean = tl.sum(b_x) / here"),
        ("statistics: blocks merged without their means", " + delta * delta * before * share", ""),
        ("statistics: a block's deviations from zero", "b_x - b_mean[None, :], 0.0)", "b_x, 0.0)"),
        (
            "merge: programs count alike",
            "mean = tl.sum(b_mean * count, 0) / N.to(dtype)",
            "mean = tl.sum(b_mean, 0) / programs",
        ),
        ("merge: programs unmasked", "inside = (o_p < programs)[:, None]", "inside = (o_p >= 0)[:, None]"),
        ("merge: programs with the wrong stride", "o_p[:, None] * 2 * H64", "o_p[:, None] * H64"),
        ("merge: summed over columns, too", "tl.sum(b_mean * count, 0) / N", "tl.sum(b_mean * count) / N"),
        ("merge: biased variance", "squares / (N - 1).to(dtype)", "squares / N.to(dtype)"),
        ("training: unbiased variance", "var = var * (N - 1).to(dtype) / N.to(dtype)", "pass"),
        (
            "forward: columns unmasked",
            "inside = (o_n < N)[:, None] & (o_h < H64)[None, :]\n    x_tile",
            "inside = (o_n < N)[:, None] & (o_h >= 0)[None, :]\n    x_tile",
        ),
        (
            "forward: rows with the wrong stride",
            "out_ptr + o_n[:, None] * H64",
            "out_ptr + o_n[:, None] * stride_xn",
        ),
        (
            "forward: statistics of Dice over rows",
            "y - tl.sum(y, 1, keep_dims=True) / H, 0.0)",
            "y - tl.sum(y, 0, keep_dims=True) / H, 0.0)",
        ),
        (
            "forward: offsets in 32 bits",
            "(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)\n    o_h",
            "(0) * BLOCK_N + tl.arange(0, BLOCK_N)\n    stride_xn = stride_xn.to(tl.int32)\n    o_h",
        ),
        ("dice: mean over the block", "keep_dims=True) / H, 0.0)", "keep_dims=True) / y.shape[1], 0.0)"),
        (
            "dice: absent units centred",
            "tl.where((o_h < H)[None, :], y - tl.sum(",
            "tl.where((o_h >= 0)[None, :], y - tl.sum(",
        ),
        ("dice: epsilon once", "tl.cast(H, y.dtype) * dice_eps", "dice_eps"),
        ("dice: backward without the mean's share", " - tl.sum(grad_c, 1, keep_dims=True) / H", ""),
        ("dice: backward without the denominator's", " - c * (s * s * s * tl.sum(c * w, 1, keep_dims=True))", ""),
        (
            "dice_batch_norm: slope of one for all",
            "_vector(alpha_ptr, o, H, dtype, 0.0)",
            "_vector(alpha_ptr, o * 0, H, dtype, 0.0)",
        ),
        (
            "backward: rows unmasked",
            "inside = (o_n < N)[:, None] & (o_h < H64)[None, :]\n        x_tile",
            "inside = (o_n >= 0)[:, None] & (o_h < H64)[None, :]\n        x_tile",
        ),
        ("backward: summed over columns, too", "H64, tl.sum(sum_g, 0)", "H64, tl.sum(sum_g)"),
        (
            "backward: no mean of the gradient",
            "grad_y -= _vector(sums_ptr + H,",
            "grad_y -= 0 * _vector(sums_ptr + H,",
        ),
        (
            "backward: no share of the variance",
            "grad_y -= n * _vector(sums_ptr,",
            "grad_y -= 0 * _vector(sums_ptr,",
        ),
        ("backward: what goes past the norm is lost", "past + grad_y * weight * r", "grad_y * weight * r"),
        ("backward: sums restart at each block", "sum_gn += grad_y * n", "sum_gn = grad_y * n"),
        ("backward: each program takes all rows", "programs * BLOCK_N):", "BLOCK_N):"),
        (
            "backward: gradient of another column",
            "o_h[None, :] * stride_gh",
            "o_h[None, :] * stride_gn",
        ),
        ("backward: one alpha has the first column's alone", "tl.sum(sum_alpha, 0), 0.0)", "sum_alpha, 0.0)"),
        (
            "backward: sums of the wrong kind",
            "tl.store(partial + 2 * H64, sum_alpha, mask",
            "tl.store(partial + 2 * H64, tl.sum(sum_g, 0), mask",
        ),
    ],
    tolerance={SINGLE: 5e-6, HALF: 2e-3, BF16: 1e-2, DOUBLE: 1e-12},
)
