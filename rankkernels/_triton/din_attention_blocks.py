"""What the kernels of DIN attention do with a block of rows of one sample; their mathematics is in din_attention.py.

Products run on tensor cores in the precision that torch's own would have (``product``), with float32 sums. A tensor
core's factors pass through registers, so a product is a loop over parts of its inner dimension, their number one that
the compiler does not know and unroll. Loops keep what they compute inside (disable_licm): hoisted addresses would take
half of the registers. The weights are read from the caches for each block of rows, padded with zeros to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton._products import product
from rankkernels.ops.attention_params import VECTORS

# What of a launch's numbers changes with the batch or a user's layout: no kernel is compiled again for it.
UNSPECIALIZED = [
    "tasks", "splits", "L", "parts_d", "parts_h", "parts_h2", "threshold", "stride_hb", "stride_hl", "stride_hd",
    "stride_tb", "stride_td", "stride_mb", "stride_ml", "stride_gb", "stride_gd", "programs",
]  # fmt: skip
ALPHA, V_SCALE, V_SHIFT, BIAS, OUT_WEIGHT, Y_SCALE, Y_SHIFT, R, VAR, COUNT = map(tl.constexpr, range(len(VECTORS)))
NUM_VECTORS = tl.constexpr(len(VECTORS))


@triton.jit
def layers_of(folded_ptr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, H2: tl.constexpr, BLOCK_H2: tl.constexpr):
    """Where the folded layers have Wt + Wd, Wh - Wd and Wp, each [BLOCK_H, BLOCK_D], the first one's vectors, W2
    [BLOCK_H2, BLOCK_H] and its vectors; and where they end, and what the forward keeps of samples and rows begins."""
    part: tl.constexpr = BLOCK_H * BLOCK_D
    vectors_ptr = folded_ptr + 3 * part
    weight2_ptr = vectors_ptr + NUM_VECTORS * BLOCK_H
    vectors2_ptr = weight2_ptr + BLOCK_H2 * BLOCK_H
    kept_ptr = vectors2_ptr + NUM_VECTORS * BLOCK_H2 if H2 > 0 else weight2_ptr
    return folded_ptr, folded_ptr + part, folded_ptr + 2 * part, vectors_ptr, weight2_ptr, vectors2_ptr, kept_ptr


@triton.jit
def kept_of(kept_ptr, samples, D: tl.constexpr, SOFTMAX: tl.constexpr):
    """Where the pooled rows [samples, D], the peak and the total of a softmax [samples] are kept, and the scores."""
    samples = tl.cast(samples, tl.int64)
    peak_ptr = kept_ptr + samples * D
    total_ptr = peak_ptr + samples
    return kept_ptr, peak_ptr, total_ptr, total_ptr + samples if SOFTMAX else kept_ptr


@triton.jit
def _end_of(mask, L, stride_ml, BLOCK: tl.constexpr):
    """The position behind the last valid row: a byte a row, where the rows behind it would cost all that rows do."""
    end = tl.zeros([BLOCK], tl.int32)
    for l0 in tl.range(0, L, BLOCK):
        o_l = l0 + tl.arange(0, BLOCK)
        valid = tl.load(mask + o_l * tl.cast(stride_ml, tl.int64), mask=o_l < L, other=0) != 0
        end = tl.maximum(end, tl.where(valid, o_l + 1, 0))
    return tl.max(end, 0)


@triton.jit
def rows_of(
    task, splits, rows_ptr, L, stride_mb, stride_ml, FORM: tl.constexpr, BLOCK_L: tl.constexpr
):  # fmt: skip
    """Task ``task``: its sample, the sample's first row in the offsets' common [N, D], and the task's share of the
    sample's positions: the first, the end of those that may be valid, and the end of those with memory. ``rows_ptr``:
    lengths, a mask or offsets, as FORM says."""
    b = tl.cast(task // splits, tl.int64)
    start, end = tl.cast(0, tl.int64), tl.cast(L, tl.int32)
    if FORM == "offsets":
        start = tl.maximum(tl.load(rows_ptr + b).to(tl.int64), 0)
        end = (tl.minimum(tl.load(rows_ptr + b + 1).to(tl.int64), L) - start).to(tl.int32)
    n = end
    if FORM == "lengths":
        n = tl.maximum(tl.minimum(tl.load(rows_ptr + b), L), 0).to(tl.int32)
    if FORM == "mask":
        n = _end_of(rows_ptr + b * stride_mb, L, stride_ml, 128)
    share = tl.cdiv(tl.cdiv(end, BLOCK_L), splits) * BLOCK_L
    first = task % splits * share
    return b, start, first, tl.minimum(n, first + share), tl.minimum(end, first + share)


@triton.jit
def valid_rows(mask_ptr, o_l, end, stride_ml, FORM: tl.constexpr):
    """Which rows are no padding; ``mask_ptr`` is at the sample's first."""
    valid = o_l < end
    if FORM == "mask":
        valid = valid & (tl.load(mask_ptr + o_l * tl.cast(stride_ml, tl.int64), mask=valid, other=0) != 0)
    return valid


@triton.jit
def zero_rows(rows, first, end, o_d, D64, D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first, .., end - 1 of ``rows``, D64 apart."""
    for l0 in tl.range(first, end, BLOCK_L):
        o_l = l0 + tl.arange(0, BLOCK_L)
        stored = (o_l < end)[:, None] & (o_d < D)[None, :]
        tl.store(rows + o_l[:, None] * D64 + o_d[None, :], tl.zeros([BLOCK_L, BLOCK_D], tl.float32), mask=stored)


@triton.jit
def strided_vector(ptr, o, size, stride):
    return tl.load(ptr + o * tl.cast(stride, tl.int64), mask=o < size, other=0.0).to(tl.float32)


@triton.jit
def _vector(vectors_ptr, WHICH: tl.constexpr, o_h, BLOCK_H: tl.constexpr):
    return tl.load(vectors_ptr + WHICH * BLOCK_H + o_h)[None, :]


@triton.jit
def _columns(history, valid, K: tl.constexpr, stride_hd, D: tl.constexpr, BLOCK_K: tl.constexpr):
    o_k = K * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = valid[:, None] & (o_k < D)[None, :]
    return tl.load(history + o_k[None, :] * stride_hd, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_rows(history, valid, stride_hd, D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows that ``history`` [L, 1] points to, in blocks of BLOCK_K columns; padding is 0."""
    if BLOCK_D == BLOCK_K:
        return (_columns(history, valid, 0, stride_hd, D, BLOCK_K),)
    elif BLOCK_D == 2 * BLOCK_K:
        return (
            _columns(history, valid, 0, stride_hd, D, BLOCK_K),
            _columns(history, valid, 1, stride_hd, D, BLOCK_K),
        )
    else:
        tl.static_assert(BLOCK_D == 4 * BLOCK_K)
        return (
            _columns(history, valid, 0, stride_hd, D, BLOCK_K),
            _columns(history, valid, 1, stride_hd, D, BLOCK_K),
            _columns(history, valid, 2, stride_hd, D, BLOCK_K),
            _columns(history, valid, 3, stride_hd, D, BLOCK_K),
        )


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _parts(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x [ROWS, COLUMNS] in parts of 32 columns."""
    if COLUMNS == 128:
        left, right = _halves(x, ROWS, COLUMNS)
        left, left_of_right = _halves(left, ROWS, 64), _halves(right, ROWS, 64)
        return left[0], left[1], left_of_right[0], left_of_right[1]
    elif COLUMNS == 64:
        return _halves(x, ROWS, COLUMNS)
    else:
        tl.static_assert(COLUMNS == 32)
        return (x,)


@triton.jit
def _part(parts, k, PARTS: tl.constexpr):
    """Part ``k``, chosen when the program runs: a loop over the parts has one of them in a tensor core's layout."""
    x = parts[0]
    for i in tl.static_range(1, PARTS):
        x = tl.where(k == i, parts[i], x)
    return x


@triton.jit
def fused_weight(wm_ptr, wp_ptr, b_target, o_d, o_h, BLOCK_D: tl.constexpr):
    """M^T of one sample, columns ``o_d`` of D and units ``o_h``; the weights are [H, BLOCK_D]."""
    o = o_h[None, :] * BLOCK_D + o_d[:, None]
    return tl.load(wm_ptr + o) + tl.load(wp_ptr + o) * b_target[:, None]


@triton.jit
def constant_of(
    target, parts_d, wt_ptr, vectors_ptr, o_h, D: tl.constexpr, stride_td, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """c = (Wt + Wd) t + bias of one sample [H], in float32 without tensor cores: once for all its rows."""
    c = tl.load(vectors_ptr + BIAS * BLOCK_H + o_h)
    for k in tl.range(0, parts_d, disable_licm=True):
        o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_wt = tl.load(wt_ptr + o_h[:, None] * BLOCK_D + o_k[None, :])
        c += tl.sum(b_wt * strided_vector(target, o_k, D, stride_td)[None, :], 1)
    return c


@triton.jit
def first_layer(
    rows, parts_d, target, wm_ptr, wp_ptr, c, o_h, D: tl.constexpr, stride_td, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """x = c + M h [L, H]."""
    x = tl.zeros([BLOCK_L, BLOCK_H], tl.float32) + c[None, :]
    for k in tl.range(0, parts_d, disable_licm=True):
        o_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_m = fused_weight(wm_ptr, wp_ptr, strided_vector(target, o_k, D, stride_td), o_k, o_h, BLOCK_D)
        x = product(_part(rows, k, BLOCK_D // BLOCK_K), b_m, x, PRECISION)
    return x


@triton.jit
def first_layer_backward(
    grad_x, parts_h, target, wm_ptr, wp_ptr, o_d, D: tl.constexpr, stride_td, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh = M^T G [L, D]."""
    grad = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    b_target = strided_vector(target, o_d, D, stride_td)
    parts = _parts(grad_x, BLOCK_L, BLOCK_H)
    for i in tl.range(0, parts_h, disable_licm=True):
        b_m = fused_weight(wm_ptr, wp_ptr, b_target, o_d, i * 32 + tl.arange(0, 32), BLOCK_D)
        grad = product(_part(parts, i, BLOCK_H // 32), tl.trans(b_m), grad, PRECISION)
    return grad


@triton.jit
def second_layer(
    a, parts_h, weight2_ptr, vectors2_ptr, o_h2, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """x2 = W2 a + bias2 [L, H2]; W2 is [BLOCK_H2, BLOCK_H]."""
    x2 = tl.zeros([BLOCK_L, BLOCK_H2], tl.float32) + _vector(vectors2_ptr, BIAS, o_h2, BLOCK_H2)
    parts = _parts(a, BLOCK_L, BLOCK_H)
    for i in tl.range(0, parts_h, disable_licm=True):
        o_h = i * 32 + tl.arange(0, 32)
        b_weight2 = tl.load(weight2_ptr + o_h2[None, :] * BLOCK_H + o_h[:, None])
        x2 = product(_part(parts, i, BLOCK_H // 32), b_weight2, x2, PRECISION)
    return x2


@triton.jit
def second_layer_backward(
    grad_x2, parts_h2, weight2_ptr, o_h, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_H2: tl.constexpr,
):  # fmt: skip
    """da = W2^T G2 [L, H]."""
    grad_a = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    parts = _parts(grad_x2, BLOCK_L, BLOCK_H2)
    for i in tl.range(0, parts_h2, disable_licm=True):
        o_h2 = i * 32 + tl.arange(0, 32)
        b_weight2 = tl.load(weight2_ptr + o_h2[:, None] * BLOCK_H + o_h[None, :])
        grad_a = product(_part(parts, i, BLOCK_H2 // 32), b_weight2, grad_a, PRECISION)
    return grad_a


@triton.jit
def _normalized(x, vectors_ptr, o_h, BLOCK_H: tl.constexpr, TRAINING: tl.constexpr):
    """y of x: in eval the normalization is in the weights before."""
    if TRAINING:
        x = x * _vector(vectors_ptr, Y_SCALE, o_h, BLOCK_H) + _vector(vectors_ptr, Y_SHIFT, o_h, BLOCK_H)
    return x


@triton.jit
def _dice_centred(y, o_h, H: tl.constexpr, dice_eps):
    """y less its row's mean over the H units, 0 past them, and 1 / sqrt(sum of its squares + H eps) [L, 1]."""
    centred = tl.where((o_h < H)[None, :], y - tl.sum(y, 1, keep_dims=True) / H, 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) + H * dice_eps)


@triton.jit
def activate(
    x, vectors_ptr, o_h, H: tl.constexpr, dice_eps, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    y = _normalized(x, vectors_ptr, o_h, BLOCK_H, TRAINING)
    if ACTIVATION == "sigmoid":
        return tl.sigmoid(y)
    elif ACTIVATION == "relu":
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leakyrelu":
        return tl.where(y > 0, y, 0.01 * y)
    elif ACTIVATION == "linear":
        return y
    else:
        alpha = _vector(vectors_ptr, ALPHA, o_h, BLOCK_H)
        if ACTIVATION == "prelu":
            return tl.where(y > 0, y, alpha * y)
        elif ACTIVATION == "dice":
            centred, r = _dice_centred(y, o_h, H, dice_eps)
            return y * (alpha + (1 - alpha) * tl.sigmoid(centred * r))
        else:
            tl.static_assert(ACTIVATION == "dice_batch_norm")
            v = x * _vector(vectors_ptr, V_SCALE, o_h, BLOCK_H) + _vector(vectors_ptr, V_SHIFT, o_h, BLOCK_H)
            return alpha * y + tl.sigmoid(v) * (y - alpha * y)


@triton.jit
def activate_backward(
    grad, x, vectors_ptr, o_h, H: tl.constexpr, dice_eps, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dL/dy, dL/dv (of a Dice's normalization; that of dL/dy is without it) and the rows' shares of alpha's [L, H]."""
    y = _normalized(x, vectors_ptr, o_h, BLOCK_H, TRAINING)
    grad_v, grad_alpha = grad, grad
    if ACTIVATION == "sigmoid":
        a = tl.sigmoid(y)
        grad_y = grad * a * (1 - a)
    elif ACTIVATION == "relu":
        grad_y = tl.where(y <= 0, 0.0, grad)  # a NaN has all of it: as torch's
    elif ACTIVATION == "leakyrelu":
        grad_y = tl.where(y > 0, grad, 0.01 * grad)
    elif ACTIVATION == "linear":
        grad_y = grad
    else:
        alpha = _vector(vectors_ptr, ALPHA, o_h, BLOCK_H)
        if ACTIVATION == "prelu":
            grad_y = tl.where(y > 0, grad, alpha * grad)
            grad_alpha = tl.where(y > 0, 0.0, grad * y)
        elif ACTIVATION == "dice":
            # u = r c, c = y - mean(y), r = (sum c^2 + H eps)^-1/2: dc = r du - r^3 c sum(c du), dy = dc - mean(dc)
            centred, r = _dice_centred(y, o_h, H, dice_eps)
            p = tl.sigmoid(centred * r)
            grad_u = grad * y * (1 - alpha) * p * (1 - p)
            grad_c = r * grad_u - centred * (r * r * r * tl.sum(centred * grad_u, 1, keep_dims=True))
            grad_y = grad * (alpha + (1 - alpha) * p) + grad_c - tl.sum(grad_c, 1, keep_dims=True) / H
            grad_y = tl.where((o_h < H)[None, :], grad_y, 0.0)
            grad_alpha = grad * y * (1 - p)
        else:
            v = x * _vector(vectors_ptr, V_SCALE, o_h, BLOCK_H) + _vector(vectors_ptr, V_SHIFT, o_h, BLOCK_H)
            p = tl.sigmoid(v)
            grad_y = grad * (alpha + (1 - alpha) * p)
            grad_v = grad * y * (1 - alpha) * p * (1 - p)
            grad_alpha = grad * y * (1 - p)
    return grad_y, grad_v, grad_alpha


@triton.jit
def dropout_factor(
    seed_ptr, LAYER: tl.constexpr, b, l0, o_h, threshold, kept_scale, DROPOUT: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What the units of rows l0, .. are multiplied with [L, H], as ``reference.dropout_factor`` has it: each call of
    Philox serves four rows."""
    if DROPOUT:
        quad = l0 // 4 + tl.arange(0, BLOCK_L // 4)
        zeros = tl.zeros([BLOCK_L // 4, BLOCK_H], tl.int32)
        w0, w1, w2, w3 = tl.philox(
            tl.load(seed_ptr), zeros + o_h[None, :], zeros + quad[:, None], zeros + b.to(tl.int32), zeros + LAYER
        )
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [quad, unit, word // 2, word % 2]
        words = tl.reshape(tl.permute(words, [0, 2, 3, 1]), [BLOCK_L, BLOCK_H])
        return tl.where((words >> 8).to(tl.int32) >= threshold, kept_scale, 0.0)
    else:
        return 1.0


@triton.jit
def gradient_of_product(
    grad_y, grad_v, x, valid, vectors_ptr, means_ptr, o_h, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """G [L, H], the gradient of the layer's product, y_scale dy + v_scale dv - u - w x in training."""
    grad = grad_y
    if TRAINING:
        grad = grad_y * _vector(vectors_ptr, Y_SCALE, o_h, BLOCK_H) - _vector(means_ptr, 0, o_h, BLOCK_H)
        grad -= x * _vector(means_ptr, 1, o_h, BLOCK_H)
    if ACTIVATION == "dice_batch_norm":
        grad += grad_v * _vector(vectors_ptr, V_SCALE, o_h, BLOCK_H)
    return tl.where(valid[:, None], grad, 0.0)


@triton.jit
def exp_less(x, peak):
    """exp(x - peak), 0 where both are -inf."""
    return tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak))
