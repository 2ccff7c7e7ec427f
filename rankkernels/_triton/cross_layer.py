"""What follows the product of a layer of DCN v2, in Triton: forward and backward.

x0, product and x [B, D], bias [D]:

    out = x0 product + x + bias        grad_x0 = grad_out product    grad_product = grad_out x0    grad_x = grad_out
    grad_bias = sum_b grad_out

The product is a library's. Passes over an array of [B, D]: forward reads three and writes one, backward reads three and
writes two, with the bias's sums in the same pass. PyTorch's operators take 8 and 7. Bound by memory. A program sums
rows of its own in order, and the programs' sums are summed after them: the same bits run after run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment
from rankkernels._triton._programs import programs_of

PROGRAMS: int | None = None  # of the backward, other than ``programs_of`` says, for tests
TILE = 2048  # values a block: 16 a thread with four warps
WIDEST = 256  # columns of a block


@triton.jit(do_not_specialize=["B"])
def cross_layer_kernel(
    x0_ptr, product_ptr, x_ptr, bias_ptr, out_ptr, B, D,
    stride_0b, stride_0d, stride_pb, stride_pd, stride_xb, stride_xd,
    ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, D], contiguous, of BLOCK_B rows and BLOCK_D columns."""
    stride_0b, stride_pb = aligned(stride_0b, ALIGN), aligned(stride_pb, ALIGN)
    stride_xb, D = aligned(stride_xb, ALIGN), aligned(D, ALIGN)
    o_b = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    o_d = (tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    inside = (o_b < B) & (o_d < D)
    out = tl.load(x_ptr + o_b * stride_xb + o_d * stride_xd, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_x0 = tl.load(x0_ptr + o_b * stride_0b + o_d * stride_0d, mask=inside, other=0.0).to(tl.float32)
    b_product = tl.load(product_ptr + o_b * stride_pb + o_d * stride_pd, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_b * D + o_d, b_x0 * b_product + out, mask=inside)


@triton.jit(do_not_specialize=["B"])
def cross_layer_backward_kernel(
    grad_out_ptr, x0_ptr, product_ptr, grad_x0_ptr, grad_product_ptr, sums_ptr, B, D,
    stride_gb, stride_gd, stride_0b, stride_0d, stride_pb, stride_pd,
    ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x0 and grad_product [B, D], contiguous, of BLOCK_D columns of every so many blocks of rows as there are
    programs, and where there is a bias the sums of grad_out's [programs, D]."""
    stride_gb, stride_0b = aligned(stride_gb, ALIGN), aligned(stride_0b, ALIGN)
    stride_pb, D = aligned(stride_pb, ALIGN), aligned(D, ALIGN)
    program, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64) * BLOCK_B
    o_d = (tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for b in range(program * BLOCK_B, B, step):
        o_b = (b + tl.arange(0, BLOCK_B))[:, None]
        inside = (o_b < B) & (o_d < D)
        b_grad = tl.load(grad_out_ptr + o_b * stride_gb + o_d * stride_gd, mask=inside, other=0.0).to(tl.float32)
        b_x0 = tl.load(x0_ptr + o_b * stride_0b + o_d * stride_0d, mask=inside, other=0.0).to(tl.float32)
        b_product = tl.load(product_ptr + o_b * stride_pb + o_d * stride_pd, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x0_ptr + o_b * D + o_d, b_grad * b_product, mask=inside)
        tl.store(grad_product_ptr + o_b * D + o_d, b_grad * b_x0, mask=inside)
        total += b_grad
    if sums_ptr is not None:
        tl.store(sums_ptr + program * D + o_d, tl.sum(total, 0, keep_dims=True), mask=o_d < D)


def _blocks(*tensors: Tensor) -> dict[str, int]:
    BLOCK_D = min(triton.next_power_of_2(tensors[0].size(1)), WIDEST)
    align = math.gcd(*map(alignment, tensors))
    return {"ALIGN": align, "BLOCK_B": TILE // BLOCK_D, "BLOCK_D": BLOCK_D, "num_warps": 4}


def cross_layer(x0: Tensor, product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """x0, product and x [B, D], any strides; bias [D] -> [B, D]."""
    B, D = x0.shape
    out = torch.empty((B, D), dtype=x0.dtype, device=x0.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(x0, product, x)
    grid = triton.cdiv(B, blocks["BLOCK_B"]), triton.cdiv(D, blocks["BLOCK_D"])
    with torch.cuda.device_of(x0):
        cross_layer_kernel[grid](
            x0, product, x, None if bias is None else bias.contiguous(), out, B, D, *x0.stride(), *product.stride(),
            *x.stride(), **blocks,
        )  # fmt: skip
    return out


def cross_layer_backward(
    grad_out: Tensor, x0: Tensor, product: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """grad_out, x0 and product [B, D], any strides -> the gradients of x0, the product and, if any, the bias [D]."""
    B, D = x0.shape
    grad_x0, grad_product = (torch.empty((B, D), dtype=x0.dtype, device=x0.device) for _ in range(2))
    if x0.numel() == 0:
        return grad_x0, grad_product, [x0.new_zeros(D)] if has_bias else []
    blocks = _blocks(grad_out, x0, product)
    columns = triton.cdiv(D, blocks["BLOCK_D"])
    programs = min(triton.cdiv(B, blocks["BLOCK_B"]), max(1, (PROGRAMS or 2 * programs_of(x0)) // columns))
    sums = torch.empty((programs, D), dtype=torch.float32, device=x0.device) if has_bias else None
    with torch.cuda.device_of(x0):
        cross_layer_backward_kernel[(programs, columns)](
            grad_out, x0, product, grad_x0, grad_product, sums, B, D, *grad_out.stride(), *x0.stride(),
            *product.stride(), **blocks,
        )  # fmt: skip
    return grad_x0, grad_product, [] if sums is None else [sums.sum(0).to(x0.dtype)]
