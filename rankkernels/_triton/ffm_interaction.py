"""Field-aware interactions in Triton: forward and backward. Each field has an embedding for every other field.

x [B, F, F, D], x_fg field f's embedding for field g; f < g:

    out[b, (f, g)] = x_fg x_gf                            elementwise, or summed over D with reduce_sum
    grad_x_fg = grad_out[b, (f, g)] x_gf     grad_x_gf = grad_out[b, (f, g)] x_fg     grad_x_ff = 0

A program has BLOCK_P pairs, of one sample or several, and both embeddings of each. Per sample forward reads
F (F - 1) D and writes F (F - 1) / 2 D, or F (F - 1) / 2; backward reads as much and grad_out, and writes F F D: every
byte once. The reference's operators pass over arrays of [B, F (F - 1) / 2, D] eight times forward, and more than
twenty times backward, with a sort of the pairs' places. Bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment
from rankkernels._triton._pairs import fields_of, pair_of

TILE = 1024  # values of each operand a block: 8 a thread with four warps
WIDEST = 128  # columns of a block
MOST_FIELDS = 1 << 15  # a sample's pairs are counted in 32 bits


@triton.jit
def _places(F, pairs, B, BLOCK_P: tl.constexpr):
    """The samples and pairs of a program [BLOCK_P], and which there are: those of all samples, one after the other."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_P
    b, pair = place // pairs, (place % pairs).to(tl.int32) + tl.arange(0, BLOCK_P)
    b += pair // pairs
    return b, pair % pairs, b < B


@triton.jit(do_not_specialize=["B", "pairs"])
def ffm_interaction_kernel(
    x_ptr, out_ptr, B, F, D, pairs, stride_xb, stride_xf, stride_xg, stride_xd,
    REDUCE_SUM: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, pairs, D], contiguous, or [B, pairs] with REDUCE_SUM, of BLOCK_P pairs."""
    stride_xb, stride_xf = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN)
    stride_xg, D = aligned(stride_xg, ALIGN), aligned(D, ALIGN)
    b, pair, valid = _places(F, pairs, B, BLOCK_P)
    f, g = fields_of(pair, F)
    x_fg = x_ptr + (b * stride_xb + f * stride_xf + g * stride_xg)[:, None]
    x_gf = x_ptr + (b * stride_xb + g * stride_xf + f * stride_xg)[:, None]
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        inside = valid[:, None] & (o_d < D)
        product = tl.load(x_fg + o_d * stride_xd, mask=inside, other=0.0).to(tl.float32)
        product *= tl.load(x_gf + o_d * stride_xd, mask=inside, other=0.0).to(tl.float32)
        if REDUCE_SUM:
            total += product
        else:
            tl.store(out_ptr + (b * pairs + pair)[:, None] * D + o_d, product, mask=inside)
    if REDUCE_SUM:
        tl.store(out_ptr + b * pairs + pair, tl.sum(total, 1), mask=valid)


@triton.jit(do_not_specialize=["B", "places"])
def ffm_interaction_backward_kernel(
    grad_out_ptr, x_ptr, grad_x_ptr, B, F, D, places,
    stride_gb, stride_gp, stride_gd, stride_xb, stride_xf, stride_xg, stride_xd,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, F, F, D], contiguous, of BLOCK_P of all ``places`` f <= g: the pairs of F + 1 fields, less one."""
    stride_xb, stride_xf = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN)
    stride_xg, D = aligned(stride_xg, ALIGN), aligned(D, ALIGN)
    b, place, valid = _places(F, places, B, BLOCK_P)
    f, g = fields_of(place, F + 1)
    g -= 1
    of_pair = valid & (f < g)
    x_fg = x_ptr + (b * stride_xb + f * stride_xf + g * stride_xg)[:, None]
    x_gf = x_ptr + (b * stride_xb + g * stride_xf + f * stride_xg)[:, None]
    grad = grad_out_ptr + (b * stride_gb + pair_of(f, g, F) * stride_gp)[:, None]
    to_fg, to_gf = grad_x_ptr + ((b * F + f) * F + g)[:, None] * D, grad_x_ptr + ((b * F + g) * F + f)[:, None] * D
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        inside = of_pair[:, None] & (o_d < D)
        b_grad = tl.load(grad + o_d * stride_gd, mask=inside, other=0.0).to(tl.float32)
        b_fg = tl.load(x_fg + o_d * stride_xd, mask=inside, other=0.0).to(tl.float32)
        b_gf = tl.load(x_gf + o_d * stride_xd, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_fg + o_d, b_grad * b_gf, mask=valid[:, None] & (o_d < D))
        tl.store(to_gf + o_d, b_grad * b_fg, mask=inside)


def supports(x: Tensor) -> bool:
    return x.size(1) <= MOST_FIELDS


def _blocks(x: Tensor) -> dict[str, int]:
    BLOCK_D = min(triton.next_power_of_2(x.size(3)), WIDEST)
    return {"BLOCK_P": min(TILE // BLOCK_D, 128), "BLOCK_D": BLOCK_D, "num_warps": 4}


def ffm_interaction(x: Tensor, reduce_sum: bool) -> Tensor:
    """x [B, F, F, D], any strides -> [B, F (F - 1) / 2, 1], or D without ``reduce_sum``."""
    B, F, _, D = x.shape
    pairs = F * (F - 1) // 2
    out = torch.empty((B, pairs, 1 if reduce_sum else D), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or D == 0:
        return out.zero_()
    blocks = _blocks(x)
    with torch.cuda.device_of(x):
        ffm_interaction_kernel[(triton.cdiv(B * pairs, blocks["BLOCK_P"]),)](
            x, out, B, F, D, pairs, *x.stride(), REDUCE_SUM=reduce_sum, ALIGN=alignment(x), **blocks
        )
    return out


def ffm_interaction_backward(grad_out: Tensor, x: Tensor, reduce_sum: bool) -> Tensor:
    """grad_out [B, F (F - 1) / 2, 1 or D], x [B, F, F, D], any strides -> grad_x [B, F, F, D], contiguous."""
    B, F, _, D = x.shape
    grad_x = torch.empty((B, F, F, D), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    blocks, places = _blocks(x), F * (F + 1) // 2
    stride_gb, stride_gp, stride_gd = grad_out.stride()
    with torch.cuda.device_of(x):
        ffm_interaction_backward_kernel[(triton.cdiv(B * places, blocks["BLOCK_P"]),)](
            grad_out, x, grad_x, B, F, D, places, stride_gb, stride_gp, 0 if reduce_sum else stride_gd, *x.stride(),
            ALIGN=alignment(x), **blocks,
        )  # fmt: skip
    return grad_x
