"""The experts of DCN v2's mixture of low rank. Kernels: csrc/cpu/interaction/mixed_experts_kernel.h and
_triton/mixed_experts.py."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided
from rankkernels.ops._library import define, has_cpu_kernel, has_triton, lib, triton_serves_single, without_autocast
from rankkernels.ops._table import notice_reference

define("mixed_experts(Tensor projections, Tensor weight) -> Tensor")
define(
    "mixed_experts_backward(Tensor grad_out, Tensor projections, Tensor weight) "
    "-> (Tensor grad_projections, Tensor grad_weight)"
)


def _form(projections: Tensor, weight: Tensor) -> tuple[int, int]:
    """Of the result."""
    return projections.size(0), weight.size(0) * weight.size(1)


def _check(op: str, projections: Tensor, weight: Tensor, grad_out: Tensor | None = None) -> None:
    """The texts are those of csrc/cpu/interaction/mixed_experts.cpp."""
    check, p = torch._check, projections
    check(p.dim() == 2, lambda: f"{op}: projections must have 2 dimensions, got {p.dim()} (shape {list(p.shape)})")
    check(
        p.dtype in FLOATING, lambda: f"{op}: projections must be float32, float64, float16 or bfloat16, got {p.dtype}"
    )
    check(
        weight.dim() == 3 and weight.size(1) == weight.size(2),
        lambda: f"{op}: weight must be [E, r, r], got {list(weight.shape)}",
    )
    check_form(op, "weight", weight, weight.shape, p.dtype, p.device)
    B, columns = _form(p, weight)
    check_form(op, "projections", p, (B, columns + weight.size(0)), p.dtype, p.device)
    if grad_out is not None:
        check_form(op, "grad_out", grad_out, (B, columns), p.dtype, p.device)


@torch.library.register_fake("rankkernels::mixed_experts", lib=lib)
def _(projections, weight):
    _check("mixed_experts", projections, weight)
    return projections.new_empty(_form(projections, weight))


@torch.library.register_fake("rankkernels::mixed_experts_backward", lib=lib)
def _(grad_out, projections, weight):
    _check("mixed_experts_backward", projections, weight, grad_out)
    return projections.new_empty(projections.shape), weight.new_empty(weight.shape)


def _reference(projections, weight):
    check_strided("mixed_experts", (projections, weight))
    _check("mixed_experts", projections, weight)
    return reference.mixed_experts(projections, weight)


@torch.library.impl(lib, "mixed_experts", "CompositeExplicitAutograd")
def _default(projections, weight):
    notice_reference("mixed_experts", projections)
    return _reference(projections, weight)


@torch.library.impl(lib, "mixed_experts_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, projections, weight):
    check_strided("mixed_experts_backward", (grad_out, projections, weight))
    _check("mixed_experts_backward", projections, weight, grad_out)
    of_projections, of_weight = vjp(reference.mixed_experts, grad_out, projections, weight)
    return of_projections.contiguous(), of_weight.contiguous()


#: Experts, and their rank, that Triton's kernels take: a program has the gates of all, and an expert's C is a tile.
WIDEST = 64


def is_faster(projections: Tensor, weight: Tensor) -> bool:
    """Whether a kernel serves these: the default computes the forward twice, torch's own autograd once."""
    if projections.is_cuda or projections.is_meta:
        return triton_serves_single(projections) and max(weight.shape) <= WIDEST
    return has_cpu_kernel(projections)


if has_triton:

    @torch.library.impl(lib, "mixed_experts", "CUDA")
    def _(projections, weight):
        from rankkernels._triton.mixed_experts import mixed_experts

        _check("mixed_experts", projections, weight)
        if not is_faster(projections, weight):
            return _default(projections, weight)
        return mixed_experts(projections, weight)

    @torch.library.impl(lib, "mixed_experts_backward", "CUDA")
    def _(grad_out, projections, weight):
        from rankkernels._triton.mixed_experts import mixed_experts_backward

        _check("mixed_experts_backward", projections, weight, grad_out)
        if not is_faster(projections, weight):
            return _reference_backward(grad_out, projections, weight)
        return mixed_experts_backward(grad_out, projections, weight)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_mixed_experts_backward = differentiable(torch.ops.rankkernels.mixed_experts_backward.default, _reference_backward)


def _backward(ctx, grad_out):
    return _mixed_experts_backward(grad_out, *ctx.saved_tensors)


without_autocast(torch.ops.rankkernels.mixed_experts.default)
without_autocast(torch.ops.rankkernels.mixed_experts_backward.default)
_forward = register_autograd("mixed_experts", _reference, _backward, _setup_context)


def mixed_experts(projections: Tensor, weight: Tensor) -> Tensor:
    """What is between the two products of a layer of DCN v2's mixture: softmax(gates)_e * tanh(C_e tanh(p_e)).

    Semantics: ``reference.mixed_experts``. Accumulates in float32 (float64 for float64) and rounds once. Autocast
    changes nothing. Of the forward nothing is kept but the inputs.

    Args:
        projections: [B, E r + E], x by all experts' V, p_1 .. p_E, and then by their gates; any strides; float32,
            float64, float16 or bfloat16.
        weight: the experts' C [E, r, r], in the dtype of ``projections``.

    Returns:
        [B, E r] in the dtype of ``projections``.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    return _forward(projections, weight)
