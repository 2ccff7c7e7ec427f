"""What the embedding kernels find in memory: where their tensors lie, and what is to be done with each.

A call has any number of tensors, so their addresses are no arguments of its kernels. What stays from step to step, of
tables and features, is ``described`` once and kept; what a batch brings goes to the device as the arguments of a launch
(``numbers``): nothing is copied from the host, nothing waits, and a CUDA graph repeats it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton._launch import launch

AT_ONCE = 80  # numbers a launch: those of 26 features, their gradients and their tables or an optimizer's settings


@triton.jit
def store_numbers(out_ptr, n, numbers, AT_ONCE: tl.constexpr):
    """The first n of AT_ONCE numbers become out [n]."""
    for k in tl.static_range(AT_ONCE):
        tl.store(out_ptr + k, numbers[k].to(tl.int64), mask=k < n)


@triton.jit(do_not_specialize=["n", *(f"a{k}" for k in range(AT_ONCE))])
def embedding_bag_numbers_kernel(
    out_ptr, n,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64, a14: tl.int64,
    a15: tl.int64, a16: tl.int64, a17: tl.int64, a18: tl.int64, a19: tl.int64, a20: tl.int64, a21: tl.int64,
    a22: tl.int64, a23: tl.int64, a24: tl.int64, a25: tl.int64, a26: tl.int64, a27: tl.int64, a28: tl.int64,
    a29: tl.int64, a30: tl.int64, a31: tl.int64, a32: tl.int64, a33: tl.int64, a34: tl.int64, a35: tl.int64,
    a36: tl.int64, a37: tl.int64, a38: tl.int64, a39: tl.int64, a40: tl.int64, a41: tl.int64, a42: tl.int64,
    a43: tl.int64, a44: tl.int64, a45: tl.int64, a46: tl.int64, a47: tl.int64, a48: tl.int64, a49: tl.int64,
    a50: tl.int64, a51: tl.int64, a52: tl.int64, a53: tl.int64, a54: tl.int64, a55: tl.int64, a56: tl.int64,
    a57: tl.int64, a58: tl.int64, a59: tl.int64, a60: tl.int64, a61: tl.int64, a62: tl.int64, a63: tl.int64,
    a64: tl.int64, a65: tl.int64, a66: tl.int64, a67: tl.int64, a68: tl.int64, a69: tl.int64, a70: tl.int64,
    a71: tl.int64, a72: tl.int64, a73: tl.int64, a74: tl.int64, a75: tl.int64, a76: tl.int64, a77: tl.int64,
    a78: tl.int64, a79: tl.int64,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The first n of the arguments become out [n]."""
    numbers = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
        a24, a25, a26, a27, a28, a29, a30, a31, a32, a33, a34, a35, a36, a37, a38, a39, a40, a41, a42, a43, a44, a45,
        a46, a47, a48, a49, a50, a51, a52, a53, a54, a55, a56, a57, a58, a59, a60, a61, a62, a63, a64, a65, a66, a67,
        a68, a69, a70, a71, a72, a73, a74, a75, a76, a77, a78, a79,
    )  # fmt: skip
    store_numbers(out_ptr, n, numbers, AT_ONCE)


def padded(values: Sequence[int]) -> tuple[int, ...]:
    """As many as a launch takes."""
    return *values, *(0,) * (AT_ONCE - len(values))


def write(out: Tensor, values: Sequence[int], first: int = 0) -> None:
    """The values from the ``first`` on become those of ``out`` [n], by a launch for every 80 of them."""
    for i in range(first, len(values), AT_ONCE):
        part = values[i : i + AT_ONCE]
        rest = out[i:] if i else out
        launch(embedding_bag_numbers_kernel, (1,), (rest,), (len(part), *padded(part)), (AT_ONCE,), num_warps=1)


def bits_of(values: Sequence[float]) -> tuple[int, ...]:
    """Of float64, as numbers."""
    return struct.unpack(f"<{len(values)}q", struct.pack(f"<{len(values)}d", *values))


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """The values on the device, [n] int64."""
    out = torch.empty(len(values), dtype=torch.int64, device=device)
    write(out, values)
    return out


@functools.lru_cache(1024)
def _described(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


_of_graphs: dict[tuple, Tensor] = {}


def described(values: tuple[int, ...], device: torch.device) -> Tensor:
    """The values on the device, [n] int64: kept, so that only what was never described, or not for long, is copied, and
    waited for. A GPU has no more launches waiting than are kept, so none reads what was forgotten; what a CUDA graph
    reads is kept for good."""
    found = _described(values, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _of_graphs[values, device] = found
    return found
