"""A linear layer's product by the faster of the two GEMM libraries inside torch.

torch's own product of float32 is MKL's, which runs no AVX-512 code on AMD's CPUs; oneDNN, in the same torch, does. The
weight's gradient dy^T x would have both operands copied for oneDNN's A B^T: ours reads them as they lie. Without
AVX-512 MKL is the faster one, but writes the gradient of x faster into rows that begin at cache lines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels.ops._cpu import onednn_is_faster
from rankkernels.ops._tracing import is_tensor, must_stay_transparent
from rankkernels.ops.linear_weight_grad import linear_weight_grad
from rankkernels.reference import BatchNorm

#: Multiply-adds from which oneDNN wins despite its cost per call, some 20 us in a model (bench_models.py).
MIN_MULTIPLY_ADDS = 1 << 24
#: With a single output unit a product is bound by reading x, which takes the time of about so many units.
LEAST_UNITS = 4
#: Values of a cache line.
LINE = 16


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, K] times the transpose of weight [M, K], plus bias [M], by the faster library."""
    if onednn_is_faster():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


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


def _is_large(x: Tensor, weight: Tensor, bias: Tensor | None, rows_as_units: int = 0) -> bool:
    """Whether oneDNN's cost per call is little, reading x counting as much as ``rows_as_units`` output units.

    False where it must be torch's own call: a subclass, another dtype or device, widths that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.numel() * max(weight.shape[0], rows_as_units) < MIN_MULTIPLY_ADDS:
        return False  # asked first: most calls are small
    for t in (x, weight) if bias is None else (x, weight, bias):
        if not is_tensor(t) or t.dtype != torch.float32 or t.device.type != "cpu":
            return False
    return x.shape[1] == weight.shape[1] and (bias is None or bias.dim() == 1)


def is_torchs(N: int, K: int, M: int) -> bool:
    """Whether ``linear`` is torch's own call for an x [N, K] and M units, and ``folded_linear`` not faster, whatever
    else they are: by three numbers that take a tenth of the time of what ``linear`` asks."""
    return N * K * max(M, LEAST_UNITS) < MIN_MULTIPLY_ADDS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, the same numbers up to the order of summation.

    x [N, K], weight [M, K], bias [M] -> [N, M]. Another dtype, device or rank is torch's own call, errors included.
    """
    grad = torch.is_grad_enabled()
    if (onednn_is_faster() or (grad and x.requires_grad)) and not must_stay_transparent():  # before any size is read
        if grad and (onednn_is_faster() or x.shape[-1] % LINE) and _is_large(x, weight, bias):
            return _Linear.apply(x, weight, bias)
        if not grad and _is_large(x, weight, bias, LEAST_UNITS):
            return _product(x, weight, bias)
    return F.linear(x, weight, bias)


def folded(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the product that includes the normalization behind it, by its running statistics.

    With r = 1 / sqrt(var + eps), norm(x W^T + b) is x (gamma r W)^T + gamma r (b - mean) + beta.
    """
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = norm.running_mean if bias is None else norm.running_mean - bias
    out = -shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale, value=-1)
    return weight * scale[:, None], out


def is_faster_folded(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``folded_linear`` is the faster way: K M multiply-adds in each call, because the weights may change in
    place between any two, where the normalization's own pass reads and writes N M values. There is no backward."""
    if torch.is_grad_enabled() or not _is_large(x, weight, bias):
        return False
    return not must_stay_transparent()


def folded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> Tensor | None:
    """The product and the normalization behind it, in eval, as one product; None where that is not the same."""
    vectors = (bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(t is not None and (t.dtype != torch.float32 or t.device.type != "cpu") for t in vectors):
        return None
    return _product(x, *folded(weight, bias, norm)) if norm.running_mean.shape[0] == weight.shape[0] else None
