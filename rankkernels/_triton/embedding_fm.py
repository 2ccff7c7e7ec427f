"""Lookup and FM of features with one id a sample in one pass, and the gradients of their lookups, in Triton.

Field f of sample b is x_f = weight_f[id_f]. With s = sum_f x_f, g and h the gradients of the FM and of the linear term
and v the linear weights,

    embeddings[b] = x_1 .. x_F side by side, fm[b] = 1/2 sum_d (s^2 - sum_f x_f^2)
    grad x_f = grad embeddings_f + g (s - x_f) + h v_f

The FM's sums are those of fm_interaction.py, in its order. The addresses of the ids, or in a fused step all that its
later launches are to find in memory, are arguments: no launch brings them. Bytes: F D w of rows read and as many
written, 4 or 8 F of ids; backward F D w read, twice where the embeddings have a gradient, and written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton import _alignment
from rankkernels._triton._alignment import aligned, between_columns
from rankkernels._triton._launch import launch
from rankkernels._triton.embedding_bag import embedding_bag_update
from rankkernels._triton.embedding_bag_blocks import rows_at, table_of
from rankkernels._triton.embedding_bag_features import DTYPES, Call, alignment, matrix_of
from rankkernels._triton.embedding_bag_numbers import ARGUMENTS, AT_ONCE, padded, store_numbers, write
from rankkernels._triton.fm_interaction import RESIDENT, SPILLS_EARLY, WARP_BYTES, _join
from rankkernels.ops._features import Features


@triton.jit(do_not_specialize=["n", "B", "D", *ARGUMENTS])
def embedding_fm_kernel(
    described_ptr, out_ptr, fm_ptr, n, B, D,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64, a14: tl.int64,
    a15: tl.int64, a16: tl.int64, a17: tl.int64, a18: tl.int64, a19: tl.int64, a20: tl.int64, a21: tl.int64,
    a22: tl.int64, a23: tl.int64, a24: tl.int64, a25: tl.int64, a26: tl.int64, a27: tl.int64, a28: tl.int64,
    a29: tl.int64, a30: tl.int64, a31: tl.int64, a32: tl.int64, a33: tl.int64, a34: tl.int64, a35: tl.int64,
    a36: tl.int64, a37: tl.int64, a38: tl.int64, a39: tl.int64, a40: tl.int64, a41: tl.int64, a42: tl.int64,
    a43: tl.int64, a44: tl.int64, a45: tl.int64, a46: tl.int64, a47: tl.int64, a48: tl.int64, a49: tl.int64,
    a50: tl.int64, a51: tl.int64, a52: tl.int64, a53: tl.int64, a54: tl.int64, a55: tl.int64, a56: tl.int64,
    a57: tl.int64, a58: tl.int64, a59: tl.int64, a60: tl.int64, a61: tl.int64, a62: tl.int64, a63: tl.int64,
    a64: tl.int64, a65: tl.int64, a66: tl.int64, a67: tl.int64, a68: tl.int64, a69: tl.int64, a70: tl.int64,
    a71: tl.int64, a72: tl.int64, a73: tl.int64, a74: tl.int64, a75: tl.int64, a76: tl.int64, a77: tl.int64,
    a78: tl.int64, a79: tl.int64,
    WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """out [B, n D] and fm [B] of BLOCK_B samples of n features, whose ids are at the first n arguments."""
    numbers = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
        a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35, a36, a37, a38, a39, a40, a41, a42, a43, a44, a45,
        a46, a47, a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59, a60, a61, a62, a63, a64, a65, a66, a67,
        a68, a69, a70, a71, a72, a73, a74, a75, a76, a77, a78, a79,
    )  # fmt: skip
    D = aligned(D, ALIGN)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_f = tl.arange(0, BLOCK_F)
    total = tl.zeros([BLOCK_B], ACC)
    for d in range(BLOCKS_D):
        o_d = d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
        s = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_D], ACC)
        y = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_D], ACC)
        for step in tl.static_range(STEPS):
            f = step * BLOCK_F + o_f
            i, address = tl.minimum(f, n - 1), tl.zeros([BLOCK_F], tl.int64)
            for k in tl.static_range(BLOCK_F):
                address = tl.where(o_f == k, numbers[step * BLOCK_F + k], address)
            there = (o_b < B)[:, None] & (f < n)[None, :]
            row, keep = rows_at(
                address[None, :], described_ptr, n, i[None, :], o_b[:, None], there, WIDE_IDS, HAS_KNOWN
            )
            weight_ptr, stride = table_of(described_ptr, n, i, DTYPE, ALIGN)
            rows_ptr = weight_ptr[None, :] + row * stride[None, :]
            of_row = (o_d < D)[None, None, :]
            b_x = tl.load(rows_ptr[:, :, None] + o_d[None, None, :], mask=keep[:, :, None] & of_row, other=0.0)
            out = out_ptr + (o_b[:, None] * n + f[None, :])[:, :, None] * D + o_d[None, None, :]
            tl.store(out, b_x, mask=there[:, :, None] & of_row)
            b_x = b_x.to(ACC)
            y += b_x * s
            s += b_x
        s, y = tl.reduce((s, y), 1, _join)
        y += s - s  # NaN where a field is infinite, as the difference of squares
        total += tl.sum(y, 1)
    tl.store(fm_ptr + o_b, total, mask=o_b < B)


@triton.jit(
    do_not_specialize=[
        "B", "F", "D", "count", "stride_gb", "stride_gd", "stride_fb", "stride_lb", "stride_xb", "stride_xd", *ARGUMENTS
    ]
)  # fmt: skip
def embedding_fm_backward_kernel(
    x_ptr, grad_ptr, grad_fm_ptr, grad_linear_ptr, linear_weight_ptr, grad_x_ptr, numbers_ptr,
    B, F, D, stride_gb, stride_gd, stride_fb, stride_lb, stride_xb, stride_xd, count,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64, a14: tl.int64,
    a15: tl.int64, a16: tl.int64, a17: tl.int64, a18: tl.int64, a19: tl.int64, a20: tl.int64, a21: tl.int64,
    a22: tl.int64, a23: tl.int64, a24: tl.int64, a25: tl.int64, a26: tl.int64, a27: tl.int64, a28: tl.int64,
    a29: tl.int64, a30: tl.int64, a31: tl.int64, a32: tl.int64, a33: tl.int64, a34: tl.int64, a35: tl.int64,
    a36: tl.int64, a37: tl.int64, a38: tl.int64, a39: tl.int64, a40: tl.int64, a41: tl.int64, a42: tl.int64,
    a43: tl.int64, a44: tl.int64, a45: tl.int64, a46: tl.int64, a47: tl.int64, a48: tl.int64, a49: tl.int64,
    a50: tl.int64, a51: tl.int64, a52: tl.int64, a53: tl.int64, a54: tl.int64, a55: tl.int64, a56: tl.int64,
    a57: tl.int64, a58: tl.int64, a59: tl.int64, a60: tl.int64, a61: tl.int64, a62: tl.int64, a63: tl.int64,
    a64: tl.int64, a65: tl.int64, a66: tl.int64, a67: tl.int64, a68: tl.int64, a69: tl.int64, a70: tl.int64,
    a71: tl.int64, a72: tl.int64, a73: tl.int64, a74: tl.int64, a75: tl.int64, a76: tl.int64, a77: tl.int64,
    a78: tl.int64, a79: tl.int64,
    ALIGN_G: tl.constexpr, ALIGN: tl.constexpr, UNIT_G: tl.constexpr, UNIT_X: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, F D], contiguous, of BLOCK_B samples and all fields; the first program also stores ``count`` of the
    arguments, if there is a place for them."""
    if numbers_ptr is not None:
        numbers = (
            a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22,
            a23, a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35, a36, a37, a38, a39, a40, a41, a42, a43,
            a44, a45, a46, a47, a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59, a60, a61, a62, a63, a64,
            a65, a66, a67, a68, a69, a70, a71, a72, a73, a74, a75, a76, a77, a78, a79,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            store_numbers(numbers_ptr, count, numbers, AT_ONCE)
    dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    stride_xb, stride_gb, D = aligned(stride_xb, ALIGN), aligned(stride_gb, ALIGN_G), aligned(D, ALIGN)
    stride_xd, stride_gd = between_columns(stride_xd, UNIT_X), between_columns(stride_gd, UNIT_G)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_f = tl.arange(0, BLOCK_F)
    for d in range(BLOCKS_D):
        o_d = d * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (o_b < B)[:, None, None] & (o_f < F)[None, :, None] & (o_d < D)[None, None, :]
        column = (o_f[:, None] * D + o_d[None, :])[None, :, :]
        grad = tl.zeros([BLOCK_B, BLOCK_F, BLOCK_D], dtype)
        if grad_fm_ptr is not None:
            b_x = tl.load(x_ptr + o_b[:, None, None] * stride_xb + column * stride_xd, mask=inside, other=0.0).to(dtype)
            grad_fm = tl.load(grad_fm_ptr + o_b * stride_fb, mask=o_b < B, other=0.0).to(dtype)
            grad = grad_fm[:, None, None] * (tl.sum(b_x, 1, keep_dims=True) - b_x)
        if grad_ptr is not None:
            grad_tile = grad_ptr + o_b[:, None, None] * stride_gb + column * stride_gd
            grad += tl.load(grad_tile, mask=inside, other=0.0).to(dtype)
        if grad_linear_ptr is not None:
            grad_linear = tl.load(grad_linear_ptr + o_b * stride_lb, mask=o_b < B, other=0.0).to(dtype)
            here = (o_f < F)[None, :, None] & (o_d < D)[None, None, :]
            weight = tl.load(linear_weight_ptr + column, mask=here, other=0.0).to(dtype)
            grad = tl.fma(grad_linear[:, None, None], weight, grad)
        tl.store(grad_x_ptr + o_b[:, None, None] * (F * D) + column, grad, mask=inside)


def _forward_blocks(D: int, F: int, itemsize: int) -> tuple[int, int, int]:
    """STEPS, BLOCK_F and BLOCK_D: a warp's load covers BLOCK_F rows."""
    warp = WARP_BYTES // itemsize
    BLOCK_D = min(triton.next_power_of_2(D), warp)
    BLOCK_F = min(triton.next_power_of_2(F), warp // BLOCK_D)
    return triton.cdiv(F, BLOCK_F), BLOCK_F, BLOCK_D


def _backward_blocks(D: int, F: int) -> tuple[int, int]:
    """BLOCK_F and BLOCK_D."""
    return triton.next_power_of_2(F), min(triton.next_power_of_2(D), RESIDENT // 64)


def supports_gradients(embeddings: Tensor, D: int) -> bool:
    """Whether a program's registers hold the fields of a sample."""
    return embeddings.numel() > 0 and math.prod(_backward_blocks(D, embeddings.size(1) // D)) <= RESIDENT


def supports(weights: Sequence[Tensor], features: Features) -> bool:
    """Whether the kernels serve these lookups: one id a sample and feature, rows of one width and dtype, and no more
    features than a launch has arguments and a program registers. What they do not serve, lookups and FM in turn do."""
    F, some = len(features.indices), weights[features.tables[0]]
    rows = {(weights[t].dtype, weights[t].size(1)) for t in features.tables}
    if len(rows) > 1 or not (features.indices[0].numel() and some.size(1)):
        return False
    steps, BLOCK_F, _ = _forward_blocks(some.size(1), F, some.element_size())
    fits = steps * BLOCK_F <= AT_ONCE and math.prod(_backward_blocks(some.size(1), F)) <= RESIDENT
    return fits and all(ids.dim() == 1 for ids in features.indices)


def embedding_fm(weights: Sequence[Tensor], features: Features, out: Tensor) -> Tensor:
    """Writes the embeddings to ``out`` [B, F D], contiguous. -> the FM [B, 1]."""
    B, F = features.indices[0].size(0), len(features.indices)
    fm, D = out.new_empty((B, 1)), out.size(1) // F
    weights = [matrix_of(w) for w in weights]
    with torch.cuda.device_of(out):
        call = Call(features, out.split_with_sizes([D] * F, 1), weights, [w.size(0) for w in weights])
        where, _ = call.described(range(F), 1)
        ids = padded(list(map(_alignment.address, call.ids)))
        align = math.gcd(alignment(out), D, *(alignment(weights[t]) for t in set(features.tables)))
        steps, BLOCK_F, BLOCK_D = _forward_blocks(D, F, out.element_size())
        BLOCK_B = 1024 // (BLOCK_F * BLOCK_D)  # 8 values a thread
        acc = tl.float64 if out.dtype == torch.float64 else tl.float32
        wide_ids, has_known, *_ = call.flags
        launch(
            embedding_fm_kernel, (triton.cdiv(B, BLOCK_B),), (where, out, fm), (F, B, D, *ids),
            (wide_ids, has_known, DTYPES[out.dtype], acc, align, steps, BLOCK_B, BLOCK_F, BLOCK_D,
             triton.cdiv(D, BLOCK_D)),
            num_warps=4,
        )  # fmt: skip
    return fm


def lookup_gradients(
    gradients: Sequence[Tensor | None], embeddings: Tensor, linear_weight: Tensor | None, grad_x: Tensor,
    numbers: Tensor | None = None, values: Sequence[int] = (),
) -> None:  # fmt: skip
    """Writes the gradient of the lookups to ``grad_x`` [B, F, D], contiguous, from those of the embeddings, the FM and
    the linear term. The first 80 ``values`` become those of ``numbers``, int64, on the way."""
    (B, F, D), (grad, grad_fm, grad_linear) = grad_x.shape, gradients
    if linear_weight is None or grad_linear is None:
        linear_weight = grad_linear = None
    else:
        linear_weight = linear_weight.contiguous()
    align = math.gcd(_alignment.alignment(grad_x), _alignment.alignment(embeddings))
    of_grad = align if grad is None else math.gcd(align, _alignment.alignment(grad))  # beside dense columns less
    BLOCK_F, BLOCK_D = _backward_blocks(D, F)
    BLOCK_B = max(1, RESIDENT // 2 // (BLOCK_F * BLOCK_D))
    gradient = (0, 0) if grad is None else grad.stride()
    strides = *gradient, *(0 if g is None else g.stride(0) for g in (grad_fm, grad_linear)), *embeddings.stride()
    brought = values[:AT_ONCE]
    with torch.cuda.device_of(grad_x):
        launch(
            embedding_fm_backward_kernel, (triton.cdiv(B, BLOCK_B),),
            (embeddings, grad, grad_fm, grad_linear, linear_weight, grad_x, numbers),
            (B, F, D, *strides, len(brought), *padded(brought)),
            (of_grad, align, grad is None or gradient[1] == 1, embeddings.stride(1) == 1, AT_ONCE, BLOCK_B, BLOCK_F,
             BLOCK_D, triton.cdiv(D, BLOCK_D)),
            num_warps=4,
            **({"maxnreg": 128} if SPILLS_EARLY and not torch.version.hip else {}),
        )  # fmt: skip


def embedding_fm_update(
    gradients: Sequence[Tensor | None], embeddings: Tensor, linear_weight: Tensor | None, weights: Sequence[Tensor],
    states: Sequence[Tensor], features: Features, optimizer: int, hyper: Sequence[float],
) -> None:  # fmt: skip
    """An optimizer's step on the rows that were looked up; ``gradients`` of the embeddings, the FM and the linear
    term."""
    F = len(features.indices)
    grad_x = torch.empty(
        (embeddings.size(0), F, embeddings.size(1) // F), dtype=embeddings.dtype, device=embeddings.device
    )

    def bring(values: Sequence[int], device: torch.device) -> Tensor:
        numbers = torch.empty(len(values), dtype=torch.int64, device=device)
        lookup_gradients(gradients, embeddings, linear_weight, grad_x, numbers, values)
        write(numbers, values, AT_ONCE)
        return numbers

    embedding_bag_update(grad_x.unbind(1), weights, states, features, optimizer, hyper, bring)
