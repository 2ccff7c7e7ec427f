"""What follows the product of a layer of DCN v2. Kernels: csrc/cpu/interaction/cross_layer_kernel.h and
_triton/cross_layer.py."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd
from rankkernels.ops._checks import FLOATING, check_form, check_strided
from rankkernels.ops._library import define, has_triton, lib, triton_serves_single
from rankkernels.ops._table import notice_reference
from rankkernels.ops._tracing import is_traced

define("cross_layer(Tensor x0, Tensor product, Tensor x, Tensor? bias) -> Tensor")
define(
    "cross_layer_backward(Tensor grad_out, Tensor x0, Tensor product, bool has_bias) "
    "-> (Tensor grad_x0, Tensor grad_product, Tensor[] grad_bias)"
)


def _check(op: str, x0: Tensor, **alike: Tensor | None) -> None:
    """The texts are those of csrc/cpu/interaction/cross_layer.cpp."""
    torch._check(x0.dim() == 2, lambda: f"{op}: x0 must have 2 dimensions, got {x0.dim()} (shape {list(x0.shape)})")
    torch._check(
        x0.dtype in FLOATING, lambda: f"{op}: x0 must be float32, float64, float16 or bfloat16, got {x0.dtype}"
    )
    for name, t in alike.items():
        if t is not None:
            check_form(op, name, t, x0.shape[1:] if name == "bias" else x0.shape, x0.dtype, x0.device)


@torch.library.register_fake("rankkernels::cross_layer", lib=lib)
def _(x0, product, x, bias):
    _check("cross_layer", x0, product=product, x=x, bias=bias)
    return x0.new_empty(x0.shape)


@torch.library.register_fake("rankkernels::cross_layer_backward", lib=lib)
def _(grad_out, x0, product, has_bias):
    _check("cross_layer_backward", x0, grad_out=grad_out, product=product)
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape), [x0.new_empty(x0.shape[1:])] if has_bias else []


def _reference(x0, product, x, bias):
    check_strided("cross_layer", (x0, product, x, bias))
    _check("cross_layer", x0, product=product, x=x, bias=bias)
    return reference.cross_layer(x0, product, x, bias)


@torch.library.impl(lib, "cross_layer", "CompositeExplicitAutograd")
def _default(x0, product, x, bias):
    notice_reference("cross_layer", x0)
    return _reference(x0, product, x, bias)


@torch.library.impl(lib, "cross_layer_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, x0, product, has_bias):
    check_strided("cross_layer_backward", (grad_out, x0, product))
    _check("cross_layer_backward", x0, grad_out=grad_out, product=product)
    grad, *others = map(reference.accumulator, (grad_out, x0, product))
    of_product, of_x0 = ((grad * t).to(x0.dtype, memory_format=torch.contiguous_format) for t in others)
    return of_x0, of_product, [grad.sum(0).to(x0.dtype)] if has_bias else []


if has_triton:

    @torch.library.impl(lib, "cross_layer", "CUDA")
    def _(x0, product, x, bias):
        from rankkernels._triton.cross_layer import cross_layer

        if not triton_serves_single(x0):
            return _default(x0, product, x, bias)
        _check("cross_layer", x0, product=product, x=x, bias=bias)
        return cross_layer(x0, product, x, bias)

    @torch.library.impl(lib, "cross_layer_backward", "CUDA")
    def _(grad_out, x0, product, has_bias):
        from rankkernels._triton.cross_layer import cross_layer_backward

        if not triton_serves_single(x0):
            return _reference_backward(grad_out, x0, product, has_bias)
        _check("cross_layer_backward", x0, grad_out=grad_out, product=product)
        return cross_layer_backward(grad_out, x0, product, has_bias)


def _setup_context(ctx, inputs, output):
    x0, product, _, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x0, product)


_cross_layer_backward = differentiable(torch.ops.rankkernels.cross_layer_backward.default, _reference_backward)


def _backward(ctx, grad_out):
    of_x0, of_product, of_bias = _cross_layer_backward(grad_out, *ctx.saved_tensors, ctx.has_bias)
    return of_x0, of_product, grad_out, of_bias[0] if of_bias else None


#: Values from which one pass is faster than torch's three small calls, on the CPU (bench_models.py).
MIN_VALUES = 1 << 17


def is_faster(x: Tensor) -> bool:
    """Whether the op, and not torch's calls, is the faster way; or the more exact one, in 16 bits. Under a compiler no
    size is read, which would specialize the graph on it."""
    return is_traced() or not x.is_cpu or x.dtype in (torch.float16, torch.bfloat16) or x.numel() >= MIN_VALUES


_forward = register_autograd("cross_layer", _reference, _backward, _setup_context)


def cross_layer(x0: Tensor, product: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x0 * product + bias + x``, with which a layer of DCN v2 ends, in one pass.

    Semantics: ``reference.cross_layer``. Accumulates in float32 (float64 for float64). Autocast changes nothing.

    Args:
        x0: the network's input [B, D], any strides; float32, float64, float16 or bfloat16.
        product: W x [B, D], in the dtype of ``x0``, as all others.
        x: the layer's input [B, D].
        bias: [D], outside the product with ``x0``, as torch-rechub has it.

    Returns:
        [B, D] in the dtype of ``x0``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    return _forward(x0, product, x, bias)
