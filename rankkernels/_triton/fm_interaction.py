"""FM second-order interaction in Triton: forward and backward.

One sample's fields are x_1 .. x_F, rows of x [B, F, D]. With s_f = x_1 + .. + x_f,

    out[b, d]       = 1/2 ((sum_f x_f)^2 - sum_f x_f^2) = sum_{f<g} x_f x_g = sum_f x_f s_{f-1}
    grad_x[b, f, d] = grad_out[b, d] (s_F - x_f)

and with reduce_sum out[b] = sum_d out[b, d]. The forward takes the last form: no difference of two nearly equal
numbers, and a single field gives exactly 0. Two runs of fields with sums s, s' and interactions y, y' join to s + s'
and y + y' + s s', so BLOCK_F runs go side by side and a reduction joins them at the end.

Per sample, for items of w bytes:

    forward    reads F D w, writes w or D w; 3 F D flops
    backward   reads F D w and grad_out, writes F D w; 3 F D flops

Both are bound by memory. The forward reads x once, BLOCK_F rows at a time. The backward needs s_F before it can write:
up to RESIDENT values a block it keeps the sample's columns in registers and reads x once, too (F <= 64 always does);
above, a second loop reads the rows again that the first left in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment, between_columns
from rankkernels._triton._launch import launch

WARP_BYTES = 32 * 16  # one 128-bit load a lane
RESIDENT = 4096  # values: 32 registers a thread with four warps
UNSPECIALIZED = ["B", "F", "D", "stride_gb", "stride_gd", "stride_xb", "stride_xf", "stride_xd"]
SPILLS_EARLY = triton.__version__.startswith("3.8.")  # for sm_100, at 80 registers, unless told how many there are


@triton.jit
def _join(s, y, other_s, other_y):
    return s + other_s, y + other_y + s * other_s


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fm_interaction_kernel(
    x_ptr, out_ptr, B, F, D,
    stride_xb, stride_xf, stride_xd,
    REDUCE_SUM: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """out [B, D], contiguous, or [B] with REDUCE_SUM, of BLOCK_B samples."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_f = tl.arange(0, BLOCK_F)
    stride_xd = between_columns(stride_xd, UNIT)
    x_rows = x_ptr + o_b[:, None, None] * stride_xb + o_f[None, :, None] * stride_xf
    total = tl.zeros([BLOCK_B], dtype)
    for d in range(BLOCKS_D):
        o_d = d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
        valid = (o_b < B)[:, None] & (o_d < D)[None, :]
        s = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_D], dtype)
        y = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_D], dtype)
        x_tile = x_rows + o_d[None, None, :] * stride_xd
        for f in tl.range(0, F, BLOCK_F, loop_unroll_factor=2):
            inside = valid[:, None, :] & (f + o_f < F)[None, :, None]
            b_x = tl.load(x_tile + f * stride_xf, mask=inside, other=0.0).to(dtype)
            y += b_x * s
            s += b_x
        s, y = tl.reduce((s, y), 1, _join)
        y += s - s  # NaN where a field is infinite, as the difference of squares
        if REDUCE_SUM:
            total += tl.sum(y, 1)
        else:
            tl.store(out_ptr + o_b[:, None] * D + o_d[None, :], y, mask=valid)
    if REDUCE_SUM:
        tl.store(out_ptr + o_b, total, mask=o_b < B)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fm_interaction_backward_kernel(
    grad_out_ptr, x_ptr, grad_x_ptr, B, F, D,
    stride_gb, stride_gd, stride_xb, stride_xf, stride_xd,
    ONE_PASS: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, F, D], contiguous, of BLOCK_B samples; ONE_PASS where BLOCK_F >= F."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_f = tl.arange(0, BLOCK_F)
    stride_xd = between_columns(stride_xd, UNIT)
    x_rows = x_ptr + o_b[:, None, None] * stride_xb + o_f[None, :, None] * stride_xf
    grad_rows = grad_x_ptr + (o_b[:, None, None] * F + o_f[None, :, None]) * D
    for d in range(BLOCKS_D):
        o_d = d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
        valid = (o_b < B)[:, None] & (o_d < D)[None, :]
        g_tile = grad_out_ptr + o_b[:, None] * stride_gb + o_d[None, :] * stride_gd
        b_grad_out = tl.load(g_tile, mask=valid, other=0.0).to(dtype)[:, None, :]
        x_tile = x_rows + o_d[None, None, :] * stride_xd
        grad_tile = grad_rows + o_d[None, None, :]
        if ONE_PASS:
            inside = valid[:, None, :] & (o_f < F)[None, :, None]
            b_x = tl.load(x_tile, mask=inside, other=0.0).to(dtype)
            s = tl.sum(b_x, 1, keep_dims=True)
            tl.store(grad_tile, b_grad_out * (s - b_x), mask=inside)
        else:
            runs = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_D], dtype)
            for f in tl.range(0, F, BLOCK_F, loop_unroll_factor=2):
                inside = valid[:, None, :] & (f + o_f < F)[None, :, None]
                runs += tl.load(x_tile + f * stride_xf, mask=inside, other=0.0).to(dtype)
            s = tl.sum(runs, 1, keep_dims=True)
            for f in tl.range(0, F, BLOCK_F, loop_unroll_factor=2):
                inside = valid[:, None, :] & (f + o_f < F)[None, :, None]
                b_x = tl.load(x_tile + f * stride_xf, mask=inside, other=0.0).to(dtype)
                tl.store(grad_tile + f * D, b_grad_out * (s - b_x), mask=inside)


def fm_interaction(x: Tensor, reduce_sum: bool) -> Tensor:
    """x [B, F, D], any strides -> [B, 1], or [B, D] without ``reduce_sum``."""
    B, F, D = x.shape
    out = torch.empty((B, 1 if reduce_sum else D), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    warp = WARP_BYTES // x.element_size()  # a warp's load covers BLOCK_F rows that lie together in memory
    BLOCK_D = min(triton.next_power_of_2(D), warp)
    BLOCK_F = min(triton.next_power_of_2(F), warp // BLOCK_D)
    BLOCK_B = 1024 // (BLOCK_F * BLOCK_D)  # 8 values a thread
    with torch.cuda.device_of(x):
        launch(
            fm_interaction_kernel, (triton.cdiv(B, BLOCK_B),), (x, out), (B, F, D, *x.stride()),
            (reduce_sum, alignment(x), x.stride(2) == 1, BLOCK_B, BLOCK_F, BLOCK_D, triton.cdiv(D, BLOCK_D)),
            num_warps=4,
        )  # fmt: skip
    return out


def fm_interaction_backward(grad_out: Tensor, x: Tensor, reduce_sum: bool) -> Tensor:
    """grad_out [B, 1] or [B, D], x [B, F, D], any strides -> grad_x [B, F, D], contiguous."""
    B, F, D = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    BLOCK_D = min(triton.next_power_of_2(D), RESIDENT // 64)
    one_pass = triton.next_power_of_2(F) * BLOCK_D <= RESIDENT
    BLOCK_F = triton.next_power_of_2(F) if one_pass else RESIDENT // 4 // BLOCK_D
    BLOCK_B = max(1, RESIDENT // 2 // (BLOCK_F * BLOCK_D)) if one_pass else 1
    with torch.cuda.device_of(x):
        launch(
            fm_interaction_backward_kernel, (triton.cdiv(B, BLOCK_B),), (grad_out, x, grad_x),
            (B, F, D, grad_out.stride(0), 0 if reduce_sum else grad_out.stride(1), *x.stride()),
            (one_pass, alignment(x), x.stride(2) == 1, BLOCK_B, BLOCK_F, BLOCK_D, triton.cdiv(D, BLOCK_D)),
            num_warps=4,
            **({"maxnreg": 128} if SPILLS_EARLY and not torch.version.hip else {}),
        )  # fmt: skip
    return grad_x
