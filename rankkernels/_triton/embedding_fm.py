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
from rankkernels._triton.embedding_bag_numbers import AT_ONCE, padded, store_numbers, write
from rankkernels._triton.fm_interaction import RESIDENT, SPILLS_EARLY, WARP_BYTES, _join
from rankkernels.ops._features import Features


@triton.jit(do_not_specialize=["n", "B", "D", *(f"i{k}" for k in range(AT_ONCE))])
def embedding_fm_kernel(
    described_ptr, out_ptr, fm_ptr, n, B, D,
    i0: tl.int64, i1: tl.int64, i2: tl.int64, i3: tl.int64, i4: tl.int64, i5: tl.int64, i6: tl.int64, i7: tl.int64,
    i8: tl.int64, i9: tl.int64, i10: tl.int64, i11: tl.int64, i12: tl.int64, i13: tl.int64, i14: tl.int64,
    i15: tl.int64, i16: tl.int64, i17: tl.int64, i18: tl.int64, i19: tl.int64, i20: tl.int64, i21: tl.int64,
    i22: tl.int64, i23: tl.int64, i24: tl.int64, i25: tl.int64, i26: tl.int64, i27: tl.int64, i28: tl.int64,
    i29: tl.int64, i30: tl.int64, i31: tl.int64, i32: tl.int64, i33: tl.int64, i34: tl.int64, i35: tl.int64,
    i36: tl.int64, i37: tl.int64, i38: tl.int64, i39: tl.int64, i40: tl.int64, i41: tl.int64, i42: tl.int64,
    i43: tl.int64, i44: tl.int64, i45: tl.int64, i46: tl.int64, i47: tl.int64, i48: tl.int64, i49: tl.int64,
    i50: tl.int64, i51: tl.int64, i52: tl.int64, i53: tl.int64, i54: tl.int64, i55: tl.int64, i56: tl.int64,
    i57: tl.int64, i58: tl.int64, i59: tl.int64, i60: tl.int64, i61: tl.int64, i62: tl.int64, i63: tl.int64,
    i64: tl.int64, i65: tl.int64, i66: tl.int64, i67: tl.int64, i68: tl.int64, i69: tl.int64, i70: tl.int64,
    i71: tl.int64, i72: tl.int64, i73: tl.int64, i74: tl.int64, i75: tl.int64, i76: tl.int64, i77: tl.int64,
    i78: tl.int64, i79: tl.int64,
    WIDE_IDS: tl.constexpr, HAS_KNOWN: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """out [B, n D] and fm [B] of BLOCK_B samples of n features, whose ids are at the first n arguments."""
    numbers = (
        i0, i1, i2, i3, i4, i5, i6, i7, i8, i9, i10, i11, i12, i13, i14, i15, i16, i17, i18, i19, i20, i21, i22, i23,
        i24, i25, i26, i27, i28, i29, i30, i31, i32, i33, i34, i35, i36, i37, i38, i39, i40, i41, i42, i43, i44, i45,
        i46, i47, i48, i49, i50, i51, i52, i53, i54, i55, i56, i57, i58, i59, i60, i61, i62, i63, i64, i65, i66, i67,
        i68, i69, i70, i71, i72, i73, i74, i75, i76, i77, i78, i79,
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
        "B", "F", "D", "count", "stride_gb", "stride_gd", "stride_fb", "stride_lb", "stride_xb", "stride_xd",
        *(f"v{k}" for k in range(AT_ONCE)),
    ]
)  # fmt: skip
def embedding_fm_backward_kernel(
    x_ptr, grad_ptr, grad_fm_ptr, grad_linear_ptr, linear_weight_ptr, grad_x_ptr, numbers_ptr,
    B, F, D, stride_gb, stride_gd, stride_fb, stride_lb, stride_xb, stride_xd, count,
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64, v7: tl.int64,
    v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64, v14: tl.int64,
    v15: tl.int64, v16: tl.int64, v17: tl.int64, v18: tl.int64, v19: tl.int64, v20: tl.int64, v21: tl.int64,
    v22: tl.int64, v23: tl.int64, v24: tl.int64, v25: tl.int64, v26: tl.int64, v27: tl.int64, v28: tl.int64,
    v29: tl.int64, v30: tl.int64, v31: tl.int64, v32: tl.int64, v33: tl.int64, v34: tl.int64, v35: tl.int64,
    v36: tl.int64, v37: tl.int64, v38: tl.int64, v39: tl.int64, v40: tl.int64, v41: tl.int64, v42: tl.int64,
    v43: tl.int64, v44: tl.int64, v45: tl.int64, v46: tl.int64, v47: tl.int64, v48: tl.int64, v49: tl.int64,
    v50: tl.int64, v51: tl.int64, v52: tl.int64, v53: tl.int64, v54: tl.int64, v55: tl.int64, v56: tl.int64,
    v57: tl.int64, v58: tl.int64, v59: tl.int64, v60: tl.int64, v61: tl.int64, v62: tl.int64, v63: tl.int64,
    v64: tl.int64, v65: tl.int64, v66: tl.int64, v67: tl.int64, v68: tl.int64, v69: tl.int64, v70: tl.int64,
    v71: tl.int64, v72: tl.int64, v73: tl.int64, v74: tl.int64, v75: tl.int64, v76: tl.int64, v77: tl.int64,
    v78: tl.int64, v79: tl.int64,
    ALIGN_G: tl.constexpr, ALIGN: tl.constexpr, UNIT_G: tl.constexpr, UNIT_X: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCKS_D: tl.constexpr,
):  # fmt: skip
    """grad_x [B, F D], contiguous, of BLOCK_B samples and all fields; the first program also stores ``count`` of the
    arguments, if there is a place for them."""
    if numbers_ptr is not None:
        numbers = (
            v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, v16, v17, v18, v19, v20, v21, v22,
            v23, v24, v25, v26, v27, v28, v29, v30, v31, v32, v33, v34, v35, v36, v37, v38, v39, v40, v41, v42, v43,
            v44, v45, v46, v47, v48, v49, v50, v51, v52, v53, v54, v55, v56, v57, v58, v59, v60, v61, v62, v63, v64,
            v65, v66, v67, v68, v69, v70, v71, v72, v73, v74, v75, v76, v77, v78, v79,
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
