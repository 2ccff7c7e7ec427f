"""FiBiNET's bilinear interaction. Kernels: csrc/cpu/interaction/bilinear_interaction_kernel.h and
_triton/bilinear_interaction.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided
from rankkernels.ops._library import define, has_triton, lib, triton_serves_single, without_autocast
from rankkernels.ops._table import notice_reference

define("bilinear_interaction(Tensor x, Tensor[] weights, int kind) -> Tensor")
define(
    "bilinear_interaction_backward(Tensor grad_out, Tensor x, Tensor[] weights, int kind) "
    "-> (Tensor grad_x, Tensor[] grad_weights)"
)

#: In the order of the kernel's enumeration: one weight, one a field that is the first of a pair, one a pair.
KINDS = ("field_all", "field_each", "field_interaction")


def _form(x: Tensor) -> tuple[int, int, int]:
    """Of the result."""
    B, F, D = x.shape
    return B, F * (F - 1) // 2, D


def _check(op: str, x: Tensor, weights: Sequence[Tensor], kind: int, grad_out: Tensor | None = None) -> None:
    """The texts are those of csrc/cpu/interaction/bilinear_interaction.cpp."""
    check = torch._check
    check(x.dim() == 3, lambda: f"{op}: x must have 3 dimensions, got {x.dim()} (shape {list(x.shape)})")
    check(x.dtype in FLOATING, lambda: f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    check(0 <= kind < len(KINDS), lambda: f"{op}: kind must be 0 .. {len(KINDS) - 1}, got {kind}")
    _, F, D = x.shape
    wanted = (1, max(F - 1, 0), F * (F - 1) // 2)[kind]
    check(
        len(weights) == wanted,
        lambda: f"{op}: {KINDS[kind]} of {F} fields needs {wanted} weights, got {len(weights)}",
    )
    for i, weight in enumerate(weights):
        check_form(op, f"weights[{i}]", weight, (D, D), x.dtype, x.device)
    if grad_out is not None:
        check_form(op, "grad_out", grad_out, _form(x), x.dtype, x.device)


@torch.library.register_fake("rankkernels::bilinear_interaction", lib=lib)
def _(x, weights, kind):
    _check("bilinear_interaction", x, weights, kind)
    return x.new_empty(_form(x))


@torch.library.register_fake("rankkernels::bilinear_interaction_backward", lib=lib)
def _(grad_out, x, weights, kind):
    _check("bilinear_interaction_backward", x, weights, kind, grad_out)
    return x.new_empty(x.shape), [w.new_empty(w.shape) for w in weights]


def _reference(x, weights, kind):
    check_strided("bilinear_interaction", (x, *weights))
    _check("bilinear_interaction", x, weights, kind)
    return reference.bilinear_interaction(x, weights, KINDS[kind])


@torch.library.impl(lib, "bilinear_interaction", "CompositeExplicitAutograd")
def _default(x, weights, kind):
    notice_reference("bilinear_interaction", x)
    return _reference(x, weights, kind)


@torch.library.impl(lib, "bilinear_interaction_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, x, weights, kind):
    check_strided("bilinear_interaction_backward", (grad_out, x, *weights))
    _check("bilinear_interaction_backward", x, weights, kind, grad_out)
    grad, *of_weights = vjp(
        lambda x, *weights: reference.bilinear_interaction(x, weights, KINDS[kind]), grad_out, x, *weights
    )
    return grad.contiguous(), [g.contiguous() for g in of_weights]


if has_triton:

    @torch.library.impl(lib, "bilinear_interaction", "CUDA")
    def _(x, weights, kind):
        from rankkernels._triton.bilinear_interaction import bilinear_interaction

        if not triton_serves_single(x):
            return _default(x, weights, kind)
        _check("bilinear_interaction", x, weights, kind)
        return bilinear_interaction(x, weights, kind)

    @torch.library.impl(lib, "bilinear_interaction_backward", "CUDA")
    def _(grad_out, x, weights, kind):
        from rankkernels._triton.bilinear_interaction import bilinear_interaction_backward

        if not triton_serves_single(x):
            return _reference_backward(grad_out, x, weights, kind)
        _check("bilinear_interaction_backward", x, weights, kind, grad_out)
        return bilinear_interaction_backward(grad_out, x, weights, kind)


def _setup_context(ctx, inputs, output):
    x, weights, ctx.kind = inputs
    ctx.save_for_backward(x, *weights)


_bilinear_interaction_backward = differentiable(
    torch.ops.rankkernels.bilinear_interaction_backward.default, _reference_backward
)


def _backward(ctx, grad_out):
    x, *weights = ctx.saved_tensors
    return *_bilinear_interaction_backward(grad_out, x, weights, ctx.kind), None


without_autocast(torch.ops.rankkernels.bilinear_interaction.default)
without_autocast(torch.ops.rankkernels.bilinear_interaction_backward.default)
_forward = register_autograd("bilinear_interaction", _reference, _backward, _setup_context)


def bilinear_interaction(x: Tensor, weights: Sequence[Tensor], kind: str = "field_interaction") -> Tensor:
    """(W x_f) * x_g of the fields f < g of each sample.

    Semantics: ``reference.bilinear_interaction``, torch-rechub's ``BiLinearInteractionLayer``. Accumulates in float32
    (float64 for float64) and rounds once. Autocast changes nothing.

    Args:
        x: [B, F, D], any strides; float32, float64, float16 or bfloat16.
        weights: [D, D] each, in the dtype of ``x``: one for "field_all", one a field but the last for
            "field_each", one a pair for "field_interaction", in the order (0, 1), (0, 2), .. (F - 2, F - 1).
        kind: which of them.

    Returns:
        [B, F (F - 1) / 2, D] in the dtype of ``x``.

    Raises:
        ValueError: an unknown ``kind``.
        RuntimeError: shapes, numbers, dtypes or devices that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"bilinear_interaction: unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    return _forward(x, list(weights), KINDS.index(kind))
