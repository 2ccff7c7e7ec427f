"""GRU with an attentional update gate. Kernels: csrc/cpu/recurrent/augru_kernel.h and _triton/augru.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import (
    FLOATING,
    check_form,
    check_indices,
    check_lengths,
    check_one_device,
    check_strided,
    raise_documented,
)
from rankkernels.ops._library import define, has_cpu_kernel, has_triton, lib, triton_serves_single, without_autocast
from rankkernels.ops._schema import schema_of
from rankkernels.ops._table import notice_reference


class Inputs(NamedTuple):
    """The tensors of the schema."""

    x: Tensor
    input_weight: Tensor
    weight: Tensor
    bias: Tensor
    attention: Tensor | None
    lengths: Tensor | None


_ARGUMENTS = schema_of(Inputs)
define(f"augru({_ARGUMENTS}) -> Tensor")
define(f"augru_backward(Tensor grad_out, Tensor out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def _check(x, input_weight, weight, bias, attention, lengths) -> None:
    check = torch._check
    check(x.dim() == 3, lambda: f"augru: x must have 3 dimensions, got {x.dim()} (shape {list(x.shape)})")
    check(x.dtype in FLOATING, lambda: f"augru: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    check(
        weight.dim() == 2 and weight.size(0) == 3 * weight.size(1),
        lambda: f"augru: weight must be [3 D, D], got shape {list(weight.shape)}",
    )
    (B, L, inputs), D, form = x.shape, weight.size(1), (x.dtype, x.device)
    check_form("augru", "weight", weight, (3 * D, D), *form)
    check_form("augru", "input_weight", input_weight, (3 * D, inputs), *form)
    check_form("augru", "bias", bias, (4, D), *form)
    if attention is not None:
        check_form("augru", "attention", attention, (B, L), *form)
    if lengths is not None:
        check_indices("augru", "lengths", lengths, B, "B")
        check_one_device("augru", x.device, (lengths,))


def _check_backward(grad_out, out, x, input_weight, weight, *rest) -> None:
    _check(x, input_weight, weight, *rest)
    for name, t in (("grad_out", grad_out), ("out", out)):
        check_form("augru_backward", name, t, (*x.shape[:2], weight.size(1)), x.dtype, x.device)


def _check_values(x, lengths) -> None:
    """Where nothing is on a device that would be waited for."""
    if lengths is not None and lengths.device.type == "cpu":
        check_lengths("augru", lengths, x.size(1), "the positions")


@torch.library.register_fake("rankkernels::augru", lib=lib)
def _(x, input_weight, weight, *rest):
    _check(x, input_weight, weight, *rest)
    return x.new_empty((*x.shape[:2], weight.size(1)))


@torch.library.register_fake("rankkernels::augru_backward", lib=lib)
def _(grad_out, out, x, input_weight, weight, bias, attention, lengths):
    _check_backward(grad_out, out, x, input_weight, weight, bias, attention, lengths)
    of_attention = x.new_empty((0 if attention is None else x.size(0), x.size(1)))
    return (*(t.new_empty(t.shape) for t in (x, input_weight, weight, bias)), of_attention)


def _reference(x, *rest):
    check_strided("augru", (x, *rest))
    _check(x, *rest)
    *_, lengths = rest
    _check_values(x, lengths)
    return reference.augru(x, *rest)


@torch.library.impl(lib, "augru", "CompositeExplicitAutograd")
def _default(x, *rest):
    notice_reference("augru", x)
    return _reference(x, *rest)


@torch.library.impl(lib, "augru_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, out, *arguments):
    check_strided("augru_backward", (grad_out, out, *arguments))
    _check_backward(grad_out, out, *arguments)
    *learnt, attention, lengths = arguments
    x, *_ = learnt
    _check_values(x, lengths)
    learnt += [] if attention is None else [attention]

    def forward(x, input_weight, weight, bias, attention=None):
        return reference.augru(x, input_weight, weight, bias, attention, lengths)

    grads = [g.contiguous() for g in vjp(forward, grad_out, *learnt)]
    return (*grads, x.new_empty((0, x.size(1)))) if attention is None else tuple(grads)


WIDEST = 64
"""States that Triton's kernels take: a gate's weight is a tile."""


def is_faster(x: Tensor, D: int) -> bool:
    """Whether a kernel serves x [B, L, K] and states of D values: the default is slower than torch's GRU."""
    if x.is_cuda or x.is_meta:
        return triton_serves_single(x) and D <= WIDEST
    return has_cpu_kernel(x)


if has_triton:

    @torch.library.impl(lib, "augru", "CUDA")
    def _(x, input_weight, weight, *rest):
        from rankkernels._triton.augru import augru

        _check(x, input_weight, weight, *rest)
        if not is_faster(x, weight.size(1)):
            return _default(x, input_weight, weight, *rest)
        return augru(x, input_weight, weight, *rest)

    @torch.library.impl(lib, "augru_backward", "CUDA")
    def _(grad_out, out, x, input_weight, weight, *rest):
        from rankkernels._triton.augru import augru_backward

        _check_backward(grad_out, out, x, input_weight, weight, *rest)
        if not is_faster(x, weight.size(1)):
            return _reference_backward(grad_out, out, x, input_weight, weight, *rest)
        return augru_backward(grad_out, out, x, input_weight, weight, *rest)


without_autocast(torch.ops.rankkernels.augru.default)
without_autocast(torch.ops.rankkernels.augru_backward.default)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs)


augru_backward = differentiable(torch.ops.rankkernels.augru_backward.default, _reference_backward)


def _backward(ctx, grad_out):
    out, *arguments = ctx.saved_tensors
    *grads, of_attention = augru_backward(grad_out, out, *arguments)
    *_, attention, _ = arguments
    return (*grads, None if attention is None else of_attention, None)


_forward = register_autograd("augru", _reference, _backward, _setup_context)


def augru(
    x: Tensor,
    input_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    attention: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """A GRU whose update gate is scaled by an attention, DIEN's; without one, ``torch.nn.GRU``'s recurrence.

    From h = 0, position after position: u = sigmoid(W_u x + U_u h + b_u), r = sigmoid(W_r x + U_r h + b_r),
    n = tanh(W_n x + b_n + r (U_n h + b_c)), and h moves to h + a u (n - h). ``torch.nn.GRU``'s z is 1 - u: its gate
    with the sign changed.

    Semantics: ``reference.augru``. Accumulates in float32 (float64 for float64).

    Args:
        x: [B, L, K], any strides; float32, float64, float16 or bfloat16.
        input_weight: [3 D, K], W_u, W_r and W_n one below the other, in the dtype of ``x`` as all the others.
        weight: [3 D, D], U_u, U_r and U_n.
        bias: [4, D]: b_u, b_r, b_c, which r scales, and b_n, which it does not.
        attention: [B, L], a.
        lengths: [B], int32 or int64: how many positions of each sample there are; all unless given.

    Returns:
        [B, L, D], h behind each position; zeros beyond the length.

    Raises:
        RuntimeError: another rank, size or dtype.
        ValueError: a length outside 0 .. L.
    """
    with raise_documented():
        return _forward(x, input_weight, weight, bias, attention, lengths)
