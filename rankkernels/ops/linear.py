"""``nn.Linear`` by the faster of the two matrix libraries inside torch, beside oneDNN with our own weight's gradient.

torch's own product of float32 is MKL's, which on AMD's CPUs does not run its AVX-512 code. oneDNN, in the same torch,
does: forward 4.4 against 1.8 ms for [4096, 429] x [429, 256] on two Zen 5 cores (``pytest bench/bench_linear.py``).
The weight's gradient dy^T x would have both operands copied for oneDNN's A B^T: ours reads them as they lie.

Without AVX-512 MKL is the faster one on AMD's CPUs too: 5.1 against 5.5 ms there on two Zen 3 cores, and 6.5 against
our 6.7 for the weight's gradient. But the gradient of x [N, K] it writes faster into rows that begin at cache lines:
10.8 against 13.6 ms on one of these cores, with K = 429.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from rankkernels.nn._transparency import is_tensor
from rankkernels.ops._library import is_transformed
from rankkernels.ops.linear_weight_grad import linear_weight_grad

#: Multiplications of a product from which oneDNN, which prepares each call, wins: in the forward and the backward, and
#: where there will be no backward.
SMALLEST, SMALLEST_FORWARD = 1 << 24, 1 << 21
#: Values of a cache line.
LINE = 16


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512 and torch has oneDNN's product."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            text = cpuinfo.read()
    except OSError:
        return False
    return "AuthenticAMD" in text and "avx512f" in text


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, K] times the transpose of weight [M, K], plus bias [M], by the faster library."""
    if onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [N, M] times weight [M, K] -> [N, K], without a backward of its own in rows that begin at cache lines."""
    if onednn_is_faster():
        return _Linear.apply(dy, weight.t(), None)
    if torch.is_grad_enabled():
        return dy @ weight
    K = weight.shape[1]
    return torch.mm(dy, weight, out=dy.new_empty(dy.shape[0], -(-K // LINE) * LINE)[:, :K])


class _Linear(torch.autograd.Function):
    """``_product``, differentiable any number of times."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _input_grad(dy, weight) if of_x else None,
            (linear_weight_grad(dy, x) if onednn_is_faster() else dy.t() @ x) if of_weight else None,
            dy.sum(0) if of_bias else None,
        )


def is_watched() -> bool:
    """Whether compilers, tracers, ``torch.func`` or forward mode are to see the modules' own calls, or autocast is to
    choose their dtypes."""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or is_transformed()
    )


def multiplications(module: nn.Linear, x: Tensor) -> int:
    """Of ``module(x)``, or 0 where a caller could tell how the product is made: x is then to be given to ``module``."""
    if is_watched():  # asked first, so that no size is specialized
        return 0
    weight, bias = module.weight, module.bias
    for t, dim in ((x, 2), (weight, 2), *(() if bias is None else ((bias, 1),))):
        if not is_tensor(t) or t.dtype != torch.float32 or t.device.type != "cpu" or t.dim() != dim:
            return 0
    return x.shape[0] * weight.numel() if x.shape[1] == weight.shape[1] else 0


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """``module(x)`` for a plain ``nn.Linear`` without hooks; the same numbers up to the order of summation."""
    if is_watched():
        return module(x)
    if torch.is_grad_enabled():
        if onednn_is_faster() or (x.requires_grad and x.shape[-1] % LINE):
            if multiplications(module, x) >= SMALLEST:
                return _Linear.apply(x, module.weight, module.bias)
    elif onednn_is_faster():
        count = multiplications(module, x)
        # A product with one unit takes the time of reading x, which is about that with four.
        if count and max(count, 4 * x.numel()) >= SMALLEST_FORWARD:
            return _product(x, module.weight, module.bias)
    return module(x)


def is_large(module: nn.Linear, x: Tensor) -> bool:
    """Whether there will be no backward, and so much is to multiply that arranging the weights pays."""
    return not torch.is_grad_enabled() and multiplications(module, x) >= SMALLEST


def folded(module: nn.Linear, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the product that is ``norm(module(x))`` in eval."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = norm.running_mean if module.bias is None else norm.running_mean - module.bias
    bias = -shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale, value=-1)
    return module.weight * scale[:, None], bias


def normalized_linear(module: nn.Linear, norm: nn.BatchNorm1d, x: Tensor) -> Tensor | None:
    """``norm(module(x))`` in eval, for plain modules, by one product; None where that is no gain or not the same.

    With r = 1 / sqrt(var + eps) it is x (gamma r W)^T + gamma r (b - mean) + beta. Weights may change in place between
    any two calls, and are folded in each: K M multiplications, where an own pass of the normalization reads and writes
    the N M products: for an x that ``is_large``.
    """
    vectors = (module.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if (
        norm.training
        or any(t is not None and (t.dtype != torch.float32 or t.device.type != "cpu") for t in vectors)
        or norm.num_features != module.weight.shape[0]
    ):
        return None
    weight, bias = folded(module, norm)
    return _product(x, weight, bias)
