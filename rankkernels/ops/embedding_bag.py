"""Embedding lookups, pooled or not, of one table or of many in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._library import (
    check_first_derivative,
    differentiable,
    is_exporting,
    lib,
    notice_reference,
    raise_documented,
    register_autograd,
    vjp,
)
from rankkernels.ops.embedding_bag_checks import (
    MODES,
    bags_of,
    check_backward,
    check_forward,
    check_range,
    check_starts,
    names_of,
    offsets_of,
    weights_of,
)

if TYPE_CHECKING:
    from rankkernels.ops.fused_step import Gate

# One entry a feature in ``indices``, ``offsets``, ``per_sample_weights``, ``tables``, ``modes`` and ``padding_idx``;
# one entry a table in ``weights`` and ``frozen_rows``. -1 stands for no padding index and no frozen row. A feature
# without offsets or per-sample weights has an empty tensor there, and where none has any the list is empty
# (torch.library has no autograd for lists of optional tensors). Pooled 1-D indices, and only they, have offsets.
# ``names``, one a line, are the features' for error messages, or empty. ``concat`` gives one tensor [B, all widths],
# ``sparse`` makes the tables' gradients sparse.
# ``padding_idx`` leaves an id out of a feature's pooling; ``frozen_rows`` is the row of a table that gets no gradient,
# as nn.Embedding's padding_idx does: a feature that shares a table may pad with another id than the table's owner.
FEATURES = (
    "Tensor[] indices, Tensor[] offsets, Tensor[] per_sample_weights, int[] tables, int[] modes, int[] padding_idx, "
    "int[] frozen_rows"
)
lib.define(
    f"embedding_bag(Tensor[] weights, {FEATURES}, str names, *, bool concat=False, bool sparse=False) -> Tensor[]"
)
# ``weights`` are given to the backward only where it needs their values: for max pooling and per-sample weights.
lib.define(
    f"embedding_bag_backward(Tensor?[] grad_outs, Tensor[] weights, SymInt[] rows, {FEATURES}) "
    "-> (Tensor[] grad_weights, Tensor[] grad_per_sample_weights)"
)
# The same gradients as rows that were looked up, ascending, and their values: coalesced.
lib.define(
    f"embedding_bag_backward_sparse(Tensor?[] grad_outs, Tensor[] weights, int[] rows, {FEATURES}) "
    "-> (Tensor[] grad_rows, Tensor[] grad_values, Tensor[] grad_per_sample_weights)"
)


@torch.library.register_fake("rankkernels::embedding_bag", lib=lib)
def _(weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, *, concat=False,
      sparse=False):  # fmt: skip
    check_forward(weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, concat)
    of_feature = [weights[t] for t in tables]
    bags = [bags_of(f, ids, offsets, modes) if ids.dim() else 1 for f, ids in enumerate(indices)]
    if concat:
        return [of_feature[0].new_empty((bags[0], sum(w.size(1) for w in of_feature)))]
    return [
        w.new_empty((*(ids.shape if MODES[m] == "none" else (b,)), w.size(1)))
        for w, ids, m, b in zip(of_feature, indices, modes, bags)
    ]


@torch.library.register_fake("rankkernels::embedding_bag_backward", lib=lib)
def _(grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows):
    check_backward(grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx,
                   frozen_rows)  # fmt: skip
    widths = {tables[f]: g for f, g in enumerate(grad_outs) if g is not None}
    like = next(iter(widths.values()))
    grad_weights = [
        widths[t].new_empty((r, widths[t].size(-1))) if t in widths else like.new_empty(0) for t, r in enumerate(rows)
    ]
    return grad_weights, [w.new_empty(w.shape) for w in per_sample_weights]


def _reference(weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, *,
               concat=False, sparse=False):  # fmt: skip
    check_forward(weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, concat)
    frozen = [None if row < 0 else row for row in frozen_rows]
    outs = [
        reference.embedding(weights[tables[f]], ids, frozen[tables[f]])
        if MODES[modes[f]] == "none"
        else reference.embedding_bag(
            weights[tables[f]],
            ids,
            offsets_of(f, ids, offsets, modes),
            MODES[modes[f]],
            weights_of(f, ids, per_sample_weights),
            None if padding_idx[f] < 0 else padding_idx[f],
            frozen[tables[f]],
        )
        for f, ids in enumerate(indices)
    ]
    return [torch.cat(outs, 1)] if concat else outs


@torch.library.impl(lib, "embedding_bag", "CompositeExplicitAutograd")
def _(weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, *, concat=False,
      sparse=False):  # fmt: skip
    check_forward(weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, concat)
    notice_reference("embedding_bag", weights[0])
    listed = names_of(names, len(indices))
    for f, ids in enumerate(indices):
        check_starts(f, ids, offsets, modes, listed[f])
    for f, ids in enumerate(indices):
        check_range(weights[tables[f]].size(0), ids, listed[f])
    return _reference(
        weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, concat=concat
    )


@torch.library.impl(lib, "embedding_bag_backward", "CompositeExplicitAutograd")
def _reference_backward(
    grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows
):
    check_backward(grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx,
                   frozen_rows)  # fmt: skip
    for f, ids in enumerate(indices):
        check_starts(f, ids, offsets, modes, f"indices[{f}]")
    for f, (ids, grad_out) in enumerate(zip(indices, grad_outs)):
        if grad_out is not None:
            check_range(rows[tables[f]], ids, f"indices[{f}]")
    grad_weights, grad_per_sample_weights = [None] * len(rows), [torch.zeros_like(w) for w in per_sample_weights]
    for f, (ids, grad_out) in enumerate(zip(indices, grad_outs)):
        if grad_out is None:
            continue
        t, mode, psw = tables[f], MODES[modes[f]], weights_of(f, ids, per_sample_weights)
        if mode == "none":
            grad = torch.ops.aten.embedding_dense_backward(grad_out, ids, rows[t], frozen_rows[t], False)
        else:
            # The sum's and the mean's gradient does not depend on the table's values: any table of its shape serves.
            weight = weights[t] if weights else grad_out.new_zeros(()).expand(rows[t], grad_out.size(1))
            padding = None if padding_idx[f] < 0 else padding_idx[f]

            def pooled(weight, psw=None, ids=ids, f=f, mode=mode, padding=padding):
                return reference.embedding_bag(weight, ids, offsets_of(f, ids, offsets, modes), mode, psw, padding)

            grad, *grad_psw = vjp(pooled, grad_out, weight, *([] if psw is None else [psw]))
            if grad_psw:
                grad_per_sample_weights[f] = grad_psw[0]
            if frozen_rows[t] >= 0:
                grad = grad.index_fill(0, torch.tensor([frozen_rows[t]], device=grad.device), 0.0)
        grad_weights[t] = grad if grad_weights[t] is None else grad_weights[t] + grad
    like = next(g for g in grad_outs if g is not None)
    return [like.new_empty(0) if g is None else g.contiguous() for g in grad_weights], grad_per_sample_weights


@torch.library.impl(lib, "embedding_bag_backward_sparse", "CompositeExplicitAutograd")
def _(grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows):
    dense, grad_psw = torch.ops.rankkernels.embedding_bag_backward.default(
        grad_outs, weights, rows, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows
    )
    touched = [[] for _ in rows]
    for f, t in enumerate(tables):
        if grad_outs[f] is not None:
            ids = indices[f].flatten().long()
            padding = padding_idx[f] if MODES[modes[f]] != "none" else -1
            touched[t].append(ids[(ids != padding) & (ids != frozen_rows[t])])
    grad_rows = [torch.cat(ids).unique() if ids else dense[0].new_empty(0, dtype=torch.int64) for ids in touched]
    return grad_rows, [g[r] for g, r in zip(dense, grad_rows)], grad_psw


def needs_values(modes, per_sample_weights):
    """Whether the gradient depends on the tables' values and not on the ids alone."""
    return any(MODES[m] == "max" for m in modes) or any(w.numel() for w in per_sample_weights)


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    weights, *lists, tables, modes, padding_idx, frozen_rows, _names = inputs
    ctx.set_materialize_grads(False)  # rows of a result that nobody uses get no gradient, not one of zeros
    lists = [weights if needs_values(modes, lists[2]) else [], *lists]
    ctx.features = tables, modes, padding_idx, frozen_rows
    ctx.rows, ctx.lengths = [w.size(0) for w in weights], [len(values) for values in lists]
    ctx.sparse = keyword_only_inputs["sparse"]
    ctx.widths = [weights[t].size(1) for t in tables] if keyword_only_inputs["concat"] else None
    ctx.save_for_backward(*(t for values in lists for t in values))


def sparse_gradients(used, grad_rows, values, rows) -> list[Tensor | None]:
    """The sparse gradients of the tables ``used``, coalesced, and None for the others."""
    return [
        torch.sparse_coo_tensor(r[None], v, (n, v.size(1)), is_coalesced=True, check_invariants=False)
        if t in used
        else None
        for t, (r, v, n) in enumerate(zip(grad_rows, values, rows))
    ]


_embedding_bag_backward = differentiable(torch.ops.rankkernels.embedding_bag_backward.default, _reference_backward)


def table_gradients(grad_outs, weights, rows, lists, features, sparse):
    """The gradients of the tables, None for one that none of ``grad_outs`` is about, and of the per-sample weights."""
    used = {features[0][f] for f, g in enumerate(grad_outs) if g is not None}
    if not used:
        return [None] * len(rows), [None] * len(lists[2])
    arguments = grad_outs, weights, rows, *lists, *features
    if not sparse:
        grads, grad_psw = _embedding_bag_backward(*arguments)
    else:
        check_first_derivative("embedding_bag with sparse gradients")
        grad_rows, values, grad_psw = torch.ops.rankkernels.embedding_bag_backward_sparse.default(*arguments)
        grads = sparse_gradients(used, grad_rows, values, rows)
    return [g if t in used else None for t, g in enumerate(grads)], grad_psw


def _backward(ctx, grad_outs):
    saved = iter(ctx.saved_tensors)
    weights, *lists = ([next(saved) for _ in range(n)] for n in ctx.lengths)
    if ctx.widths:
        grad_outs = [None] * len(ctx.widths) if grad_outs[0] is None else grad_outs[0].split(ctx.widths, 1)
    grad_weights, grad_psw = table_gradients(grad_outs, weights, ctx.rows, lists, ctx.features, ctx.sparse)
    return grad_weights, [None] * len(lists[0]), [None] * len(lists[1]), grad_psw, *[None] * 5


_forward = register_autograd("embedding_bag", _reference, _backward, _setup_context)


class Optimizer(Protocol):
    """What ``table_batched_embedding_bag`` needs of an optimizer: see ``rankkernels.optim``."""

    def gate(self, weights: Sequence[Tensor]) -> Gate:
        """Decides when to step on ``weights``. Raises a ValueError for one that the optimizer cannot step on."""

    def update(self, grad_outs: list, weights: Sequence[Tensor], lists: Sequence, features: Sequence) -> list[Tensor]:
        """Steps on ``weights``; ``lists`` and ``features`` are the op's other arguments. -> its gradients."""

    def whole_gradients(self, weights: Sequence[Tensor], tables: Sequence[int]) -> bool:
        """Whether ``update`` must see the gradients of the lookups, and ``update_fm`` would not do."""

    def update_fm(self, grads: Sequence, weights: Sequence[Tensor], unchanged: bool, lists: Sequence,
                  features: Sequence) -> Tensor:  # fmt: skip
        """As ``update``, with the first arguments of ``embedding_fm_update``. -> the linear weights' gradient."""


def distinct(weights: Sequence[Tensor], tables: Sequence[int], frozen_rows: Sequence[int]) -> tuple[list, list, list]:
    """The arguments with every table given once, as a step needs them.

    Raises:
        ValueError: a table has two frozen rows.
    """
    if len(set(map(id, weights))) == len(weights):
        return weights, tables, frozen_rows
    places = {id(w): t for t, w in reversed(list(enumerate(weights)))}  # where each comes first
    for t, w in enumerate(weights):
        if frozen_rows[t] != frozen_rows[places[id(w)]]:
            raise ValueError(
                f"embedding_bag: tables {places[id(w)]} and {t} are one, but their frozen rows differ, "
                f"{frozen_rows[places[id(w)]]} and {frozen_rows[t]}"
            )
    first = sorted(places.values())
    place = {t: i for i, t in enumerate(first)}
    return [weights[t] for t in first], [place[places[id(weights[t])]] for t in tables], [frozen_rows[t] for t in first]


class _Updating(torch.autograd.Function):
    """The op with an optimizer's step in its backward; the tables get no gradient of their own.

    ``anchor``, the gate's, stands for the tables in the graph: one input and not many.
    """

    @staticmethod
    def forward(ctx, optimizer, gate, lists, features, names, concat, anchor, *per_sample_weights):
        weights, indices, offsets = lists
        lists = [indices, offsets, list(per_sample_weights)]
        ctx.optimizer, ctx.gate, ctx.features, ctx.weights = optimizer, gate, features, weights
        ctx.lengths = [len(values) for values in lists]
        ctx.widths = [weights[t].size(1) for t in features[0]] if concat else None
        ctx.set_materialize_grads(False)
        values = weights if needs_values(features[1], per_sample_weights) else []
        ctx.save_for_backward(*(t for values in lists for t in values), *values)  # these must not have changed
        with torch._C._AutoDispatchBelowAutograd():  # the op's own autograd would hand the lists on once more
            out = torch.ops.rankkernels.embedding_bag.default(weights, *lists, *features, names, concat=concat)
        gate.lookups.add(ctx)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grad_outs):
        check_first_derivative("embedding_bag with a fused optimizer")
        saved = iter(ctx.saved_tensors)
        lists = [[next(saved) for _ in range(n)] for n in ctx.lengths]
        if ctx.widths:
            grad_outs = [None] * len(ctx.widths) if grad_outs[0] is None else grad_outs[0].split(ctx.widths, 1)
        lookup = list(grad_outs), ctx.weights, lists, ctx.features
        grad_psw = [None] * len(lists[2])
        if any(g is not None for g in grad_outs):
            if ctx.gate.alone(ctx):
                grad_psw = ctx.optimizer.update(*lookup)
            else:
                ctx.gate.add(*lookup)
                if any(ctx.needs_input_grad[7:]):
                    rows = [w.size(0) for w in ctx.weights]
                    _, grad_psw = table_gradients(grad_outs, ctx.weights, rows, lists, ctx.features, sparse=True)
        return *[None] * 6, ctx.gate.no_grad, *grad_psw


def outside_graph(function, *arguments):
    """Calls it with a break of the graph being made: rows that a backward finds have a shape that no graph knows."""
    return torch.compiler.disable(function)(*arguments)  # here and not as a decorator, which imports the compiler


def no_backward() -> bool:
    """Whether the forward alone is asked for: what its backward is to do is then nothing to break a graph for."""
    return not torch.is_grad_enabled() or is_exporting()


def call(
    weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names, concat=False,
    sparse=False, optimizer=None,
):  # fmt: skip
    """The op on arguments in the schema's own form."""
    if (sparse or optimizer is not None) and no_backward():
        sparse, optimizer = False, None
    if torch.compiler.is_exporting():  # what AOTInductor compiles makes None of an empty list
        offsets, per_sample_weights = (values or [weights[0].new_empty(0)] * len(indices)
                                       for values in (offsets, per_sample_weights))  # fmt: skip
    if (sparse or optimizer is not None) and torch.compiler.is_compiling():
        return outside_graph(call, weights, indices, offsets, per_sample_weights, tables, modes, padding_idx,
                             frozen_rows, names, concat, sparse, optimizer)  # fmt: skip
    with raise_documented():
        if optimizer is not None:
            gate = optimizer.gate(weights)
            weights, tables, frozen_rows = distinct(weights, tables, frozen_rows)
            lists, features = (weights, indices, offsets), (tables, modes, padding_idx, frozen_rows)
            out = _Updating.apply(optimizer, gate, lists, features, names, concat, gate.anchor, *per_sample_weights)
            return list(out)
        return _forward(
            weights, indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, names,
            concat=concat, sparse=sparse,
        )  # fmt: skip


def join_names(names: Sequence[str]) -> str:
    """The features' names in the schema's form."""
    return "\n".join([name.replace("\n", " ") for name in names])


def in_schema(weights, indices, modes, tables, padding_idx, frozen_rows, names):
    """The op's lists that are no tensors, from the public functions' arguments."""
    n = len(indices)
    tables = list(range(n)) if tables is None else tables
    for what, values, kind, expected in (
        ("modes", modes, "feature", n), ("tables", tables, "feature", n), ("padding_idx", padding_idx, "feature", n),
        ("names", names, "feature", n), ("frozen_rows", frozen_rows, "table", len(weights)),
    ):  # fmt: skip
        if values is not None and len(values) != expected:
            raise ValueError(f"embedding_bag: {what} must have one entry a {kind}, {expected}, got {len(values)}")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"embedding_bag: unknown mode {mode!r}, expected one of {', '.join(MODES)}")
    for f, t in enumerate(tables):
        if not 0 <= t < len(weights):
            raise ValueError(f"embedding_bag: feature {f} has table {t} of {len(weights)}")

    def rows(what, values, table_of):
        if values is None:
            return [-1] * len(table_of)
        found = []
        for value, t in zip(values, table_of):
            if value is None:
                found.append(-1)
                continue
            R = weights[t].size(0) if weights[t].dim() == 2 else 0
            if not -R <= value < R:
                raise ValueError(f"embedding_bag: {what} {value} is no row of a table with {R} rows")
            found.append(value % R)
        return found

    return (
        tables,
        [MODES.index(m) for m in modes],
        rows("padding_idx", padding_idx, tables),
        rows("frozen_rows", frozen_rows, range(len(weights))),
        "" if names is None else join_names(names),
    )


def table_batched_embedding_bag(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    modes: Sequence[str],
    tables: Sequence[int] | None = None,
    offsets: Sequence[Tensor | None] | None = None,
    per_sample_weights: Sequence[Tensor | None] | None = None,
    padding_idx: Sequence[int | None] | None = None,
    frozen_rows: Sequence[int | None] | None = None,
    names: Sequence[str] | None = None,
    concat: bool = False,
    sparse: bool = False,
    optimizer: Optimizer | None = None,
) -> list[Tensor]:
    """Many features looked up in many tables, in one call.

    Args:
        weights: the tables, each [R, D] with rows and width of its own.
        indices: one tensor a feature, int32 or int64: any shape for mode none, [B, L] for a pooled feature, or [N] with
            ``offsets``.
        modes: "none", "sum", "mean" or "max" a feature.
        tables: the table of each feature, by position in ``weights``; one each in order by default.
        offsets: where the bags of a pooled feature start, [B], or None.
        per_sample_weights: factors of the shape of the indices for a sum or a mean, or None. The mean divides by the
            number of ids.
        padding_idx: the id that a feature's pooling leaves out, or None; negative ones count from the table's end.
        frozen_rows: the row of a table that gets no gradient, or None; negative ones likewise.
        names: what error messages call the features; by default indices[0], indices[1], ...
        concat: write all features side by side into one tensor. Each must be pooled or have 1-D indices, with one
            number of bags and one dtype for all.
        sparse: give the tables sparse gradients, coalesced, as ``torch.optim.SparseAdam``, ``Adagrad`` and ``SGD`` take
            them. Under ``torch.compile`` the lookup is then a break in the graph, with an optimizer too.
        optimizer: one of ``rankkernels.optim``, to step on the rows looked up in the backward itself; the tables get
            no ``grad`` then.

    Returns:
        One tensor a feature: indices.shape + [D] for mode none, [B, D] otherwise; an empty bag is zeros. With
        ``concat`` a list of the one tensor [B, sum of the widths].

    Raises:
        IndexError: an id outside its table (on the CPU; other devices have their own report).
        RuntimeError: shapes, dtypes or devices that do not fit.
        ValueError: lists of another length than the features or the tables, an unknown mode or table, a padding index
            that is no row.
    """

    def tensors(values):
        if values is None or all(v is None for v in values):
            return []
        absent = weights[0].new_empty(0) if len(weights) else None  # only where it is needed: an eighth of a small call
        return [absent if v is None else v for v in values]

    arguments = in_schema(weights, indices, modes, tables, padding_idx, frozen_rows, names)
    return call(weights, indices, tensors(offsets), tensors(per_sample_weights), *arguments, concat, sparse, optimizer)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    padding_idx: int | None = None,
    sparse: bool = False,
) -> Tensor:
    """Pooled rows of one table: weight [R, D], indices [B, L] or [N] with offsets [B] -> [B, D].

    Semantics: ``reference.embedding_bag`` and ``torch.nn.functional.embedding_bag``, plus a mean with
    ``per_sample_weights``. See ``table_batched_embedding_bag`` for the arguments and the errors.
    """
    return table_batched_embedding_bag(
        [weight],
        [indices],
        modes=[mode],
        offsets=[offsets],
        per_sample_weights=[per_sample_weights],
        padding_idx=[padding_idx],
        frozen_rows=[padding_idx],
        names=["indices"],
        sparse=sparse,
    )[0]
