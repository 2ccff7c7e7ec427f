"""``nn.Linear`` by the faster of the two matrix libraries inside torch.

torch's own product of float32 is MKL's, which on AMD's CPUs does not run its AVX-512 code. oneDNN, in the same torch,
does: forward 4.4 against 1.8 ms for [4096, 429] x [429, 256] on two Zen 5 cores (``pytest bench/bench_linear.py``).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

#: Multiplications of a product from which oneDNN, which prepares each call, wins in the forward and the backward.
SMALLEST = 1 << 24


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU and torch has oneDNN's product."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return "AuthenticAMD" in cpuinfo.read()
    except OSError:
        return False


class _OneDNNLinear(torch.autograd.Function):
    """x [N, K] times the transpose of weight [M, K], plus bias [M]; differentiable any number of times."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _OneDNNLinear.apply(dy, weight.t(), None) if of_x else None,
            _OneDNNLinear.apply(dy.t(), x.t(), None) if of_weight else None,
            dy.sum(0) if of_bias else None,
        )


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """``module(x)`` for a plain ``nn.Linear`` without hooks; the same numbers up to the order of summation."""
    # Compilers and tracers are to see nn.Linear; they ask first, so that no size is specialized.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return module(x)
    weight = module.weight
    plain = type(x) in (Tensor, nn.Parameter) and x.dim() == 2 and x.device.type == "cpu"
    if (
        not plain
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.shape[1] != weight.shape[1]
        or x.shape[0] * weight.numel() < SMALLEST
        or not onednn_is_faster()
    ):
        return module(x)
    return _OneDNNLinear.apply(x, weight, module.bias)
