"""Every Triton kernel, through its public launcher: what the interpreter's and the compiler's tests iterate over.

Adding a kernel is one entry in OPS.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from rankkernels import reference

MAP_NORESERVE = 0x4000  # Linux: pages exist when they are touched

HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

#: Relative error, norm over norm, of a result that is accumulated in float32 (float64) and rounded once.
ROUNDED_ONCE = {HALF: 2**-11, BF16: 2**-8, SINGLE: 1e-6, DOUBLE: 1e-14}


@dataclass
class Op:
    """The kernels of one module of ``rankkernels._triton``.

    ``make(config, dtype)`` gives the arguments, ``launch(module, **arguments)`` runs the launchers on them and
    ``expected(**arguments)`` says what they must return; float tensors among the arguments reach it in float64.
    """

    module: str
    make: Callable[[dict, torch.dtype], dict]
    launch: Callable[..., Sequence[Tensor]]
    expected: Callable[..., Sequence[Tensor]]
    configs: Sequence[dict]
    dtypes: Sequence[torch.dtype]
    #: What a user trains with: compiled for each target, never run. ``aligned`` asks for 128-bit loads.
    compiled: Sequence[dict]
    #: Source edits (what, old, new), each of which must make a config of ``configs`` fail.
    mutations: Sequence[tuple[str, str, str]]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: ROUNDED_ONCE)


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


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinite where anything is NaN."""
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    result = difference / scale if scale else difference
    return math.inf if math.isnan(result) else result


def fm_make(config: dict, dtype: torch.dtype) -> dict:
    B, F, D = config["shape"]
    layout, reduce_sum = config.get("layout", "contiguous"), config.get("reduce_sum", True)
    grad_out = strided([B, 1 if reduce_sum else D], dtype, layout)
    if config.get("expanded"):
        grad_out = strided([1, 1], dtype).expand(grad_out.shape)
    return {"x": strided([B, F, D], dtype, layout), "grad_out": grad_out, "reduce_sum": reduce_sum}


def fm_launch(module: ModuleType, x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    return module.fm_interaction(x, reduce_sum), module.fm_interaction_backward(grad_out, x, reduce_sum)


def fm_expected(x: Tensor, grad_out: Tensor, reduce_sum: bool) -> Sequence[Tensor]:
    x = x.requires_grad_()
    out = reference.fm_interaction(x, reduce_sum)
    return out, *torch.autograd.grad(out, x, grad_out)


FM = Op(
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
    compiled=[
        {"shape": (512, 39, D), "dtype": dtype, "reduce_sum": reduce_sum, "aligned": D * dtype.itemsize % 16 == 0}
        for D, dtype, reduce_sum in [
            (16, SINGLE, True),
            (16, BF16, True),
            (10, SINGLE, True),
            (8, HALF, False),
            (64, HALF, True),
            (64, SINGLE, False),
            (128, BF16, True),
            (16, DOUBLE, True),
        ]
    ]
    + [{"shape": (512, 300, 64), "dtype": SINGLE, "aligned": True}, {"shape": (512, 1, 1), "dtype": BF16}],
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
)

OPS = [FM]
