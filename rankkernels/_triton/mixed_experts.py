"""The experts of a mixture of low rank, between the two GEMMs of a layer of DCN v2, in Triton: forward and backward.

projections [B, E r + E] = x [V_1 .. V_E, gates], C [E, r, r]:

    h_e = tanh(projections_e)    q_e = tanh(C_e h_e)    w = softmax(gates)    out_e = w_e q_e

    dw_e = <grad_e, q_e>         dz_e = w_e grad_e (1 - q_e^2)               dC_e = sum_b dz_e h_e^T
    grad_gate_e = w_e (dw_e - sum_k w_k dw_k)     grad_projections_e = (C_e^T dz_e) (1 - h_e^2)

A program has samples, and goes through the experts with the shares of all in registers: what is read is read once, and
nothing is kept of the forward. The backward's store their samples' sums for dC, which are summed in order after them.
In 16 bits h and dz are rounded to these before their products, as torch's own would have it.

Four experts of rank 32, B 4096, float32: forward moves 4.3 MB and does 34 Mflop and a million tanh, backward 6.5 MB,
three times the flops and as many tanh. By count 1.3 and 1.9 us of an H100's memory, 1.6 and 2.8 of its instructions,
twenty for a tanh: less than launches take, of which the reference has 6 and 10. Hence one launch each, and few samples
a block: a product's warps have eight columns each, none another's, and there are two programs for each multiprocessor.
With more samples a program of the backward has more blocks, for each expert in turn, that the sums for dC stay few.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment
from rankkernels._triton._products import precision_of, product
from rankkernels._triton._programs import programs_of

PROGRAMS: int | None = None  # of the backward, other than ``programs_of`` says, for tests
BLOCK_B = 16  # samples: as few as a tensor core takes
GATES = 64  # that a program of the backward has in registers, for each of BLOCK_B samples, at most


@triton.jit
def _tanh(x):
    """To float32's precision, of small values, too: the polynomial is fitted to 1e-7 below .55. Never beyond 1."""
    s = x * x
    small = x + x * s * (-0.33332947 + s * (0.13320725 + s * (-0.05267181 + s * 0.01643757)))
    return tl.where(tl.abs(x) < 0.55, small, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _softmax(gates_ptr, o_b, B, E, stride_b, stride_d, BLOCK_E: tl.constexpr):
    """The experts' shares [.., BLOCK_E] of samples o_b [.., 1]: zeros beyond the last expert, finite beyond the last
    sample."""
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)[None, None, :]
    gates = tl.load(gates_ptr + o_b * stride_b + o_e * stride_d, mask=(o_b < B) & (o_e < E), other=0.0).to(tl.float32)
    gates = tl.where(o_e < E, gates, float("-inf"))
    parts = tl.exp(gates - tl.max(gates, 2, keep_dims=True))
    return parts / tl.sum(parts, 2, keep_dims=True)


@triton.jit
def _share(weights, this):
    """[BLOCK_B, 1]: the one of each sample where ``this`` is true."""
    return tl.sum(tl.sum(tl.where(this, weights, 0.0), 2), 1, keep_dims=True)


@triton.jit
def _rows(ptr, e, E, o_b, B, o_r, rank, stride_b, stride_d):
    """An expert's columns of samples o_b [BLOCK_B, 1]; zeros beyond the last of either."""
    inside = (o_b < B) & (o_r < tl.minimum(rank, (E - e) * rank))[None, :]
    return tl.load(ptr + o_b * stride_b + (e * rank + o_r)[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def _matrix(weight_ptr, e, E, o_r, rank):
    """An expert's C; zeros beyond the last."""
    inside = (o_r < rank)[:, None] & (o_r < tl.minimum(rank, (E - e) * rank))[None, :]
    return tl.load(weight_ptr + (e * rank + o_r[:, None]) * rank + o_r[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["B"])
def mixed_experts_kernel(
    projections_ptr, weight_ptr, out_ptr, B, E, rank, stride_pb, stride_pd,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [B, E rank], contiguous, of BLOCK_B samples."""
    stride_pb, rank = aligned(stride_pb, ALIGN), aligned(rank, ALIGN)
    o_b = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    o_e, o_r = tl.arange(0, BLOCK_E)[None, None, :], tl.arange(0, BLOCK_R).to(tl.int64)
    inside, gates_ptr = (o_b < B) & (o_r < rank)[None, :], projections_ptr + E * rank * stride_pd
    weights = _softmax(gates_ptr, o_b[:, :, None], B, E, stride_pb, stride_pd, BLOCK_E)
    # A turn ahead: beside their load the compiler would take each tanh in every product's layout, in every warp.
    b_p = _rows(projections_ptr, 0, E, o_b, B, o_r, rank, stride_pb, stride_pd)
    b_C = _matrix(weight_ptr, 0, E, o_r, rank)
    for e in range(E):
        h, C = _tanh(b_p.to(tl.float32)), b_C
        b_p = _rows(projections_ptr, e + 1, E, o_b, B, o_r, rank, stride_pb, stride_pd)
        b_C = _matrix(weight_ptr, e + 1, E, o_r, rank)
        q = _tanh(product(h, tl.trans(C), tl.zeros_like(h), PRECISION))
        tl.store(out_ptr + (o_b * E + e) * rank + o_r[None, :], _share(weights, o_e == e) * q, mask=inside)


@triton.jit(do_not_specialize=["B"])
def mixed_experts_backward_kernel(
    grad_out_ptr, projections_ptr, weight_ptr, grad_projections_ptr, sums_ptr, B, E, rank, columns,
    stride_gb, stride_gd, stride_pb, stride_pd, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grad_projections [B, columns = E rank + E], contiguous, of BLOCKS times BLOCK_B samples, and these samples' sums
    [programs, E, rank, rank] for the weight's gradient."""
    stride_gb, stride_pb = aligned(stride_gb, ALIGN), aligned(stride_pb, ALIGN)
    rank, columns = aligned(rank, ALIGN), aligned(columns, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    first = (program * BLOCKS * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    o_block, o_e = tl.arange(0, BLOCKS)[None, :, None], tl.arange(0, BLOCK_E)[None, None, :]
    o_r, of_gates = tl.arange(0, BLOCK_R).to(tl.int64), first[:, :, None] + o_block * BLOCK_B
    gates_ptr = projections_ptr + E * rank * stride_pd
    weights = _softmax(gates_ptr, of_gates, B, E, stride_pb, stride_pd, BLOCK_E)
    grad_weights, total = tl.zeros_like(weights), tl.zeros([BLOCK_R, BLOCK_R], tl.float32)
    b_p = _rows(projections_ptr, 0, E, first, B, o_r, rank, stride_pb, stride_pd)
    b_grad = _rows(grad_out_ptr, 0, E, first, B, o_r, rank, stride_gb, stride_gd)
    b_C = _matrix(weight_ptr, 0, E, o_r, rank)
    for i in range(E * BLOCKS):
        e, block, next_e, next_block = i // BLOCKS, i % BLOCKS, (i + 1) // BLOCKS, (i + 1) % BLOCKS
        o_b, next_b = first + block * BLOCK_B, first + next_block * BLOCK_B
        h, grad, C = _tanh(b_p.to(tl.float32)), b_grad.to(tl.float32), b_C
        b_p = _rows(projections_ptr, next_e, E, next_b, B, o_r, rank, stride_pb, stride_pd)
        b_grad = _rows(grad_out_ptr, next_e, E, next_b, B, o_r, rank, stride_gb, stride_gd)
        b_C = _matrix(weight_ptr, next_e, E, o_r, rank)
        q = _tanh(product(h, tl.trans(C), tl.zeros_like(h), PRECISION))
        this = (o_e == e) & (o_block == block)
        grad_weights += tl.where(this, tl.sum(grad * q, 1)[:, None, None], 0.0)
        grad_z = _share(weights, this) * grad * (1 - q * q)
        total = product(tl.trans(grad_z), h, tl.where(block == 0, 0.0, total), PRECISION)
        if block == BLOCKS - 1:
            to = sums_ptr + ((program * E + e) * rank + o_r[:, None]) * rank + o_r[None, :]
            tl.store(to, total, mask=(o_r < rank)[:, None] & (o_r < rank)[None, :])
        grad_h = product(grad_z, C, tl.zeros_like(h), PRECISION)
        to = grad_projections_ptr + o_b * columns + (e * rank + o_r)[None, :]
        tl.store(to, grad_h * (1 - h * h), mask=(o_b < B) & (o_r < rank)[None, :])
    grad_gates = weights * (grad_weights - tl.sum(weights * grad_weights, 2, keep_dims=True))
    to = grad_projections_ptr + of_gates * columns + E * rank + o_e
    tl.store(to, grad_gates, mask=(of_gates < B) & (o_e < E))


def _blocks(weight: Tensor, *rows: Tensor) -> dict:
    """A warp for eight columns: all of a product's warps then have tiles of their own."""
    E, rank, _ = weight.shape
    BLOCK_R = max(16, triton.next_power_of_2(rank))
    blocks = {"BLOCK_B": BLOCK_B, "BLOCK_E": triton.next_power_of_2(E), "BLOCK_R": BLOCK_R}
    options = {"PRECISION": precision_of(weight.dtype), "ALIGN": math.gcd(rank, *map(alignment, rows))}
    if not torch.version.hip:
        options["maxnreg"] = 255  # at 128, which the compiler would rather have, it spills
    return blocks | options | {"num_warps": BLOCK_R // 8, "num_stages": 1}


def mixed_experts(projections: Tensor, weight: Tensor) -> Tensor:
    """projections [B, E r + E], any strides; weight [E, r, r], E and r 64 at most -> [B, E r]."""
    B, (E, rank, _) = projections.size(0), weight.shape
    out = torch.empty((B, E * rank), dtype=projections.dtype, device=projections.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(projections):
        mixed_experts_kernel[(triton.cdiv(B, BLOCK_B),)](
            projections, weight.contiguous(), out, B, E, rank, *projections.stride(), **_blocks(weight, projections)
        )
    return out


def mixed_experts_backward(grad_out: Tensor, projections: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [B, E r] and the op's arguments, any strides -> the gradients of projections and weight."""
    B, (E, rank, _) = projections.size(0), weight.shape
    grad_projections = torch.empty(projections.shape, dtype=projections.dtype, device=projections.device)
    if grad_out.numel() == 0:
        return grad_projections.zero_(), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    blocks = _blocks(weight, grad_out, projections)
    share = triton.cdiv(triton.cdiv(B, BLOCK_B), PROGRAMS or programs_of(projections))
    blocks["BLOCKS"] = min(triton.next_power_of_2(share), GATES // blocks["BLOCK_E"])
    programs = triton.cdiv(B, blocks["BLOCKS"] * BLOCK_B)
    sums = torch.empty((programs, *weight.shape), dtype=torch.float32, device=projections.device)
    with torch.cuda.device_of(projections):
        mixed_experts_backward_kernel[(programs,)](
            grad_out, projections, weight.contiguous(), grad_projections, sums, B, E, rank, projections.size(1),
            *grad_out.stride(), *projections.stride(), **blocks,
        )  # fmt: skip
    return grad_projections, sums.sum(0).to(weight.dtype)
