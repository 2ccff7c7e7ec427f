"""FM second-order interaction. Kernels: csrc/cpu/dense/fm_interaction_kernel.h and _triton/fm_interaction.py."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd
from rankkernels.ops._checks import FLOATING, check_form, check_strided
from rankkernels.ops._library import define, has_triton, lib, triton_serves
from rankkernels.ops._table import notice_reference

define("fm_interaction(Tensor x, bool reduce_sum) -> Tensor")
define("fm_interaction_backward(Tensor grad_out, Tensor x, bool reduce_sum) -> Tensor")


def _check(op: str, x: Tensor, reduce_sum: bool, grad_out: Tensor | None = None) -> None:
    torch._check(x.dim() == 3, lambda: f"{op}: x must have 3 dimensions, got {x.dim()} (shape {list(x.shape)})")
    torch._check(x.dtype in FLOATING, lambda: f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if grad_out is not None:
        check_form(op, "grad_out", grad_out, (x.size(0), 1 if reduce_sum else x.size(2)), x.dtype, x.device)


@torch.library.register_fake("rankkernels::fm_interaction", lib=lib)
def _(x, reduce_sum):
    _check("fm_interaction", x, reduce_sum)
    return x.new_empty((x.size(0), 1 if reduce_sum else x.size(2)))


@torch.library.register_fake("rankkernels::fm_interaction_backward", lib=lib)
def _(grad_out, x, reduce_sum):
    _check("fm_interaction_backward", x, reduce_sum, grad_out)
    return x.new_empty(x.shape)


def _reference(x, reduce_sum):
    check_strided("fm_interaction", (x,))
    _check("fm_interaction", x, reduce_sum)
    return reference.fm_interaction(x, reduce_sum)


@torch.library.impl(lib, "fm_interaction", "CompositeExplicitAutograd")
def _default(x, reduce_sum):
    notice_reference("fm_interaction", x)
    return _reference(x, reduce_sum)


@torch.library.impl(lib, "fm_interaction_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, x, reduce_sum):
    check_strided("fm_interaction_backward", (grad_out, x))
    _check("fm_interaction_backward", x, reduce_sum, grad_out)
    xa, ga = reference.accumulator(x), reference.accumulator(grad_out)
    return (ga[:, None, :] * (xa.sum(1, keepdim=True) - xa)).to(x.dtype)


if has_triton:

    @torch.library.impl(lib, "fm_interaction", "CUDA")
    def _(x, reduce_sum):
        from rankkernels._triton.fm_interaction import fm_interaction

        if not triton_serves(x):
            return _default(x, reduce_sum)
        _check("fm_interaction", x, reduce_sum)
        return fm_interaction(x, reduce_sum)

    @torch.library.impl(lib, "fm_interaction_backward", "CUDA")
    def _(grad_out, x, reduce_sum):
        from rankkernels._triton.fm_interaction import fm_interaction_backward

        if not triton_serves(x):
            return _reference_backward(grad_out, x, reduce_sum)
        _check("fm_interaction_backward", x, reduce_sum, grad_out)
        return fm_interaction_backward(grad_out, x, reduce_sum)


def _setup_context(ctx, inputs, output):
    x, ctx.reduce_sum = inputs
    ctx.save_for_backward(x)


fm_interaction_backward = differentiable(torch.ops.rankkernels.fm_interaction_backward.default, _reference_backward)


def _backward(ctx, grad_out):
    (x,) = ctx.saved_tensors
    return fm_interaction_backward(grad_out, x, ctx.reduce_sum), None


_forward = register_autograd("fm_interaction", _reference, _backward, _setup_context)
# Under autocast on CUDA torch's own sum and pow compute and return float32; on the CPU they keep the input's dtype.
torch.library.register_autocast("rankkernels::fm_interaction", "cuda", torch.float32, lib=lib)


def fm_interaction(x: Tensor, reduce_sum: bool = True) -> Tensor:
    """Second-order interactions of a factorization machine, the sum over field pairs f < g of x_f * x_g.

    Semantics: ``reference.fm_interaction``, torch-rechub's ``FM``, DeepCTR-Torch's ``FM`` (``reduce_sum=True``) and
    FuxiCTR's ``InnerProductInteraction("product_sum")``. Accumulates in float32 (float64 for float64).

    Args:
        x: field embeddings [B, F, D], any strides; float32, float64, float16 or bfloat16.
        reduce_sum: sum over D as well.

    Returns:
        [B, 1] if ``reduce_sum``, else [B, D], in the dtype of ``x``; float32 under autocast on CUDA.

    Raises:
        RuntimeError: ``x`` has another rank or dtype.
    """
    return _forward(x, reduce_sum)
