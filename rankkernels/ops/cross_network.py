"""DCN's cross network, all layers in one pass. Kernels: csrc/cpu/interaction/cross_network_kernel.h and
_triton/cross_network.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided, wide
from rankkernels.ops._library import define, has_triton, lib, triton_serves
from rankkernels.ops._table import notice_reference

# ``projections`` [B, layers] are the dots of each sample with the layers' weights, in float32 (float64 for float64).
define("cross_network(Tensor x, Tensor[] weights, Tensor[] biases) -> (Tensor out, Tensor projections)")
define(
    "cross_network_backward(Tensor grad_out, Tensor projections, Tensor x, Tensor[] weights, Tensor[] biases) "
    "-> (Tensor grad_x, Tensor[] grad_weights, Tensor[] grad_biases)"
)


def _check(op: str, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """The texts are those of csrc/cpu/interaction/cross_network.cpp."""
    check = torch._check
    check(x.dim() == 2, lambda: f"{op}: x must have 2 dimensions, got {x.dim()} (shape {list(x.shape)})")
    check(x.dtype in FLOATING, lambda: f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    check(
        len(biases) == len(weights),
        lambda: f"{op}: there must be a bias for each of {len(weights)} weights, got {len(biases)}",
    )
    D = x.size(1)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        check_form(op, f"weights[{i}]", weight, (1, D), x.dtype, x.device)
        check_form(op, f"biases[{i}]", bias, (D,), x.dtype, x.device)


def _check_backward(grad_out, projections, x, weights, biases) -> None:
    op = "cross_network_backward"
    _check(op, x, weights, biases)
    check_form(op, "grad_out", grad_out, x.shape, x.dtype, x.device)
    check_form(op, "projections", projections, (x.size(0), len(weights)), wide(x.dtype), x.device)


@torch.library.register_fake("rankkernels::cross_network", lib=lib)
def _(x, weights, biases):
    _check("cross_network", x, weights, biases)
    return x.new_empty(x.shape), x.new_empty((x.size(0), len(weights)), dtype=wide(x.dtype))


@torch.library.register_fake("rankkernels::cross_network_backward", lib=lib)
def _(grad_out, projections, x, weights, biases):
    _check_backward(grad_out, projections, x, weights, biases)
    return x.new_empty(x.shape), [w.new_empty(w.shape) for w in weights], [b.new_empty(b.shape) for b in biases]


def _reference(x, weights, biases):
    check_strided("cross_network", (x, *weights, *biases))
    _check("cross_network", x, weights, biases)
    rows = torch.cat([*weights, x.new_empty(0, x.size(1))])
    projections = reference.accumulator(x) @ reference.accumulator(rows).t()
    out = reference.cross_network(x, weights, biases)
    return out.clone(memory_format=torch.contiguous_format), projections.contiguous()


@torch.library.impl(lib, "cross_network", "CompositeExplicitAutograd")
def _default(x, weights, biases):
    notice_reference("cross_network", x)
    return _reference(x, weights, biases)


@torch.library.impl(lib, "cross_network_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, projections, x, weights, biases):
    check_strided("cross_network_backward", (grad_out, projections, x, *weights, *biases))
    _check_backward(grad_out, projections, x, weights, biases)
    n = len(weights)
    grad_x, *grads = vjp(
        lambda x, *params: reference.cross_network(x, params[:n], params[n:]), grad_out, x, *weights, *biases
    )
    grads = [g.contiguous() for g in grads]
    return grad_x.clone(memory_format=torch.contiguous_format), grads[:n], grads[n:]


def _has_kernel(x: Tensor) -> bool:
    """Whether a GPU's kernels serve x [B, D]."""
    if x.dim() != 2 or not triton_serves(x):
        return False
    from rankkernels._triton.cross_network import supports

    return supports(x)


if has_triton:

    @torch.library.impl(lib, "cross_network", "CUDA")
    def _(x, weights, biases):
        from rankkernels._triton.cross_network import cross_network

        if not _has_kernel(x):
            return _default(x, weights, biases)
        _check("cross_network", x, weights, biases)
        return cross_network(x, weights, biases)

    @torch.library.impl(lib, "cross_network_backward", "CUDA")
    def _(grad_out, projections, x, weights, biases):
        from rankkernels._triton.cross_network import cross_network_backward

        if not _has_kernel(x):
            return _reference_backward(grad_out, projections, x, weights, biases)
        _check_backward(grad_out, projections, x, weights, biases)
        return cross_network_backward(grad_out, projections, x, weights, biases)


def _setup_context(ctx, inputs, output):
    x, weights, biases = inputs
    _, projections = output
    ctx.save_for_backward(projections, x, *weights, *biases)
    ctx.mark_non_differentiable(projections)


_cross_network_backward = differentiable(torch.ops.rankkernels.cross_network_backward.default, _reference_backward)


def _backward(ctx, grad_out, _):
    projections, x, *params = ctx.saved_tensors
    n = len(params) // 2
    return _cross_network_backward(grad_out, projections, x, params[:n], params[n:])


_forward = register_autograd("cross_network", _reference, _backward, _setup_context)


def cross_network(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """All layers of DCN's cross network, x_{l+1} = x_0 (w_l . x_l) + b_l + x_l with x_0 = ``x``.

    Semantics: ``reference.cross_network``, torch-rechub's ``CrossNetwork`` and FuxiCTR's of the same name. Computed by
    the closed form x_l = alpha_l x_0 + beta_l, which reads ``x`` once and stores no layer's output. Accumulates in
    float32 (float64 for float64) and rounds once. Autocast changes nothing.

    Args:
        x: [B, D], any strides; float32, float64, float16 or bfloat16.
        weights: [1, D] a layer, as ``nn.Linear(D, 1)`` has it, in the dtype of ``x``.
        biases: [D] a layer, in the dtype of ``x``.

    Returns:
        The last layer's output [B, D], in the dtype of ``x``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    out, _ = _forward(x, list(weights), list(biases))
    return out
