"""Field-aware second-order interactions. Kernels: csrc/cpu/interaction/ffm_interaction_kernel.h and
_triton/ffm_interaction.py."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided
from rankkernels.ops._library import define, has_triton, lib, triton_serves_single
from rankkernels.ops._table import notice_reference

define("ffm_interaction(Tensor x, bool reduce_sum) -> Tensor")
define("ffm_interaction_backward(Tensor grad_out, Tensor x, bool reduce_sum) -> Tensor")


def _form(x: Tensor, reduce_sum: bool) -> tuple[int, int, int]:
    """Of the result."""
    F = x.size(1)
    return x.size(0), F * (F - 1) // 2, 1 if reduce_sum else x.size(3)


def _check(op: str, x: Tensor, reduce_sum: bool, grad_out: Tensor | None = None) -> None:
    """The texts are those of csrc/cpu/interaction/ffm_interaction.cpp."""
    torch._check(x.dim() == 4, lambda: f"{op}: x must have 4 dimensions, got {x.dim()} (shape {list(x.shape)})")
    torch._check(x.dtype in FLOATING, lambda: f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    torch._check(x.size(1) == x.size(2), lambda: f"{op}: x must be [B, F, F, D], got {list(x.shape)}")
    if grad_out is not None:
        check_form(op, "grad_out", grad_out, _form(x, reduce_sum), x.dtype, x.device)


@torch.library.register_fake("rankkernels::ffm_interaction", lib=lib)
def _(x, reduce_sum):
    _check("ffm_interaction", x, reduce_sum)
    return x.new_empty(_form(x, reduce_sum))


@torch.library.register_fake("rankkernels::ffm_interaction_backward", lib=lib)
def _(grad_out, x, reduce_sum):
    _check("ffm_interaction_backward", x, reduce_sum, grad_out)
    return x.new_empty(x.shape)


def _reference(x, reduce_sum):
    check_strided("ffm_interaction", (x,))
    _check("ffm_interaction", x, reduce_sum)
    return reference.ffm_interaction(x, reduce_sum)


@torch.library.impl(lib, "ffm_interaction", "CompositeExplicitAutograd")
def _default(x, reduce_sum):
    notice_reference("ffm_interaction", x)
    return _reference(x, reduce_sum)


@torch.library.impl(lib, "ffm_interaction_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, x, reduce_sum):
    check_strided("ffm_interaction_backward", (grad_out, x))
    _check("ffm_interaction_backward", x, reduce_sum, grad_out)
    (grad,) = vjp(lambda x: reference.ffm_interaction(x, reduce_sum), grad_out, x)
    return grad.contiguous()


def _has_kernel(x: Tensor) -> bool:
    """Whether a GPU's kernels serve x [B, F, F, D]."""
    if x.dim() != 4 or not triton_serves_single(x):
        return False
    from rankkernels._triton.ffm_interaction import supports

    return supports(x)


if has_triton:

    @torch.library.impl(lib, "ffm_interaction", "CUDA")
    def _(x, reduce_sum):
        from rankkernels._triton.ffm_interaction import ffm_interaction

        if not _has_kernel(x):
            return _default(x, reduce_sum)
        _check("ffm_interaction", x, reduce_sum)
        return ffm_interaction(x, reduce_sum)

    @torch.library.impl(lib, "ffm_interaction_backward", "CUDA")
    def _(grad_out, x, reduce_sum):
        from rankkernels._triton.ffm_interaction import ffm_interaction_backward

        if not _has_kernel(x):
            return _reference_backward(grad_out, x, reduce_sum)
        _check("ffm_interaction_backward", x, reduce_sum, grad_out)
        return ffm_interaction_backward(grad_out, x, reduce_sum)


def _setup_context(ctx, inputs, output):
    x, ctx.reduce_sum = inputs
    ctx.save_for_backward(x)


_ffm_interaction_backward = differentiable(torch.ops.rankkernels.ffm_interaction_backward.default, _reference_backward)


def _backward(ctx, grad_out):
    (x,) = ctx.saved_tensors
    return _ffm_interaction_backward(grad_out, x, ctx.reduce_sum), None


_forward = register_autograd("ffm_interaction", _reference, _backward, _setup_context)


def ffm_interaction(x: Tensor, reduce_sum: bool = True) -> Tensor:
    """Products of the fields f < g, each by its embedding for the other: x[:, f, g] * x[:, g, f].

    Semantics: ``reference.ffm_interaction``, torch-rechub's ``FFM``. Accumulates in float32 (float64 for float64).
    Autocast changes nothing.

    Args:
        x: [B, F, F, D], any strides, x[:, f, g] field f's embedding for field g; float32, float64, float16 or bfloat16.
        reduce_sum: sum over D.

    Returns:
        [B, F (F - 1) / 2, 1] if ``reduce_sum``, else [B, F (F - 1) / 2, D], in the dtype of ``x``.

    Raises:
        RuntimeError: ``x`` has another form or dtype.
    """
    return _forward(x, reduce_sum)
