"""A layer of DCN v2 with experts of low rank, both GEMMs included. Kernel:
csrc/cpu/interaction/mixed_cross_layer_kernel.h."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided, wide
from rankkernels.ops._library import define, has_cpu_kernel, lib, without_autocast
from rankkernels.ops._table import notice_reference
from rankkernels.ops._tracing import must_stay_transparent

_LAYER = "Tensor x0, Tensor x, Tensor u, Tensor v, Tensor weight, Tensor gates, Tensor bias"
# ``projections`` [B, E r + E] are x by all experts' V and by the gates, in float32 (float64 for float64); ``product``
# is what x0 is multiplied with, [B, D], or [0, D] where no backward will ask for it.
define(f"mixed_cross_layer({_LAYER}, bool keep_product) -> (Tensor out, Tensor projections, Tensor product)")
define(
    f"mixed_cross_layer_backward(Tensor grad_out, Tensor projections, Tensor product, {_LAYER}) -> (Tensor grad_x0, "
    "Tensor grad_x, Tensor grad_u, Tensor grad_v, Tensor grad_weight, Tensor grad_gates, Tensor grad_bias)"
)


def _check(op: str, x0, x, u, v, weight, gates, bias) -> None:
    """The texts are those of csrc/cpu/interaction/mixed_cross_layer.cpp."""
    check = torch._check
    check(x0.dim() == 2, lambda: f"{op}: x0 must have 2 dimensions, got {x0.dim()} (shape {list(x0.shape)})")
    check(x0.dtype in FLOATING, lambda: f"{op}: x0 must be float32, float64, float16 or bfloat16, got {x0.dtype}")
    check(
        weight.dim() == 3 and weight.size(1) == weight.size(2),
        lambda: f"{op}: weight must be [E, r, r], got {list(weight.shape)}",
    )
    (E, rank, _), D = weight.shape, x0.size(1)
    forms = dict(weight=weight.shape, x=x0.shape, u=(E, D, rank), v=(E, D, rank), gates=(E, D), bias=(D,))
    for (name, shape), t in zip(forms.items(), (weight, x, u, v, gates, bias)):
        check_form(op, name, t, shape, x0.dtype, x0.device)


def _check_backward(grad_out, projections, product, x0, x, u, v, weight, gates, bias) -> None:
    op = "mixed_cross_layer_backward"
    _check(op, x0, x, u, v, weight, gates, bias)
    (E, rank, _), B = weight.shape, x0.size(0)
    check_form(op, "grad_out", grad_out, x0.shape, x0.dtype, x0.device)
    check_form(op, "projections", projections, (B, E * rank + E), wide(x0.dtype), x0.device)
    check_form(op, "product", product, x0.shape, x0.dtype, x0.device)


@torch.library.register_fake("rankkernels::mixed_cross_layer", lib=lib)
def _(x0, x, u, v, weight, gates, bias, keep_product):
    _check("mixed_cross_layer", x0, x, u, v, weight, gates, bias)
    (E, rank, _), (B, D) = weight.shape, x0.shape
    projections = x0.new_empty((B, E * rank + E), dtype=wide(x0.dtype))
    return x0.new_empty(x0.shape), projections, x0.new_empty((B if keep_product else 0, D))


@torch.library.register_fake("rankkernels::mixed_cross_layer_backward", lib=lib)
def _(grad_out, projections, product, *layer):
    _check_backward(grad_out, projections, product, *layer)
    return tuple(t.new_empty(t.shape) for t in layer)


def _reference(x0, x, u, v, weight, gates, bias, keep_product):
    layer = (x0, x, u, v, weight, gates, bias)
    check_strided("mixed_cross_layer", layer)
    _check("mixed_cross_layer", *layer)
    projections = reference.mixture_projections(x, v, gates)
    product = reference.mixture_product(projections, u, weight, bias)
    out = (reference.accumulator(x0) * product + reference.accumulator(x)).to(x0.dtype)
    saved = (projections, (product if keep_product else product[:0]).to(x0.dtype))
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (out, *saved))


@torch.library.impl(lib, "mixed_cross_layer", "CompositeExplicitAutograd")
def _default(x0, *others):
    notice_reference("mixed_cross_layer", x0)
    return _reference(x0, *others)


@torch.library.impl(lib, "mixed_cross_layer_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, projections, product, *layer):
    check_strided("mixed_cross_layer_backward", (grad_out, projections, product, *layer))
    _check_backward(grad_out, projections, product, *layer)
    grads = vjp(reference.mixed_cross_layer, grad_out, *layer)
    return tuple(g.clone(memory_format=torch.contiguous_format) for g in grads)


def is_faster(x: Tensor) -> bool:
    """Whether this op, and not its parts, is the faster way: in 16 bits a library's GEMMs are."""
    return has_cpu_kernel(x) and x.dtype in (torch.float32, torch.float64) and not must_stay_transparent()


def _setup_context(ctx, inputs, output):
    *layer, _ = inputs
    _, projections, product = output
    ctx.save_for_backward(projections, product, *layer)
    ctx.mark_non_differentiable(projections, product)


_mixed_cross_layer_backward = differentiable(
    torch.ops.rankkernels.mixed_cross_layer_backward.default, _reference_backward
)


def _backward(ctx, grad_out, *_):
    return *_mixed_cross_layer_backward(grad_out, *ctx.saved_tensors), None


without_autocast(torch.ops.rankkernels.mixed_cross_layer.default)
without_autocast(torch.ops.rankkernels.mixed_cross_layer_backward.default)
_forward = register_autograd("mixed_cross_layer", _reference, _backward, _setup_context)


def mixed_cross_layer(
    x0: Tensor, x: Tensor, u: Tensor, v: Tensor, weight: Tensor, gates: Tensor, bias: Tensor
) -> Tensor:
    """A cross layer of low rank, x0 * (sum_e share_e U_e tanh(C_e tanh(V_e^T x)) + bias) + x.

    Semantics: ``reference.mixed_cross_layer``, a layer of torch-rechub's ``CrossNetMix``. Accumulates in float32
    (float64 for float64) and rounds once. Autocast changes nothing.

    Args:
        x0: the network's input [B, D], any strides; float32, float64, float16 or bfloat16.
        x: the layer's input [B, D], in the dtype of ``x0``, as all others.
        u: [E, D, r].
        v: [E, D, r].
        weight: the experts' C [E, r, r].
        gates: [E, D], of which the shares are softmax(gates x).
        bias: [D].

    Returns:
        [B, D] in the dtype of ``x0``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    layer = x0, x, u, v, weight, gates, bias
    out, _, _ = _forward(*layer, torch.is_grad_enabled() and any(t.requires_grad for t in layer))
    return out
