"""Where pairs of fields lie in the packed triangle of all f < g: (0, 1), (0, 2), .. (F - 2, F - 1)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair_of(f, g, F):
    return f * (2 * F - f - 1) // 2 + g - f - 1


@triton.jit
def fields_of(pair, F):
    """The fields f < g of a pair. Counted from the last pair, f's row begins behind k (k + 1) / 2 others, of which k is
    the root rounded down: it may be off by one where float32 rounds."""
    behind = F * (F - 1) // 2 - 1 - pair
    k = ((tl.sqrt(8 * behind.to(tl.float32) + 1) - 1) / 2).to(behind.dtype)
    k -= (k * (k + 1) // 2 > behind).to(behind.dtype)
    k += ((k + 1) * (k + 2) // 2 <= behind).to(behind.dtype)
    return F - 2 - k, F - 1 - (behind - k * (k + 1) // 2)
