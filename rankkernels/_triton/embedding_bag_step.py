"""An optimizer's step on rows of tables, given each row's gradient: the formulas are reference.optimizer_step's.

Bytes a row: its weights and its state, read and written. What depends on the step's number and the learning rate alone
is folded before: adam w -= step m / (inverse_root sqrt(v) + eps), adamw and row-wise adam likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton._alignment import aligned
from rankkernels._triton.embedding_bag_blocks import pointer_to

#: What is done with a row's sum; optimizers, by their numbers, come behind.
KIND_DENSE, KIND_SPARSE, SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, ADAMW, FTRL, ROWWISE_ADAM, ROWWISE_RMSPROP = (
    tl.constexpr(k) for k in range(10)
)
#: Columns of a table, described.
T_KEY, T_ROWS, T_NUMBER, T_WEIGHT, T_STRIDE, T_STATE0, T_STATE1, T_STATE_STRIDE, T_SETTINGS = (
    tl.constexpr(k) for k in range(9)
)
#: Settings, float64: those that change from step to step first. The last four are an optimizer's own: ftrl's power,
#: beta, l1 and l2, row-wise RMSprop's ar_alpha and the most that a row decays, and the betas of the others.
LR, STEP, INVERSE_ROOT, GRAD_FACTOR, COUNT, SKIPS, RATE1, RATE2, EPS, DECAY, MAX_NORM, PHILOX_KEY = (
    tl.constexpr(k) for k in range(12)
)
OWN0, OWN1, OWN2, OWN3 = (tl.constexpr(k) for k in range(12, 16))
SETTINGS = tl.constexpr(16)


@triton.jit
def power_of(x, power):
    """x to a power that is not negative; nearly all ask for the root."""
    other = tl.where(power == 0.0, 1.0, tl.exp2(power * tl.log2(x)))
    return tl.where(power == 0.5, tl.sqrt(x), other)


@triton.jit
def clipped(g, max_norm, ACC: tl.constexpr):
    """reference.clip_rows of rows [P, .], 0: no clipping."""
    largest = tl.max(tl.maximum(g, -g), 1)[:, None]
    tiny = 2.2250738585072014e-308 if ACC == tl.float64 else 1.1754943508222875e-38
    relative = g / tl.maximum(largest, tl.full([1, 1], tiny, ACC))
    norm = largest * tl.sqrt(tl.sum(relative * relative, 1)[:, None])
    norm = tl.where(largest == float("inf"), largest, norm)
    norm = tl.where(max_norm == 0.0, 0.0, norm)
    return g * tl.where(norm <= max_norm, 1.0, max_norm / norm)  # a NaN takes its row along


@triton.jit
def setting(settings_ptr, PLACE: tl.constexpr, ACC: tl.constexpr):
    return tl.load(settings_ptr + PLACE).to(ACC)[:, None]


@triton.jit
def step_row_wise(w, g, state0, done, row, D, settings_ptr, described_ptr, t, n, KIND: tl.constexpr, ACC: tl.constexpr):
    """The new rows, where one number a row of the state is in ``state0``; that is written."""
    mean = (tl.sum(g * g, 1) / D)[:, None]
    state_ptr = state0[:, None] + row[:, None]
    before = tl.load(state_ptr, mask=done[:, None], other=0.0)
    if KIND == ROWWISE_ADAGRAD:
        s = before + mean
        w -= setting(settings_ptr, LR, ACC) / (tl.sqrt(s) + setting(settings_ptr, EPS, ACC)) * g
    else:
        s = before + setting(settings_ptr, RATE2, ACC) * (mean - before)
        last_ptr = tl.load(described_ptr + T_STATE1 * n + t, mask=done, other=0).to(tl.pointer_type(ACC))
        last_ptr = last_ptr[:, None] + row[:, None]
        last, count = tl.load(last_ptr, mask=done[:, None], other=0.0), setting(settings_ptr, COUNT, ACC)
        lr = setting(settings_ptr, LR, ACC)
        decay = lr * setting(settings_ptr, OWN0, ACC) * tl.where(last == 0.0, 1.0, count - last)
        w -= tl.minimum(decay, setting(settings_ptr, OWN1, ACC)) * w
        w -= lr / (tl.sqrt(s) + setting(settings_ptr, EPS, ACC)) * g
        tl.debug_barrier()
        tl.store(last_ptr, count + tl.zeros_like(last), mask=done[:, None])
    tl.debug_barrier()  # every thread of a row has loaded what one of them stores
    tl.store(state_ptr, s, mask=done[:, None])
    return w


@triton.jit
def step_adam(
    w, g, state_ptr, inside, state1, at, row, done, D, settings_ptr, KIND: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The new rows by Adam and its kin; the moments, ``state_ptr`` and at ``state1``, are written."""
    m = tl.load(state_ptr, mask=inside, other=0.0)
    m += setting(settings_ptr, RATE1, ACC) * (g - m)
    tl.store(state_ptr, m, mask=inside)
    rate, size = setting(settings_ptr, RATE2, ACC), setting(settings_ptr, STEP, ACC)
    root, eps = setting(settings_ptr, INVERSE_ROOT, ACC), setting(settings_ptr, EPS, ACC)
    if KIND == ROWWISE_ADAM:
        row_ptr = state1[:, None] + row[:, None]
        v = tl.load(row_ptr, mask=done[:, None], other=0.0)
        v += rate * ((tl.sum(g * g, 1) / D)[:, None] - v)
        tl.debug_barrier()  # every thread of a row has loaded what one of them stores
        tl.store(row_ptr, v, mask=done[:, None])
        return w - size / (root * tl.sqrt(v) + eps) * m
    else:
        square_ptr = state1[:, None] + at
        v = tl.load(square_ptr, mask=inside, other=0.0)
        v += rate * (g * g - v)
        tl.store(square_ptr, v, mask=inside)
        return w - size * m / (root * tl.sqrt(v) + eps)


@triton.jit
def step_ftrl(w, g, z_ptr, n_ptr, inside, settings_ptr, ACC: tl.constexpr):
    """The new rows by reference.ftrl_step; z and n are written."""
    power, lr = setting(settings_ptr, OWN0, ACC), setting(settings_ptr, LR, ACC)
    z, n = tl.load(z_ptr, mask=inside, other=0.0), tl.load(n_ptr, mask=inside, other=0.0)
    before = power_of(n, power)
    n += g * g
    after = power_of(n, power)
    z += g - (after - before) / lr * w
    tl.store(z_ptr, z, mask=inside)
    tl.store(n_ptr, n, mask=inside)
    l1 = setting(settings_ptr, OWN2, ACC)
    shrunk = tl.where(z > 0, z - l1, z + l1)
    w = -shrunk / ((setting(settings_ptr, OWN1, ACC) + after) / lr + setting(settings_ptr, OWN3, ACC))
    return tl.where(tl.maximum(z, -z) <= l1, 0.0, w)


@triton.jit
def rounding_bits(row, key, count, BLOCK_D: tl.constexpr):
    """reference.rounding_bits of rows [P], each with a key and a step of its own: [P, BLOCK_D]."""
    block = tl.arange(0, BLOCK_D // 8 if BLOCK_D > 8 else 1)[None, :]
    zeros = tl.zeros_like(block) + tl.zeros_like(row)[:, None].to(tl.int32)
    low, high, of_step = row.to(tl.int32)[:, None], (row >> 32).to(tl.int32)[:, None], count.to(tl.int32)[:, None]
    w0, w1, w2, w3 = tl.philox(key[:, None], zeros + block, zeros + low, zeros + high, zeros + of_step)
    words = w0
    if BLOCK_D >= 8:
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    elif BLOCK_D == 4:
        words = tl.interleave(w0, w1)
    bits = words & 0xFFFF
    if BLOCK_D >= 2:
        bits = tl.interleave(bits, words >> 16)
    return bits


@triton.jit
def rounded(w, row, settings_ptr, DTYPE: tl.constexpr, BLOCK_D: tl.constexpr):
    """reference.round_stochastically of rows w [P, BLOCK_D] whose tables ask for it, still in float32."""
    key, count = tl.load(settings_ptr + PHILOX_KEY).to(tl.int64), tl.load(settings_ptr + COUNT).to(tl.int64)
    bits = rounding_bits(row, key, count, BLOCK_D)
    given = w.to(tl.uint32, bitcast=True)
    magnitude = given & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        inside = magnitude < 0x7F7F0000
        found = ((given + (0xFFFF - bits)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        inside = magnitude < 0x477FE000
        spacing = tl.maximum(magnitude & 0x7F800000, 0x38800000) - 0x05000000  # of two powers, 2^-24 or more
        inverse = (0x7F000000 - spacing).to(tl.float32, bitcast=True)
        scaled = tl.where(inside, magnitude, 0).to(tl.float32, bitcast=True) * inverse
        below = scaled.to(tl.int32)
        up = (scaled - below.to(tl.float32)) * 65536.0 > bits.to(tl.float32)
        found = (below + up.to(tl.int32)).to(tl.float32) * spacing.to(tl.float32, bitcast=True)
        found = tl.where(given > 0x7FFFFFFF, -found, found)
    return tl.where(inside & (key != 0)[:, None], found, w)


@triton.jit
def step(
    total, row, done, t, described_ptr, hyper_ptr, n, D, KIND: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, CLIPS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A step on rows [P] of tables t [P] that are ``done``, whose gradients are ``total`` [P, BLOCK_D]."""
    settings_ptr = hyper_ptr + tl.load(described_ptr + T_SETTINGS * n + t, mask=done, other=0) * SETTINGS
    done &= tl.load(settings_ptr + SKIPS) == 0.0
    o_d = tl.arange(0, BLOCK_D)
    inside = done[:, None] & (o_d < aligned(D, ALIGN))[None, :]
    stride = tl.load(described_ptr + T_STRIDE * n + t, mask=done, other=0) // ALIGN * ALIGN
    weight_ptr = pointer_to(tl.load(described_ptr + T_WEIGHT * n + t, mask=done, other=0), DTYPE, ALIGN)
    weight_ptr = weight_ptr[:, None] + (row * stride)[:, None] + o_d[None, :]
    w = tl.load(weight_ptr, mask=inside, other=0.0).to(ACC)
    g = total * setting(settings_ptr, GRAD_FACTOR, ACC)
    if CLIPS:
        g = clipped(g, setting(settings_ptr, MAX_NORM, ACC), ACC)
    decay = setting(settings_ptr, DECAY, ACC)
    if KIND <= ADAM:
        g += decay * w
    elif KIND == ADAMW or KIND == ROWWISE_ADAM:
        w -= setting(settings_ptr, LR, ACC) * decay * w
    WHOLE: tl.constexpr = 128 // ACC.primitive_bitwidth
    ALIGN_STATE: tl.constexpr = ALIGN if ALIGN < WHOLE else WHOLE
    state0 = pointer_to(tl.load(described_ptr + T_STATE0 * n + t, mask=done, other=0), ACC, ALIGN_STATE)
    state1 = pointer_to(tl.load(described_ptr + T_STATE1 * n + t, mask=done, other=0), ACC, ALIGN_STATE)
    state_stride = tl.load(described_ptr + T_STATE_STRIDE * n + t, mask=done, other=0) // ALIGN_STATE * ALIGN_STATE
    at = (row * state_stride)[:, None] + o_d[None, :]
    state_ptr = state0[:, None] + at
    if KIND == SGD:
        w -= setting(settings_ptr, LR, ACC) * g
    elif KIND == ADAGRAD:
        s = tl.load(state_ptr, mask=inside, other=0.0) + g * g
        tl.store(state_ptr, s, mask=inside)
        w -= setting(settings_ptr, LR, ACC) * g / (tl.sqrt(s) + setting(settings_ptr, EPS, ACC))
    elif KIND == ROWWISE_ADAGRAD or KIND == ROWWISE_RMSPROP:
        w = step_row_wise(w, g, state0, done, row, D, settings_ptr, described_ptr, t, n, KIND, ACC)
    elif KIND == FTRL:
        w = step_ftrl(w, g, state_ptr, state1[:, None] + at, inside, settings_ptr, ACC)
    else:
        w = step_adam(w, g, state_ptr, inside, state1, at, row, done, D, settings_ptr, KIND, ACC)
    if ROUNDS and DTYPE.primitive_bitwidth == 16:
        w = rounded(w, row, settings_ptr, DTYPE, BLOCK_D)
    tl.store(weight_ptr, w, mask=inside)
