"""What this CPU is, as far as a choice between libraries and kernels depends on it."""

from __future__ import annotations

import functools

import torch

from rankkernels.ops._library import cpu_isa


def has_avx512() -> bool:
    """Whether the C++ kernels run with AVX-512."""
    return cpu_isa in ("avx512", "avx512_bf16")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether torch has oneDNN and this is an AMD CPU with AVX-512, where MKL, torch's choice, does without that."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            text = cpuinfo.read()
    except OSError:
        return False
    return "AuthenticAMD" in text and "avx512f" in text
