"""The experts of a mixture of low rank, between the two GEMMs of a layer of DCN v2, in Triton: forward and backward.

projections [B, E r + E] = x [V_1 .. V_E, gates], C [E, r, r]:

    h_e = tanh(projections_e)    q_e = tanh(C_e h_e)    w = softmax(gates)    out_e = w_e q_e

    dw_e = <grad_e, q_e>         dz_e = w_e grad_e (1 - q_e^2)               dC_e = sum_b dz_e h_e^T
    grad_gate_e = w_e (dw_e - sum_k w_k dw_k)     grad_projections_e = (C_e^T dz_e) (1 - h_e^2)

A program has BLOCK_B samples and goes through the experts, with the gates' softmax of all in registers: what is read
is read once, and nothing is kept of the forward. It stores its samples' part of dC, and the parts are summed in order
after it. In 16 bits h and dz are rounded to these before their products, as torch's own would have it.

Four experts of rank 32, B 4096, float32: forward moves 4.3 MB and does 34 MFLOP and 1.0 M tanh of some 15
instructions, backward 6.5 MB, three times the flops and as many tanh. On an H100 1.3 and 1.9 us of memory, and half of
that of instructions: less than a launch takes, of which the reference's operators have 10 and some 20. What remains is
the latency of four experts in turn, the next one's rows loaded before they are wanted, in a program each
multiprocessor; with more samples blocks grow, so that the parts of dC, 2 r / (3 BLOCK_B) of what else is moved, do not.
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

PROGRAMS: int | None = None  # of the backward, other than one a multiprocessor, for tests
BLOCK_B = 32  # samples of the forward
TILE = 4096  # values of the backward's blocks at most


@triton.jit
def _tanh(x):
    """To float32's precision, of small values, too: the polynomial is fitted to 1e-7 below .55. Never beyond 1."""
    s = x * x
    small = x + x * s * (-0.33332947 + s * (0.13320725 + s * (-0.05267181 + s * 0.01643757)))
    return tl.where(tl.abs(x) < 0.55, small, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _softmax(gates_ptr, valid, E, stride, BLOCK_E: tl.constexpr):
    """[BLOCK_B, BLOCK_E] of the rows at ``gates_ptr`` [BLOCK_B, 1], finite where they are not ``valid``."""
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)[None, :]
    gates = tl.load(gates_ptr + o_e * stride, mask=valid & (o_e < E), other=0.0).to(tl.float32)
    gates = tl.where(o_e < E, gates, float("-inf"))
    parts = tl.exp(gates - tl.max(gates, 1, keep_dims=True))
    return parts / tl.sum(parts, 1, keep_dims=True)


@triton.jit
def _hidden(rows, weight_ptr, e, inside, o_r, rank, stride, PRECISION: tl.constexpr):
    """h, q and C of an expert."""
    b_p = tl.load(rows + (e * rank + o_r)[None, :] * stride, mask=inside, other=0.0)
    square = (o_r < rank)[:, None] & (o_r < rank)[None, :]
    b_C = tl.load(weight_ptr + (e * rank + o_r[:, None]) * rank + o_r[None, :], mask=square, other=0.0)
    h = _tanh(b_p.to(tl.float32))
    return h, _tanh(product(h, tl.trans(b_C), tl.zeros_like(h), PRECISION)), b_C


@triton.jit(do_not_specialize=["B"])
def mixed_experts_kernel(
    projections_ptr, weight_ptr, out_ptr, B, E, rank, stride_pb, stride_pd,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out [B, E rank], contiguous, of BLOCK_B samples."""
    stride_pb, rank = aligned(stride_pb, ALIGN), aligned(rank, ALIGN)
    o_b = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    o_e, o_r = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_R).to(tl.int64)
    rows, inside = projections_ptr + o_b * stride_pb, (o_b < B) & (o_r < rank)[None, :]
    weights = _softmax(rows + E * rank * stride_pd, o_b < B, E, stride_pd, BLOCK_E)
    for e in range(E):
        _, q, _ = _hidden(rows, weight_ptr, e, inside, o_r, rank, stride_pd, PRECISION)
        weight = tl.sum(tl.where(o_e == e, weights, 0.0), 1, keep_dims=True)
        tl.store(out_ptr + (o_b * E + e) * rank + o_r[None, :], weight * q, mask=inside)


@triton.jit(do_not_specialize=["B"])
def mixed_experts_backward_kernel(
    grad_out_ptr, projections_ptr, weight_ptr, grad_projections_ptr, sums_ptr, B, E, rank,
    stride_gb, stride_gd, stride_pb, stride_pd,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grad_projections [B, E rank + E], contiguous, of BLOCK_B samples, and these samples' part of the weight's
    gradient [programs, E, rank, rank]."""
    stride_gb, stride_pb, rank = aligned(stride_gb, ALIGN), aligned(stride_pb, ALIGN), aligned(rank, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    o_b, o_e, o_r = program * BLOCK_B + tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_R).to(tl.int64)
    o_b, valid, square = o_b[:, None], (o_b < B)[:, None], (o_r < rank)[:, None] & (o_r < rank)[None, :]
    rows, inside = projections_ptr + o_b * stride_pb, valid & (o_r < rank)[None, :]
    grads, to = grad_out_ptr + o_b * stride_gb, grad_projections_ptr + o_b * aligned(E * rank + E, ALIGN)
    weights = _softmax(rows + E * rank * stride_pd, valid, E, stride_pd, BLOCK_E)
    grad_weights = tl.zeros_like(weights)
    for e in range(E):
        h, q, b_C = _hidden(rows, weight_ptr, e, inside, o_r, rank, stride_pd, PRECISION)
        b_grad = tl.load(grads + (e * rank + o_r)[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
        grad_weights += tl.where(o_e == e, tl.sum(b_grad * q, 1, keep_dims=True), 0.0)
        grad_z = tl.sum(tl.where(o_e == e, weights, 0.0), 1, keep_dims=True) * b_grad * (1 - q * q)
        grad_h = product(grad_z, b_C, tl.zeros_like(h), PRECISION)
        tl.store(to + (e * rank + o_r)[None, :], grad_h * (1 - h * h), mask=inside)
        part = product(tl.trans(grad_z), h, tl.zeros([BLOCK_R, BLOCK_R], tl.float32), PRECISION)
        tl.store(sums_ptr + ((program * E + e) * rank + o_r[:, None]) * rank + o_r[None, :], part, mask=square)
    of_gates = weights * (grad_weights - tl.sum(weights * grad_weights, 1, keep_dims=True))
    tl.store(to + E * rank + o_e, of_gates, mask=valid & (o_e < E))


def _blocks(BLOCK_B: int, weight: Tensor, *rows: Tensor) -> dict:
    E, rank, _ = weight.shape
    BLOCK_R = max(16, triton.next_power_of_2(rank))
    options = {"PRECISION": precision_of(weight.dtype), "ALIGN": math.gcd(rank, *map(alignment, rows))}
    if not torch.version.hip:
        options["maxnreg"] = 255
    BLOCK_B = min(BLOCK_B, TILE // BLOCK_R)
    warps = max(1, min(BLOCK_B * BLOCK_R // 256, 8))
    return options | {
        "BLOCK_B": BLOCK_B, "BLOCK_E": triton.next_power_of_2(E), "BLOCK_R": BLOCK_R, "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def mixed_experts(projections: Tensor, weight: Tensor) -> Tensor:
    """projections [B, E r + E], any strides; weight [E, r, r], E and r 64 at most -> [B, E r]."""
    B, (E, rank, _) = projections.size(0), weight.shape
    out = torch.empty((B, E * rank), dtype=projections.dtype, device=projections.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(BLOCK_B, weight, projections)
    with torch.cuda.device_of(projections):
        mixed_experts_kernel[(triton.cdiv(B, blocks["BLOCK_B"]),)](
            projections, weight.contiguous(), out, B, E, rank, *projections.stride(), **blocks
        )
    return out


def mixed_experts_backward(grad_out: Tensor, projections: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [B, E r] and the op's arguments, any strides -> the gradients of projections and weight."""
    B, (E, rank, _) = projections.size(0), weight.shape
    grad_projections = torch.empty(projections.shape, dtype=projections.dtype, device=projections.device)
    if grad_out.numel() == 0:
        return grad_projections.zero_(), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    programs = PROGRAMS or programs_of(projections) // 2
    samples = max(16, triton.next_power_of_2(triton.cdiv(B, programs)))
    blocks = _blocks(samples, weight, grad_out, projections)
    parts = triton.cdiv(B, blocks["BLOCK_B"])
    sums = torch.empty((parts, *weight.shape), dtype=torch.float32, device=projections.device)
    with torch.cuda.device_of(projections):
        mixed_experts_backward_kernel[(parts,)](
            grad_out, projections, weight.contiguous(), grad_projections, sums, B, E, rank, *grad_out.stride(),
            *projections.stride(), **blocks,
        )  # fmt: skip
    return grad_projections, sums.sum(0).to(weight.dtype)
