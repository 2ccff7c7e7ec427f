"""Idle steps of rows under dense Adam or AdamW: the mathematics is csrc/cpu/embedding/catch_up_kernel.h's.

A row's w, m and v are as of step t, its gradients up to step T were zero. Then

    w <- P w - m sum_n c_n T_n(z) / (g x + eps)      x = sqrt(v), z = (g x - eps) / (g x + eps)
    m <- beta1^(T-t) m                               v <- beta2^(T-t) v

where g, the c_n and P follow from t alone: an entry of the history. The sum is Clenshaw's, over as many terms as count,
4 for most rows; more, where another row of the program needs them, add zero. Flops a value: 9 and 3 a term, a division
and a square root.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rankkernels._triton.embedding_bag_blocks import pointer_to
from rankkernels.ops._idle_steps import TERMS as MOST_TERMS

#: Columns of a table, described.
I_KEY, I_ROWS, I_WEIGHT, I_STRIDE, I_STATE0, I_STATE1, I_STATE_STRIDE, I_LAST, I_CLOCK = (
    tl.constexpr(k) for k in range(9)
)
#: Numbers of a clock: the history's address and ``Clock``, decay and eps as bits of float64.
C_HISTORY, C_STEP, C_BASE, C_DECAY, C_EPS, CLOCK = (tl.constexpr(k) for k in range(6))
#: A history's columns.
TERMS = tl.constexpr(MOST_TERMS)
CENTRE, DECAY, TERM, POWER1, POWER2, WIDTH = (
    tl.constexpr(k) for k in (0, 1, 2, *range(2 + MOST_TERMS, 5 + MOST_TERMS))
)


@triton.jit
def clock_of(behind_ptr, clocks_ptr, n, t):
    """Where the clocks of tables t [P] are."""
    return clocks_ptr + tl.load(behind_ptr + I_CLOCK * n + t) * CLOCK


@triton.jit
def last_steps_of(behind_ptr, n, t, row):
    """Where the last steps of rows of tables t are."""
    return tl.load(behind_ptr + I_LAST * n + t).to(tl.pointer_type(tl.int32)) + row


@triton.jit
def state_of(behind_ptr, n, t, row, ACC: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the moments of rows [P] of tables t are, [P, BLOCK_D]."""
    WHOLE: tl.constexpr = 128 // ACC.primitive_bitwidth
    ALIGN_STATE: tl.constexpr = ALIGN if ALIGN < WHOLE else WHOLE
    stride = tl.load(behind_ptr + I_STATE_STRIDE * n + t) // ALIGN_STATE * ALIGN_STATE
    at = (row * stride)[:, None] + tl.arange(0, BLOCK_D)[None, :]
    m_ptr = pointer_to(tl.load(behind_ptr + I_STATE0 * n + t), ACC, ALIGN_STATE)
    v_ptr = pointer_to(tl.load(behind_ptr + I_STATE1 * n + t), ACC, ALIGN_STATE)
    return m_ptr[:, None] + at, v_ptr[:, None] + at


@triton.jit
def number_at(clock_ptr, PLACE: tl.constexpr):
    return tl.load(clock_ptr + PLACE).to(tl.float64, bitcast=True)


@triton.jit
def is_idle(last, clock_ptr):
    """Whether a row of this last step has steps to catch up with: one that never had a gradient only where rows
    decay."""
    step = tl.load(clock_ptr + C_STEP)
    return tl.where(last > 0, last < step, (-last < step) & (number_at(clock_ptr, C_DECAY) != 1.0))


@triton.jit
def terms_that_count(start_ptr, stepped, ACC: tl.constexpr):
    """How many terms of each entry [P] do: 4, 6, 8 or all."""
    o = tl.arange(0, TERMS)[None, :]
    term = tl.load(start_ptr[:, None] + TERM + o, mask=stepped[:, None], other=0.0)
    size = tl.maximum(term, -term)
    least = tl.load(start_ptr + TERM, mask=stepped, other=0.0) * (1e-17 if ACC == tl.float64 else 1e-9)
    largest = tl.max(tl.where(size <= least[:, None], 0, o), 1)  # a NaN counts
    n = tl.where(largest >= 8, TERMS, tl.where(largest >= 6, 8, tl.where(largest >= 4, 6, 4)))
    return tl.where(stepped, n, 0)


@triton.jit
def caught_up(w, m, v, last, idle, clock_ptr, ACC: tl.constexpr):
    """Rows w [P, .] of ``last`` steps [P] as of the clock's step, those that are not ``idle`` as they are, and what
    their m and v are multiplied with."""
    stepped = idle & (last > 0)
    history_ptr = tl.load(clock_ptr + C_HISTORY).to(tl.pointer_type(tl.float64))
    step, base = tl.load(clock_ptr + C_STEP), tl.load(clock_ptr + C_BASE)
    of_all, eps = number_at(clock_ptr, C_DECAY), number_at(clock_ptr, C_EPS).to(ACC)[:, None]
    t = tl.where(last > 0, last, -last).to(tl.int64)
    start_ptr = history_ptr + (tl.maximum(t, base) - base) * WIDTH
    power_ptr = history_ptr + (step - t) * WIDTH
    decay = tl.load(start_ptr + DECAY, mask=idle, other=1.0)
    decay = tl.where(idle & (of_all != 1.0), of_all / decay, 1.0).to(ACC)[:, None]
    keep1 = tl.load(power_ptr + POWER1, mask=stepped, other=1.0).to(ACC)[:, None]
    keep2 = tl.load(power_ptr + POWER2, mask=stepped, other=1.0).to(ACC)[:, None]
    gx = tl.load(start_ptr + CENTRE, mask=stepped, other=1.0).to(ACC)[:, None] * tl.sqrt(v)
    inverse = 1.0 / (gx + eps)
    z = (gx - eps) * inverse
    n = terms_that_count(start_ptr, stepped, ACC)
    most = tl.max(n)
    b1, b2 = tl.zeros_like(w), tl.zeros_like(w)  # sum of c_n T_n(z) = b1 - z b2
    for k in range(0, most):
        j = most - 1 - k
        term = tl.load(start_ptr + TERM + j, mask=j < n, other=0.0)
        b = ((of_all * term).to(ACC)[:, None] - b2) + (z + z) * b1
        b2 = b1
        b1 = b
    moved = tl.where(stepped[:, None], m * ((b1 - z * b2) * inverse), 0.0)
    return decay * w - moved, keep1, keep2
