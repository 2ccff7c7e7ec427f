"""Batch normalization and activation of a hidden layer's products in Triton: forward and backward.

x [N, H] has a row a sample and a column a unit. With m and v the mean and variance of a column, those of the batch in
training, r = 1 / sqrt(v + eps), n = (x - m) r and y = gamma n + beta (without a normalization y = x),

    out = activation(y), but for dice_batch_norm    out = alpha x + sigmoid(y) (x - alpha x)

Backward, with g = dL/dy and, for dice_batch_norm, d what of dL/dx goes past the normalization (0 else), in training

    grad_x = d + r gamma (g - mean(g) - n mean(g n)),    grad_gamma = sum g n,    grad_beta = sum g

means and sums running down a column; in eval the two means are absent. Dice has its statistics along a row, so a
program has whole rows, BLOCK_N of them at a time.

Passes over an array of x's size: training forward reads x, reads x, writes out; its backward reads x and grad_out for
the sums, reads both, writes grad_x. Else forward 2, backward 3. All are bound by memory: some 10 flops a value for
relu, 40 for dice. What goes down a column is summed by each program over rows of its own, in order, and then over the
programs in one tile: the same bits run after run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment, between_columns
from rankkernels._triton._launch import launch
from rankkernels._triton._programs import programs_of

PROGRAMS: int | None = None  # of a pass that sums, and so many partial sums: other than ``programs_of`` says, for tests
TILE = 2048  # values a block: 16 a thread with four warps
MAX_WIDTH = 4096
UNSPECIALIZED = ["N", "H", "rows", "programs", "stride_gn", "stride_gh", "stride_xn", "stride_xh"]


@triton.jit
def _vector(ptr, o, H, dtype: tl.constexpr, OTHER: tl.constexpr):
    """[H] values at ``ptr``, OTHER where it is None."""
    if ptr is None:
        return tl.full(o.shape, OTHER, dtype)
    else:
        return tl.load(ptr + o, mask=o < H, other=0.0).to(dtype)


@triton.jit
def _slopes(alpha_ptr, o, H, ONE_ALPHA: tl.constexpr, dtype: tl.constexpr):
    """alpha of each unit [1, H], be it one for all."""
    if ONE_ALPHA:
        return tl.full(o.shape, 0.0, dtype)[None, :] + tl.load(alpha_ptr).to(dtype)
    else:
        return _vector(alpha_ptr, o, H, dtype, 0.0)[None, :]


@triton.jit
def _normalization(mean_ptr, var_ptr, o_h, N, H, TRAINING: tl.constexpr, norm_eps: tl.constexpr, dtype: tl.constexpr):
    """Mean and r of each column [1, H], 0 and 1 without a normalization. In training the unbiased variance lies behind
    the mean."""
    if mean_ptr is None:
        return tl.zeros(o_h.shape, dtype)[None, :], tl.full(o_h.shape, 1.0, dtype)[None, :]
    else:
        var = _vector(mean_ptr + H if TRAINING else var_ptr, o_h, H, dtype, 0.0)
        if TRAINING:
            var = var * (N - 1).to(dtype) / N.to(dtype)
        r = tl.rsqrt(var + norm_eps)
        return _vector(mean_ptr, o_h, H, dtype, 0.0)[None, :], tl.where(o_h < H, r, 0.0)[None, :]


@triton.jit
def _dice(y, o_h, H, dice_eps: tl.constexpr):
    """The row statistics' c = y - mean, 0 past H, 1 / sqrt(sum(c^2 + eps)) [N, 1], and p."""
    c = tl.where((o_h < H)[None, :], y - tl.sum(y, 1, keep_dims=True) / H, 0.0)
    s = tl.rsqrt(tl.sum(c * c, 1, keep_dims=True) + tl.cast(H, y.dtype) * dice_eps)
    return c, s, tl.sigmoid(c * s)


@triton.jit
def _activate(x, y, alpha, o_h, H, dice_eps: tl.constexpr, ACTIVATION: tl.constexpr):
    if ACTIVATION == "sigmoid":
        return tl.sigmoid(y)
    elif ACTIVATION == "relu":
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leakyrelu":
        return tl.where(y > 0, y, 0.01 * y)
    elif ACTIVATION == "prelu":
        return tl.where(y > 0, y, alpha * y)
    elif ACTIVATION == "dice":
        _, _, p = _dice(y, o_h, H, dice_eps)
        return y * (alpha + (1 - alpha) * p)
    elif ACTIVATION == "dice_batch_norm":
        return alpha * x + tl.sigmoid(y) * (x - alpha * x)
    else:
        tl.static_assert(ACTIVATION == "linear")
        return y


@triton.jit
def _activate_backward(grad, x, y, alpha, o_h, H, dice_eps: tl.constexpr, ACTIVATION: tl.constexpr):
    """dL/dy, what of dL/dx goes past the normalization, and each value's share of alpha's gradient."""
    zeros = tl.zeros_like(y)
    if ACTIVATION == "sigmoid":
        p = tl.sigmoid(y)
        return grad * p * (1 - p), zeros, zeros
    elif ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, grad), zeros, zeros  # a NaN has all of it: as torch's
    elif ACTIVATION == "leakyrelu":
        return tl.where(y > 0, grad, 0.01 * grad), zeros, zeros
    elif ACTIVATION == "prelu":
        return tl.where(y > 0, grad, alpha * grad), zeros, tl.where(y > 0, 0.0, grad * y)
    elif ACTIVATION == "dice":
        # u = s c with s = (sum c^2 + H eps)^-1/2: with w = dL/du, dc = s w - s^3 c sum(c w) and dy = dc - mean(dc)
        c, s, p = _dice(y, o_h, H, dice_eps)
        w = grad * y * (1 - alpha) * p * (1 - p)
        grad_c = s * w - c * (s * s * s * tl.sum(c * w, 1, keep_dims=True))
        grad_y = grad * (alpha + (1 - alpha) * p) + grad_c - tl.sum(grad_c, 1, keep_dims=True) / H
        return tl.where((o_h < H)[None, :], grad_y, 0.0), zeros, grad * y * (1 - p)
    elif ACTIVATION == "dice_batch_norm":
        p = tl.sigmoid(y)
        return grad * x * (1 - alpha) * p * (1 - p), grad * (alpha + (1 - alpha) * p), grad * x * (1 - p)
    else:
        tl.static_assert(ACTIVATION == "linear")
        return grad, zeros, zeros


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_statistics_kernel(
    x_ptr, partials_ptr, N, H, rows, stride_xn, stride_xh,
    ALIGN: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations over rows [p rows, (p + 1) rows), of a block of columns: [P, 2, H].

    Blocks of rows are merged as in Chan, Golub and LeVeque (1983).
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xn, H64 = aligned(stride_xn, ALIGN), aligned(H, ALIGN)
    stride_xh = between_columns(stride_xh, UNIT)
    program = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = program * rows
    end = tl.minimum(start + rows, N)
    mean, squares = tl.zeros([BLOCK_H], dtype), tl.zeros([BLOCK_H], dtype)
    for n0 in range(start, end, BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        inside = (o_n < end)[:, None] & (o_h < H64)[None, :]
        x_tile = x_ptr + o_n[:, None] * stride_xn + o_h[None, :] * stride_xh
        b_x = tl.load(x_tile, mask=inside, other=0.0).to(dtype)
        before = (n0 - start).to(dtype)
        here = tl.minimum(end - n0, BLOCK_N).to(dtype)
        b_mean = tl.sum(b_x, 0) / here
        centred = tl.where(inside, b_x - b_mean[None, :], 0.0)
        delta, share = b_mean - mean, here / (before + here)
        mean += delta * share
        squares += tl.sum(centred * centred, 0) + delta * delta * before * share
    partial = partials_ptr + program * 2 * H64 + o_h
    tl.store(partial, mean, mask=o_h < H64)
    tl.store(partial + H64, squares, mask=o_h < H64)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_merge_kernel(
    partials_ptr, stats_ptr, N, H, rows, programs, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Mean and unbiased variance [2, H] of a block of columns, from the partial ones of all programs."""
    dtype: tl.constexpr = stats_ptr.dtype.element_ty
    H64 = aligned(H, ALIGN)
    o_p, o_h = tl.arange(0, BLOCK_P).to(tl.int64), tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (o_p < programs)[:, None] & (o_h < H64)[None, :]
    partial = partials_ptr + o_p[:, None] * 2 * H64 + o_h[None, :]
    b_mean = tl.load(partial, mask=inside, other=0.0)
    b_squares = tl.load(partial + H64, mask=inside, other=0.0)
    count = tl.maximum(tl.minimum(N - o_p * rows, rows), 0).to(dtype)[:, None]
    mean = tl.sum(b_mean * count, 0) / N.to(dtype)
    delta = b_mean - mean[None, :]
    squares = tl.sum(b_squares + tl.where(inside, delta * delta * count, 0.0), 0)
    tl.store(stats_ptr + o_h, mean, mask=o_h < H64)
    tl.store(stats_ptr + H64 + o_h, squares / (N - 1).to(dtype), mask=o_h < H64)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_activation_kernel(
    x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, alpha_ptr, out_ptr, N, H, stride_xn, stride_xh,
    norm_eps: tl.constexpr, dice_eps: tl.constexpr, TRAINING: tl.constexpr, ACTIVATION: tl.constexpr,
    ONE_ALPHA: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out [N, H], contiguous, of BLOCK_N rows."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xn, H64 = aligned(stride_xn, ALIGN), aligned(H, ALIGN)
    stride_xh = between_columns(stride_xh, UNIT)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    inside = (o_n < N)[:, None] & (o_h < H64)[None, :]
    x_tile = x_ptr + o_n[:, None] * stride_xn + o_h[None, :] * stride_xh
    b_x = tl.load(x_tile, mask=inside, other=0.0).to(dtype)
    mean, r = _normalization(mean_ptr, var_ptr, o_h, N, H, TRAINING, norm_eps, dtype)
    weight, bias = _vector(weight_ptr, o_h, H, dtype, 1.0)[None, :], _vector(bias_ptr, o_h, H, dtype, 0.0)[None, :]
    alpha = _slopes(alpha_ptr, o_h, H, ONE_ALPHA, dtype)
    y = (b_x - mean) * r * weight + bias
    out = _activate(b_x, y, alpha, o_h, H, dice_eps, ACTIVATION)
    tl.store(out_ptr + o_n[:, None] * H64 + o_h[None, :], out, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_activation_backward_kernel(
    grad_out_ptr, x_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, alpha_ptr, sums_ptr, grad_x_ptr, partials_ptr,
    N, H, stride_gn, stride_gh, stride_xn, stride_xh,
    norm_eps: tl.constexpr, dice_eps: tl.constexpr, TRAINING: tl.constexpr, ACTIVATION: tl.constexpr,
    ONE_ALPHA: tl.constexpr, ALIGN: tl.constexpr, UNIT_G: tl.constexpr, UNIT_X: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grad_x [N, H], contiguous, if there is one; sums over this program's rows [P, 3, H] if they are asked for.

    The sums are of g n, g and alpha's gradient, all of it in column 0 where alpha is one for all; ``sums_ptr``, if
    there is one, has them of all rows.
    """
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xn, H64 = aligned(stride_xn, ALIGN), aligned(H, ALIGN)
    stride_gn, stride_gh = aligned(stride_gn, ALIGN), between_columns(stride_gh, UNIT_G)
    stride_xh = between_columns(stride_xh, UNIT_X)
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_h = tl.arange(0, BLOCK_H)
    mean, r = _normalization(mean_ptr, var_ptr, o_h, N, H, TRAINING, norm_eps, dtype)
    weight, bias = _vector(weight_ptr, o_h, H, dtype, 1.0)[None, :], _vector(bias_ptr, o_h, H, dtype, 0.0)[None, :]
    alpha = _slopes(alpha_ptr, o_h, H, ONE_ALPHA, dtype)
    sum_gn = tl.zeros([BLOCK_N, BLOCK_H], dtype)
    sum_g, sum_alpha = sum_gn, sum_gn
    for n0 in range(program * BLOCK_N, N, programs * BLOCK_N):
        o_n = n0 + tl.arange(0, BLOCK_N)
        inside = (o_n < N)[:, None] & (o_h < H64)[None, :]
        x_tile = x_ptr + o_n[:, None] * stride_xn + o_h[None, :] * stride_xh
        g_tile = grad_out_ptr + o_n[:, None] * stride_gn + o_h[None, :] * stride_gh
        b_x = tl.load(x_tile, mask=inside, other=0.0).to(dtype)
        b_grad_out = tl.load(g_tile, mask=inside, other=0.0).to(dtype)
        n = (b_x - mean) * r
        grad_y, past, grad_alpha = _activate_backward(
            b_grad_out, b_x, n * weight + bias, alpha, o_h, H, dice_eps, ACTIVATION
        )
        if partials_ptr is not None:
            sum_gn += grad_y * n
            sum_g += grad_y
            sum_alpha += grad_alpha
        if grad_x_ptr is not None:
            if sums_ptr is not None:
                count = N.to(dtype)
                grad_y -= _vector(sums_ptr + H, o_h, H, dtype, 0.0)[None, :] / count
                grad_y -= n * _vector(sums_ptr, o_h, H, dtype, 0.0)[None, :] / count
            tl.store(grad_x_ptr + o_n[:, None] * H64 + o_h[None, :], past + grad_y * weight * r, mask=inside)
    if partials_ptr is not None:
        partial = partials_ptr + program * 3 * H64 + o_h
        tl.store(partial, tl.sum(sum_gn, 0), mask=o_h < H64)
        tl.store(partial + H64, tl.sum(sum_g, 0), mask=o_h < H64)
        sum_alpha = tl.sum(sum_alpha, 0)
        if ONE_ALPHA:
            sum_alpha = tl.where(o_h == 0, tl.sum(sum_alpha, 0), 0.0)
        tl.store(partial + 2 * H64, sum_alpha, mask=o_h < H64)


def supports(x: Tensor) -> bool:
    """Whether the kernels serve ``x``: a row is a block."""
    return x.dim() != 2 or x.size(1) <= MAX_WIDTH


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Common(NamedTuple):
    """What the forward and the backward kernel have in common."""

    vectors: tuple[Tensor | None, ...]
    training: bool
    flags: tuple
    BLOCK_H: int


def _common(
    x, weight, bias, alpha, batch_stats, running_mean, running_var, activation, batch_norm, training, norm_eps, dice_eps
) -> _Common:
    training = batch_norm and training
    mean, var = (batch_stats, None) if training else (running_mean, running_var) if batch_norm else (None, None)
    vectors = tuple(None if t is None else t.contiguous() for t in (mean, var, weight, bias, alpha))
    one_alpha = alpha is not None and alpha.numel() == 1
    flags = norm_eps, dice_eps, training, activation, one_alpha
    return _Common(vectors, training, flags, triton.next_power_of_2(x.size(1)))


def _statistics(x: Tensor) -> Tensor:
    """Mean and unbiased variance of each column [2 H], in float32 or float64."""
    N, H = x.shape
    stats = torch.empty(2 * H, dtype=_wide(x), device=x.device)
    BLOCK_H = min(triton.next_power_of_2(H), 64)
    BLOCK_N = TILE // BLOCK_H
    most = PROGRAMS or programs_of(x)
    rows = triton.cdiv(triton.cdiv(N, BLOCK_N), most) * BLOCK_N
    programs = triton.cdiv(N, rows)
    partials = torch.empty((programs, 2, H), dtype=_wide(x), device=x.device)
    launch(
        norm_statistics_kernel, (programs, triton.cdiv(H, BLOCK_H)), (x, partials), (N, H, rows, *x.stride()),
        (alignment(x), x.stride(1) == 1, BLOCK_N, BLOCK_H), num_warps=4,
    )  # fmt: skip
    launch(
        norm_merge_kernel, (triton.cdiv(H, 16),), (partials, stats), (N, H, rows, programs),
        (alignment(x), triton.next_power_of_2(most), 16), num_warps=4,
    )  # fmt: skip
    return stats


def norm_activation(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, alpha: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, activation: str, batch_norm: bool, training: bool, norm_eps: float, dice_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as the op's -> out [N, H] and, in training with a normalization, batch_stats [2 H]."""
    N, H = x.shape
    out = torch.empty((N, H), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, torch.zeros(2 * H if batch_norm and training else 0, dtype=_wide(x), device=x.device)
    with torch.cuda.device_of(x):
        batch_stats = _statistics(x) if batch_norm and training else x.new_empty(0, dtype=_wide(x))
        common = _common(
            x, weight, bias, alpha, batch_stats, running_mean, running_var, activation, batch_norm, training, norm_eps,
            dice_eps,
        )  # fmt: skip
        BLOCK_N = max(1, TILE // (2 if x.dtype == torch.float64 else 1) // common.BLOCK_H)
        launch(
            norm_activation_kernel, (triton.cdiv(N, BLOCK_N),), (x, *common.vectors, out), (N, H, *x.stride()),
            (*common.flags, alignment(x), x.stride(1) == 1, BLOCK_N, common.BLOCK_H), num_warps=4,
        )  # fmt: skip
    return out, batch_stats


def norm_activation_backward(
    grad_out: Tensor, batch_stats: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, alpha: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, activation: str, batch_norm: bool, training: bool,
    norm_eps: float, dice_eps: float,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """grad_out [N, H] and the forward's -> gradients of x (contiguous) and of weight, bias and alpha where given."""
    N, H = x.shape
    given = [p for p in (weight, bias, alpha) if p is not None]
    grad_x = torch.empty((N, H), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x, [torch.zeros_like(p) for p in given]
    with torch.cuda.device_of(x):
        common = _common(
            x, weight, bias, alpha, batch_stats, running_mean, running_var, activation, batch_norm, training, norm_eps,
            dice_eps,
        )  # fmt: skip
        BLOCK_N = max(1, TILE // 2 // common.BLOCK_H)  # its sums are tiles, too
        numbers = N, H, *grad_out.stride(), *x.stride()
        constants = (
            *common.flags, math.gcd(alignment(x), alignment(grad_out)), grad_out.stride(1) == 1, x.stride(1) == 1,
            BLOCK_N, common.BLOCK_H,
        )  # fmt: skip

        def run(programs: int, sums: Tensor | None, grad_x: Tensor | None, partials: Tensor | None) -> None:
            pointers = grad_out, x, *common.vectors, sums, grad_x, partials
            launch(norm_activation_backward_kernel, (programs,), pointers, numbers, constants, num_warps=4)

        blocks = triton.cdiv(N, BLOCK_N)
        programs = min(blocks, PROGRAMS or programs_of(x))
        partials = torch.empty((programs, 3, H), dtype=_wide(x), device=x.device)
        run(programs, None, None if common.training else grad_x, partials)
        sums = partials.sum(0)
        if common.training:
            run(blocks, sums, grad_x, None)
        grad_weight, grad_bias, grad_alpha = sums
    grads = [] if weight is None else [grad_weight, grad_bias]
    if alpha is not None:
        grads.append(grad_alpha if alpha.numel() == H else grad_alpha[: alpha.numel()])
    return grad_x, [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(grads, given)]
