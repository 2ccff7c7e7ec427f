"""Attention of a target by dot products. Kernels: csrc/cpu/target_attention/target_attention_kernel.h and
_triton/target_attention.py."""

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
    check_one_device,
    check_positions,
    check_strided,
    raise_documented,
    wide,
)
from rankkernels.ops._library import define, has_cpu_kernel, has_triton, lib, triton_serves_single
from rankkernels.ops._schema import schema_of
from rankkernels.ops._table import notice_reference


class Inputs(NamedTuple):
    """The tensors of the schema."""

    query: Tensor
    history: Tensor
    lengths: Tensor | None
    mask: Tensor | None
    offsets: Tensor | None
    history_index: Tensor | None


_ARGUMENTS = schema_of(Inputs)
define(f"target_attention({_ARGUMENTS}) -> (Tensor, Tensor)")
define(f"target_attention_backward(Tensor grad_out, Tensor out, Tensor stats, {_ARGUMENTS}) -> (Tensor, Tensor)")


def _check(inputs: Inputs) -> None:
    def check(condition: bool, text) -> None:
        torch._check(condition, lambda: f"target_attention: {text()}")

    query, history, lengths, mask, offsets, index = inputs
    check(query.dim() == 3, lambda: f"query must have 3 dimensions, got {query.dim()} (shape {list(query.shape)})")
    check(query.dtype in FLOATING, lambda: f"query must be float32, float64, float16 or bfloat16, got {query.dtype}")
    given = sum(t is not None for t in (lengths, mask, offsets))
    check(given < 2, lambda: "give one of lengths, mask and offsets")
    B, _, D = query.shape
    dims, form = (3, "[B, L, D]") if offsets is None else (2, "[N, D]")
    check(
        history.dim() == dims and history.size(dims - 1) == D,
        lambda: f"history must be {form} of D = {D} columns, got shape {list(history.shape)}",
    )
    check(
        history.dtype == query.dtype and history.device == query.device,
        lambda: f"history must have the dtype and device of query, {query.dtype}, got {history.dtype}",
    )
    if index is not None:
        check_indices("target_attention", "history_index", index, B, "B")
    each = "B" if index is None else "U"
    if offsets is not None:
        fits = offsets.dim() == 1 and offsets.size(0) > 0
        check(fits, lambda: f"offsets must be [{each} + 1], got shape {list(offsets.shape)}")
        size = B + 1 if index is None else offsets.size(0)
        check_indices("target_attention", "offsets", offsets, size, f"{each} + 1")
        users = offsets.size(0) - 1
    else:
        users = history.size(0)
    check(
        index is not None or users == B,
        lambda: f"history and query must have one batch size B, got {history.size(0)} and {B}",
    )
    if lengths is not None:
        check_indices("target_attention", "lengths", lengths, users, each)
    if mask is not None:
        L = history.size(1)
        check(
            mask.dim() == 2 and mask.size(0) == users and mask.size(1) == L,
            lambda: f"mask must be [{each}, L] = [{users}, {L}], got shape {list(mask.shape)}",
        )
        check(mask.dtype == torch.bool, lambda: f"mask must be bool, true at valid rows, got {mask.dtype}")
    check_one_device("target_attention", query.device, inputs)


def _check_backward(grad_out: Tensor, out: Tensor, stats: Tensor, inputs: Inputs) -> None:
    _check(inputs)
    query, op = inputs.query, "target_attention_backward"
    check_form(op, "grad_out", grad_out, query.shape, query.dtype, query.device)
    check_form(op, "out", out, query.shape, query.dtype, query.device)
    check_form(op, "stats", stats, (*query.shape[:2], 2), wide(query.dtype), query.device)


def _check_values(inputs: Inputs) -> None:
    """Of positions on the CPU: reading others would wait for their device."""
    _, history, lengths, _, offsets, index = inputs
    if history.device.type == "cpu":
        check_positions("target_attention", history, lengths, offsets, index)


@torch.library.register_fake("rankkernels::target_attention", lib=lib)
def _(*arguments):
    inputs = Inputs(*arguments)
    _check(inputs)
    query = inputs.query
    return query.new_empty(query.shape), query.new_empty((*query.shape[:2], 2), dtype=wide(query.dtype))


@torch.library.register_fake("rankkernels::target_attention_backward", lib=lib)
def _(grad_out, out, stats, *arguments):
    inputs = Inputs(*arguments)
    _check_backward(grad_out, out, stats, inputs)
    return inputs.query.new_empty(inputs.query.shape), inputs.history.new_empty(inputs.history.shape)


def _reference(*arguments):
    inputs = Inputs(*arguments)
    check_strided("target_attention", arguments)
    _check(inputs)
    _check_values(inputs)
    out = reference.target_attention(*arguments)
    return out, out.new_zeros((*out.shape[:2], 2), dtype=wide(out.dtype))


@torch.library.impl(lib, "target_attention", "CompositeExplicitAutograd")
def _default(query, *rest):
    notice_reference("target_attention", query)
    return _reference(query, *rest)


@torch.library.impl(lib, "target_attention_backward", "CompositeExplicitAutograd")
def _reference_backward(grad_out, out, stats, *arguments):
    inputs = Inputs(*arguments)
    check_strided("target_attention_backward", (grad_out, out, stats, *arguments))
    _check_backward(grad_out, out, stats, inputs)
    _check_values(inputs)
    query, history, *rest = inputs
    grads = vjp(lambda q, h: reference.target_attention(q, h, *rest), grad_out, query, history)
    return tuple(g.contiguous() for g in grads)


WIDEST = 128
"""Columns of a row that Triton's kernels take: a program holds blocks of whole rows."""


def is_faster(query: Tensor) -> bool:
    """Whether a kernel serves queries [B, H, D]: of padded histories the default is slower than torch's products."""
    if query.is_cuda or query.is_meta:
        return triton_serves_single(query) and query.size(-1) <= WIDEST
    return has_cpu_kernel(query)


if has_triton:

    @torch.library.impl(lib, "target_attention", "CUDA")
    def _(*arguments):
        from rankkernels._triton.target_attention import target_attention

        inputs = Inputs(*arguments)
        if not (inputs.query.dim() == 3 and is_faster(inputs.query)):
            return _default(*arguments)
        _check(inputs)
        return target_attention(*inputs)

    @torch.library.impl(lib, "target_attention_backward", "CUDA")
    def _(grad_out, out, stats, *arguments):
        from rankkernels._triton.target_attention import target_attention_backward

        inputs = Inputs(*arguments)
        if not (inputs.query.dim() == 3 and is_faster(inputs.query)):
            return _reference_backward(grad_out, out, stats, *arguments)
        _check_backward(grad_out, out, stats, inputs)
        return target_attention_backward(grad_out, out, stats, *inputs)


def _setup_context(ctx, inputs, output):
    out, stats = output
    ctx.save_for_backward(out, stats, *inputs)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


target_attention_backward = differentiable(torch.ops.rankkernels.target_attention_backward.default, _reference_backward)


def _backward(ctx, grad_out, _):
    nothing = (None,) * len(Inputs._fields)
    if grad_out is None:
        return nothing
    grads = Inputs(*nothing)._replace(
        **dict(zip(("query", "history"), target_attention_backward(grad_out, *ctx.saved_tensors)))
    )
    return tuple(grads)


_forward = register_autograd("target_attention", _reference, _backward, _setup_context)


def target_attention(
    query: Tensor,
    history: Tensor,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    history_index: Tensor | None = None,
) -> Tensor:
    """Each sample's history, pooled by the softmax of its rows' dot products with the sample's queries.

    The rows are keys and values both: projections of keys belong to the queries, K^T q, and those of values to what is
    pooled. Scale the queries where scores are to be scaled. A history is read once, however many samples share it.

    Semantics: ``reference.target_attention``; FuxiCTR's ``MultiHeadTargetAttention`` between its projections.
    Accumulates in float32 (float64 for float64).

    Args:
        query: [B, H, D], H queries a sample; any strides; float32, float64, float16 or bfloat16.
        history: [B, L, D], or [N, D] with ``offsets``, in the dtype of ``query``.
        lengths: [B], int32 or int64: the first so many rows are valid. Without any a sample gets zeros.
        mask: [B, L], true at valid rows. Without any a sample gets the mean of all L, as FuxiCTR's softmax of -1e9.
        offsets: [B + 1], int32 or int64: rows ``offsets[b]:offsets[b + 1]`` of ``history`` are sample b's.
        history_index: [B], int32 or int64: sample b has history ``history_index[b]`` of U, and lengths, mask or offsets
            are those of the histories.

    Returns:
        [B, H, D].

    Raises:
        RuntimeError: another rank, size or dtype; more than one of lengths, mask and offsets.
        ValueError: a length outside 0 .. L, offsets that decrease or do not run from 0 to N.
        IndexError: a ``history_index`` outside 0 .. U - 1.
    """
    with raise_documented():
        return _forward(query, history, lengths, mask, offsets, history_index)[0]
