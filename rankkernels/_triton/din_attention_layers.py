"""The hidden layers of DIN attention as its Triton kernels take them, each normalization folded into a product, and
what the kernels' sums are for the layers' own parameters.

A normalization is an affine map once its mean m and variance are known, r = (variance + eps)^-1/2. In eval a product
gives y = gamma (z - m) r + beta, and a Dice's v = v_scale y + v_shift. In training m and r are those of the batch's
valid rows; a product gives x = (z - m) r, and y = y_scale x + y_shift, v = v_scale x + v_shift. There

    G = dL/dx = y_scale dy + v_scale dv - u - w x,    dz = r G

with u and w the means over rows of what is normalized and of its product with x. A layer with both a normalization and
Dice's has y = gamma x + beta, so Dice's statistics follow: mean beta, variance gamma^2 var / (var + eps).

Each kernel is one launch where PyTorch would have some twenty, of a few thousand numbers each: they cost the host more
than the products cost the GPU. Partial sums are added in the order of their programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton.din_attention_blocks import (
    ALPHA,
    BIAS,
    COUNT,
    OUT_WEIGHT,
    UNSPECIALIZED,
    V_SCALE,
    V_SHIFT,
    VAR,
    Y_SCALE,
    Y_SHIFT,
    R,
)


@triton.jit
def _units(ptr, o, H: tl.constexpr):
    """[H] values in float32, 0 past them."""
    return tl.load(ptr + o, mask=o < H, other=0.0).to(tl.float32)


@triton.jit
def _slopes(alpha_ptr, o, H: tl.constexpr, ONE_ALPHA: tl.constexpr):
    """alpha of each unit, be it one for all."""
    if ONE_ALPHA:
        return tl.where(o < H, tl.load(alpha_ptr).to(tl.float32), 0.0)
    else:
        return _units(alpha_ptr, o, H)


@triton.jit
def _inverse_std(var, eps, o, H: tl.constexpr):
    return tl.where(o < H, tl.rsqrt(var + eps), 0.0)


@triton.jit
def _merged(partials_ptr, programs, o_u, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """Number of rows, mean and biased variance of some units, from those of all programs."""
    o_p = tl.arange(0, BLOCK_P)
    partial, inside = partials_ptr + o_p * (2 * BLOCK_H + 1), o_p < programs
    count = tl.load(partial + 2 * BLOCK_H, mask=inside, other=0.0)
    b_mean = tl.load(partial[:, None] + o_u[None, :], mask=inside[:, None], other=0.0)
    b_squares = tl.load(partial[:, None] + BLOCK_H + o_u[None, :], mask=inside[:, None], other=0.0)
    n = tl.sum(count, 0)
    total = tl.maximum(n, 1.0)
    mean = tl.sum(count[:, None] * b_mean, 0) / total
    delta = b_mean - mean[None, :]
    return n, mean, tl.sum(b_squares + count[:, None] * delta * delta, 0) / total


@triton.jit
def _store_vector(vectors_ptr, WHICH: tl.constexpr, value, o, H: tl.constexpr, BLOCK_H: tl.constexpr):
    tl.store(vectors_ptr + WHICH * BLOCK_H + o, tl.where(o < H, value, 0.0))


@triton.jit
def _store_weight(
    weight_ptr, folded_ptr, scale, o_u, FIRST: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The units' rows of the weight times ``scale``; of the first layer's four parts as Wt + Wd, Wh - Wd and Wp."""
    o_k = tl.arange(0, BLOCK_K)
    inside, scale = (o_u < H)[:, None] & (o_k < K)[None, :], scale[:, None]
    out = folded_ptr + o_u[:, None] * BLOCK_K + o_k[None, :]
    if FIRST:
        row = weight_ptr + o_u[:, None] * (4 * K) + o_k[None, :]
        wt = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        wh = tl.load(row + K, mask=inside, other=0.0).to(tl.float32)
        wd = tl.load(row + 2 * K, mask=inside, other=0.0).to(tl.float32)
        wp = tl.load(row + 3 * K, mask=inside, other=0.0).to(tl.float32)
        tl.store(out, (wt + wd) * scale)
        tl.store(out + BLOCK_H * BLOCK_K, (wh - wd) * scale)
        tl.store(out + 2 * BLOCK_H * BLOCK_K, wp * scale)
    else:
        weight = tl.load(weight_ptr + o_u[:, None] * K + o_k[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(out, weight * scale)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_fold_kernel(
    weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, alpha_ptr, dice_weight_ptr, dice_bias_ptr, mean_ptr, var_ptr,
    dice_mean_ptr, dice_var_ptr, out_weight_ptr, partials_ptr, stats_ptr, folded_ptr,
    programs, norm_eps, dice_eps,
    AT_LAYER: tl.constexpr, AT_STATS: tl.constexpr, STATISTICS: tl.constexpr, ONE_ALPHA: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """A layer's weight and vectors, of BLOCK_U units, with its normalizations folded into them: STATISTICS "none", the
    "running" ones or those of the "batch", from its partial ones; of these the statistics as the op returns them.

    In training a normalization and Dice's have the statistics of one product.
    """
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    unit = o_u < H
    FIRST: tl.constexpr = AT_LAYER == 0
    folded_ptr, stats_ptr = folded_ptr + AT_LAYER, stats_ptr + AT_STATS if STATISTICS == "batch" else stats_ptr
    vectors_ptr = folded_ptr + (3 if FIRST else 1) * BLOCK_H * BLOCK_K
    scale, bias = tl.full([BLOCK_U], 1.0, tl.float32), _units(bias_ptr, o_u, H)
    if alpha_ptr is not None:
        _store_vector(vectors_ptr, ALPHA, _slopes(alpha_ptr, o_u, H, ONE_ALPHA), o_u, H, BLOCK_H)
    if out_weight_ptr is not None:
        _store_vector(vectors_ptr, OUT_WEIGHT, _units(out_weight_ptr, o_u, H), o_u, H, BLOCK_H)
    if STATISTICS == "running":
        if norm_weight_ptr is not None:
            scale = _units(norm_weight_ptr, o_u, H) * _inverse_std(_units(var_ptr, o_u, H), norm_eps, o_u, H)
            bias = (bias - _units(mean_ptr, o_u, H)) * scale + _units(norm_bias_ptr, o_u, H)
        if dice_weight_ptr is not None:
            v_scale = _units(dice_weight_ptr, o_u, H) * _inverse_std(_units(dice_var_ptr, o_u, H), dice_eps, o_u, H)
            v_shift = _units(dice_bias_ptr, o_u, H) - _units(dice_mean_ptr, o_u, H) * v_scale
            _store_vector(vectors_ptr, V_SCALE, v_scale, o_u, H, BLOCK_H)
            _store_vector(vectors_ptr, V_SHIFT, v_shift, o_u, H, BLOCK_H)
    if STATISTICS == "batch":
        n, mean, var = _merged(partials_ptr, programs, o_u, BLOCK_H, BLOCK_P)
        unbiased = n / tl.maximum(n - 1.0, 1.0)
        scale = _inverse_std(var, dice_eps if norm_weight_ptr is None else norm_eps, o_u, H)
        bias = (bias - mean) * scale
        tl.store(stats_ptr + o_u, mean, mask=unit)
        tl.store(stats_ptr + H + o_u, var * unbiased, mask=unit)
        if norm_weight_ptr is None:
            y_scale, y_shift = 1 / scale, mean
        else:
            y_scale, y_shift = _units(norm_weight_ptr, o_u, H), _units(norm_bias_ptr, o_u, H)
        if dice_weight_ptr is not None:
            v_scale = _units(dice_weight_ptr, o_u, H)
            if norm_weight_ptr is not None:
                y_var = y_scale * scale * y_scale * scale * var
                v_scale *= y_scale * _inverse_std(y_var, dice_eps, o_u, H)
                tl.store(stats_ptr + 2 * H + o_u, y_shift, mask=unit)
                tl.store(stats_ptr + 3 * H + o_u, y_var * unbiased, mask=unit)
            _store_vector(vectors_ptr, V_SCALE, v_scale, o_u, H, BLOCK_H)
            _store_vector(vectors_ptr, V_SHIFT, _units(dice_bias_ptr, o_u, H), o_u, H, BLOCK_H)
        _store_vector(vectors_ptr, Y_SCALE, y_scale, o_u, H, BLOCK_H)
        _store_vector(vectors_ptr, Y_SHIFT, y_shift, o_u, H, BLOCK_H)
        _store_vector(vectors_ptr, R, scale, o_u, H, BLOCK_H)
        _store_vector(vectors_ptr, VAR, var, o_u, H, BLOCK_H)
        _store_vector(vectors_ptr, COUNT, n, o_u, H, BLOCK_H)
    _store_vector(vectors_ptr, BIAS, bias, o_u, H, BLOCK_H)
    _store_weight(weight_ptr, folded_ptr, scale, o_u, FIRST, K, H, BLOCK_K, BLOCK_H)


@triton.jit
def _sum_of(partial, inside, AT: tl.constexpr, o):
    """Sum over programs, whose numbers begin at ``partial`` [P, 1], of what each has at AT + o."""
    return tl.sum(tl.load(partial + AT + o[None, :], mask=inside, other=0.0), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_sums_kernel(
    partials_ptr, folded_ptr, norm_weight_ptr, dice_weight_ptr, dice_mean_ptr, dice_var_ptr, means_ptr,
    grad_norm_weight_ptr, grad_norm_bias_ptr, grad_alpha_ptr, grad_dice_weight_ptr, grad_dice_bias_ptr,
    grad_out_weight_ptr, grad_out_bias_ptr,
    programs, dice_eps,
    TRAINING: tl.constexpr, ONE_ALPHA: tl.constexpr, AT_VECTORS: tl.constexpr, AT_MEANS: tl.constexpr,
    AT_SUMS: tl.constexpr, AT_OUTPUT: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's alpha and normalizations, but in eval its own, and, of the last layer, of the output
    layer's weight and bias; in training u and w [2, BLOCK_H], too. One program."""
    BLOCK_P: tl.constexpr = 32
    vectors_ptr = folded_ptr + AT_VECTORS
    o, o_one = tl.arange(0, BLOCK_H), tl.arange(0, 1)
    unit, none = o < H, tl.zeros([BLOCK_H], tl.float32)
    of_alpha, of_y, of_yx, of_v, of_vx, grad_out_weight = none, none, none, none, none, none
    grad_out_bias = tl.zeros([1], tl.float32)
    for p0 in tl.range(0, programs, BLOCK_P):
        o_p = p0 + tl.arange(0, BLOCK_P)
        inside, partial = (o_p < programs)[:, None], partials_ptr + o_p.to(tl.int64)[:, None] * SIZE
        if grad_alpha_ptr is not None:
            of_alpha += _sum_of(partial, inside, AT_SUMS, o)
        if TRAINING and norm_weight_ptr is not None:
            of_y += _sum_of(partial, inside, AT_SUMS + BLOCK_H, o)
            of_yx += _sum_of(partial, inside, AT_SUMS + 2 * BLOCK_H, o)
        if dice_weight_ptr is not None:
            of_v += _sum_of(partial, inside, AT_SUMS + 3 * BLOCK_H, o)
            of_vx += _sum_of(partial, inside, AT_SUMS + 4 * BLOCK_H, o)
        if grad_out_weight_ptr is not None:
            grad_out_weight += _sum_of(partial, inside, AT_OUTPUT, o)
            grad_out_bias += _sum_of(partial, inside, AT_OUTPUT + BLOCK_H, o_one)
    if grad_alpha_ptr is not None:
        if ONE_ALPHA:
            tl.store(grad_alpha_ptr, tl.sum(tl.where(unit, of_alpha, 0.0), 0))
        else:
            tl.store(grad_alpha_ptr + o, of_alpha, mask=unit)
    if dice_weight_ptr is not None:
        grad_dice_weight, dice_weight = of_vx, _units(dice_weight_ptr, o, H)
        if not TRAINING:
            dice_r = _inverse_std(_units(dice_var_ptr, o, H), dice_eps, o, H)
            grad_dice_weight = (of_vx - _units(dice_mean_ptr, o, H) * of_v) * dice_r
    if TRAINING:
        count = tl.maximum(tl.load(vectors_ptr + COUNT * BLOCK_H), 1.0)
        if norm_weight_ptr is None:
            u, w = dice_weight * of_v, dice_weight * of_vx
        else:
            norm_weight = _units(norm_weight_ptr, o, H)
            u, w = norm_weight * of_y, norm_weight * of_yx
            grad_norm_weight = of_yx
            if dice_weight_ptr is not None:
                # v = beta' + gamma' n, n = s x with s = gamma r', r' = (gamma^2 q + eps')^-1/2 and q = var r^2, the
                # mean of x^2: dL/dy = dy + gamma' r' (dv - mean(dv) - n mean(dv n))
                r = tl.load(vectors_ptr + R * BLOCK_H + o)
                q = tl.load(vectors_ptr + VAR * BLOCK_H + o) * r * r
                dice_r = _inverse_std(norm_weight * norm_weight * q, dice_eps, o, H)
                s, k = norm_weight * dice_r, dice_weight * dice_r
                grad_dice_weight = s * of_vx
                grad_norm_weight = of_yx + k * of_vx * (1 - s * s * q)
                u, w = norm_weight * (of_y + k * of_v), norm_weight * (grad_norm_weight + k * s * s * of_vx)
            tl.store(grad_norm_weight_ptr + o, grad_norm_weight, mask=unit)
            tl.store(grad_norm_bias_ptr + o, of_y, mask=unit)
        tl.store(means_ptr + AT_MEANS + o, tl.where(unit, u / count, 0.0))
        tl.store(means_ptr + AT_MEANS + BLOCK_H + o, tl.where(unit, w / count, 0.0))
    if dice_weight_ptr is not None:
        tl.store(grad_dice_weight_ptr + o, grad_dice_weight, mask=unit)
        tl.store(grad_dice_bias_ptr + o, of_v, mask=unit)
    if grad_out_weight_ptr is not None:
        tl.store(grad_out_weight_ptr + o, grad_out_weight, mask=unit)
        tl.store(grad_out_bias_ptr + o_one, grad_out_bias)


@triton.jit
def _sum_of_tile(partial, inside, o):
    return tl.sum(tl.load(partial[:, None, :] + o[None, :, :], mask=inside[:, None, :], other=0.0), 0)


@triton.jit
def _share(grad, row, inside):
    """What of the scale's gradient a part of the weight brings, [units]."""
    return tl.sum(grad * tl.load(row, mask=inside, other=0.0).to(tl.float32), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def din_attention_unfold_kernel(
    partials_ptr, grad_wt_ptr, folded_ptr, weight_ptr, bias_ptr, norm_weight_ptr, mean_ptr, var_ptr,
    grad_weight_ptr, grad_bias_ptr, grad_norm_weight_ptr, grad_norm_bias_ptr,
    programs, norm_eps,
    TRAINING: tl.constexpr, AT_VECTORS: tl.constexpr, AT_WEIGHT: tl.constexpr, AT_BIAS: tl.constexpr,
    SIZE: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's weight, of BLOCK_U units and BLOCK_C columns of each part, and of its bias; and in eval
    of its normalization, where ``norm_weight`` is not None, and BLOCK_C has all columns."""
    o_u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    unit, inside = o_u < H, (o_c < K)[:, None] & (o_u < H)[None, :]
    FIRST: tl.constexpr = AT_WEIGHT == 0
    scale = tl.full([BLOCK_U], 1.0, tl.float32)
    if TRAINING:
        scale = tl.load(folded_ptr + AT_VECTORS + R * BLOCK_H + o_u)
    elif norm_weight_ptr is not None:
        r = _inverse_std(_units(var_ptr, o_u, H), norm_eps, o_u, H)
        scale = _units(norm_weight_ptr, o_u, H) * r
    if FIRST:
        o = o_c[:, None] * BLOCK_H + o_u[None, :]
    else:
        o = o_u[None, :] * BLOCK_K + o_c[:, None]
    grad_bias = tl.zeros([BLOCK_U], tl.float32)
    grad_weight = tl.zeros([BLOCK_C, BLOCK_U], tl.float32)  # of the first layer, Wh - Wd's
    grad_wp = grad_weight
    for p0 in tl.range(0, programs, BLOCK_P):
        o_p = p0 + tl.arange(0, BLOCK_P)
        there, partial = (o_p < programs)[:, None], partials_ptr + o_p.to(tl.int64)[:, None] * SIZE
        grad_bias += _sum_of(partial, there, AT_BIAS, o_u)
        grad_weight += _sum_of_tile(partial + AT_WEIGHT, there, o)
        if FIRST:
            grad_wp += _sum_of_tile(partial + AT_WEIGHT + BLOCK_K * BLOCK_H, there, o)
    if FIRST:
        grad_wt = tl.load(grad_wt_ptr + o_u[None, :] * K + o_c[:, None], mask=inside, other=0.0)
        row = o_u[None, :] * (4 * K) + o_c[:, None]
        grad = grad_weight_ptr + row
        tl.store(grad, grad_wt * scale[None, :], mask=inside)
        tl.store(grad + K, grad_weight * scale[None, :], mask=inside)
        tl.store(grad + 2 * K, (grad_wt - grad_weight) * scale[None, :], mask=inside)
        tl.store(grad + 3 * K, grad_wp * scale[None, :], mask=inside)
    else:
        row = o_u[None, :] * K + o_c[:, None]
        tl.store(grad_weight_ptr + row, grad_weight * scale[None, :], mask=inside)
    if tl.program_id(1) == 0:
        tl.store(grad_bias_ptr + o_u, grad_bias * scale, mask=unit)
    if norm_weight_ptr is not None and not TRAINING:
        grad_scale = grad_bias * (_units(bias_ptr, o_u, H) - _units(mean_ptr, o_u, H))
        weight = weight_ptr + row
        if FIRST:
            grad_scale += _share(grad_wt, weight, inside) + _share(grad_weight, weight + K, inside)
            grad_scale += _share(grad_wt - grad_weight, weight + 2 * K, inside) + _share(
                grad_wp, weight + 3 * K, inside
            )
        else:
            grad_scale += _share(grad_weight, weight, inside)
        tl.store(grad_norm_weight_ptr + o_u, grad_scale * r, mask=unit)
        tl.store(grad_norm_bias_ptr + o_u, grad_bias, mask=unit)
