"""Products on tensor cores, in the precision that torch's own would have."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def precision_of(dtype: torch.dtype) -> str:
    """Of ``product``s of inputs of this dtype."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@triton.jit
def _rounded_to_tf32(x):
    """To the nearest of 10 mantissa bits: a tensor core drops the other 13, which would shrink every sum."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN's bits may carry over into a number


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, of float32. PRECISION: float16 or bfloat16 for inputs of these; for float32 tf32 where torch's
    own products may have it, else tf32x3, three of them for float32's precision; ieee on AMD, whose cores have it."""
    if PRECISION == "float16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    elif PRECISION == "bfloat16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "tf32":
        return tl.dot(_rounded_to_tf32(a), _rounded_to_tf32(b), total, input_precision="tf32")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
