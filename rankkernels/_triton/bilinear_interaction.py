"""FiBiNET's bilinear interaction of fields, in Triton: forward and backward.

x [B, F, D], W one matrix [D, D] for all fields, one a field f, or one a pair f < g:

    z = W x_f     out[b, (f, g)] = z x_g                                elementwise
    dz = grad_out x_g     dx_g += grad_out z     dx_f += W^T dz         dW = sum_b dz x_f^T

A program of the forward has BLOCK_B samples of a field f and goes through all g. One of the backward has those of a
field, which is the first of some pairs and the second of others; those of the other fields, beside it, find grad_out in
L2. A matrix a pair: z once in each, and dW by programs of a pair, over samples of their own in order. A matrix a field:
the sum of dz, which is as large as x, is stored, and dW a library's product. In 16 bits dz is rounded to these before
its products, as torch's own would have it.

Per sample forward reads F D and writes F (F - 1) / 2 D, F (F - 1) D^2 flops, where there is a matrix a pair; backward
reads grad_out twice, three times the flops. The operators of the reference pass over arrays of [B, F (F - 1) / 2, D]
nine times forward and more than twelve times backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment
from rankkernels._triton._pairs import fields_of, pair_of
from rankkernels._triton._products import precision_of, product
from rankkernels._triton._programs import programs_of

PROGRAMS: int | None = None  # over a pair's samples, other than ``programs_of`` says, for tests
BLOCK_B = 64  # samples
WIDEST = 32  # columns of a block
ALL, EACH, PAIR = range(3)  # the op's kinds: whose the matrices are


@triton.jit
def _times_weight(
    field, weight_ptr, valid, o_e, D, stride_xd, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Columns o_e of W x_f, of rows at ``field`` [BLOCK_B, 1]."""
    z = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = valid & (o_d < D)[None, :]
        b_x = tl.load(field + o_d[None, :] * stride_xd, mask=inside, other=0.0)
        inside = (o_e < D)[:, None] & (o_d < D)[None, :]
        b_weight = tl.load(weight_ptr + o_e[:, None] * D + o_d[None, :], mask=inside, other=0.0)
        z = product(b_x, tl.trans(b_weight), z, PRECISION)
    return z


@triton.jit(do_not_specialize=["B"])
def bilinear_interaction_kernel(
    x_ptr, weights_ptr, out_ptr, B, F, D, stride_w, stride_xb, stride_xf, stride_xd,
    OF_PAIRS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, pairs, D], contiguous, of BLOCK_B samples, the pairs whose first a field is, and BLOCK_D columns."""
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    f, o_b = program % (F - 1), (program // (F - 1) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    o_e = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid, rows = o_b < B, x_ptr + o_b * stride_xb
    inside = valid & (o_e < D)[None, :]
    field, out_rows = rows + f * stride_xf, out_ptr + o_b * (F * (F - 1) // 2) * D + o_e[None, :]
    if not OF_PAIRS:
        weight_ptr = weights_ptr + f * stride_w
        z = _times_weight(field, weight_ptr, valid, o_e, D, stride_xd, PRECISION, BLOCK_B, BLOCK_D)
    for g in range(f + 1, F):
        pair = pair_of(f, g, F)
        if OF_PAIRS:
            weight_ptr = weights_ptr + pair * stride_w
            z = _times_weight(field, weight_ptr, valid, o_e, D, stride_xd, PRECISION, BLOCK_B, BLOCK_D)
        b_x = tl.load(rows + g * stride_xf + o_e[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_rows + pair * D, z * b_x, mask=inside)


@triton.jit(do_not_specialize=["B"])
def bilinear_interaction_backward_kernel(
    grad_out_ptr, x_ptr, weights_ptr, grad_x_ptr, grad_z_ptr, B, F, D, stride_w,
    stride_gb, stride_gp, stride_gd, stride_xb, stride_xf, stride_xd,
    OF_PAIRS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, F, D], contiguous, of BLOCK_B samples, a field and BLOCK_D columns; without a matrix a pair grad_z
    [B, F - 1, D], too."""
    stride_gb, stride_gp = aligned(stride_gb, ALIGN), aligned(stride_gp, ALIGN)
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    program = tl.program_id(0).to(tl.int64)
    h, o_b = program % F, (program // F * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
    first = tl.program_id(1).to(tl.int64) * BLOCK_D
    o_d = first + tl.arange(0, BLOCK_D)
    valid, rows, grads = o_b < B, x_ptr + o_b * stride_xb, grad_out_ptr + o_b * stride_gb
    total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for e in range(0, D, BLOCK_D):
        o_e = e + tl.arange(0, BLOCK_D).to(tl.int64)
        inside, of_weight = valid & (o_e < D)[None, :], (o_e < D)[:, None] & (o_d < D)[None, :]
        weight_tile = weights_ptr + o_e[:, None] * D + o_d[None, :]
        grad_z = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for g in range(h + 1, F):
            pair = pair_of(h, g, F)
            b_grad = tl.load(grads + pair * stride_gp + o_e[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
            b_x = tl.load(rows + g * stride_xf + o_e[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
            if OF_PAIRS:
                b_weight = tl.load(weight_tile + pair * stride_w, mask=of_weight, other=0.0).to(tl.float32)
                total = product(b_grad * b_x, b_weight, total, PRECISION)
            else:
                grad_z += b_grad * b_x
        if not OF_PAIRS:
            if h < F - 1:  # the last field is the first of no pair
                b_weight = tl.load(weight_tile + h * stride_w, mask=of_weight, other=0.0).to(tl.float32)
                total = product(grad_z, b_weight, total, PRECISION)
                if e == first:
                    tl.store(grad_z_ptr + (o_b * (F - 1) + h) * D + o_e[None, :], grad_z, mask=inside)
    inside = valid & (o_d < D)[None, :]
    for f in range(0, h):
        pair = pair_of(f, h, F)
        weight_ptr = weights_ptr + (pair if OF_PAIRS else f) * stride_w
        z = _times_weight(rows + f * stride_xf, weight_ptr, valid, o_d, D, stride_xd, PRECISION, BLOCK_B, BLOCK_D)
        b_grad = tl.load(grads + pair * stride_gp + o_d[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
        total += b_grad * z
    tl.store(grad_x_ptr + (o_b * F + h) * D + o_d[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["B", "share"])
def bilinear_interaction_weights_kernel(
    grad_out_ptr, x_ptr, sums_ptr, B, F, D, share, stride_gb, stride_gp, stride_gd, stride_xb, stride_xf, stride_xd,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums [parts, pairs, D, D] for a matrix's gradient over ``share`` samples, of BLOCK_D rows and columns."""
    stride_gb, stride_gp = aligned(stride_gb, ALIGN), aligned(stride_gp, ALIGN)
    stride_xb, stride_xf, D = aligned(stride_xb, ALIGN), aligned(stride_xf, ALIGN), aligned(D, ALIGN)
    program, pairs = tl.program_id(0).to(tl.int64), F * (F - 1) // 2
    pair, start = program % pairs, program // pairs * share
    f, g = fields_of(pair, F)
    o_e = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_d = tl.program_id(2).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for b in range(start, tl.minimum(start + share, B), BLOCK_B):
        o_b = (b + tl.arange(0, BLOCK_B))[:, None]
        inside, rows = (o_b < B) & (o_e < D)[None, :], x_ptr + o_b * stride_xb
        grads = grad_out_ptr + o_b * stride_gb + pair * stride_gp
        b_grad = tl.load(grads + o_e[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
        b_grad *= tl.load(rows + g * stride_xf + o_e[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
        inside = (o_b < B) & (o_d < D)[None, :]
        b_x = tl.load(rows + f * stride_xf + o_d[None, :] * stride_xd, mask=inside, other=0.0).to(tl.float32)
        total = product(tl.trans(b_grad), b_x, total, PRECISION)
    inside = (o_e < D)[:, None] & (o_d < D)[None, :]
    tl.store(sums_ptr + (program * D + o_e[:, None]) * D + o_d[None, :], total, mask=inside)


def _blocks(*tensors: Tensor) -> dict:
    x, *_ = tensors
    BLOCK_D = max(16, min(triton.next_power_of_2(x.size(2)), WIDEST))
    options = {"PRECISION": precision_of(x.dtype), "ALIGN": math.gcd(*map(alignment, tensors))}
    if not torch.version.hip:
        options["maxnreg"] = 255  # sm_100's compiler spills at 96 registers unless told how many there are
    return options | {"BLOCK_B": BLOCK_B, "BLOCK_D": BLOCK_D, "num_warps": 4, "num_stages": 1}


def _stacked(weights: Sequence[Tensor], kind: int) -> tuple[Tensor, int]:
    """The matrices [n, D, D], and how far one field's, or pair's, are from the next's."""
    stacked = torch.stack(list(weights))
    return stacked, 0 if kind == ALL else stacked.stride(0)


def bilinear_interaction(x: Tensor, weights: Sequence[Tensor], kind: int) -> Tensor:
    """x [B, F, D], any strides; weights [D, D] each -> [B, F (F - 1) / 2, D]."""
    B, F, D = x.shape
    out = torch.empty((B, F * (F - 1) // 2, D), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(x)
    grid = triton.cdiv(B, BLOCK_B) * (F - 1), triton.cdiv(D, blocks["BLOCK_D"])
    stacked, stride_w = _stacked(weights, kind)
    with torch.cuda.device_of(x):
        bilinear_interaction_kernel[grid](
            x, stacked, out, B, F, D, stride_w, *x.stride(), OF_PAIRS=kind == PAIR, **blocks
        )
    return out


def bilinear_interaction_backward(
    grad_out: Tensor, x: Tensor, weights: Sequence[Tensor], kind: int
) -> tuple[Tensor, list[Tensor]]:
    """grad_out [B, F (F - 1) / 2, D], x [B, F, D], any strides -> the gradients of x and of the weights."""
    B, F, D = x.shape
    grad_x = torch.empty((B, F, D), dtype=x.dtype, device=x.device)
    if grad_out.numel() == 0:
        return grad_x.zero_(), [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
    blocks, of_pairs = _blocks(x, grad_out), kind == PAIR
    grad_z = None if of_pairs else torch.empty((B, F - 1, D), dtype=torch.float32, device=x.device)
    stacked, stride_w = _stacked(weights, kind)
    with torch.cuda.device_of(x):
        bilinear_interaction_backward_kernel[triton.cdiv(B, BLOCK_B) * F, triton.cdiv(D, blocks["BLOCK_D"])](
            grad_out, x, stacked, grad_x, grad_z, B, F, D, stride_w, *grad_out.stride(), *x.stride(),
            OF_PAIRS=of_pairs, **blocks,
        )  # fmt: skip
        of_weights = _of_pairs(grad_out, x, blocks) if grad_z is None else _of_fields(grad_z, x, kind)
    return grad_x, list(of_weights.to(x.dtype).unbind())


def _of_pairs(grad_out: Tensor, x: Tensor, blocks: dict) -> Tensor:
    """The weights' gradients [pairs, D, D]: few pairs of many samples are summed in parts."""
    (B, F, D), pairs = x.shape, grad_out.size(1)
    squares = triton.cdiv(D, blocks["BLOCK_D"]) ** 2
    parts = min(triton.cdiv(B, BLOCK_B), triton.cdiv(PROGRAMS or 2 * programs_of(x), pairs * squares))
    share = triton.cdiv(triton.cdiv(B, BLOCK_B), parts) * BLOCK_B
    parts = triton.cdiv(B, share)
    sums = torch.empty((parts, pairs, D, D), dtype=torch.float32, device=x.device)
    grid = parts * pairs, triton.cdiv(D, blocks["BLOCK_D"]), triton.cdiv(D, blocks["BLOCK_D"])
    bilinear_interaction_weights_kernel[grid](
        grad_out, x, sums, B, F, D, share, *grad_out.stride(), *x.stride(), **blocks
    )
    return sums.sum(0)


def _of_fields(grad_z: Tensor, x: Tensor, kind: int) -> Tensor:
    """The weights' gradients [1 or F - 1, D, D]."""
    fields = x[:, :-1].to(grad_z.dtype)
    if kind == ALL:
        return (grad_z.flatten(0, 1).t() @ fields.flatten(0, 1))[None]
    return torch.bmm(grad_z.permute(1, 2, 0), fields.transpose(0, 1))
