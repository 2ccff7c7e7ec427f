"""DIN attention under the interpreter: its configurations, and the edits of its source that they must notice."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from gpu.cases.base import BF16, HALF, SINGLE, Interpreted, strided
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.ops.attention_params import Flags, unflatten
from rankkernels.testing import din_attention_case


def make(config: dict, dtype: torch.dtype) -> dict:
    """``config``: B, L, D and the hidden widths, activation, form (all, lengths, mask or offsets), and switches."""
    B, L, D, *widths = config["shape"]
    activation, layout = config["activation"], config.get("layout", "contiguous")
    batch_norm, form = config.get("batch_norm", False), config.get("form", "all")
    params, running_stats, width = [], [], 4 * D
    for H in widths:
        norm = [torch.rand(H) + 0.5, torch.randn(H) * 0.1]
        # Where a slope jumps at 0, tf32's rounding of z would move some of it across: then units are well on or off.
        jumps = dtype != SINGLE and activation in ("relu", "leakyrelu", "prelu")
        bias = torch.randn(H).sign() * 4 if jumps else torch.randn(H) * 0.1
        params += [torch.randn(H, width) / width**0.5, bias]
        params += norm if batch_norm else []
        params += [torch.randn(H if config.get("alpha_of_each_unit") or activation == "dice_batch_norm" else 1)] * (
            activation in ("prelu", "dice", "dice_batch_norm")
        )
        params += [torch.rand(H) + 0.5, torch.randn(H) * 0.1] if activation == "dice_batch_norm" else []
        for _ in range(batch_norm + (activation == "dice_batch_norm")):
            running_stats += [torch.randn(H) * 0.1, torch.rand(H) + 0.5]
        width = H
    params += [torch.randn(1, width) / width**0.5, torch.randn(1)]
    lengths = torch.randint(1, L + 1, (B,)) if L else torch.zeros(B, dtype=torch.int64)
    lengths[1::3] = 0
    slack = config.get("slack", 0)  # rows before the first sample's and behind the last one's
    return {
        "history": strided([int(lengths.sum()) + 2 * slack, D] if form == "offsets" else [B, L, D], dtype, layout),
        "target": strided([B, D], dtype, layout),
        "grad_out": strided([B, D], dtype, layout),
        "lengths": lengths.int() if form == "lengths" else None,
        "mask": strided([B, L], SINGLE, layout) > config.get("above", 0) if form == "mask" else None,
        "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]) + slack if form == "offsets" else None,
        "params": params,
        "running_stats": running_stats,
        "flags": Flags(
            list(ACTIVATIONS).index(activation),
            batch_norm,
            config.get("softmax", False),
            False,
            False,
            config.get("training", False),
            1e-5,
            1e-3,
            config.get("dropout", 0.0),
            torch.tensor(2**62 + 12345),
        ),
        "programs": config.get("programs", 2),
        "precision": config.get("precision", "ieee"),
    }


def by_layer(
    out: Tensor,
    batch_stats: Tensor,
    grad_history: Tensor,
    grad_target: Tensor,
    grad_params: Sequence[Tensor],
    layers: int,
):
    """Each layer's gradients as one vector: alone some are zero in truth, a bias under a softmax for one."""
    per_layer = (len(grad_params) - 2) // layers
    groups = [grad_params[i * per_layer : (i + 1) * per_layer] for i in range(layers)] + [grad_params[-2:]]
    gradients = [torch.cat([g.flatten() for g in group]) for group in groups]
    return out, batch_stats, grad_history, grad_target, *gradients


def count_layers(params: Sequence[Tensor]) -> int:
    return sum(p.dim() == 2 for p in params) - 1


@contextlib.contextmanager
def having(module, programs: int, precision: str):
    """What a launch finds set: the grid's size, and what torch allows products of float32."""
    before = module.PROGRAMS, torch.backends.cuda.matmul.fp32_precision
    module.PROGRAMS, torch.backends.cuda.matmul.fp32_precision = programs, precision
    try:
        yield
    finally:
        module.PROGRAMS, torch.backends.cuda.matmul.fp32_precision = before


def forward(
    module, history, target, grad_out, lengths, mask, offsets, params, running_stats, flags, programs, precision
):
    with having(module, programs, precision):
        return module.din_attention(history, target, lengths, mask, offsets, params, running_stats, flags)


def launch(
    module, history, target, grad_out, lengths, mask, offsets, params, running_stats, flags, programs, precision
):
    inputs = history, target, lengths, mask, offsets, params, running_stats, flags
    with having(module, programs, precision):
        out, batch_stats, saved = module.din_attention(*inputs)
        grads = module.din_attention_backward(grad_out, batch_stats, saved, *inputs)
    return by_layer(out, batch_stats, *grads, count_layers(params))


def expected(history, target, grad_out, lengths, mask, offsets, params, running_stats, flags, programs, precision):
    layers = flags.name, flags.batch_norm, flags.norm_eps, flags.dice_eps
    params = [p.double().requires_grad_() for p in params]
    history, target = history.requires_grad_(), target.requires_grad_()
    rows = history
    if offsets is not None:
        rows, offsets = history[offsets[0] : offsets[-1]], offsets - offsets[0]
    hidden, out_weight, out_bias = unflatten(params, running_stats, *layers)
    out, stats = reference.din_attention(
        rows, target, hidden, out_weight, out_bias, lengths=lengths, mask=mask, offsets=offsets,
        use_softmax=flags.use_softmax, training=flags.training, dropout=flags.dropout, seed=flags.seed,
    )  # fmt: skip
    stats = torch.cat([t for s in stats if s is not None for t in s] or [out.new_empty(0)])
    inputs = [history, target, *params]
    grads = torch.autograd.grad(out, inputs, grad_out, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
    return by_layer(out, stats, grads[0], grads[1], grads[2:], count_layers(params))


#: 10 bits of mantissa, as float16 has.
TF32 = {"precision": "tf32", "dtypes": [SINGLE]}

DIN = Interpreted(
    module="din_attention",
    huge=[
        din_attention_case(2**26, 50, 16, [36], batch_norm=False),
        din_attention_case(1, 2**26, 64, [36], batch_norm=False),
        din_attention_case(2**24, 50, 128, [80], "dice_batch_norm", form="offsets", use_softmax=True),
        din_attention_case(2**24, 50, 128, [80, 40], "dice", batch_norm=False, form="offsets", use_softmax=True),
    ],
    make=make,
    launch=launch,
    expected=expected,
    configs=[
        {"shape": (3, 37, 10, 20), "activation": activation, "form": form, "softmax": softmax, "batch_norm": norm}
        for activation, form, softmax, norm in [
            ("linear", "all", False, False),
            ("sigmoid", "lengths", True, False),
            ("relu", "mask", False, True),
            ("leakyrelu", "offsets", True, True),
            ("prelu", "lengths", False, False),
            ("dice", "offsets", False, False),
            ("dice", "mask", True, True),
            ("dice_batch_norm", "all", True, False),
        ]
    ]
    + [
        {"shape": (3, 19, 7, 36, 9), "activation": activation, "form": form, "softmax": softmax, "batch_norm": norm}
        | ({"dtypes": [SINGLE]} if activation in ("relu", "leakyrelu", "prelu") else {})
        for activation, form, softmax, norm in [
            ("linear", "mask", True, True),
            ("sigmoid", "offsets", False, True),
            ("relu", "all", True, False),
            ("leakyrelu", "lengths", False, False),
            ("prelu", "offsets", True, False),
            ("dice", "lengths", True, False),
            ("dice_batch_norm", "lengths", False, True),
        ]
    ]
    + [
        {"shape": shape, "activation": activation, "form": form, "softmax": softmax, "batch_norm": norm}
        | {"training": True, "dropout": dropout}
        | ({"dtypes": [SINGLE]} if len(shape) > 4 else {})  # the op takes a library's products for those
        for shape in ((3, 37, 10, 20), (3, 19, 7, 36, 9))
        for activation, form, softmax, norm, dropout in [
            ("dice_batch_norm", "mask", False, False, 0.0),
            ("dice_batch_norm", "lengths", True, True, 0.5),
            ("dice", "offsets", False, True, 0.2),
            ("sigmoid", "all", True, True, 0.0),
        ]
    ]
    + [
        # Few samples: programs share them.
        {"shape": (2, 200, 10, 20), "activation": "dice", "form": "lengths", "softmax": True, "programs": 6},
        {"shape": (3, 200, 10, 20), "activation": "sigmoid", "form": "offsets", "softmax": True, "programs": 64},
        {"shape": (1, 200, 10, 20, 7), "activation": "dice_batch_norm", "form": "mask", "programs": 3}
        | {"training": True, "dropout": 0.3},
        {
            "shape": (2, 17, 70, 100, 40),
            "activation": "dice",
            "form": "lengths",
            "softmax": True,
            "layout": "sliced",
        },
        {"shape": (4, 75, 6, 8), "activation": "sigmoid", "form": "all", "softmax": True},
        {"shape": (2, 5, 128, 128, 128), "activation": "prelu", "form": "mask", "layout": "reversed"},
        {"shape": (2, 5, 3, 1), "activation": "dice", "form": "offsets", "layout": "stepped"},
        # In bfloat16 one unit's rounding would be all that the second layer sees.
        {"shape": (2, 4, 5, 1, 33), "activation": "dice", "form": "all", "alpha_of_each_unit": True}
        | {"dtypes": [SINGLE, HALF]},
        {"shape": (3, 3, 4, 3), "activation": "sigmoid", "form": "lengths", "layout": "far rows"},
        {"shape": (3, 3, 4, 3), "activation": "sigmoid", "form": "mask", "softmax": True, "layout": "far samples"},
        {"shape": (2, 9, 5, 6), "activation": "dice", "form": "all", "dropout": 1.0},
        {"shape": (3, 40, 5, 6), "activation": "sigmoid", "form": "offsets", "slack": 45},
        # Few valid rows, which end anywhere, and none in some samples.
        {"shape": (5, 150, 5, 6), "activation": "dice", "form": "mask", "softmax": True, "above": 2.2},
        # Where torch's products may be tf32, these are.
        {"shape": (3, 37, 40, 20), "activation": "dice", "form": "lengths", "softmax": True} | TF32,
        # More programs than are summed at once.
        {
            "shape": (40, 3, 5, 6),
            "activation": "dice",
            "form": "all",
            "programs": 40,
            "batch_norm": True,
            "training": True,
        },
        {"shape": (3, 19, 7, 36, 9), "activation": "sigmoid", "form": "offsets"} | TF32,
        {"shape": (3, 37, 10, 20), "activation": "dice", "form": "mask", "batch_norm": True, "training": True} | TF32,
        {"shape": (2, 0, 4, 3), "activation": "relu", "form": "lengths", "softmax": True},
        {"shape": (0, 3, 4, 3), "activation": "relu", "form": "lengths"},
    ],
    dtypes=(SINGLE, HALF, BF16),
    mutations=[
        ("rows past the sample's end", "valid = o_l < end\n", "valid = o_l < end + 1\n"),
        ("columns past D", "(o_k < D)[None, :]", "(o_k < D + 1)[None, :]"),
        ("rows of another task", "task % splits * share", "task // splits * share"),
        (
            "offsets of the sample before",
            "tl.load(rows_ptr + b).to(tl.int64), 0)",
            "tl.load(rows_ptr + tl.maximum(b - 1, 0)).to(tl.int64), 0)",
        ),
        ("products: the first part for all", "tl.where(k == i, parts[i], x)", "tl.where(k == i, parts[0], x)"),
        (
            "constant: a part of the target missed",
            "(0, parts_d, disable_licm=True):\n        o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)\n        b_wt",
            "(1, parts_d, disable_licm=True):\n        o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)\n        b_wt",
        ),
        (
            "constant: summed over units",
            "D, stride_td)[None, :], 1)\n    return c",
            "D, stride_td)[None, :], 0)\n    return c",
        ),
        ("first layer: target left out of M", "tl.load(wp_ptr + o) * b_target[:, None]", "tl.load(wp_ptr + o)"),
        (
            "second layer: a part missed",
            "tl.range(0, parts_h, disable_licm=True):\n        o_h",
            "tl.range(0, parts_h - 1, disable_licm=True):\n        o_h",
        ),
        (
            "second layer: backward with the wrong stride",
            "weight2_ptr + o_h2[:, None] * BLOCK_H",
            "weight2_ptr + o_h2[:, None] * BLOCK_H2",
        ),
        ("dice_batch_norm: a layer's vectors with the wrong stride", "WHICH * BLOCK_H + o_h)", "WHICH * 32 + o_h)"),
        (
            "dice: mean over the block",
            "tl.sum(y, 1, keep_dims=True) / H, 0.0)",
            "tl.sum(y, 1, keep_dims=True) / 32, 0.0)",
        ),
        (
            "dice: statistics over rows",
            "tl.sum(centred * centred, 1, keep_dims=True)",
            "tl.sum(centred * centred, 0, keep_dims=True)",
        ),
        ("dice: backward without the mean's share", " - tl.sum(grad_c, 1, keep_dims=True) / H", ""),
        ("training: shift of a normalization left out", " + _vector(vectors_ptr, Y_SHIFT, o_h, BLOCK_H)", ""),
        ("training: a mean left out of G", "grad -= x * _vector(means_ptr, 1, o_h, BLOCK_H)", "pass"),
        ("training: padding has a G", "return tl.where(valid[:, None], grad, 0.0)", "return grad"),
        ("dropout: of other rows", "quad = l0 // 4 +", "quad = l0 +"),
        (
            "dropout: rows of a quad exchanged",
            "tl.join(w0, w2), tl.join(w1, w3)",
            "tl.join(w0, w1), tl.join(w2, w3)",
        ),
        ("dropout: one for both layers", "zeros + LAYER", "zeros"),
        ("programs: a softmax not rescaled", "total, peak = total * decay +", "total, peak = total +"),
        (
            "forward: pooled over columns",
            "return (out[0] * decay + tl.sum(weight * rows[0], 0),)",
            "return (out[0] * decay + tl.sum(weight * rows[0]),)",
        ),
        (
            "softmax: padding takes its share",
            'b_score = tl.where(valid, b_score, -float("inf"))',
            "b_score = tl.where(valid, b_score, 0.0)",
        ),
        ("programs: shares of a softmax not rescaled", "b_sum *= scale[:, None]", "pass"),
        ("programs: totals of a softmax not rescaled", "tl.sum(b_total * scale, 0)", "tl.sum(b_total, 0)"),
        (
            "programs: shares of the sample before",
            "share = shares_ptr + b * splits",
            "share = shares_ptr + b * 0 * splits",
        ),
        (
            "training: padding among the squares",
            "tl.where(valid[:, None], x - b_mean[None, :], 0.0)",
            "x - b_mean[None, :]",
        ),
        ("training: mean of the block's places", "tl.maximum(b_count, 1.0)", "BLOCK_L"),
        ("training: distance of the means left out", " + step * step * (count * share)", ""),
        ("training: over units", "squares += tl.sum(centred * centred, 0)", "squares += tl.sum(centred * centred)"),
        ("training: partial sums with the wrong stride", "* (2 * LAST + 1)", "* (2 * LAST)"),
        ("backward: sums restart at each sample", "grad_wm += grad_m\n", "grad_wm = grad_m\n"),
        (
            "backward: target of the weights left out",
            "grad_wp += grad_m * strided_vector(target, o_s, D, stride_td)[:, None]",
            "grad_wp += grad_m",
        ),
        ("softmax: backward without the mean", "weight * (grad_score - mean)", "weight * grad_score"),
        ("backward: scores of the first sample", "score_ptr + first_row + o_l", "score_ptr + o_l"),
        (
            "backward: padding keeps its memory's value",
            'if FORM == "lengths" or FORM == "mask":\n                done',
            'if FORM == "never":\n                done',
        ),
        (
            "backward: stray store past the last row",
            "(o_l < stored_end)[:, None] & (o_d < D)[None, :]\n                tl.store",
            "(o_l < stored_end + 1)[:, None] & (o_d < D)[None, :]\n                tl.store",
        ),
        ("backward: columns past the share's", "valid[:, None] & (o_s < D)", "valid[:, None] & (o_s >= 0)"),
        ("sliced: a share of columns missed", "blocks[0] // 32 if", "1 if"),
        ("backward: alpha's sum over units", "alpha += tl.sum(grad_alpha, 0)", "alpha += tl.sum(grad_alpha)"),
        ("training: sum over units", "of_yx += tl.sum(grad_y * x, 0)", "of_yx += tl.sum(grad_y * x)"),
        ("backward: second bias of the last block", "grad_bias2 += tl.sum", "grad_bias2 = tl.sum"),
        (
            "backward: second weight with the wrong stride",
            "AT_WEIGHT2 + o_h2[:, None] * BLOCK_H ",
            "AT_WEIGHT2 + o_h2[:, None] * BLOCK_H2 ",
        ),
        ("batch_norm: left out of its weight", "scale = _units(norm_weight_ptr, o_u, H) * r", "pass"),
        (
            "training: normalization left out of its weight",
            "scale = tl.load(folded_ptr + AT_VECTORS + R * BLOCK_H + o_u)",
            "pass",
        ),
        ("fold: Wd left out of Wt + Wd", "tl.store(out, (wt + wd) * scale)", "tl.store(out, wt * scale)"),
        (
            "fold: units of the first program",
            "o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)\n    unit = o_u < H",
            "o_u = tl.arange(0, BLOCK_U)\n    unit = o_u < H",
        ),
        ("batch_norm: mean left out of the bias", "(bias - _units(mean_ptr, o_u, H)) * scale", "bias * scale"),
        (
            "training: programs count alike",
            "tl.sum(count[:, None] * b_mean, 0) / total",
            "tl.sum(b_mean, 0) / programs",
        ),
        ("training: distance of the programs' means", " + count[:, None] * delta * delta", ""),
        ("training: biased variance", "unbiased = n / tl.maximum(n - 1.0, 1.0)", "unbiased = 1.0"),
        (
            "training: Dice's statistics without the normalization's",
            "v_scale *= y_scale * _inverse_std",
            "v_scale *= _inverse_std",
        ),
        ("sums: a program's vectors in a wrong place", "AT_SUMS + 4 * BLOCK_H", "AT_SUMS + 3 * BLOCK_H"),
        (
            "programs: the first blocks' sums alone",
            "tl.range(0, programs, BLOCK_P):\n        o_p = p0 + tl.arange(0, BLOCK_P)\n        inside",
            "tl.range(0, 1, BLOCK_P):\n        o_p = p0 + tl.arange(0, BLOCK_P)\n        inside",
        ),
        ("training: a mean of Dice's left out", "norm_weight * (of_y + k * of_v)", "norm_weight * of_y"),
        ("training: means of the padded rows, too", "tl.where(unit, u / count, 0.0)", "tl.where(unit, u, 0.0)"),
        ("unfold: Wt's gradient for Wd", "(grad_wt - grad_weight) * scale", "grad_wt * scale"),
        ("unfold: units with the wrong stride", "row = o_u[None, :] * (4 * K)", "row = o_u[None, :] * (3 * K)"),
        ("batch_norm: a part of the weight left out", "_share(grad_weight, weight + K, inside)", "0.0"),
    ],
    tolerance={SINGLE: 1e-5, HALF: 2e-3, BF16: 1e-2},
    rounded_to=lambda config, dtype: HALF if config.get("precision") else dtype,
    streamed="history",
    streamed_configs=[
        {"shape": (2, 37, 70, 20), "activation": "dice", "form": "all", "softmax": True},
        {"shape": (2, 37, 16, 36, 9), "activation": "sigmoid", "form": "offsets"},
    ],
    forward=forward,
    counted_configs=[
        {"shape": (4, 50, 64, 36), "activation": "dice", "form": "all"},
        {"shape": (4, 50, 64, 80, 40), "activation": "sigmoid", "form": "all", "softmax": True},
        {"shape": (4, 50, 16, 36), "activation": "dice", "form": "all"},
        {"shape": (4, 50, 64, 36), "activation": "dice", "form": "all", "batch_norm": True}
        | {"training": True, "passes": 2},
        {"shape": (4, 50, 64, 80, 40), "activation": "sigmoid", "form": "all", "batch_norm": True}
        | {"training": True, "passes": 3},
    ],
)
