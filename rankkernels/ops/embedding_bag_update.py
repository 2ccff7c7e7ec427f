"""An optimizer's step on the rows that a batch looked up. Kernels: csrc/cpu/embedding/optimizer_kernel.h,
csrc/cuda/embedding/optimizer.cuh and _triton/embedding_bag_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._checks import FLOATING
from rankkernels.ops._embedding_checks import check_backward, check_table
from rankkernels.ops._features import Features
from rankkernels.ops._library import define, lib, triton_embeds, triton_serves_tables
from rankkernels.ops._rules import OPTIMIZERS, ROUNDING, RULES, STEP, Hyper, Live, settings
from rankkernels.ops._schema import schema_of
from rankkernels.ops._table import notice_reference


def state_shapes(kind: str, table: torch.Size) -> list[torch.Size]:
    """Of the states of a table of this shape."""
    rule = RULES[kind]
    return [table] * rule.elementwise + [table[:1]] * rule.row_wise


def is_live(tables: Sequence[Tensor]) -> bool:
    """Whether a step on these tables can be given its ``Live``: on a GPU."""
    return all(t.is_cuda for t in tables)


def is_captured(tables: Sequence[Tensor]) -> bool:
    """Whether what is launched on these tables becomes part of a CUDA graph."""
    on_gpu = torch.backends.cuda.is_built() and any(t.is_cuda for t in tables)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _side_by_side(a: Tensor, b: Tensor) -> bool:
    """Whether the columns of ``b`` follow those of ``a`` in the rows of one matrix."""
    return (
        a.dim() == b.dim() == 2
        and a.dtype == b.dtype
        and a.size(0) == b.size(0)
        and a.stride() == b.stride()
        and a.stride(1) == 1
        and a.storage_offset() + a.size(1) == b.storage_offset()
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


def infinite(grads: Sequence[Tensor]) -> Tensor:
    """1 where one of the gradients is not finite, else 0: [] float32, on their device. Features side by side in one
    matrix are one."""
    wholes: list[Tensor] = []
    for g in grads:
        if wholes and _side_by_side(wholes[-1], g):
            left = wholes.pop()
            g = left.as_strided((g.size(0), left.size(1) + g.size(1)), g.stride(), left.storage_offset())
        wholes.append(g)
    finite = [whole.isfinite().all() for whole in wholes]
    return (finite.pop() if len(finite) == 1 else torch.stack(finite).all()).logical_not().float()


def _of_table(values: Sequence, t: int, tables: int) -> Sequence:
    """The entries of table ``t`` in a list that has equally many of each."""
    each = len(values) // tables
    return values[each * t : each * t + each]


# ``states`` hold the states of each table, as its rule has them, in float32, float64 for a float64 table, and behind
# them on a GPU its ``Live``, if it has one. Returned are the gradients of the per-sample weights.
define(
    f"embedding_bag_update(Tensor?[] grad_outs, Tensor(a!)[] weights, Tensor(b!)[] states, {schema_of(Features)}, "
    "int optimizer, float[] hyper) -> Tensor[] grad_per_sample_weights"
)
# The same for one table, given its coalesced gradient.
define(
    "sparse_update(Tensor(a!) weight, Tensor(b!)[] states, Tensor rows, Tensor values, int optimizer, float[] hyper) "
    "-> ()"
)


class BagGradients(NamedTuple):
    """The gradients of ``embedding_bag``'s results, one a feature or None: see ``_fused_step.Gradients``."""

    outs: list[Tensor | None]

    def lookups(self, features: Features) -> list[int]:
        return [f for f, g in enumerate(self.outs) if g is not None]

    def update(self, weights: Sequence[Tensor]) -> tuple[torch._ops.OpOverload, tuple]:
        return torch.ops.rankkernels.embedding_bag_update.default, (self.outs, weights)

    def of_inputs(self, returned: list[Tensor]) -> tuple:
        return (returned,)

    def of_lookups(self, features: Features) -> tuple:
        return (self.outs,)


def _without_live(op: str, states: Sequence[Tensor], weights: Sequence[Tensor], each: int) -> list[Tensor]:
    """The states as the rule has them; the others are checked."""
    left = []
    for t, weight in enumerate(weights):
        of_table = _of_table(states, t, len(weights))
        for value in of_table[each:]:
            torch._check(
                value.numel() == 1 and value.dtype == torch.float32 and value.device == weight.device,
                lambda: (
                    f"{op}: count, lr, scale and skip of a table must each be one float32 on its device, got shape "
                    f"{list(value.shape)} and {value.dtype}"
                ),
            )
        left += of_table[:each]
    return left


def check_tables(op, weights, states, optimizer, hyper) -> None:
    """The texts are those of csrc/embedding/optimizer.h."""
    check, n = torch._check, len(weights)
    check(0 <= optimizer < len(OPTIMIZERS), lambda: f"{op}: unknown optimizer {optimizer}")
    rule = RULES[OPTIMIZERS[optimizer]]
    each = rule.elementwise + rule.row_wise
    if n and len(states) == n * (each + len(Live._fields)):
        states = _without_live(op, states, weights, each)
    check(
        len(states) == n * each,
        lambda: f"{op}: states must hold {each} tensors a table, got {len(states)} for {n}",
    )
    numbers = len(Hyper._fields) + len(rule.settings)
    check(
        len(hyper) == numbers * n, lambda: f"{op}: hyper must hold {numbers} numbers a table, got {len(hyper)} for {n}"
    )
    for rounding, step in zip(hyper[ROUNDING::numbers], hyper[STEP::numbers]):
        check(
            0 <= rounding < 2**53 and rounding == int(rounding),
            lambda: f"{op}: rounding must be 0 or an integer below 2^53, got {rounding:g}",
        )
        check(
            rounding == 0 or (0 <= step < 2**32 and step == int(step)),
            lambda: f"{op}: where rounding is not 0, step must be an integer below 2^32, got {step:g}",
        )
    for t, w in enumerate(weights):
        strides = list(w.stride()) if w.layout == torch.strided else None
        check(
            w.dtype in FLOATING,
            lambda: f"{op}: a table must be float32, float64, float16 or bfloat16, got {w.dtype}",
        )
        check(
            w.dim() == 2
            and strides is not None
            and (strides[1] == 1 or w.size(1) <= 1)
            and (strides[0] >= w.size(1) or w.size(0) <= 1),
            lambda: (
                f"{op}: a table must be [R, D] with elements side by side in rows that do not overlap, got shape "
                f"{list(w.shape)}" + (f" and strides {strides}" if w.dim() == 2 else "")
            ),
        )
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        for i, state in enumerate(states[each * t : each * t + each]):
            one_a_row = i >= rule.elementwise
            shape = w.shape[:1] if one_a_row else w.shape
            fits = state.dtype == dtype and state.shape == shape and state.layout == torch.strided
            apart = fits and (
                w.size(0) <= 1
                or (state.stride(0) == 1 if one_a_row else w.size(1) <= state.stride(0) == states[each * t].stride(0))
            )
            check(
                apart and state.device == w.device and (one_a_row or w.size(1) <= 1 or state.stride(1) == 1),
                lambda: (
                    f"{op}: state {i} of a table of shape {list(w.shape)} must be {dtype} of one value "
                    + ("a row, contiguous" if one_a_row else "an element, in rows as far apart as state 0's")
                    + f", got shape {list(state.shape)} and {state.dtype}"
                ),
            )


def _check_sparse(weight, states, rows, values, optimizer, hyper) -> None:
    op, check = "sparse_update", torch._check
    check_tables(op, [weight], states, optimizer, hyper)
    check(
        rows.dim() == 1
        and rows.dtype == torch.int64
        and values.shape == (rows.size(0), weight.size(1))
        and values.dtype == weight.dtype
        and rows.device == values.device == weight.device
        and rows.layout == values.layout == torch.strided,
        lambda: (
            f"{op}: rows must be int64 [n] and values [n, D] like the table of shape {list(weight.shape)} and "
            f"{weight.dtype}, got shapes {list(rows.shape)} and {list(values.shape)}, {rows.dtype} and {values.dtype}"
        ),
    )


def _check_rows(weight, rows) -> None:
    """Rows that ascend in the table: on other devices than the CPU nobody waits for the values."""
    if rows.device.type != "cpu" or rows.numel() == 0:
        return
    before = torch.cat([rows.new_tensor([-1]), rows[:-1]])
    bad = ((rows <= before) | (rows < 0) | (rows >= weight.size(0))).nonzero()
    torch._check(
        len(bad) == 0,
        lambda: (
            f"sparse_update: rows[{int(bad[0])}] = {int(rows[bad[0]])} must ascend in a table with {weight.size(0)} "
            "rows"
        ),
    )


@torch.library.impl(lib, "sparse_update", "CompositeExplicitAutograd")
def _default_sparse(weight, states, rows, values, optimizer, hyper):
    _check_sparse(weight, states, rows, values, optimizer, hyper)
    _check_rows(weight, rows)
    notice_reference("sparse_update", weight)
    kind, rule = OPTIMIZERS[optimizer], RULES[OPTIMIZERS[optimizer]]
    states, live = states[: rule.elementwise + rule.row_wise], states[rule.elementwise + rule.row_wise :]
    now = settings(kind, hyper)
    rounding = int(hyper[ROUNDING])
    if live:
        count, lr, scale, skip = live
        if skip:
            return
        now |= {"lr": float(lr), "step": float(count.add_(1)), "grad_factor": 1 / float(scale)}
    state = [s[rows] for s in states]
    dtype = state[0].dtype if state else torch.promote_types(weight.dtype, torch.float32)
    stepped, state = reference.optimizer_step(kind, weight[rows].to(dtype), values.to(dtype), state, **now)
    if rounding and weight.element_size() == 2:
        bits = reference.rounding_bits(rounding, int(now["step"]), rows, weight.size(1))
        stepped = reference.round_stochastically(stepped, weight.dtype, bits)
    weight.index_copy_(0, rows, stepped.to(weight.dtype))
    for old, new in zip(states, state):
        old.index_copy_(0, rows, new)


@torch.library.impl(lib, "embedding_bag_update", "CompositeExplicitAutograd")
def _default(grad_outs, weights, states, *rest):
    *features, optimizer, hyper = rest
    T = len(weights)
    for t, w in enumerate(weights):
        check_table("embedding_bag_update", t, w, weights[0].device)
    check_tables("embedding_bag_update", weights, states, optimizer, hyper)
    rows, values, grad_psw = torch.ops.rankkernels.embedding_bag_backward_sparse.default(
        grad_outs, weights, [w.size(0) for w in weights], *features
    )
    for t in Features(*features).tables_of(grad_outs):
        torch.ops.rankkernels.sparse_update.default(
            weights[t], _of_table(states, t, T), rows[t], values[t], optimizer, _of_table(hyper, t, T)
        )
    return grad_psw


def check_apart(weights: Sequence[Tensor]) -> None:
    """Raises if two tables share memory: programs would step on both at once. The columns of one matrix may be several
    tables. As ``check_apart`` of csrc/embedding/optimizer.h."""
    starts = sorted((w.data_ptr(), t) for t, w in enumerate(weights) if w.numel() and not w.is_meta)
    for i, (start, t) in enumerate(starts):
        w = weights[t]
        end = start + ((w.size(0) - 1) * w.stride(0) + w.size(1)) * w.element_size()
        for other_start, other in starts[i + 1 :]:
            if other_start >= end:
                break
            apart, v = (other_start - start) // w.element_size(), weights[other]
            alike = w.stride(0) > 0 and (w.stride(0), w.dtype) == (v.stride(0), v.dtype)
            torch._check(
                alike and w.size(1) <= apart % w.stride(0) <= w.stride(0) - v.size(1),
                lambda: (
                    f"embedding_bag_update: weights[{min(t, other)}] and weights[{max(t, other)}] share memory: give a "
                    "table once, and its features its number"
                ),
            )


if triton_embeds:

    @torch.library.impl(lib, "sparse_update", "CUDA")
    def _(weight, states, rows, values, optimizer, hyper):
        from rankkernels._triton.embedding_bag import sparse_update

        if not triton_serves_tables([weight]):
            return _default_sparse(weight, states, rows, values, optimizer, hyper)
        _check_sparse(weight, states, rows, values, optimizer, hyper)
        sparse_update(weight, states, rows, values, optimizer, hyper)

    @torch.library.impl(lib, "embedding_bag_update", "CUDA")
    def _(grad_outs, weights, states, *rest):
        from rankkernels._triton.embedding_bag import embedding_bag_update

        if not triton_serves_tables(weights):
            return _default(grad_outs, weights, states, *rest)
        check_update(grad_outs, weights, states, *rest)
        check_apart(weights)
        *features, optimizer, hyper = rest
        return embedding_bag_update(grad_outs, weights, states, Features(*features), optimizer, hyper)


@torch.library.register_fake("rankkernels::sparse_update", lib=lib)
def _(weight, states, rows, values, optimizer, hyper):
    _check_sparse(weight, states, rows, values, optimizer, hyper)


def check_update(grad_outs, weights, states, *rest) -> None:
    *features, optimizer, hyper = rest
    for t, w in enumerate(weights):
        check_table("embedding_bag_update", t, w, weights[0].device)
    check_tables("embedding_bag_update", weights, states, optimizer, hyper)
    check_backward(grad_outs, weights, [w.size(0) for w in weights], Features(*features))


@torch.library.register_fake("rankkernels::embedding_bag_update", lib=lib)
def _(grad_outs, weights, states, *rest):
    *features, _optimizer, _hyper = rest
    features = Features(*features)
    check_update(grad_outs, weights, states, *rest)
    return [w.new_empty(w.shape) for w in features.per_sample_weights]
