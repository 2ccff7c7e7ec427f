"""Dot products of a sample's fields, every pair once, in Triton: forward and backward.

x [B, F, D], r [F (F - 1) / 2] factors of the pairs, or ones. For f < g

    out[b, (f, g)] = r_fg x_f . x_g        grad_x_f = sum_{g > f} s_fg x_g + sum_{g < f} s_gf x_g
    grad_r_fg = sum_b grad_out[b, (f, g)] x_f . x_g                        s_fg = r_fg grad_out[b, (f, g)]

A program has a sample and BLOCK_F of its fields, and goes through the others in blocks: a tile of X X^T, or of S +
S^T, which is gathered from the packed triangle. Forward reads F D values a sample and writes F (F - 1) / 2, F (F - 1)
D flops; backward reads both, writes F D, twice the flops. Both are bound by memory for D up to some 100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment

BLOCK = 32  # fields and columns of a tile at most; 64 spill


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b in the precision of the sums; products of 16-bit values are exact."""
    if total.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision=PRECISION)
    else:
        return tl.dot(a, b, total)


@triton.jit
def _pair(o_f, o_g, F):
    """Where the pair of the smaller and the larger of two fields lies in the triangle."""
    f, g = tl.minimum(o_f, o_g), tl.maximum(o_f, o_g)
    return f * (2 * F - f - 1) // 2 + g - f - 1


@triton.jit(do_not_specialize=["B"])
def pairwise_dot_kernel(
    x_ptr, weights_ptr, out_ptr, B, F, D, pairs, stride_xb, stride_xf, stride_xd,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, pairs], contiguous, of one sample and BLOCK_F fields with those behind them."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    b, f = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_F
    x_ptr += b * stride_xb
    o_f = f + tl.arange(0, BLOCK_F).to(tl.int64)
    for g in range(f, F, BLOCK_F):
        o_g = g + tl.arange(0, BLOCK_F).to(tl.int64)
        tile = tl.zeros([BLOCK_F, BLOCK_F], dtype)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
            inside = (o_f < F)[:, None] & (o_d < D)[None, :]
            b_f = tl.load(x_ptr + o_f[:, None] * stride_xf + o_d[None, :] * stride_xd, mask=inside, other=0.0)
            inside = (o_g < F)[:, None] & (o_d < D)[None, :]
            b_g = tl.load(x_ptr + o_g[:, None] * stride_xf + o_d[None, :] * stride_xd, mask=inside, other=0.0)
            tile = _dot(b_f, tl.trans(b_g), tile, PRECISION)
        above = (o_f[:, None] < o_g[None, :]) & (o_g < F)[None, :]
        pair = _pair(o_f[:, None], o_g[None, :], F)
        if weights_ptr is not None:
            tile *= tl.load(weights_ptr + pair, mask=above, other=0.0).to(dtype)
        tl.store(out_ptr + b * pairs + pair, tile, mask=above)


@triton.jit(do_not_specialize=["B"])
def pairwise_dot_backward_kernel(
    grad_out_ptr, x_ptr, weights_ptr, grad_x_ptr, B, F, D, stride_gb, stride_gp, stride_xb, stride_xf, stride_xd,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, F, D], contiguous, of one sample and BLOCK_F fields."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    b, f = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_F
    x_ptr += b * stride_xb
    grad_out_ptr += b * stride_gb
    o_f = f + tl.arange(0, BLOCK_F).to(tl.int64)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        grad = tl.zeros([BLOCK_F, BLOCK_D], dtype)
        for g in range(0, F, BLOCK_F):
            o_g = g + tl.arange(0, BLOCK_F).to(tl.int64)
            of_pair = (o_f[:, None] != o_g[None, :]) & (o_f < F)[:, None] & (o_g < F)[None, :]
            pair = _pair(o_f[:, None], o_g[None, :], F)
            s = tl.load(grad_out_ptr + pair * stride_gp, mask=of_pair, other=0.0).to(dtype)
            if weights_ptr is not None:
                s *= tl.load(weights_ptr + pair, mask=of_pair, other=0.0).to(dtype)
            inside = (o_g < F)[:, None] & (o_d < D)[None, :]
            b_g = tl.load(x_ptr + o_g[:, None] * stride_xf + o_d[None, :] * stride_xd, mask=inside, other=0.0)
            grad = _dot(s, b_g.to(dtype), grad, PRECISION)
        inside = (o_f < F)[:, None] & (o_d < D)[None, :]
        tl.store(grad_x_ptr + (b * F + o_f[:, None]) * D + o_d[None, :], grad, mask=inside)


def _grid_and_blocks(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Of float64, whose products are not the tensor cores', smaller tiles."""
    B, F, D = x.shape
    most = 16 if x.dtype == torch.float64 else BLOCK
    BLOCK_F = max(16, min(triton.next_power_of_2(F), most))
    BLOCK_D = max(16, min(triton.next_power_of_2(D), most))
    # Three products of tf32's cores have float32's precision; AMD's cores have it. A thread loads 16 bytes at once.
    options = {"ALIGN": alignment(x), "PRECISION": "ieee" if torch.version.hip else "tf32x3", "num_stages": 1}
    warps = BLOCK_F * BLOCK_D * x.element_size() // 512
    options["num_warps"] = max(1, min(2 if x.dtype == torch.float64 else 4, warps))
    return (B, triton.cdiv(F, BLOCK_F)), {"BLOCK_F": BLOCK_F, "BLOCK_D": BLOCK_D, **options}


def pairwise_dot(x: Tensor, weights: Tensor | None) -> Tensor:
    """x [B, F, D], any strides; weights [F (F - 1) / 2] -> [B, F (F - 1) / 2]."""
    B, F, D = x.shape
    pairs = F * (F - 1) // 2
    out = torch.empty((B, pairs), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out.zero_()
    grid, blocks = _grid_and_blocks(x)
    with torch.cuda.device_of(x):
        pairwise_dot_kernel[grid](
            x, None if weights is None else weights.contiguous(), out, B, F, D, pairs, *x.stride(), **blocks
        )
    return out


def pairwise_dot_backward(grad_out: Tensor, x: Tensor, weights: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """grad_out [B, F (F - 1) / 2], x [B, F, D], any strides -> the gradients of x and of the weights, if any."""
    B, F, D = x.shape
    grad_x = torch.empty((B, F, D), dtype=x.dtype, device=x.device)
    if x.numel():
        grid, blocks = _grid_and_blocks(x)
        with torch.cuda.device_of(x):
            pairwise_dot_backward_kernel[grid](
                grad_out, x, None if weights is None else weights.contiguous(), grad_x, B, F, D, *grad_out.stride(),
                *x.stride(), **blocks,
            )  # fmt: skip
    if weights is None:
        return grad_x, []
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return grad_x, [(grad_out.to(wide) * pairwise_dot(x.to(wide), None)).sum(0).to(x.dtype)]
