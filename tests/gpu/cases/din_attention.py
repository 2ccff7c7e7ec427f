"""The ops that have GPU kernels, an entry each: what every test, report and check of such kernels iterates over.

Triton's are run by the interpreter (``interpreted``) and compiled (``cases`` and ``huge``), those in CUDA C++ run under
the CPU shim (``cuda``); ``rankkernels.gpu_report`` reports and bench/gpu_check.py times ``cases``. Tests fail where a
kernel is reached by no entry.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops.din_attention import ACTIVATIONS, Flags, unflatten
from rankkernels.testing import (
    OpCase,
    din_attention_case,
    embedding_bag_case,
    embedding_fm_case,
    fm_interaction_case,
    norm_activation_case,
    relative_error,
)

MAP_NORESERVE = 0x4000  # Linux: pages exist when they are touched

HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

#: Relative error, norm over norm, of a result that is accumulated in float32 (float64) and rounded once.
ROUNDED_ONCE = {HALF: 2**-11, BF16: 2**-8, SINGLE: 1e-6, DOUBLE: 1e-14}


@dataclass
class Interpreted:
    """The kernels of one module of ``rankkernels._triton``, through its public launchers.

    ``make(config, dtype)`` gives the arguments, ``launch(module, **arguments)`` runs the launchers on them, ``forward``
    that of the forward alone, and ``expected(**arguments)`` says what they must return; float tensors among the
    arguments reach it in float64.
    """

    module: str
    make: Callable[[dict, torch.dtype], dict]
    launch: Callable[..., Sequence[Tensor]]
    expected: Callable[..., Sequence[Tensor]]
    configs: Sequence[dict]
    dtypes: Sequence[torch.dtype]
    #: Source edits (what, old, new) of the module or one it is split into (its name and an ending), each of which must
    #: make a config of ``configs`` fail. Configs in which the word that ``what`` begins with is on are tried first.
    mutations: Sequence[tuple[str, str, str]]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: ROUNDED_ONCE)
    #: The argument that the first launch reads once, with ``streamed_configs`` in which it reads all of it.
    streamed: str = ""
    streamed_configs: Sequence[dict] = ()
    #: Where the bytes that the forward moves are counted, with the ``passes`` over the streamed argument if not one.
    counted_configs: Sequence[dict] = ()
    forward: Callable[..., Sequence[Tensor]] | None = None


@dataclass
class Cuda:
    """Kernels in CUDA C++: ``launches`` are, of each op that they implement, those of a call whose tables have one
    dtype, a sort being PyTorch's; ``cases`` run under the CPU shim, beside the op's TEST_CASES."""

    launches: dict[str, list[str]]
    cases: Sequence[OpCase]


@dataclass
class GPUOp:
    """An op's kernels: ``cases`` have the shapes a user trains with, in the dtypes that are compiled and measured, and
    ``huge`` ones tensors of more than 2^31 elements, on the meta device: the interpreter follows such offsets."""

    op: str
    cases: Sequence[OpCase]
    huge: Sequence[OpCase] = ()
    interpreted: Interpreted | None = None
    cuda: Cuda | None = None


def in_dtypes(case: OpCase, *dtypes: torch.dtype) -> OpCase:
    return replace(case, dtypes=dtypes)


def strided(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Random values in a memory layout: "sliced" leaves gaps in every dimension, "stepped" within rows, "reversed" puts
    the first dimension innermost, "far samples" and "far rows" need 64-bit offsets."""
    if layout == "contiguous":
        return torch.randn(shape).to(dtype)
    if layout == "sliced":
        return torch.randn([n + 1 for n in shape]).to(dtype)[tuple(slice(1, None) for _ in shape)]
    if layout == "stepped":
        return torch.randn([*shape[:-1], 2 * shape[-1]]).to(dtype)[..., ::2]
    if layout in ("far samples", "far rows"):  # 2^31 items and more from the first to the last
        dim = layout == "far rows"
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        stride[dim] = 2**30
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        pages = mmap.mmap(-1, extent * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        far = torch.frombuffer(pages, dtype=dtype).as_strided(shape, stride)
        return far.copy_(torch.randn(shape))
    assert layout == "reversed"
    return torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])


def described(value) -> str:
    """A config or a dtype as part of a test's name."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" if isinstance(v, bool) else described(v) for k, v in value.items())
    return str(value).removeprefix("torch.").replace(" ", "")


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinite where anything is NaN."""
    result = relative_error(actual, expected)
    return math.inf if math.isnan(result) else result


def fm_make(config: dict, dtype: torch.dtype) -> dict:
    B, F, D = config["shape"]
    layout, reduce_sum = config.get("layout", "contiguous"), config.get("reduce_sum", True)
    grad_out = strided([B, 1 if reduce_sum else D], dtype, layout)
    if config.get("expanded"):
        grad_out = strided([1, 1], dtype).expand(grad_out.shape)
    return {"x": strided([B, F, D], dtype, layout), "grad_out": grad_out, "reduce_sum": reduce_sum}


def fm_forward(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return (module.fm_interaction(x, reduce_sum),)


def fm_launch(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return *fm_forward(module, x, grad_out, reduce_sum), module.fm_interaction_backward(grad_out, x, reduce_sum)


def fm_expected(x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    x = x.requires_grad_()
    out = reference.fm_interaction(x, reduce_sum)
    return out, *torch.autograd.grad(out, x, grad_out)


FM = GPUOp(
    op="fm_interaction",
    cases=[
        in_dtypes(fm_interaction_case(65536, 39, 16), SINGLE, BF16, DOUBLE),
        in_dtypes(fm_interaction_case(8192, 39, 64), SINGLE, HALF),
        in_dtypes(fm_interaction_case(4096, 39, 10), SINGLE),
        in_dtypes(fm_interaction_case(4096, 39, 8, reduce_sum=False), HALF),
        in_dtypes(fm_interaction_case(4096, 39, 64, reduce_sum=False), SINGLE),
        in_dtypes(fm_interaction_case(4096, 39, 128), BF16),
        in_dtypes(fm_interaction_case(4096, 300, 64), SINGLE),
        in_dtypes(fm_interaction_case(4096, 1, 1), BF16),
    ],
    huge=[fm_interaction_case(2**27, 39, 16), fm_interaction_case(3, 2**30, 4), fm_interaction_case(2, 3, 2**31 + 5)],
    interpreted=Interpreted(
        module="fm_interaction",
        make=fm_make,
        launch=fm_launch,
        expected=fm_expected,
        configs=[
            {"shape": (B, F, D), "layout": layout, "reduce_sum": reduce_sum}
            for B, F, D, layout in [
                (5, 39, 16, "contiguous"),
                (3, 26, 10, "sliced"),
                (2, 3, 8, "reversed"),
                (2, 5, 7, "stepped"),
                (2, 70, 65, "contiguous"),  # more values than the backward keeps on chip, and two blocks of columns
                (3, 67, 64, "sliced"),
                (2, 2, 300, "reversed"),
                (9, 1, 3, "contiguous"),
                (600, 1, 1, "contiguous"),
                (1, 1, 1, "stepped"),
                (3, 2, 5, "far samples"),
                (2, 3, 5, "far rows"),
                (0, 4, 8, "contiguous"),
                (3, 0, 8, "contiguous"),
                (3, 4, 0, "contiguous"),
            ]
            for reduce_sum in (True, False)
        ]
        + [{"shape": (5, 4, 12), "reduce_sum": reduce_sum, "expanded": True} for reduce_sum in (True, False)],
        dtypes=(SINGLE, HALF, BF16, DOUBLE),
        streamed="x",
        streamed_configs=[{"shape": (3, 26, 10)}, {"shape": (2, 70, 65)}],
        forward=fm_forward,
        counted_configs=[{"shape": (4, 39, 16)}, {"shape": (4, 26, 10)}, {"shape": (4, 5, 128), "reduce_sum": False}],
        mutations=[
            (
                "forward: a field too many",
                "F)[None, :, None]\n            b_x = tl.load(x_tile + f * stride_xf",
                "F + 1)[None, :, None]\n            b_x = tl.load(x_tile + f * stride_xf",
            ),
            (
                "forward: samples unmasked",
                "(o_b < B)[:, None] & (o_d < D)[None, :]\n        s =",
                "(o_b >= 0)[:, None] & (o_d < D)[None, :]\n        s =",
            ),
            ("forward: columns unmasked", "(o_d < D)[None, :]\n        s =", "(o_d >= 0)[None, :]\n        s ="),
            (
                "forward: a field's stride between samples",
                "o_b[:, None, None] * stride_xb + o_f[None, :, None] * stride_xf\n    total",
                "o_b[:, None, None] * stride_xf + o_f[None, :, None] * stride_xf\n    total",
            ),
            ("forward: reduced over samples", "tl.reduce((s, y), 1, _join)", "tl.reduce((s, y), 0, _join)"),
            ("forward: runs joined without their product", "y + other_y + s * other_s", "y + other_y"),
            ("forward: result of the wrong sample", "out_ptr + o_b, total", "out_ptr + o_b // 2, total"),
            (
                "backward: fields unmasked in one pass",
                "valid[:, None, :] & (o_f < F)[None, :, None]",
                "valid[:, None, :] & (o_f >= 0)[None, :, None]",
            ),
            (
                "backward: last fields missed in two passes",
                "s = tl.sum(runs, 1, keep_dims=True)\n            for f in tl.range(0, F,",
                "s = tl.sum(runs, 1, keep_dims=True)\n            for f in tl.range(0, F - BLOCK_F,",
            ),
            (
                "forward: offsets in 32 bits",
                "o_f[None, :, None] * stride_xf\n    total",
                "o_f[None, :, None] * tl.cast(stride_xf, tl.int32)\n    total",
            ),
            ("backward: columns unmasked", "(o_d < D)[None, :]\n        g_tile", "(o_d >= 0)[None, :]\n        g_tile"),
            ("backward: summed over samples", "tl.sum(b_x, 1, keep_dims=True)", "tl.sum(b_x, 0, keep_dims=True)"),
            ("backward: gradient of another sample", "o_b[:, None] * stride_gb", "o_b[:, None] * stride_gd"),
            (
                "backward: the last samples left out",
                "fm_interaction_backward_kernel[(triton.cdiv(B, BLOCK_B),)]",
                "fm_interaction_backward_kernel[(B // BLOCK_B,)]",
            ),
        ],
    ),
)


def din_make(config: dict, dtype: torch.dtype) -> dict:
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
    return {
        "history": strided([int(lengths.sum()), D] if form == "offsets" else [B, L, D], dtype, layout),
        "target": strided([B, D], dtype, layout),
        "grad_out": strided([B, D], dtype, layout),
        "lengths": lengths.int() if form == "lengths" else None,
        "mask": strided([B, L], SINGLE, layout) > 0 if form == "mask" else None,
        "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]) if form == "offsets" else None,
        "params": params,
        "running_stats": running_stats,
        "flags": Flags(
            list(ACTIVATIONS).index(activation),
            batch_norm,
            config.get("softmax", False),
            config.get("training", False),
            1e-5,
            1e-3,
            config.get("dropout", 0.0),
            torch.tensor(2**62 + 12345),
        ),
        "programs": config.get("programs", 2),
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


def din_layers(params: Sequence[Tensor]) -> int:
    return sum(p.dim() == 2 for p in params) - 1


def din_forward(module, history, target, grad_out, lengths, mask, offsets, params, running_stats, flags, programs):
    module.PROGRAMS = programs
    return module.din_attention(history, target, lengths, mask, offsets, params, running_stats, flags)


def din_launch(module, history, target, grad_out, lengths, mask, offsets, params, running_stats, flags, programs):
    inputs = history, target, lengths, mask, offsets, params, running_stats, flags
    module.PROGRAMS = programs
    out, batch_stats, saved = module.din_attention(*inputs)
    grads = module.din_attention_backward(grad_out, batch_stats, saved, *inputs)
    return by_layer(out, batch_stats, *grads, din_layers(params))


def din_expected(history, target, grad_out, lengths, mask, offsets, params, running_stats, flags, programs):
    layers = flags.name, flags.batch_norm, flags.norm_eps, flags.dice_eps
    params = [p.double().requires_grad_() for p in params]
    history, target = history.requires_grad_(), target.requires_grad_()
    hidden, out_weight, out_bias = unflatten(params, running_stats, *layers)
    out, stats = reference.din_attention(
        history, target, hidden, out_weight, out_bias, lengths=lengths, mask=mask, offsets=offsets,
        use_softmax=flags.use_softmax, training=flags.training, dropout=flags.dropout, seed=flags.seed,
    )  # fmt: skip
    stats = torch.cat([t for s in stats if s is not None for t in s] or [out.new_empty(0)])
    inputs = [history, target, *params]
    grads = torch.autograd.grad(out, inputs, grad_out, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
    return by_layer(out, stats, grads[0], grads[1], grads[2:], din_layers(params))


DIN = GPUOp(
    op="din_attention",
    cases=[
        in_dtypes(din_attention_case(4096, 50, 16, [36], "dice", False, False, False, "lengths"), SINGLE),
        in_dtypes(din_attention_case(4096, 50, 64, [36], "dice", False, True, False, "offsets"), SINGLE),
        in_dtypes(din_attention_case(4096, 50, 64, [64], "dice_batch_norm", False, False, False, "mask"), BF16),
        in_dtypes(din_attention_case(4096, 50, 64, [80, 40], "dice", False, False, False, "lengths"), SINGLE),
    ]
    + [
        # The widest layers, and what else the kernels are compiled to: do the registers suffice?
        in_dtypes(din_attention_case(512, 50, D, widths, activation, norm, softmax, training, form, dropout), dtype)
        for D, widths, activation, norm, softmax, training, form, dropout, dtype in [
            (128, [128, 128], "dice", True, True, True, "mask", 0.1, SINGLE),
            (128, [128, 128], "dice_batch_norm", False, True, False, "offsets", 0.0, HALF),
            (128, [128], "dice_batch_norm", True, False, True, "lengths", 0.0, BF16),
            (64, [80, 40], "sigmoid", False, False, True, "lengths", 0.2, SINGLE),
            (32, [64, 16], "prelu", True, True, False, "padded", 0.0, HALF),
            (16, [36], "dice", True, True, True, "mask", 0.1, SINGLE),
        ]
    ],
    huge=[
        din_attention_case(2**26, 50, 16, [36], batch_norm=False),
        din_attention_case(1, 2**26, 64, [36], batch_norm=False),
        din_attention_case(2**24, 50, 128, [80, 40], "dice_batch_norm", form="offsets", use_softmax=True),
    ],
    interpreted=Interpreted(
        module="din_attention",
        make=din_make,
        launch=din_launch,
        expected=din_expected,
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
            {"shape": (2, 4, 5, 1, 33), "activation": "dice", "form": "all", "alpha_of_each_unit": True},
            {"shape": (3, 3, 4, 3), "activation": "sigmoid", "form": "lengths", "layout": "far rows"},
            {"shape": (3, 3, 4, 3), "activation": "sigmoid", "form": "mask", "softmax": True, "layout": "far samples"},
            {"shape": (2, 9, 5, 6), "activation": "dice", "form": "all", "dropout": 1.0},
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
            ("a layer's vectors with the wrong stride", "WHICH * BLOCK_H + o_h)", "WHICH * 32 + o_h)"),
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
            ("training: a mean left out of G", "grad -= x * _vector(vectors_ptr, W, o_h, BLOCK_H)", "pass"),
            ("training: padding has a G", "return tl.where(valid[:, None], grad, 0.0)", "return grad"),
            ("dropout: of other rows", "quad = l0 // 4 +", "quad = l0 +"),
            (
                "dropout: rows of a quad exchanged",
                "tl.join(w0, w2), tl.join(w1, w3)",
                "tl.join(w0, w1), tl.join(w2, w3)",
            ),
            ("dropout: one for both layers", "zeros + LAYER", "zeros"),
            ("softmax: not rescaled", "total, peak = total * decay +", "total, peak = total +"),
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
            ("programs: shares of a softmax not rescaled", "sums * (share / total", "sums * (1 / total"),
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
                'if FORM == "lengths":\n                for',
                'if FORM == "never":\n                for',
            ),
            (
                "backward: stray store past the last row",
                "(o_l < stored_end)[:, None] & (o_d < D)[None, :]\n                tl.store",
                "(o_l < stored_end + 1)[:, None] & (o_d < D)[None, :]\n                tl.store",
            ),
            ("backward: columns past the share's", "valid[:, None] & (o_s < D)", "valid[:, None] & (o_s >= 0)"),
            ("backward: a share of columns missed", "BLOCK_D // BLOCK_S if", "1 if"),
            ("backward: alpha's sum over units", "alpha += tl.sum(grad_alpha, 0)", "alpha += tl.sum(grad_alpha)"),
            ("training: sum over units", "of_yx += tl.sum(grad_y * x, 0)", "of_yx += tl.sum(grad_y * x)"),
            ("backward: second bias of the last block", "grad_bias2 += tl.sum", "grad_bias2 = tl.sum"),
            (
                "backward: second weight with the wrong stride",
                "tl.store(weight2 + o_h2[:, None] * BLOCK_H ",
                "tl.store(weight2 + o_h2[:, None] * BLOCK_H2 ",
            ),
            (
                "batch_norm: left out of its weight",
                "grad_weight, grad_bias = grad_weight * s[:, None], grad_bias * s",
                "pass",
            ),
            ("training: normalization left out of its weight", "weight * layer.r[:, None]", "weight"),
        ],
        tolerance={SINGLE: 1e-5, HALF: 2e-3, BF16: 1e-2},
        streamed="history",
        streamed_configs=[
            {"shape": (2, 37, 70, 20), "activation": "dice", "form": "all", "softmax": True},
            {"shape": (2, 37, 16, 36, 9), "activation": "sigmoid", "form": "offsets"},
        ],
        forward=din_forward,
        counted_configs=[
            {"shape": (4, 50, 64, 36), "activation": "dice", "form": "all"},
            {"shape": (4, 50, 64, 80, 40), "activation": "sigmoid", "form": "all", "softmax": True},
            {"shape": (4, 50, 16, 36), "activation": "dice", "form": "all"},
            {"shape": (4, 50, 64, 36), "activation": "dice", "form": "all", "batch_norm": True}
            | {"training": True, "passes": 2},
            {"shape": (4, 50, 64, 80, 40), "activation": "sigmoid", "form": "all", "batch_norm": True}
            | {"training": True, "passes": 3},
        ],
    ),
)


def norm_make(config: dict, dtype: torch.dtype) -> dict:
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


def norm_outputs(out: Tensor, stats: Tensor, grad_x: Tensor, grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of the vectors as one."""
    return out, stats, grad_x, torch.cat([g.flatten() for g in grads]) if grads else stats


def norm_launch(module, x, grad_out, weight, bias, alpha, running_mean, running_var, flags):
    module.PROGRAMS = 3  # so that a program has several blocks of rows, and not every block of programs is full
    inputs = x, weight, bias, alpha, running_mean, running_var, *flags
    out, batch_stats = module.norm_activation(*inputs)
    return norm_outputs(out, batch_stats, *module.norm_activation_backward(grad_out, batch_stats, *inputs))


def norm_expected(x, grad_out, weight, bias, alpha, running_mean, running_var, flags):
    activation, batch_norm, training, norm_eps, dice_eps = flags
    wanted = [t.requires_grad_() for t in (x, weight, bias, alpha) if t is not None]
    norm = reference.BatchNorm(weight, bias, running_mean, running_var, norm_eps) if batch_norm else None
    out, stats = reference.norm_activation(x, norm, activation, alpha, training, dice_eps)
    grads = torch.autograd.grad(out, wanted, grad_out)
    return norm_outputs(out, x.new_empty(0) if stats is None else torch.cat(stats), grads[0], grads[1:])


NORM = GPUOp(
    op="norm_activation",
    cases=[
        in_dtypes(norm_activation_case(4096, 256, "dice"), SINGLE, BF16),
        in_dtypes(norm_activation_case(4096, 200, "dice_batch_norm", affine=False), SINGLE),
        in_dtypes(norm_activation_case(4096, 128, "relu"), HALF),
        in_dtypes(norm_activation_case(4096, 256, "relu", training=False), DOUBLE),
    ],
    huge=[norm_activation_case(2**27, 40), norm_activation_case(2**20, 4096, "dice_batch_norm")],
    interpreted=Interpreted(
        module="norm_activation",
        make=norm_make,
        launch=norm_launch,
        expected=norm_expected,
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
                "_vector(alpha_ptr, o_h, H, dtype, 0.0)[None, :]\n    y =",
                "_vector(alpha_ptr, o_h * 0, H, dtype, 0.0)[None, :]\n    y =",
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
                "o_h[None, :] * tl.cast(stride_gh, tl.int64)",
                "o_h[None, :] * stride_gn",
            ),
            (
                "backward: sums of the wrong kind",
                "tl.store(partial + 2 * H64, tl.sum(sum_alpha, 0)",
                "tl.store(partial + 2 * H64, tl.sum(sum_g, 0)",
            ),
        ],
        tolerance={SINGLE: 5e-6, HALF: 2e-3, BF16: 1e-2, DOUBLE: 1e-12},
    ),
)

EMBEDDING_BAG = GPUOp(
    op="embedding_bag",
    cases=[
        in_dtypes(embedding_bag_case([100_000] * 26, [16] * 26, list(range(26)), ["sum"] * 26, B=4096, L=1), SINGLE),
        in_dtypes(embedding_bag_case([1_000_000] * 8, [64] * 8, list(range(8)), ["sum"] * 8, B=1024, L=20), SINGLE),
    ],
    cuda=Cuda(
        launches={
            "embedding_bag": ["embedding_bag"],
            "embedding_bag_backward": ["zero", "embedding_lookups", "sort", "embedding_reduce", "embedding_join"],
        },
        cases=[
            # One row of a warp's width and more, packed and not; groups of every number of lanes.
            *(
                embedding_bag_case([7], [d], [0], ["mean"], B=9, L=5, weighted=True)
                for d in (1, 2, 4, 12, 16, 40, 136, 300)
            ),
            embedding_bag_case([7], [24], [0], ["none"], B=70, L=1),
            embedding_bag_case([13], [72], [0, 0], ["max", "sum"], B=9, L=6, padding_idx=2),
            # Hot rows, whose runs cross many tiles and groups of a warp.
            embedding_bag_case([3], [16], [0], ["sum"], B=40, L=40, jagged=True),
            embedding_bag_case([1], [10], [0], ["mean"], B=30, L=30, weighted=True),
            # Tables of several widths in one tile, and more features and tables than go with one launch.
            embedding_bag_case([2, 3, 2], [8, 10, 48], [0, 1, 2, 1], ["sum", "mean", "none", "max"], B=6, L=3),
            embedding_bag_case([5] * 130, [4] * 130, list(range(130)), ["sum", "none"] * 65, B=3, L=2, padding_idx=1),
        ],
    ),
)

EMBEDDING_FM = GPUOp(
    op="embedding_fm",
    cases=[in_dtypes(embedding_fm_case([100_000] * 26, 16, list(range(26)), ["none"] * 26, B=4096), SINGLE)],
    cuda=Cuda(
        launches={
            "embedding_fm": ["embedding_fm"],
            "embedding_fm_backward": ["embedding_fm_backward", "embedding_linear_parts", "embedding_linear_total"],
        },
        cases=[
            # Groups of every number of lanes, packed and not, with fewer and more features than a warp has groups.
            *(
                embedding_fm_case([7], d, [0] * 3, ["none", "sum", "max"], B=9, L=2)
                for d in (1, 2, 12, 16, 40, 136, 300)
            ),
            embedding_fm_case([7, 5], 4, [0, 1] * 9, ["none", "mean"] * 9, B=11, padding_idx=2),
            # More features than go with one launch, and more samples than a part of the linear weights' gradient.
            embedding_fm_case([3] * 90, 8, list(range(90)), ["sum", "none"] * 45, B=10),
            embedding_fm_case([3] * 90, 5, list(range(90)), ["none", "mean"] * 45, B=2, linear=False),
            embedding_fm_case([7], 4, [0, 0], ["none", "none"], B=300, dense=3),
        ],
    ),
)

GPU_OPS = [FM, DIN, NORM, EMBEDDING_BAG, EMBEDDING_FM]
INTERPRETED = [op.interpreted for op in GPU_OPS if op.interpreted]
COMPILED = [case for op in GPU_OPS if op.interpreted for case in op.cases]
CUDA_LAUNCHES = {name: kernels for op in GPU_OPS if op.cuda for name, kernels in op.cuda.launches.items()}
