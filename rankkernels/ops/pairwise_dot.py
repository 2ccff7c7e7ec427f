"""Dot products of a sample's fields, every pair once. Kernels: csrc/cpu/interaction/pairwise_dot_kernel.h and
_triton/pairwise_dot.py."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided
from rankkernels.ops._library import define, has_triton, lib, triton_serves
from rankkernels.ops._table import notice_reference

define("pairwise_dot(Tensor embeddings, Tensor? field_weights) -> Tensor")
define(
    "pairwise_dot_backward(Tensor grad_out, Tensor embeddings, Tensor? field_weights) "
    "-> (Tensor grad_embeddings, Tensor[] grad_field_weights)"
)


def _pairs(embeddings: Tensor) -> int:
    return embeddings.size(1) * (embeddings.size(1) - 1) // 2


def _check(op: str, embeddings: Tensor, field_weights: Tensor | None, grad_out: Tensor | None = None) -> None:
    """The texts are those of csrc/cpu/interaction/pairwise_dot.cpp."""
    check, x, weights = torch._check, embeddings, field_weights
    check(x.dim() == 3, lambda: f"{op}: embeddings must have 3 dimensions, got {x.dim()} (shape {list(x.shape)})")
    check(x.dtype in FLOATING, lambda: f"{op}: embeddings must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if weights is not None:
        check_form(op, "field_weights", weights, (_pairs(x),), x.dtype, x.device)
    if grad_out is not None:
        check_form(op, "grad_out", grad_out, (x.size(0), _pairs(x)), x.dtype, x.device)


@torch.library.register_fake("rankkernels::pairwise_dot", lib=lib)
def _(embeddings, field_weights):
    _check("pairwise_dot", embeddings, field_weights)
    return embeddings.new_empty((embeddings.size(0), _pairs(embeddings)))


@torch.library.register_fake("rankkernels::pairwise_dot_backward", lib=lib)
def _(grad_out, embeddings, field_weights):
    _check("pairwise_dot_backward", embeddings, field_weights, grad_out)
    return embeddings.new_empty(embeddings.shape), [w.new_empty(w.shape) for w in _given(field_weights)]


def _given(field_weights: Tensor | None) -> list[Tensor]:
    return [] if field_weights is None else [field_weights]


def _reference(embeddings, field_weights):
    check_strided("pairwise_dot", (embeddings, field_weights))
    _check("pairwise_dot", embeddings, field_weights)
    return reference.pairwise_dot(embeddings, field_weights)


@torch.library.impl(lib, "pairwise_dot", "CompositeExplicitAutograd")
def _default(embeddings, field_weights):
    notice_reference("pairwise_dot", embeddings)
    return _reference(embeddings, field_weights)


@torch.library.impl(lib, "pairwise_dot_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, embeddings, field_weights):
    check_strided("pairwise_dot_backward", (grad_out, embeddings, field_weights))
    _check("pairwise_dot_backward", embeddings, field_weights, grad_out)
    grad, *of_weights = vjp(reference.pairwise_dot, grad_out, embeddings, *_given(field_weights))
    return grad.contiguous(), [g.contiguous() for g in of_weights]


if has_triton:

    @torch.library.impl(lib, "pairwise_dot", "CUDA")
    def _(embeddings, field_weights):
        from rankkernels._triton.pairwise_dot import pairwise_dot

        if not triton_serves(embeddings):
            return _default(embeddings, field_weights)
        _check("pairwise_dot", embeddings, field_weights)
        return pairwise_dot(embeddings, field_weights)

    @torch.library.impl(lib, "pairwise_dot_backward", "CUDA")
    def _(grad_out, embeddings, field_weights):
        from rankkernels._triton.pairwise_dot import pairwise_dot_backward

        if not triton_serves(embeddings):
            return _reference_backward(grad_out, embeddings, field_weights)
        _check("pairwise_dot_backward", embeddings, field_weights, grad_out)
        return pairwise_dot_backward(grad_out, embeddings, field_weights)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_pairwise_dot_backward = differentiable(torch.ops.rankkernels.pairwise_dot_backward.default, _reference_backward)


def _backward(ctx, grad_out):
    grad, of_weights = _pairwise_dot_backward(grad_out, *ctx.saved_tensors)
    return grad, of_weights[0] if of_weights else None


_forward = register_autograd("pairwise_dot", _reference, _backward, _setup_context)


def pairwise_dot(embeddings: Tensor, field_weights: Tensor | None = None) -> Tensor:
    """Dot products of the fields f < g of each sample, the strict upper triangle of X X^T row by row.

    Semantics: ``reference.pairwise_dot``; the inner product of PNN, DLRM's interaction, FuxiCTR's
    ``InnerProductInteraction("inner_product")``; with ``field_weights`` the terms of FwFM. The [F, F] products of a
    sample are never stored. Accumulates in float32 (float64 for float64). Autocast changes nothing.

    Args:
        embeddings: [B, F, D], any strides; float32, float64, float16 or bfloat16.
        field_weights: [F (F - 1) / 2], a factor for each pair, in the dtype of ``embeddings``.

    Returns:
        [B, F (F - 1) / 2] in the dtype of ``embeddings``; pairs in the order (0, 1), (0, 2), .. (F - 2, F - 1).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    return _forward(embeddings, field_weights)
