"""GRU with an attentional update gate. Kernel: csrc/cpu/recurrent/augru_kernel.h."""

from __future__ import annotations

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._autograd import differentiable, register_autograd, vjp
from rankkernels.ops._checks import FLOATING, check_form, check_strided, raise_documented
from rankkernels.ops._library import define, lib
from rankkernels.ops._table import notice_reference

_ARGUMENTS = "Tensor gates, Tensor weight, Tensor bias, Tensor? attention, Tensor? lengths"
define(f"augru({_ARGUMENTS}) -> Tensor")
define(f"augru_backward(Tensor grad_out, Tensor out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")


def _check(gates, weight, bias, attention, lengths) -> None:
    check = torch._check
    check(
        gates.dim() == 3,
        lambda: f"augru: gates must have 3 dimensions, got {gates.dim()} (shape {list(gates.shape)})",
    )
    check(
        gates.dtype in FLOATING,
        lambda: f"augru: gates must be float32, float64, float16 or bfloat16, got {gates.dtype}",
    )
    check(
        weight.dim() == 2 and weight.size(0) == 3 * weight.size(1) and weight.size(0) == gates.size(2),
        lambda: f"augru: weight must be [3 D, D] of the {gates.size(2)} = 3 D gates, got shape {list(weight.shape)}",
    )
    (B, L, _), D, form = gates.shape, weight.size(1), (gates.dtype, gates.device)
    check_form("augru", "weight", weight, (3 * D, D), *form)
    check_form("augru", "bias", bias, (D,), *form)
    if attention is not None:
        check_form("augru", "attention", attention, (B, L), *form)
    if lengths is None:
        return
    check(
        lengths.dim() == 1 and lengths.size(0) == B,
        lambda: f"augru: lengths must be [B] = [{B}], got shape {list(lengths.shape)}",
    )
    check(
        lengths.dtype in (torch.int32, torch.int64),
        lambda: f"augru: lengths must be int32 or int64, got {lengths.dtype}",
    )
    check(lengths.device == gates.device, lambda: "augru: all arguments must be on one device")


def _check_backward(grad_out, out, gates, weight, *rest) -> None:
    _check(gates, weight, *rest)
    for name, t in (("grad_out", grad_out), ("out", out)):
        check_form("augru_backward", name, t, (*gates.shape[:2], weight.size(1)), gates.dtype, gates.device)


def _check_values(gates, lengths) -> None:
    """Where nothing is on a device that would be waited for."""
    if lengths is None or not lengths.numel() or lengths.device.type != "cpu":
        return
    wrong = (lengths < 0) | (lengths > gates.size(1))
    if wrong.any():
        b = int(wrong.to(torch.uint8).argmax())
        raise RuntimeError(f"augru: lengths[{b}] = {int(lengths[b])} is outside 0 .. {gates.size(1)}, the positions")


@torch.library.register_fake("rankkernels::augru", lib=lib)
def _(gates, weight, bias, attention, lengths):
    _check(gates, weight, bias, attention, lengths)
    return gates.new_empty((*gates.shape[:2], weight.size(1)))


@torch.library.register_fake("rankkernels::augru_backward", lib=lib)
def _(grad_out, out, gates, weight, bias, attention, lengths):
    _check_backward(grad_out, out, gates, weight, bias, attention, lengths)
    of_attention = gates.new_empty((0 if attention is None else gates.size(0), gates.size(1)))
    return gates.new_empty(gates.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), of_attention


def _reference(gates, weight, bias, attention, lengths):
    arguments = gates, weight, bias, attention, lengths
    check_strided("augru", arguments)
    _check(*arguments)
    _check_values(gates, lengths)
    return reference.augru(*arguments)


@torch.library.impl(lib, "augru", "CompositeExplicitAutograd")
def _(gates, *rest):
    notice_reference("augru", gates)
    return _reference(gates, *rest)


@torch.library.impl(lib, "augru_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, out, gates, weight, bias, attention, lengths):
    check_strided("augru_backward", (grad_out, out, gates, weight, bias, attention, lengths))
    _check_backward(grad_out, out, gates, weight, bias, attention, lengths)
    _check_values(gates, lengths)
    learnt = [gates, weight, bias] if attention is None else [gates, weight, bias, attention]

    def forward(gates, weight, bias, attention=None):
        return reference.augru(gates, weight, bias, attention, lengths)

    grads = [g.contiguous() for g in vjp(forward, grad_out, *learnt)]
    return (*grads, gates.new_empty((0, gates.size(1)))) if attention is None else tuple(grads)


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
    gates: Tensor, weight: Tensor, bias: Tensor, attention: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """A GRU whose update gate is scaled by an attention, DIEN's; without one, ``torch.nn.GRU``'s recurrence.

    From h = 0, position after position: u = sigmoid(g_u + U_u h), r = sigmoid(g_r + U_r h),
    n = tanh(g_n + r (U_n h + bias)), and h moves to h + a u (n - h). ``torch.nn.GRU``'s z is 1 - u: its gate with the
    sign changed.

    Semantics: ``reference.augru``. Accumulates in float32 (float64 for float64).

    Args:
        gates: [B, L, 3 D], what the inputs give to g_u, g_r and g_n, biases included; any strides; float32, float64,
            float16 or bfloat16.
        weight: [3 D, D], U_u, U_r and U_n one below the other, in the dtype of ``gates`` as all the others.
        bias: [D], of the candidate, within what r scales.
        attention: [B, L], a.
        lengths: [B], int32 or int64: how many positions of each sample there are; all unless given.

    Returns:
        [B, L, D], h behind each position; zeros beyond the length.

    Raises:
        RuntimeError: another rank, size or dtype.
        ValueError: a length outside 0 .. L.
    """
    with raise_documented():
        return _forward(gates, weight, bias, attention, lengths)
