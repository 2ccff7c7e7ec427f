"""DIN attention's backward: one kernel, whose launches compute some of the gradients each.

Whatever a launch is for, it computes rows' scores' gradients and the products again, as far as needed: keeping z costs
8 H bytes a row, written and read, computing it 2 D H flops. Bytes a row and launch: D items of history and the score's
4; those of history's gradient once. Flops a row: the forward's in each launch, and

    LAST      last layer's vectors and the output layer's
    WEIGHT2   the second layer's weight: 2 H H2
    FIRST     the first of two layers' vectors: 2 H H2
    ROWS      the rows' gradients: 2 H H2, 2 D H
    WEIGHT    the first layer's weight, in shares of BLOCK_S columns of D at program_id(1): each 2 H H2, 2 BLOCK_S H

A launch has as many of them as there are registers for; c [B, H] comes from a product before them all, since none has
registers to keep it in. Programs sum over their tasks in order, and one reduction sums the programs: the same bits run
after run.
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
    activate_backward,
    dropout_factor,
    exp_less,
    first_layer,
    first_layer_backward,
    gradient_of_product,
    kept_of,
    layers_of,
    load_rows,
    product,
    rows_of,
    second_layer,
    second_layer_backward,
    strided_vector,
    valid_rows,
    zero_rows,
)


@triton.jit
def _plus_sums(sums, grad_y, grad_v, grad_alpha, x, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr):
    """Sums over rows, [H] each, of alpha's gradient, of dL/dy and x dL/dy, and of dL/dv and x dL/dv."""
    alpha, of_y, of_yx, of_v, of_vx = sums
    if ACTIVATION == "prelu" or ACTIVATION == "dice" or ACTIVATION == "dice_batch_norm":
        alpha += tl.sum(grad_alpha, 0)
    if TRAINING:
        of_y += tl.sum(grad_y, 0)
        of_yx += tl.sum(grad_y * x, 0)
    if ACTIVATION == "dice_batch_norm":
        of_v += tl.sum(grad_v, 0)
        of_vx += tl.sum(grad_v * x, 0)
    return alpha, of_y, of_yx, of_v, of_vx


@triton.jit
def _store_sums(ptr, sums, o, BLOCK: tl.constexpr):
    for i in tl.static_range(5):
        tl.store(ptr + i * BLOCK + o, sums[i])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_backward_kernel(
    history_ptr, target_ptr, rows_ptr, folded_ptr, seed_ptr, grad_out_ptr, c_ptr, means_ptr, grad_history_ptr,
    grad_target_ptr, grad_c_ptr, partials_ptr,
    tasks, stride_gb, stride_gd, splits, L, parts_d, parts_h, parts_h2, dice_eps, threshold, kept_scale,
    stride_hb, stride_hl, stride_hd, stride_tb, stride_td, stride_mb, stride_ml,
    D: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    DROPOUT: tl.constexpr, FORM: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
    AT_WEIGHT2: tl.constexpr, AT_SUMS: tl.constexpr, AT_SUMS2: tl.constexpr, AT_BIAS: tl.constexpr,
    AT_OUTPUT: tl.constexpr, SIZE: tl.constexpr, BLOCK_L: tl.constexpr, LAST: tl.constexpr, WEIGHT2: tl.constexpr,
    FIRST: tl.constexpr, ROWS: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Tasks program_id(0), + num_programs(0), ..

    grad_history like history, contiguous; grad_c [tasks, BLOCK_H]; grad_target [tasks, D] without (Wt + Wd)^T dc; a
    program's sums, as ``Partials`` has them, [programs, SIZE]; means [2, BLOCK_H] and, of a second layer,
    [2, BLOCK_H2] are u and w. One layer is FIRST and LAST.
    """
    BLOCK_K: tl.constexpr = 32
    BLOCK_S: tl.constexpr = 32
    BLOCKS: tl.constexpr = BLOCK_D // BLOCK_K
    LAST_BLOCK: tl.constexpr = BLOCK_H2 if H2 > 0 else BLOCK_H
    pid, share = tl.program_id(0), tl.program_id(1)
    o_d, o_h, o_h2 = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H2)
    o_s, o_last = share * BLOCK_S + tl.arange(0, BLOCK_S), tl.arange(0, LAST_BLOCK)
    stride_hb, stride_hl = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN)
    stride_hd, D64 = between_columns(stride_hd, UNIT), aligned(D, ALIGN)
    wt_ptr, wm_ptr, wp_ptr, vectors_ptr, weight2_ptr, vectors2_ptr, kept_ptr = layers_of(
        folded_ptr, BLOCK_D, BLOCK_H, H2, BLOCK_H2
    )
    sum_ptr, peak_ptr, total_ptr, score_ptr = kept_of(kept_ptr, tasks // splits, D, SOFTMAX)
    means2_ptr = means_ptr + 2 * BLOCK_H if TRAINING else means_ptr
    none, none2 = tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_H2], tl.float32)
    sums, sums2 = (none, none, none, none, none), (none2, none2, none2, none2, none2)
    grad_out_weight, grad_out_bias = tl.zeros([LAST_BLOCK], tl.float32), 0.0
    grad_wm, grad_wp = tl.zeros([BLOCK_S, BLOCK_H], tl.float32), tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    grad_weight2, grad_bias2, grad_bias = tl.zeros([BLOCK_H2, BLOCK_H], tl.float32), none2, none
    for task in tl.range(pid, tasks, tl.num_programs(0), disable_licm=True):
        b, start, first, end, stored_end = rows_of(task, splits, rows_ptr, L, stride_mb, stride_ml, FORM, BLOCK_L)
        first_row = start if FORM == "offsets" else b * L
        row, target = history_ptr + b * stride_hb + start * stride_hl, target_ptr + b * stride_tb
        mask = rows_ptr + b * stride_mb if FORM == "mask" else rows_ptr
        grad_out = grad_out_ptr + b * stride_gb
        grad_history = grad_history_ptr + first_row * D64 if ROWS else grad_history_ptr
        peak, total, mean = 0.0, 1.0, 0.0  # of the scores, and sum_l w_l dw_l
        if SOFTMAX:
            peak, total = tl.load(peak_ptr + b), tl.load(total_ptr + b)
            b_grad_out = strided_vector(grad_out, o_d, D, stride_gd)
            mean = tl.sum(b_grad_out * tl.load(sum_ptr + b * D + o_d, mask=o_d < D, other=0.0), 0)
        grad_m, grad_c = tl.zeros([BLOCK_S, BLOCK_H], tl.float32), tl.zeros([BLOCK_H], tl.float32)
        for l0 in tl.range(first, end, BLOCK_L, disable_licm=True):
            o_l = l0 + tl.arange(0, BLOCK_L)
            valid = valid_rows(mask, o_l, end, stride_ml, FORM)
            history = row + o_l[:, None] * stride_hl
            rows = load_rows(history, valid, stride_hd, D, BLOCK_K, BLOCK_D)
            grad_score = tl.zeros([BLOCK_L], tl.float32)  # at first dw
            for k in tl.static_range(BLOCKS):
                o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
                grad_score += tl.sum(rows[k] * strided_vector(grad_out, o_k, D, stride_gd)[None, :], 1)
            weight = tl.load(score_ptr + first_row + o_l, mask=valid, other=0.0)
            if SOFTMAX:
                weight = tl.where(valid, exp_less(weight, peak) / total, 0.0)
                grad_score = weight * (grad_score - mean)
            c = tl.load(c_ptr + b * H + o_h, mask=o_h < H, other=0.0)
            x = first_layer(
                rows, parts_d, target, wm_ptr, wp_ptr, c, o_h, D, stride_td, PRECISION, BLOCK_L, BLOCK_K, BLOCK_D,
                BLOCK_H,
            )  # fmt: skip
            factor = dropout_factor(seed_ptr, 0, b, l0, o_h, threshold, kept_scale, DROPOUT, BLOCK_L, BLOCK_H)
            if LAST:
                grad_out_bias += tl.sum(grad_score, 0)
            if H2 > 0:
                a = activate(x, vectors_ptr, o_h, H, dice_eps, ACTIVATION, TRAINING, BLOCK_H) * factor
                x2 = second_layer(a, parts_h, weight2_ptr, vectors2_ptr, o_h2, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2)
                # dL/da2 before the dropout is grad_score2 out_weight, that of out_weight the sum of grad_score2 a2
                grad_score2 = grad_score[:, None] * dropout_factor(
                    seed_ptr, 1, b, l0, o_h2, threshold, kept_scale, DROPOUT, BLOCK_L, BLOCK_H2
                )
                if LAST:
                    a2 = activate(x2, vectors2_ptr, o_h2, H2, dice_eps, ACTIVATION, TRAINING, BLOCK_H2)
                    grad_out_weight += tl.sum(grad_score2 * a2, 0)
                grad_y, grad_v, grad_alpha = activate_backward(
                    grad_score2 * _vector(vectors2_ptr, OUT_WEIGHT, o_h2, BLOCK_H2), x2, vectors2_ptr, o_h2, H2,
                    dice_eps, ACTIVATION, TRAINING, BLOCK_H2,
                )  # fmt: skip
                if LAST:
                    sums2 = _plus_sums(sums2, grad_y, grad_v, grad_alpha, x2, ACTIVATION, TRAINING)
                grad_x2 = gradient_of_product(
                    grad_y, grad_v, x2, valid, vectors2_ptr, means2_ptr, o_h2, ACTIVATION, TRAINING, BLOCK_H2
                )
                if WEIGHT2:
                    grad_bias2 += tl.sum(grad_x2, 0)
                    grad_weight2 = product(tl.trans(grad_x2), a, grad_weight2, PRECISION)
                if FIRST or ROWS or WEIGHT:
                    grad_a = second_layer_backward(
                        grad_x2, parts_h2, weight2_ptr, o_h, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2
                    )
            else:
                grad_a = grad_score[:, None] * _vector(vectors_ptr, OUT_WEIGHT, o_h, BLOCK_H)
                if LAST:
                    a = activate(x, vectors_ptr, o_h, H, dice_eps, ACTIVATION, TRAINING, BLOCK_H) * factor
                    grad_out_weight += tl.sum(grad_score[:, None] * a, 0)
            if FIRST or ROWS or WEIGHT:
                grad_y, grad_v, grad_alpha = activate_backward(
                    grad_a * factor, x, vectors_ptr, o_h, H, dice_eps, ACTIVATION, TRAINING, BLOCK_H
                )
                if FIRST:
                    sums = _plus_sums(sums, grad_y, grad_v, grad_alpha, x, ACTIVATION, TRAINING)
            if ROWS or WEIGHT:
                grad_x = gradient_of_product(
                    grad_y, grad_v, x, valid, vectors_ptr, means_ptr, o_h, ACTIVATION, TRAINING, BLOCK_H
                )
            if WEIGHT:
                inside = valid[:, None] & (o_s < D)[None, :]
                s_history = tl.load(history + o_s[None, :] * stride_hd, mask=inside, other=0.0).to(tl.float32)
                grad_m = product(tl.trans(s_history), grad_x, grad_m, PRECISION)
            if ROWS:
                grad_c += tl.sum(grad_x, 0)
                grad = first_layer_backward(
                    grad_x, parts_h, target, wm_ptr, wp_ptr, o_d, D, stride_td, PRECISION, BLOCK_L, BLOCK_D, BLOCK_H
                )
                grad += weight[:, None] * strided_vector(grad_out, o_d, D, stride_gd)[None, :]
                stored = (o_l < stored_end)[:, None] & (o_d < D)[None, :]
                tl.store(
                    grad_history + o_l[:, None] * D64 + o_d[None, :], tl.where(valid[:, None], grad, 0.0), mask=stored
                )
        if ROWS:
            tl.store(grad_c_ptr + tl.cast(task, tl.int64) * BLOCK_H + o_h, grad_c)
            grad_bias += grad_c
            if FORM == "lengths" or FORM == "mask":
                done = first + tl.cdiv(tl.maximum(end - first, 0), BLOCK_L) * BLOCK_L
                zero_rows(grad_history, done, stored_end, o_d, D64, D, BLOCK_L, BLOCK_D)
        if WEIGHT:
            s_wp = tl.load(wp_ptr + o_h[None, :] * BLOCK_D + o_s[:, None])
            grad_target = grad_target_ptr + tl.cast(task, tl.int64) * D
            tl.store(grad_target + o_s, tl.sum(s_wp * grad_m, 1), mask=o_s < D)
            grad_wm += grad_m
            grad_wp += grad_m * strided_vector(target, o_s, D, stride_td)[:, None]
    if ROWS and FORM == "offsets":  # what no sample has
        if pid == 0:
            samples = tasks // splits
            zero_rows(
                grad_history_ptr, tl.cast(0, tl.int64), tl.load(rows_ptr).to(tl.int64), o_d, D64, D, BLOCK_L, BLOCK_D
            )
            behind = tl.maximum(tl.load(rows_ptr + samples).to(tl.int64), 0)
            zero_rows(grad_history_ptr, behind, tl.cast(L, tl.int64), o_d, D64, D, BLOCK_L, BLOCK_D)
    partial = partials_ptr + tl.cast(pid, tl.int64) * SIZE
    if LAST:
        tl.store(partial + AT_OUTPUT + o_last, grad_out_weight)
        tl.store(partial + AT_OUTPUT + LAST_BLOCK, grad_out_bias)
        if H2 > 0:
            _store_sums(partial + AT_SUMS2, sums2, o_h2, BLOCK_H2)
    if FIRST:
        _store_sums(partial + AT_SUMS, sums, o_h, BLOCK_H)
    if ROWS:
        tl.store(partial + AT_BIAS + o_h, grad_bias)
    if WEIGHT2:
        tl.store(partial + AT_WEIGHT2 + o_h2[:, None] * BLOCK_H + o_h[None, :], grad_weight2)
        tl.store(partial + AT_WEIGHT2 + BLOCK_H2 * BLOCK_H + o_h2, grad_bias2)
    if WEIGHT:
        slab = partial + o_s[:, None] * BLOCK_H + o_h[None, :]
        tl.store(slab, grad_wm)
        tl.store(slab + BLOCK_D * BLOCK_H, grad_wp)
