"""DCN's cross network in Triton: forward and backward.

    x_{l+1} = x_0 (w_l . x_l) + b_l + x_l

by the closed form x_l = alpha_l x_0 + beta_l, with p_l = w_l . x_0, c_l = w_l . beta_l and alpha_0 = 1:

    beta_{l+1} = beta_l + b_l        alpha_{l+1} = alpha_l (1 + p_l) + c_l        out = alpha_L x_0 + beta_L

Backward, with g a row of grad_out and a_l = dL/dalpha_l, a_L = g . x_0 and a_l = a_{l+1} (1 + p_l):

    dL/dp_l = a_{l+1} alpha_l    dL/dc_l = a_{l+1}    grad_x = alpha_L g + sum_l dL/dp_l w_l
    grad_w_l = sum_rows dL/dp_l x_0 + beta_l sum_rows dL/dc_l, a library's product
    grad_beta_L = sum_rows g    grad_b_l = grad_beta_{l+1}    grad_beta_l = grad_beta_{l+1} + w_l sum_rows dL/dc_l

A program has whole rows, which stay in registers while the layers' weights come from L2. Passes over an array of x's
size: forward reads x, writes out; backward reads x and grad_out, writes grad_x, and the sums over rows read both once
more. (2 L + 2) D flops a row forward, (4 L + 4) D backward: bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment

TILE = 2048  # values a block: 16 a thread with four warps
MAX_WIDTH = 4096
ROWS = 128  # a block of the recurrence, a thread each


def supports(x: Tensor) -> bool:
    """Whether a row fits into a program."""
    return x.size(1) <= MAX_WIDTH


@triton.jit(do_not_specialize=["B", "L"])
def cross_network_kernel(
    x_ptr, weights_ptr, constants_ptr, beta_ptr, out_ptr, projections_ptr, B, L, D, stride_xb, stride_xd,
    ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, D] and projections [B, L], contiguous, of BLOCK_B rows."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, D = aligned(stride_xb, ALIGN), aligned(D, ALIGN)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (o_b < B)[:, None] & (o_d < D)[None, :]
    x_tile = x_ptr + o_b[:, None] * stride_xb + o_d[None, :] * stride_xd
    b_x = tl.load(x_tile, mask=inside, other=0.0).to(dtype)
    alpha = tl.full([BLOCK_B], 1.0, dtype)
    for layer in range(L):
        weight = tl.load(weights_ptr + layer * D + o_d, mask=o_d < D, other=0.0)
        p = tl.sum(b_x * weight[None, :], 1)
        tl.store(projections_ptr + o_b * L + layer, p, mask=o_b < B)
        alpha += alpha * p + tl.load(constants_ptr + layer)
    beta = tl.load(beta_ptr + o_d, mask=o_d < D, other=0.0)
    tl.store(out_ptr + o_b[:, None] * D + o_d[None, :], alpha[:, None] * b_x + beta[None, :], mask=inside)


@triton.jit(do_not_specialize=["B", "L"])
def cross_alphas_kernel(projections_ptr, constants_ptr, alphas_ptr, B, L, BLOCK_B: tl.constexpr):
    """alphas [B, L + 1] of BLOCK_B rows."""
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    alpha = tl.full([BLOCK_B], 1.0, projections_ptr.dtype.element_ty)
    for layer in range(L):
        tl.store(alphas_ptr + o_b * (L + 1) + layer, alpha, mask=o_b < B)
        p = tl.load(projections_ptr + o_b * L + layer, mask=o_b < B, other=0.0)
        alpha += alpha * p + tl.load(constants_ptr + layer)
    tl.store(alphas_ptr + o_b * (L + 1) + L, alpha, mask=o_b < B)


@triton.jit(do_not_specialize=["B", "L"])
def cross_network_backward_kernel(
    grad_out_ptr, x_ptr, weights_ptr, projections_ptr, alphas_ptr, grad_x_ptr, grad_p_ptr, grad_c_ptr, B, L, D,
    stride_gb, stride_gd, stride_xb, stride_xd, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, D], dL/dp and dL/dc [B, L], contiguous, of BLOCK_B rows."""
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, D = aligned(stride_xb, ALIGN), aligned(D, ALIGN)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    valid = o_b < B
    inside = valid[:, None] & (o_d < D)[None, :]
    g_tile = grad_out_ptr + o_b[:, None] * stride_gb + o_d[None, :] * stride_gd
    x_tile = x_ptr + o_b[:, None] * stride_xb + o_d[None, :] * stride_xd
    b_grad = tl.load(g_tile, mask=inside, other=0.0).to(dtype)
    a = tl.sum(b_grad * tl.load(x_tile, mask=inside, other=0.0).to(dtype), 1)
    b_grad *= tl.load(alphas_ptr + o_b * (L + 1) + L, mask=valid, other=0.0)[:, None]
    for i in range(L):
        layer = L - 1 - i
        grad_p = a * tl.load(alphas_ptr + o_b * (L + 1) + layer, mask=valid, other=0.0)
        tl.store(grad_p_ptr + o_b * L + layer, grad_p, mask=valid)
        tl.store(grad_c_ptr + o_b * L + layer, a, mask=valid)
        weight = tl.load(weights_ptr + layer * D + o_d, mask=o_d < D, other=0.0)
        b_grad += grad_p[:, None] * weight[None, :]
        a += a * tl.load(projections_ptr + o_b * L + layer, mask=valid, other=0.0)
    tl.store(grad_x_ptr + o_b[:, None] * D + o_d[None, :], b_grad, mask=inside)


def _layers(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [L, D], each layer's beta and the last [L + 1, D], and the constants c [L], in what is computed
    with."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    none = x.new_zeros(0, x.size(1))
    rows = torch.cat([none, *weights]).to(dtype)
    betas = torch.cat([x.new_zeros(1, x.size(1)), *(b[None] for b in biases)]).to(dtype).cumsum(0)
    return rows, betas, (rows * betas[:-1]).sum(1)


def _blocks(x: Tensor) -> dict[str, int]:
    BLOCK_D = triton.next_power_of_2(x.size(1))
    return {"ALIGN": alignment(x), "BLOCK_D": BLOCK_D, "BLOCK_B": max(1, TILE // BLOCK_D), "num_warps": 4}


def cross_network(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """x [B, D], any strides; weights [1, D] and biases [D] a layer -> out [B, D], projections [B, L]."""
    (B, D), L = x.shape, len(weights)
    rows, betas, constants = _layers(x, weights, biases)
    out, projections = torch.empty((B, D), dtype=x.dtype, device=x.device), rows.new_zeros((B, L))
    if x.numel() == 0:
        return out, projections
    blocks = _blocks(x)
    with torch.cuda.device_of(x):
        cross_network_kernel[(triton.cdiv(B, blocks["BLOCK_B"]),)](
            x, rows, constants, betas[L], out, projections, B, L, D, *x.stride(), **blocks
        )
    return out, projections


def cross_network_backward(
    grad_out: Tensor, projections: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """grad_out [B, D], projections [B, L], x [B, D], any strides -> the gradients of x, weights and biases."""
    (B, D), L = x.shape, len(weights)
    rows, betas, constants = _layers(x, weights, biases)
    grad_x = torch.empty((B, D), dtype=x.dtype, device=x.device)
    grad_p, grad_c, alphas = (rows.new_zeros((B, n)) for n in (L, L, L + 1))
    if x.numel():
        projections, blocks = projections.contiguous(), _blocks(x)
        with torch.cuda.device_of(x):
            cross_alphas_kernel[(triton.cdiv(B, ROWS),)](
                projections, constants, alphas, B, L, BLOCK_B=ROWS, num_warps=4
            )
            cross_network_backward_kernel[(triton.cdiv(B, blocks["BLOCK_B"]),)](
                grad_out, x, rows, projections, alphas, grad_x, grad_p, grad_c, B, L, D, *grad_out.stride(),
                *x.stride(), **blocks,
            )  # fmt: skip
    of_constants = grad_c.sum(0)[:, None]
    of_weights = grad_p.t() @ x.to(rows.dtype) + of_constants * betas[:-1]
    later = torch.cat([(of_constants * rows)[1:], rows.new_zeros(1, D)]).flip(0).cumsum(0).flip(0)
    of_betas = grad_out.sum(0, dtype=rows.dtype) + later  # grad_beta_{layer+1}, which is the bias's
    return grad_x, [w[None].to(x.dtype) for w in of_weights], [b.to(x.dtype, copy=True) for b in of_betas[:L]]
