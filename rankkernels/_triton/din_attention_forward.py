"""DIN attention's forward: scores and pooling in one kernel, and before it in training the batch's statistics; behind
it, where programs shared a sample, their sum.

Bytes a row: D items of history, read once, and the score's 4 written; a sample's target and out beside them, and
weights, are all that else is moved. Flops a row: 2 D H (+ 2 H H2), and the pooling's 2 D; a sample: c's 2 D H. A pass
for statistics is the products again, as far as the layer asked for, without scores and pooling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton._alignment import aligned, between_columns
from rankkernels._triton.din_attention_blocks import (
    OUT_WEIGHT,
    UNSPECIALIZED,
    _vector,
    activate,
    constant_of,
    dropout_factor,
    exp_less,
    first_layer,
    kept_of,
    layers_of,
    load_rows,
    rows_of,
    second_layer,
    valid_rows,
)


@triton.jit
def _pooled(out, weight, decay, rows, BLOCKS: tl.constexpr):
    """out decay + sum_l weight_l h_l, in the blocks of columns of ``rows``."""
    if BLOCKS == 1:
        return (out[0] * decay + tl.sum(weight * rows[0], 0),)
    elif BLOCKS == 2:
        return out[0] * decay + tl.sum(weight * rows[0], 0), out[1] * decay + tl.sum(weight * rows[1], 0)
    else:
        return (
            out[0] * decay + tl.sum(weight * rows[0], 0),
            out[1] * decay + tl.sum(weight * rows[1], 0),
            out[2] * decay + tl.sum(weight * rows[2], 0),
            out[3] * decay + tl.sum(weight * rows[3], 0),
        )


@triton.jit
def _no_columns(BLOCK_K: tl.constexpr, BLOCKS: tl.constexpr):
    zeros = tl.zeros([BLOCK_K], tl.float32)
    if BLOCKS == 1:
        return (zeros,)
    elif BLOCKS == 2:
        return zeros, zeros
    else:
        return zeros, zeros, zeros, zeros


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_kernel(
    history_ptr, target_ptr, rows_ptr, folded_ptr, seed_ptr, out_bias_ptr, out_ptr, shares_ptr,
    splits, L, parts_d, parts_h, parts_h2, dice_eps, threshold, kept_scale,
    stride_hb, stride_hl, stride_hd, stride_tb, stride_td, stride_mb, stride_ml,
    D: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    DROPOUT: tl.constexpr, FORM: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A sample, or its share program_id % splits: each row's score, before a softmax, and out [B, D]; with a softmax
    also out, the peak and the total in float32, all of them but out behind the folded layers.

    With SPLIT ``shares`` [B splits, D + 2] instead of the last three: the share's sum, with a softmax relative to its
    peak, and beside it peak and total.
    """
    BLOCK_L: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 32
    BLOCKS: tl.constexpr = BLOCK_D // BLOCK_K
    task = tl.program_id(0)
    b, start, first, end, _ = rows_of(task, splits, rows_ptr, L, stride_mb, stride_ml, FORM, BLOCK_L)
    wt_ptr, wm_ptr, wp_ptr, vectors_ptr, weight2_ptr, vectors2_ptr, kept_ptr = layers_of(
        folded_ptr, BLOCK_D, BLOCK_H, H2, BLOCK_H2
    )
    sum_ptr, peak_ptr, total_ptr, score_ptr = kept_of(kept_ptr, tl.num_programs(0) // splits, D, SOFTMAX)
    o_h, o_h2 = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H2)
    stride_hb, stride_hl = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN)
    stride_hd, target = between_columns(stride_hd, UNIT), target_ptr + b * stride_tb
    row = history_ptr + b * stride_hb + start * stride_hl
    score = score_ptr + (start if FORM == "offsets" else b * L)
    mask = rows_ptr + b * stride_mb if FORM == "mask" else rows_ptr
    c = constant_of(target, parts_d, wt_ptr, vectors_ptr, o_h, D, stride_td, BLOCK_K, BLOCK_D, BLOCK_H)
    b_out_bias = tl.load(out_bias_ptr).to(tl.float32)
    out = _no_columns(BLOCK_K, BLOCKS)
    peak, total = -float("inf"), 0.0
    for l0 in tl.range(first, end, BLOCK_L, disable_licm=True):
        o_l = l0 + tl.arange(0, BLOCK_L)
        valid = valid_rows(mask, o_l, end, stride_ml, FORM)
        rows = load_rows(row + o_l[:, None] * stride_hl, valid, stride_hd, D, BLOCK_K, BLOCK_D)
        x = first_layer(
            rows, parts_d, target, wm_ptr, wp_ptr, c, o_h, D, stride_td, PRECISION, BLOCK_L, BLOCK_K, BLOCK_D,
            BLOCK_H,
        )  # fmt: skip
        a = activate(x, vectors_ptr, o_h, H, dice_eps, ACTIVATION, TRAINING, BLOCK_H)
        a *= dropout_factor(seed_ptr, 0, b, l0, o_h, threshold, kept_scale, DROPOUT, BLOCK_L, BLOCK_H)
        if H2 > 0:
            x2 = second_layer(a, parts_h, weight2_ptr, vectors2_ptr, o_h2, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2)
            a2 = activate(x2, vectors2_ptr, o_h2, H2, dice_eps, ACTIVATION, TRAINING, BLOCK_H2)
            a2 *= dropout_factor(seed_ptr, 1, b, l0, o_h2, threshold, kept_scale, DROPOUT, BLOCK_L, BLOCK_H2)
            b_score = tl.sum(a2 * _vector(vectors2_ptr, OUT_WEIGHT, o_h2, BLOCK_H2), 1) + b_out_bias
        else:
            b_score = tl.sum(a * _vector(vectors_ptr, OUT_WEIGHT, o_h, BLOCK_H), 1) + b_out_bias
        tl.store(score + o_l, b_score, mask=valid)
        decay = 1.0
        if SOFTMAX:
            b_score = tl.where(valid, b_score, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(b_score, 0))
            weight, decay = exp_less(b_score, new_peak), exp_less(peak, new_peak)
            total, peak = total * decay + tl.sum(weight, 0), new_peak
        else:
            weight = tl.where(valid, b_score, 0.0)
        out = _pooled(out, weight[:, None], decay, rows, BLOCKS)
    if SPLIT:
        sum_ptr = shares_ptr + tl.cast(task, tl.int64) * (D + 2)
        peak_ptr, total_ptr = sum_ptr + D, sum_ptr + D + 1
    else:
        sum_ptr, peak_ptr, total_ptr = sum_ptr + b * D, peak_ptr + b, total_ptr + b
    for k in tl.static_range(BLOCKS):
        o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_out = out[k]
        if SOFTMAX and not SPLIT:
            b_out = b_out / tl.where(total > 0, total, 1.0)
        if SOFTMAX or SPLIT:
            tl.store(sum_ptr + o_k, b_out, mask=o_k < D)
        if not SPLIT:
            tl.store(out_ptr + b * D + o_k, b_out, mask=o_k < D)
    if SOFTMAX:
        tl.store(peak_ptr, peak)
        tl.store(total_ptr, total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_join_kernel(
    folded_ptr, shares_ptr, out_ptr, splits,
    D: tl.constexpr, H2: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """A sample's out, and with a softmax what is kept beside it, from the shares of its programs."""
    BLOCK: tl.constexpr = 32
    b = tl.program_id(0).to(tl.int64)
    _, _, _, _, _, _, kept_ptr = layers_of(folded_ptr, BLOCK_D, BLOCK_H, H2, BLOCK_H2)
    sum_ptr, peak_ptr, total_ptr, _ = kept_of(kept_ptr, tl.num_programs(0), D, SOFTMAX)
    o_d = tl.arange(0, BLOCK_D)
    share = shares_ptr + b * splits * (D + 2)
    peak, total = -float("inf"), 0.0
    if SOFTMAX:
        peaks = tl.full([BLOCK], -float("inf"), tl.float32)
        for s0 in tl.range(0, splits, BLOCK):
            o_s = s0 + tl.arange(0, BLOCK)
            peaks = tl.maximum(peaks, tl.load(share + o_s * (D + 2) + D, mask=o_s < splits, other=-float("inf")))
        peak = tl.max(peaks, 0)
    out = tl.zeros([BLOCK_D], tl.float32)
    for s0 in tl.range(0, splits, BLOCK):
        o_s = s0 + tl.arange(0, BLOCK)
        inside = (o_s < splits)[:, None] & (o_d < D)[None, :]
        b_sum = tl.load(share + o_s[:, None] * (D + 2) + o_d[None, :], mask=inside, other=0.0)
        if SOFTMAX:
            b_peak = tl.load(share + o_s * (D + 2) + D, mask=o_s < splits, other=-float("inf"))
            b_total = tl.load(share + o_s * (D + 2) + D + 1, mask=o_s < splits, other=0.0)
            scale = exp_less(b_peak, peak)
            total += tl.sum(b_total * scale, 0)
            b_sum *= scale[:, None]
        out += tl.sum(b_sum, 0)
    if SOFTMAX:
        out = out / tl.where(total > 0, total, 1.0)
        tl.store(sum_ptr + b * D + o_d, out, mask=o_d < D)
        tl.store(peak_ptr + b, peak)
        tl.store(total_ptr + b, total)
    tl.store(out_ptr + b * D + o_d, out, mask=o_d < D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_statistics_kernel(
    history_ptr, target_ptr, rows_ptr, folded_ptr, seed_ptr, partials_ptr,
    tasks, splits, L, parts_d, parts_h, parts_h2, dice_eps, threshold, kept_scale,
    stride_hb, stride_hl, stride_hd, stride_tb, stride_td, stride_mb, stride_ml,
    D: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    DROPOUT: tl.constexpr, FORM: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """Over the valid rows of tasks program_id, + num_programs, ..: their number, and of the last layer's product the
    mean and the sum of squares from it, partials [programs, 2, BLOCK] and [programs] behind them.

    Blocks are joined by Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979): no difference of large sums.
    """
    BLOCK_L: tl.constexpr = 32
    BLOCK_K: tl.constexpr = 32
    pid = tl.program_id(0)
    wt_ptr, wm_ptr, wp_ptr, vectors_ptr, weight2_ptr, vectors2_ptr, kept_ptr = layers_of(
        folded_ptr, BLOCK_D, BLOCK_H, H2, BLOCK_H2
    )
    o_h, o_h2 = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H2)
    LAST: tl.constexpr = BLOCK_H2 if H2 > 0 else BLOCK_H
    o_last = tl.arange(0, LAST)
    stride_hb, stride_hl = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN)
    stride_hd = between_columns(stride_hd, UNIT)
    count, mean, squares = 0.0, tl.zeros([LAST], tl.float32), tl.zeros([LAST], tl.float32)
    for task in tl.range(pid, tasks, tl.num_programs(0), disable_licm=True):
        b, start, first, end, _ = rows_of(task, splits, rows_ptr, L, stride_mb, stride_ml, FORM, BLOCK_L)
        row, target = history_ptr + b * stride_hb + start * stride_hl, target_ptr + b * stride_tb
        mask = rows_ptr + b * stride_mb if FORM == "mask" else rows_ptr
        c = constant_of(target, parts_d, wt_ptr, vectors_ptr, o_h, D, stride_td, BLOCK_K, BLOCK_D, BLOCK_H)
        for l0 in tl.range(first, end, BLOCK_L, disable_licm=True):
            o_l = l0 + tl.arange(0, BLOCK_L)
            valid = valid_rows(mask, o_l, end, stride_ml, FORM)
            rows = load_rows(row + o_l[:, None] * stride_hl, valid, stride_hd, D, BLOCK_K, BLOCK_D)
            x = first_layer(
                rows, parts_d, target, wm_ptr, wp_ptr, c, o_h, D, stride_td, PRECISION, BLOCK_L, BLOCK_K, BLOCK_D,
                BLOCK_H,
            )  # fmt: skip
            if H2 > 0:
                a = activate(x, vectors_ptr, o_h, H, dice_eps, ACTIVATION, TRAINING, BLOCK_H)
                a *= dropout_factor(seed_ptr, 0, b, l0, o_h, threshold, kept_scale, DROPOUT, BLOCK_L, BLOCK_H)
                x = second_layer(a, parts_h, weight2_ptr, vectors2_ptr, o_h2, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2)
            b_count = tl.sum(valid.to(tl.float32), 0)
            b_mean = tl.sum(tl.where(valid[:, None], x, 0.0), 0) / tl.maximum(b_count, 1.0)
            centred = tl.where(valid[:, None], x - b_mean[None, :], 0.0)
            share = b_count / tl.maximum(count + b_count, 1.0)
            step = b_mean - mean
            squares += tl.sum(centred * centred, 0) + step * step * (count * share)
            mean += step * share
            count += b_count
    partial = partials_ptr + tl.cast(pid, tl.int64) * (2 * LAST + 1)
    tl.store(partial + o_last, mean)
    tl.store(partial + LAST + o_last, squares)
    tl.store(partial + 2 * LAST, count)
