"""DIN attention in Triton: forward and backward, one or two hidden layers, scores and pooling in one kernel.

Sample b has target t [D] and history rows h_l [D]. The first layer W = [Wt | Wh | Wd | Wp] takes [t, h, t - h, t * h]:

    z_l = Wt t + Wh h_l + Wd (t - h_l) + Wp (t * h_l) + bias = c + M h_l
    c   = (Wt + Wd) t + bias,    M = (Wh - Wd) + Wp diag(t)        M is [H, D], one a sample, built on chip

    a_l = act(z_l)  [and z2_l = W2 a_l + bias2, a2_l = act(z2_l)],    s_l = <out_weight, a_l> + out_bias
    w_l = s_l, or softmax_l(s),    out = sum_l w_l h_l

Backward, with dw_l = <dout, h_l>, ds_l = dw_l or w_l (dw_l - sum_k w_k dw_k), G_l = dL/dz_l, dM = sum_l G_l h_l^T and
dc = sum_l G_l:

    dh_l = w_l dout + M^T G_l             dt = (Wt + Wd)^T dc + sum_H Wp * dM
    d(Wh - Wd) = sum_b dM_b               dWp = sum_b dM_b diag(t_b)               d(Wt + Wd) = sum_b dc_b t_b^T

Batch normalizations in eval are affine maps and are folded, the hidden layers' into weight and bias, Dice's into a
scale and a shift. Products without rows of history (c, d(Wt + Wd), (Wt + Wd)^T dc) are left to the library.

Flops a row: 2 D H (+ 2 H H2) forward; backward the same again, and 4 D H (+ 4 H H2). Bytes a row: forward D items and
the score's 4; the backward reads them (twice with a softmax) and writes D items. Beside its inputs the backward keeps
the scores alone. Lengths cost whole blocks of BLOCK_L rows; a mask costs all L.

A program of the backward has BLOCK_S columns of D of the samples p, p + PROGRAMS, ..: what needs all columns, z and the
gradient of a, is done again for each of the D / BLOCK_S shares. It sums the weights' gradients over its samples in this
order, and one reduction sums the programs: the same bits run after run.

Products run on tensor cores with float32 operands: tf32 keeps every bit of a 16-bit history and 10 of a weight's
mantissa; for float32, three tf32 products give float32's precision. AMD's take float32 as it is. The weights are read
from the caches for each block of rows, and products done in parts: a tensor core's factors pass through registers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._alignment import aligned, alignment
from rankkernels.ops.din_attention import params_per_layer, unflatten
from rankkernels.reference import BatchNorm, Hidden

PROGRAMS = 256  # of the backward: partial sums of the weights' gradients
BLOCK_S = 32  # of the backward: columns of D a program
MAX_WIDTH = 128  # of history rows and of hidden layers


@triton.jit
def _rows(rows_ptr, b, L, FORM: tl.constexpr):
    """First row of sample ``b`` (in the samples' common [N, D] with offsets) and its number of rows, within bounds."""
    if FORM == "offsets":
        start = tl.maximum(tl.load(rows_ptr + b).to(tl.int64), 0)
        return start, (tl.minimum(tl.load(rows_ptr + b + 1).to(tl.int64), L) - start).to(tl.int32)
    elif FORM == "lengths":
        return tl.cast(0, tl.int64), tl.maximum(tl.minimum(tl.load(rows_ptr + b), L), 0).to(tl.int32)
    else:
        return tl.cast(0, tl.int64), tl.cast(L, tl.int32)


@triton.jit
def _valid(mask_ptr, o_l, n, stride_ml, FORM: tl.constexpr):
    """Which rows are no padding; ``mask_ptr`` is at the sample's first."""
    valid = o_l < n
    if FORM == "mask":
        valid = valid & (tl.load(mask_ptr + o_l * tl.cast(stride_ml, tl.int64), mask=valid, other=0) != 0)
    return valid


@triton.jit
def _fused_weight(wm_ptr, wp_ptr, b_target, o_d, o_h, BLOCK_D: tl.constexpr):
    """M^T of one sample, columns ``o_d`` of D and units ``o_h``; the weights are padded with zeros to [H, BLOCK_D]."""
    o = o_h[None, :] * BLOCK_D + o_d[:, None]
    return tl.load(wm_ptr + o) + tl.load(wp_ptr + o) * b_target[:, None]


@triton.jit
def _vector(ptr, o_h, H, stride):
    return tl.load(ptr + o_h * tl.cast(stride, tl.int64), mask=o_h < H, other=0.0).to(tl.float32)


@triton.jit
def _slopes(alpha_ptr, scale_ptr, shift_ptr, o_h, H, stride_alpha, ACTIVATION: tl.constexpr):
    """What the activation learns, [H] each: alpha, and Dice's folded normalization. Zeros where it learns nothing."""
    zeros = tl.zeros(o_h.shape, tl.float32)
    alpha, scale, shift = zeros, zeros, zeros
    if ACTIVATION == "prelu" or ACTIVATION == "dice" or ACTIVATION == "dice_batch_norm":
        alpha = _vector(alpha_ptr, o_h, H, stride_alpha)
    if ACTIVATION == "dice_batch_norm":
        scale, shift = _vector(scale_ptr, o_h, H, 1), _vector(shift_ptr, o_h, H, 1)
    return alpha[None, :], scale[None, :], shift[None, :]


@triton.jit
def _dice_centred(z, o_h, H: tl.constexpr, dice_eps):
    """z less its row's mean over the H units, 0 past them, and 1 / sqrt(sum of its squares + H eps) [L, 1]."""
    centred = tl.where((o_h < H)[None, :], z - tl.sum(z, 1, keep_dims=True) / H, 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) + H * dice_eps)


@triton.jit
def _activate(z, slopes, o_h, H: tl.constexpr, dice_eps, ACTIVATION: tl.constexpr):
    alpha, scale, shift = slopes
    if ACTIVATION == "sigmoid":
        return tl.sigmoid(z)
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leakyrelu":
        return tl.where(z > 0, z, 0.01 * z)
    elif ACTIVATION == "prelu":
        return tl.where(z > 0, z, alpha * z)
    elif ACTIVATION == "dice":
        centred, r = _dice_centred(z, o_h, H, dice_eps)
        return z * (alpha + (1 - alpha) * tl.sigmoid(centred * r))
    elif ACTIVATION == "dice_batch_norm":
        return z * (alpha + (1 - alpha) * tl.sigmoid(z * scale + shift))
    else:
        tl.static_assert(ACTIVATION == "linear")
        return z


@triton.jit
def _activate_backward(grad, z, slopes, o_h, H: tl.constexpr, dice_eps, ACTIVATION: tl.constexpr):
    """Gradients of z [L, H] and, summed over the rows, of alpha, scale and shift [H]."""
    alpha, scale, shift = slopes
    zeros = tl.zeros(o_h.shape, tl.float32)
    grad_alpha, grad_scale, grad_shift = zeros, zeros, zeros
    if ACTIVATION == "sigmoid":
        a = tl.sigmoid(z)
        grad_z = grad * a * (1 - a)
    elif ACTIVATION == "relu":
        grad_z = tl.where(z > 0, grad, 0.0)
    elif ACTIVATION == "leakyrelu":
        grad_z = tl.where(z > 0, grad, 0.01 * grad)
    elif ACTIVATION == "prelu":
        grad_z = tl.where(z > 0, grad, alpha * grad)
        grad_alpha = tl.sum(tl.where(z > 0, 0.0, grad * z), 0)
    elif ACTIVATION == "dice":
        # y = r c with c = z - mean(z) and r = (sum c^2 + H eps)^-1/2: dc = r dy - r^3 c sum(c dy), dz = dc - mean(dc)
        centred, r = _dice_centred(z, o_h, H, dice_eps)
        p = tl.sigmoid(centred * r)
        grad_y = grad * z * (1 - alpha) * p * (1 - p)
        grad_c = r * grad_y - centred * (r * r * r * tl.sum(centred * grad_y, 1, keep_dims=True))
        grad_z = grad * (alpha + (1 - alpha) * p) + grad_c - tl.sum(grad_c, 1, keep_dims=True) / H
        grad_z = tl.where((o_h < H)[None, :], grad_z, 0.0)
        grad_alpha = tl.sum(grad * z * (1 - p), 0)
    elif ACTIVATION == "dice_batch_norm":
        p = tl.sigmoid(z * scale + shift)
        grad_y = grad * z * (1 - alpha) * p * (1 - p)
        grad_z = grad * (alpha + (1 - alpha) * p) + grad_y * scale
        grad_alpha = tl.sum(grad * z * (1 - p), 0)
        grad_scale = tl.sum(grad_y * z, 0)
        grad_shift = tl.sum(grad_y, 0)
    else:
        tl.static_assert(ACTIVATION == "linear")
        grad_z = grad
    return grad_z, grad_alpha, grad_scale, grad_shift


@triton.jit
def _first_layer(
    history, target, wm_ptr, wp_ptr, b_c, valid, o_h, D: tl.constexpr, stride_hd, stride_td, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """z = c + M h of the rows that ``history`` [L, 1] points to, BLOCK_K columns of M at a time."""
    z = tl.zeros([BLOCK_L, BLOCK_H], tl.float32) + b_c
    for d in range(0, D, BLOCK_K):
        o_k = d + tl.arange(0, BLOCK_K)
        inside = valid[:, None] & (o_k < D)[None, :]
        b_history = tl.load(history + o_k[None, :] * stride_hd, mask=inside, other=0.0).to(tl.float32)
        b_target = _vector(target, o_k, D, stride_td)
        b_m = _fused_weight(wm_ptr, wp_ptr, b_target, o_k, o_h, BLOCK_D)
        z = tl.dot(b_history, b_m, z, input_precision=PRECISION)
    return z


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _parts(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] in parts of 32 columns: a product takes registers for all of both factors that it is given."""
    if COLUMNS == 128:
        left, right = _halves(x, ROWS, COLUMNS)
        left, left_of_right = _halves(left, ROWS, 64), _halves(right, ROWS, 64)
        return left[0], left[1], left_of_right[0], left_of_right[1]
    elif COLUMNS == 64:
        return _halves(x, ROWS, COLUMNS)
    else:
        tl.static_assert(COLUMNS == 32)
        return x, x


@triton.jit
def _second_weight(weight2_ptr, o_h, o_h2, BLOCK_H: tl.constexpr):
    """W2^T, units ``o_h`` and ``o_h2``; padded like the first layer's."""
    return tl.load(weight2_ptr + o_h2[None, :] * BLOCK_H + o_h[:, None])


@triton.jit
def _second_layer(
    a, weight2_ptr, bias2_ptr, o_h2, H2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """z2 = W2 a + bias2 [L, H2]."""
    z2 = tl.zeros([BLOCK_L, BLOCK_H2], tl.float32) + _vector(bias2_ptr, o_h2, H2, 1)[None, :]
    parts = _parts(a, BLOCK_L, BLOCK_H)
    for i in tl.static_range(BLOCK_H // 32):
        b_weight2 = _second_weight(weight2_ptr, i * 32 + tl.arange(0, 32), o_h2, BLOCK_H)
        z2 = tl.dot(parts[i], b_weight2, z2, input_precision=PRECISION)
    return z2


@triton.jit
def _second_layer_backward(
    grad_z2, weight2_ptr, o_h, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """da = W2^T G2 [L, H]."""
    grad_a = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    parts = _parts(grad_z2, BLOCK_L, BLOCK_H2)
    for i in tl.static_range(BLOCK_H2 // 32):
        b_weight2 = _second_weight(weight2_ptr, o_h, i * 32 + tl.arange(0, 32), BLOCK_H)
        grad_a = tl.dot(parts[i], tl.trans(b_weight2), grad_a, input_precision=PRECISION)
    return grad_a


@triton.jit
def _first_layer_backward(
    grad_z, s_target, wm_ptr, wp_ptr, o_s, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh = M^T G at columns ``o_s`` [L, S]."""
    grad = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    parts = _parts(grad_z, BLOCK_L, BLOCK_H)
    for i in tl.static_range(BLOCK_H // 32):
        s_m = _fused_weight(wm_ptr, wp_ptr, s_target, o_s, i * 32 + tl.arange(0, 32), BLOCK_D)
        grad = tl.dot(parts[i], tl.trans(s_m), grad, input_precision=PRECISION)
    return grad


@triton.jit
def _exp_less(x, peak):
    """exp(x - peak), 0 where both are -inf."""
    return tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak))


@triton.jit(do_not_specialize=["L"])
def din_attention_kernel(
    history_ptr, target_ptr, rows_ptr, mask_ptr, c_ptr, wm_ptr, wp_ptr, alpha_ptr, scale_ptr, shift_ptr,
    weight2_ptr, bias2_ptr, alpha2_ptr, scale2_ptr, shift2_ptr, out_weight_ptr, out_bias_ptr, score_ptr, out_ptr, L,
    dice_eps, stride_hb, stride_hl, stride_hd, stride_tb, stride_td, stride_mb, stride_ml, stride_alpha, stride_alpha2,
    D: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, ACTIVATION: tl.constexpr, FORM: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """out [B, D] and the valid rows' scores, one a row of history: one sample."""
    b = tl.program_id(0).to(tl.int64)
    o_d, o_h, o_h2 = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H2)
    stride_hb, stride_hl = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN)
    start, n = _rows(rows_ptr, b, L, FORM)
    stride_hd, target = tl.cast(stride_hd, tl.int64), target_ptr + b * stride_tb
    row = history_ptr + b * stride_hb + start * stride_hl
    score = score_ptr + (start if FORM == "offsets" else b * L)
    mask = mask_ptr + b * stride_mb if FORM == "mask" else mask_ptr
    b_c = _vector(c_ptr + b * H, o_h, H, 1)[None, :]
    slopes = _slopes(alpha_ptr, scale_ptr, shift_ptr, o_h, H, stride_alpha, ACTIVATION)
    b_out_bias = tl.load(out_bias_ptr).to(tl.float32)
    out = tl.zeros([BLOCK_D], tl.float32)
    peak, total = -float("inf"), 0.0
    for l0 in range(0, n, BLOCK_L):
        o_l = l0 + tl.arange(0, BLOCK_L)
        valid = _valid(mask, o_l, n, stride_ml, FORM)
        z = _first_layer(
            row + o_l[:, None] * stride_hl, target, wm_ptr, wp_ptr, b_c, valid, o_h, D, stride_hd, stride_td,
            PRECISION, BLOCK_L, BLOCK_K, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        a = _activate(z, slopes, o_h, H, dice_eps, ACTIVATION)
        if H2 > 0:
            z2 = _second_layer(a, weight2_ptr, bias2_ptr, o_h2, H2, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2)
            slopes2 = _slopes(alpha2_ptr, scale2_ptr, shift2_ptr, o_h2, H2, stride_alpha2, ACTIVATION)
            a2 = _activate(z2, slopes2, o_h2, H2, dice_eps, ACTIVATION)
            b_score = tl.sum(a2 * _vector(out_weight_ptr, o_h2, H2, 1)[None, :], 1) + b_out_bias
        else:
            b_score = tl.sum(a * _vector(out_weight_ptr, o_h, H, 1)[None, :], 1) + b_out_bias
        tl.store(score + o_l, b_score, mask=valid)
        if SOFTMAX:
            b_score = tl.where(valid, b_score, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(b_score, 0))
            weight, decay = _exp_less(b_score, new_peak), _exp_less(peak, new_peak)
            out, total, peak = out * decay, total * decay + tl.sum(weight, 0), new_peak
        else:
            weight = tl.where(valid, b_score, 0.0)
        history = row + o_l[:, None] * stride_hl + o_d[None, :] * stride_hd
        b_history = tl.load(history, mask=valid[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        out += tl.sum(weight[:, None] * b_history, 0)
    if SOFTMAX:
        out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + b * D + o_d, out, mask=o_d < D)


@triton.jit(do_not_specialize=["B", "L"])
def din_attention_backward_kernel(
    grad_out_ptr, history_ptr, target_ptr, rows_ptr, mask_ptr, c_ptr, wm_ptr, wp_ptr, alpha_ptr, scale_ptr, shift_ptr,
    weight2_ptr, bias2_ptr, alpha2_ptr, scale2_ptr, shift2_ptr, out_weight_ptr, out_bias_ptr, score_ptr,
    grad_history_ptr, grad_target_ptr, grad_c_ptr, partials_ptr, B, L, dice_eps,
    stride_gb, stride_gd, stride_hb, stride_hl, stride_hd, stride_tb, stride_td, stride_mb, stride_ml,
    stride_alpha, stride_alpha2, stride_partial,
    D: tl.constexpr, H: tl.constexpr, H2: tl.constexpr, ACTIVATION: tl.constexpr, FORM: tl.constexpr,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """Samples program_id(0), + num_programs(0), .. and columns BLOCK_S of D at program_id(1).

    grad_history like history, contiguous; grad_target [B, D] without (Wt + Wd)^T dc, float32; grad_c [B, H]; and the
    program's sums of the weights' gradients, partials [programs, stride_partial], in the order of the last stores.
    """
    pid, share = tl.program_id(0), tl.program_id(1)
    o_d, o_h, o_h2 = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_H2)
    o_s = share * BLOCK_S + tl.arange(0, BLOCK_S)
    o_last = o_h2 if H2 > 0 else o_h
    stride_hb, stride_hl = aligned(stride_hb, ALIGN), aligned(stride_hl, ALIGN)
    stride_hd, D64 = tl.cast(stride_hd, tl.int64), aligned(D, ALIGN)
    grad_wm, grad_wp = tl.zeros([BLOCK_S, BLOCK_H], tl.float32), tl.zeros([BLOCK_S, BLOCK_H], tl.float32)
    grad_alpha, grad_scale = tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_H], tl.float32)
    grad_shift, grad_out_bias = tl.zeros([BLOCK_H], tl.float32), 0.0
    grad_out_weight = tl.zeros(o_last.shape, tl.float32)
    grad_weight2, grad_bias2 = tl.zeros([BLOCK_H2, BLOCK_H], tl.float32), tl.zeros([BLOCK_H2], tl.float32)
    grad_alpha2, grad_scale2 = tl.zeros([BLOCK_H2], tl.float32), tl.zeros([BLOCK_H2], tl.float32)
    grad_shift2 = tl.zeros([BLOCK_H2], tl.float32)
    for sample in range(pid, B, tl.num_programs(0)):
        b = tl.cast(sample, tl.int64)
        start, n = _rows(rows_ptr, b, L, FORM)
        first = start if FORM == "offsets" else b * L
        row = history_ptr + b * stride_hb + start * stride_hl
        mask = mask_ptr + b * stride_mb if FORM == "mask" else mask_ptr
        grad_history = grad_history_ptr + first * D64 + o_s[None, :]
        target = target_ptr + b * stride_tb
        s_target = _vector(target, o_s, D, stride_td)
        b_grad_out = _vector(grad_out_ptr + b * stride_gb, o_d, D, stride_gd)[None, :]
        s_grad_out = _vector(grad_out_ptr + b * stride_gb, o_s, D, stride_gd)[None, :]
        peak, total, mean = -float("inf"), 0.0, 0.0  # of the scores, and sum_l w_l dw_l
        if SOFTMAX:
            for l0 in range(0, n, BLOCK_L):
                o_l = l0 + tl.arange(0, BLOCK_L)
                valid = _valid(mask, o_l, n, stride_ml, FORM)
                inside = valid[:, None] & (o_d < D)[None, :]
                history = row + o_l[:, None] * stride_hl + o_d[None, :] * stride_hd
                b_history = tl.load(history, mask=inside, other=0.0).to(tl.float32)
                b_score = tl.load(score_ptr + first + o_l, mask=valid, other=-float("inf"))
                new_peak = tl.maximum(peak, tl.max(b_score, 0))
                weight, decay = _exp_less(b_score, new_peak), _exp_less(peak, new_peak)
                total = total * decay + tl.sum(weight, 0)
                mean = mean * decay + tl.sum(weight * tl.sum(b_history * b_grad_out, 1), 0)
                peak = new_peak
            total = tl.where(total > 0, total, 1.0)
            mean = mean / total
        grad_m, grad_c = tl.zeros([BLOCK_S, BLOCK_H], tl.float32), tl.zeros([BLOCK_H], tl.float32)
        for l0 in range(0, n, BLOCK_L):
            o_l = l0 + tl.arange(0, BLOCK_L)
            valid = _valid(mask, o_l, n, stride_ml, FORM)
            rows = valid[:, None]
            history = row + o_l[:, None] * stride_hl + o_d[None, :] * stride_hd
            b_history = tl.load(history, mask=rows & (o_d < D)[None, :], other=0.0).to(tl.float32)
            grad_weight = tl.sum(b_history * b_grad_out, 1)
            b_score = tl.load(score_ptr + first + o_l, mask=valid, other=0.0)
            if SOFTMAX:
                weight = tl.where(valid, _exp_less(b_score, peak) / total, 0.0)
                grad_score = weight * (grad_weight - mean)
            else:
                weight, grad_score = b_score, grad_weight
            grad_out_bias += tl.sum(grad_score, 0)
            b_c = _vector(c_ptr + b * H, o_h, H, 1)[None, :]
            z = _first_layer(
                row + o_l[:, None] * stride_hl, target, wm_ptr, wp_ptr, b_c, valid, o_h, D, stride_hd, stride_td,
                PRECISION, BLOCK_L, BLOCK_K, BLOCK_D, BLOCK_H,
            )  # fmt: skip
            slopes = _slopes(alpha_ptr, scale_ptr, shift_ptr, o_h, H, stride_alpha, ACTIVATION)
            a = _activate(z, slopes, o_h, H, dice_eps, ACTIVATION)
            if H2 > 0:
                z2 = _second_layer(a, weight2_ptr, bias2_ptr, o_h2, H2, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2)
                slopes2 = _slopes(alpha2_ptr, scale2_ptr, shift2_ptr, o_h2, H2, stride_alpha2, ACTIVATION)
                a2 = _activate(z2, slopes2, o_h2, H2, dice_eps, ACTIVATION)
                grad_out_weight += tl.sum(grad_score[:, None] * a2, 0)
                grad_a2 = grad_score[:, None] * _vector(out_weight_ptr, o_h2, H2, 1)[None, :]
                grad_z2, d_alpha2, d_scale2, d_shift2 = _activate_backward(
                    grad_a2, z2, slopes2, o_h2, H2, dice_eps, ACTIVATION
                )
                grad_z2 = tl.where(rows, grad_z2, 0.0)
                grad_alpha2, grad_scale2, grad_shift2 = (
                    grad_alpha2 + d_alpha2, grad_scale2 + d_scale2, grad_shift2 + d_shift2
                )  # fmt: skip
                grad_bias2 += tl.sum(grad_z2, 0)
                grad_weight2 = tl.dot(tl.trans(grad_z2), a, grad_weight2, input_precision=PRECISION)
                grad_a = _second_layer_backward(grad_z2, weight2_ptr, o_h, PRECISION, BLOCK_L, BLOCK_H, BLOCK_H2)
            else:
                grad_out_weight += tl.sum(grad_score[:, None] * a, 0)
                grad_a = grad_score[:, None] * _vector(out_weight_ptr, o_h, H, 1)[None, :]
            grad_z, d_alpha, d_scale, d_shift = _activate_backward(grad_a, z, slopes, o_h, H, dice_eps, ACTIVATION)
            grad_z = tl.where(rows, grad_z, 0.0)
            grad_alpha, grad_scale, grad_shift = grad_alpha + d_alpha, grad_scale + d_scale, grad_shift + d_shift
            grad_c += tl.sum(grad_z, 0)
            history = row + o_l[:, None] * stride_hl + o_s[None, :] * stride_hd
            s_history = tl.load(history, mask=rows & (o_s < D)[None, :], other=0.0).to(tl.float32)
            grad_m = tl.dot(tl.trans(s_history), grad_z, grad_m, input_precision=PRECISION)
            grad = _first_layer_backward(
                grad_z, s_target, wm_ptr, wp_ptr, o_s, PRECISION, BLOCK_L, BLOCK_S, BLOCK_D, BLOCK_H
            )
            grad += weight[:, None] * s_grad_out
            end = n if FORM == "offsets" else L
            stored = (o_l < end)[:, None] & (o_s < D)[None, :]
            tl.store(grad_history + o_l[:, None] * D64, tl.where(rows, grad, 0.0), mask=stored)
        if FORM == "lengths":
            for l0 in range(tl.cdiv(n, BLOCK_L) * BLOCK_L, L, BLOCK_L):
                o_l = l0 + tl.arange(0, BLOCK_L)
                stored = (o_l < L)[:, None] & (o_s < D)[None, :]
                tl.store(grad_history + o_l[:, None] * D64, tl.zeros([BLOCK_L, BLOCK_S], tl.float32), mask=stored)
        grad_wm += grad_m
        grad_wp += grad_m * s_target[:, None]
        s_wp = tl.load(wp_ptr + o_h[None, :] * BLOCK_D + o_s[:, None])
        tl.store(grad_target_ptr + b * D64 + o_s, tl.sum(s_wp * grad_m, 1), mask=o_s < D)
        if share == 0:
            tl.store(grad_c_ptr + b * H + o_h, grad_c, mask=o_h < H)
    partial = partials_ptr + tl.cast(pid, tl.int64) * stride_partial
    slab = o_s[:, None] + o_h[None, :] * BLOCK_D
    tl.store(partial + slab, grad_wm)
    tl.store(partial + BLOCK_H * BLOCK_D + slab, grad_wp)
    if share == 0:
        partial += 2 * BLOCK_H * BLOCK_D
        tl.store(partial + o_h, grad_alpha)
        tl.store(partial + BLOCK_H + o_h, grad_scale)
        tl.store(partial + 2 * BLOCK_H + o_h, grad_shift)
        partial += 3 * BLOCK_H
        tl.store(partial + o_last, grad_out_weight)
        if H2 > 0:
            partial += BLOCK_H2
            tl.store(partial + o_h2, grad_bias2)
            tl.store(partial + BLOCK_H2 + o_h2, grad_alpha2)
            tl.store(partial + 2 * BLOCK_H2 + o_h2, grad_scale2)
            tl.store(partial + 3 * BLOCK_H2 + o_h2, grad_shift2)
            partial += 4 * BLOCK_H2
            tl.store(partial + o_h2[:, None] * BLOCK_H + o_h[None, :], grad_weight2)
            tl.store(partial + BLOCK_H2 * BLOCK_H, grad_out_bias)
        else:
            tl.store(partial + BLOCK_H, grad_out_bias)


class _Layer(NamedTuple):
    """A hidden layer as the kernels take it, in float32: [H, in], [H], [H] or [1], and Dice's folded norm [H], [H]."""

    weight: Tensor
    bias: Tensor
    alpha: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def _folded(hidden: Hidden) -> _Layer:
    """Batch normalizations in eval are affine: s (x - mean) + bias with s = weight / sqrt(var + eps)."""
    weight, bias = hidden.weight.float().contiguous(), hidden.bias.float().contiguous()
    if hidden.norm is not None:
        s = _scale(hidden.norm)
        weight = weight * s[:, None]
        bias = (bias - hidden.norm.running_mean) * s + hidden.norm.bias
    scale = shift = None
    if hidden.dice_norm is not None:
        scale = _scale(hidden.dice_norm)
        shift = hidden.dice_norm.bias - hidden.dice_norm.running_mean * scale
    alpha = None if hidden.alpha is None else hidden.alpha.expand(bias.numel())
    return _Layer(weight, bias, alpha, scale, shift)


def _scale(norm: BatchNorm) -> Tensor:
    return norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)


def _unfolded(hidden: Hidden, grad: _Layer) -> list[Tensor]:
    """Gradients of the parameters of ``hidden``, in the order of the op's ``params``."""
    grad_weight, grad_bias, grads = grad.weight, grad.bias, []
    if hidden.norm is not None:
        norm, s = hidden.norm, _scale(hidden.norm)
        grad_s = (grad_weight * hidden.weight).sum(1) + grad_bias * (hidden.bias - norm.running_mean)
        grads += [grad_s * torch.rsqrt(norm.running_var + norm.eps), grad_bias]
        grad_weight, grad_bias = grad_weight * s[:, None], grad_bias * s
    if hidden.alpha is not None:
        grads.append(grad.alpha.sum(0, keepdim=True) if hidden.alpha.numel() == 1 else grad.alpha)
    if hidden.dice_norm is not None:
        norm = hidden.dice_norm
        grad_scale = grad.scale - norm.running_mean * grad.shift
        grads += [grad_scale * torch.rsqrt(norm.running_var + norm.eps), grad.shift]
    return [grad_weight, grad_bias, *grads]


def supports(history: Tensor, params: Sequence[Tensor], activation: str, batch_norm: bool, training: bool) -> bool:
    """Whether the kernels serve these arguments; the reference does the others.

    One or two hidden layers, D and hidden widths up to MAX_WIDTH, float32, float16 and bfloat16; in training no
    normalization over the batch.
    """
    first, *second = params[: -2 : params_per_layer(activation, batch_norm)] or [None, None, None]
    return (
        len(second) <= 1
        and max(history.size(-1), first.size(0), *(w.size(0) for w in second)) <= MAX_WIDTH
        and history.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not (training and (batch_norm or activation == "dice_batch_norm"))
    )


def _block(width: int) -> int:
    """The power of two, 32 at least, that holds ``width``: a block of it has more columns than rows."""
    return max(32, triton.next_power_of_2(width))


def _padded(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, _block(columns) - columns, 0, _block(rows) - rows)).contiguous()


def _arguments(history, target, lengths, mask, offsets, hidden, out_weight, out_bias, use_softmax, dice_eps):
    """What both kernels take, and Wt + Wd [H, D]."""
    D, layers = target.size(1), [_folded(h) for h in hidden]
    first, second = layers[0], layers[1] if len(layers) > 1 else None
    H, H2 = first.bias.numel(), 0 if second is None else second.bias.numel()
    weight = first.weight.view(H, 4, D)
    weight_t = weight[:, 0] + weight[:, 2]
    if offsets is not None:
        form, rows, (stride_hb, stride_hl, stride_hd) = "offsets", offsets.contiguous(), (0, *history.stride())
    else:
        form = "all" if lengths is None and mask is None else "lengths" if mask is None else "mask"
        stride_hb, stride_hl, stride_hd = history.stride()
        rows = None if lengths is None else lengths.contiguous()
    stride_mb, stride_ml = (0, 0) if mask is None else mask.stride()
    precision = "ieee" if torch.version.hip else "tf32x3" if history.dtype == torch.float32 else "tf32"
    arguments = dict(
        history_ptr=history, target_ptr=target, rows_ptr=rows, mask_ptr=mask,
        c_ptr=torch.addmm(first.bias, target.float(), weight_t.t()),
        wm_ptr=_padded(weight[:, 1] - weight[:, 2]), wp_ptr=_padded(weight[:, 3]),
        alpha_ptr=first.alpha, scale_ptr=first.scale, shift_ptr=first.shift,
        weight2_ptr=None, bias2_ptr=None, alpha2_ptr=None, scale2_ptr=None, shift2_ptr=None,
        out_weight_ptr=out_weight.contiguous(), out_bias_ptr=out_bias, L=history.size(-2), dice_eps=dice_eps,
        stride_hb=stride_hb, stride_hl=stride_hl, stride_hd=stride_hd, stride_tb=target.stride(0),
        stride_td=target.stride(1), stride_mb=stride_mb, stride_ml=stride_ml,
        stride_alpha=0 if first.alpha is None else first.alpha.stride(0), stride_alpha2=0,
        D=D, H=H, H2=H2, ACTIVATION=hidden[0].activation, FORM=form, SOFTMAX=use_softmax, PRECISION=precision,
        ALIGN=alignment(history), BLOCK_K=16, BLOCK_D=_block(D), BLOCK_H=_block(H), BLOCK_H2=_block(H2),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    if second is not None:
        arguments |= dict(
            weight2_ptr=_padded(second.weight), bias2_ptr=second.bias, alpha2_ptr=second.alpha,
            scale2_ptr=second.scale, shift2_ptr=second.shift,
            stride_alpha2=0 if second.alpha is None else second.alpha.stride(0),
        )  # fmt: skip
    return arguments, weight_t


def din_attention(
    history: Tensor, target: Tensor, lengths: Tensor | None, mask: Tensor | None, offsets: Tensor | None,
    params: Sequence[Tensor], running_stats: Sequence[Tensor], activation: str, batch_norm: bool, use_softmax: bool,
    norm_eps: float, dice_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments as the op's, those that ``supports`` allows -> out [B, D] and what the backward needs.

    That is one float32 a row of history, its score before a softmax.
    """
    B, D = target.shape
    out = torch.empty((B, D), dtype=history.dtype, device=history.device)
    score = torch.zeros(history.shape[:-1], dtype=torch.float32, device=history.device).flatten()
    if B == 0:
        return out, score
    hidden, out_weight, out_bias = unflatten(params, running_stats, activation, batch_norm, norm_eps, dice_eps)
    with torch.cuda.device_of(history):
        arguments, _ = _arguments(
            history, target, lengths, mask, offsets, hidden, out_weight, out_bias, use_softmax, dice_eps
        )
        din_attention_kernel[(B,)](score_ptr=score, out_ptr=out, BLOCK_L=32, **arguments)
    return out, score


def din_attention_backward(
    grad_out: Tensor, score: Tensor, history: Tensor, target: Tensor, lengths: Tensor | None, mask: Tensor | None,
    offsets: Tensor | None, params: Sequence[Tensor], running_stats: Sequence[Tensor], activation: str,
    batch_norm: bool, use_softmax: bool, norm_eps: float, dice_eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """grad_out [B, D], score and the forward's arguments -> gradients of history (contiguous), target and params."""
    B, D = target.shape
    if B == 0:
        return torch.zeros_like(history), torch.zeros_like(target), [torch.zeros_like(p) for p in params]
    hidden, out_weight, out_bias = unflatten(params, running_stats, activation, batch_norm, norm_eps, dice_eps)
    with torch.cuda.device_of(history):
        arguments, weight_t = _arguments(
            history, target, lengths, mask, offsets, hidden, out_weight, out_bias, use_softmax, dice_eps
        )
        H, H2, BLOCK_D, BLOCK_H, BLOCK_H2 = (arguments[k] for k in ("H", "H2", "BLOCK_D", "BLOCK_H", "BLOCK_H2"))
        programs = min(B, PROGRAMS)
        sizes = [BLOCK_H * BLOCK_D] * 2 + [BLOCK_H] * 3
        sizes += [BLOCK_H2] * 5 + [BLOCK_H2 * BLOCK_H, 1] if H2 else [BLOCK_H, 1]
        empty = functools.partial(torch.empty, dtype=torch.float32, device=history.device)
        grad_history = torch.empty(history.shape, dtype=history.dtype, device=history.device)
        grad_target, grad_c, partials = empty(B, D), empty(B, H), empty(programs, sum(sizes))
        din_attention_backward_kernel[(programs, BLOCK_D // BLOCK_S)](
            grad_out_ptr=grad_out, score_ptr=score, grad_history_ptr=grad_history, grad_target_ptr=grad_target,
            grad_c_ptr=grad_c, partials_ptr=partials, B=B, stride_gb=grad_out.stride(0), stride_gd=grad_out.stride(1),
            stride_partial=partials.stride(0), BLOCK_L=16, BLOCK_S=BLOCK_S, **arguments,
        )  # fmt: skip
        grad_wm, grad_wp, alpha, scale, shift, grad_out_weight, *rest = partials.sum(0).split(sizes)
        grad_wm, grad_wp = (g.view(BLOCK_H, BLOCK_D)[:H, :D] for g in (grad_wm, grad_wp))
        grad_wt = grad_c.t() @ target.float()
        grad_weight = torch.cat([grad_wt, grad_wm, grad_wt - grad_wm, grad_wp], 1)
        grads = _unfolded(hidden[0], _Layer(grad_weight, grad_c.sum(0), alpha[:H], scale[:H], shift[:H]))
        if H2:
            bias2, alpha2, scale2, shift2, weight2 = rest[:5]
            weight2 = weight2.view(BLOCK_H2, BLOCK_H)[:H2, :H]
            grads += _unfolded(hidden[1], _Layer(weight2, bias2[:H2], alpha2[:H2], scale2[:H2], shift2[:H2]))
        grads += [grad_out_weight[None, : H2 or H], rest[-1]]
        grad_target = torch.addmm(grad_target, grad_c, weight_t).to(target.dtype)
    return grad_history, grad_target, [g.to(p.dtype).contiguous() for g, p in zip(grads, params)]
