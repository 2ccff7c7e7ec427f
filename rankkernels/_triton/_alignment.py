"""Vector loads of rows whose width and strides Triton does not see to be aligned."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def aligned(value, ALIGN: tl.constexpr):
    """``value`` in 64 bits, known to the compiler as a multiple of ALIGN."""
    return tl.multiple_of(tl.cast(value, tl.int64), ALIGN)


@triton.jit
def between_columns(stride, UNIT: tl.constexpr):
    """The stride in 64 bits, 1 for the compiler, too, where it is UNIT."""
    if UNIT:
        return tl.cast(1, tl.int64)
    else:
        return tl.cast(stride, tl.int64)


def alignment(x: Tensor) -> int:
    """The power of two, up to 128 bits, that the row starts and the width of ``x`` are multiples of, in items.

    Triton sees by itself only multiples of 16 items: this makes vector loads of D = 8 and D = 10, too.
    """
    return math.gcd(16 // x.element_size(), *x.stride()[:-1], x.size(-1))


def address(t: Tensor | None) -> int:
    """Where the values of ``t`` begin, for a kernel that finds it in memory; 0 for None."""
    return 0 if t is None else t.data_ptr()
