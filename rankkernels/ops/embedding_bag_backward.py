"""The gradients of a lookup. Kernels: csrc/cpu/embedding/segment_sum_kernel.h, csrc/cuda/embedding/backward.cuh and
_triton/embedding_bag_reduce.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rankkernels import reference
from rankkernels.ops._autograd import check_first_derivative, differentiable, vjp
from rankkernels.ops._embedding_checks import check_backward, check_values
from rankkernels.ops._features import Features
from rankkernels.ops._library import define, lib, triton_embeds, triton_serves_tables
from rankkernels.ops._schema import nothing, schema_of

# Tables and features without a gradient get an empty tensor. ``weights`` are given only where the gradients depend on
# their values (``Features.need_values``); ``rows`` are the tables' numbers of rows.
define(
    f"embedding_bag_backward(Tensor?[] grad_outs, Tensor[] weights, SymInt[] rows, {schema_of(Features)}) "
    "-> (Tensor[] grad_weights, Tensor[] grad_per_sample_weights)"
)
# The same gradients as rows that were looked up, ascending, and their values: coalesced.
define(
    f"embedding_bag_backward_sparse(Tensor?[] grad_outs, Tensor[] weights, int[] rows, {schema_of(Features)}) "
    "-> (Tensor[] grad_rows, Tensor[] grad_values, Tensor[] grad_per_sample_weights)"
)


@torch.library.register_fake("rankkernels::embedding_bag_backward", lib=lib)
def _(grad_outs, weights, rows, *features):
    features = Features(*features)
    check_backward(grad_outs, weights, rows, features)
    of_table = {t: g for t, g in zip(features.tables, grad_outs) if g is not None}
    some_grad = next(iter(of_table.values()))
    grad_weights = [
        of_table[t].new_empty((r, of_table[t].size(-1))) if t in of_table else some_grad.new_empty(0)
        for t, r in enumerate(rows)
    ]
    return grad_weights, [w.new_empty(w.shape) for w in features.per_sample_weights]


def _lookup_gradients(features: Features, f: int, grad_out: Tensor, weights: list[Tensor], rows: int):
    """The gradients of one feature's table and per-sample weights, None where it has none."""
    ids, table, frozen = features.indices[f], features.tables[f], features.frozen_rows[features.tables[f]]
    if features.mode(f) == "none":
        return torch.ops.aten.embedding_dense_backward(grad_out, ids, rows, frozen, False), None
    # The gradient of a sum or a mean does not depend on the table's values: any table of its shape will do.
    weight = weights[table] if weights else grad_out.new_zeros(()).expand(rows, grad_out.size(1))
    factors, padding = features.per_sample_weights_of(f), features.padding_idx[f]

    def pooled(weight, factors=None):
        padding_idx = None if padding < 0 else padding
        return reference.embedding_bag(weight, ids, features.offsets_of(f), features.mode(f), factors, padding_idx)

    grad, *grad_factors = vjp(pooled, grad_out, weight, *([] if factors is None else [factors]))
    if frozen >= 0:
        grad = grad.index_fill(0, torch.tensor([frozen], device=grad.device), 0.0)
    return grad, next(iter(grad_factors), None)


@torch.library.impl(lib, "embedding_bag_backward", "CompositeExplicitAutograd")
def _default(grad_outs, weights, rows, *features):
    features = Features(*features)
    check_backward(grad_outs, weights, rows, features)
    features = features.as_rows()
    names = [f"indices[{f}]" for f in range(len(features.indices))]
    check_values(features, rows, names, [g is not None for g in grad_outs])
    grad_weights, grad_factors = nothing(rows), [torch.zeros_like(w) for w in features.per_sample_weights]
    for f, (table, grad_out) in enumerate(zip(features.tables, grad_outs)):
        if grad_out is None:
            continue
        grad, of_factors = _lookup_gradients(features, f, grad_out, weights, rows[table])
        if of_factors is not None:
            grad_factors[f] = of_factors
        grad_weights[table] = grad if grad_weights[table] is None else grad_weights[table] + grad
    some_grad = next(g for g in grad_outs if g is not None)
    return [some_grad.new_empty(0) if g is None else g.contiguous() for g in grad_weights], grad_factors


@torch.library.impl(lib, "embedding_bag_backward_sparse", "CompositeExplicitAutograd")
def _default_sparse(grad_outs, weights, rows, *features):
    dense, grad_factors = torch.ops.rankkernels.embedding_bag_backward.default(grad_outs, weights, rows, *features)
    features = Features(*features).as_rows()
    touched = [[] for _ in rows]
    for f, (table, grad_out) in enumerate(zip(features.tables, grad_outs)):
        if grad_out is not None:
            ids = features.indices[f].flatten().long()
            padding = features.padding_idx[f] if features.mode(f) != "none" else -1
            touched[table].append(ids[(ids != padding) & (ids != features.frozen_rows[table])])
    grad_rows = [torch.cat(ids).unique() if ids else dense[0].new_empty(0, dtype=torch.int64) for ids in touched]
    return grad_rows, [g[r] for g, r in zip(dense, grad_rows)], grad_factors


if triton_embeds:

    @torch.library.impl(lib, "embedding_bag_backward", "CUDA")
    def _(grad_outs, weights, rows, *features):
        from rankkernels._triton.embedding_bag import embedding_bag_backward

        check_backward(grad_outs, weights, rows, Features(*features))
        if not triton_serves_tables(grad_outs):
            return _default(grad_outs, weights, rows, *features)
        return embedding_bag_backward(grad_outs, weights, rows, Features(*features))

    @torch.library.impl(lib, "embedding_bag_backward_sparse", "CUDA")
    def _(grad_outs, weights, rows, *features):
        from rankkernels._triton.embedding_bag import embedding_bag_backward_sparse

        check_backward(grad_outs, weights, rows, Features(*features))
        if not triton_serves_tables(grad_outs):
            return _default_sparse(grad_outs, weights, rows, *features)
        return embedding_bag_backward_sparse(grad_outs, weights, rows, Features(*features))


class _Ascending(NamedTuple):
    """The memory of rows that ascend; while it is referred to, weakly, no other memory has its number."""

    memory: StorageWeakRef
    count: int
    version: int


#: By that number. A leaf's ``grad`` is no longer said to be coalesced, and to look would wait for a GPU.
_ascending: dict[int, _Ascending] = {}


def _remember(rows: Tensor) -> None:
    memory = rows.untyped_storage()
    _ascending[memory._cdata] = _Ascending(StorageWeakRef(memory), rows.numel(), rows._version)


def _known_to_ascend(grad: Tensor) -> bool:
    """Whether the rows of a sparse gradient are those that ``sparse_gradients`` gave it."""
    rows = grad._indices()
    found = _ascending.get(rows.untyped_storage()._cdata)
    return found is not None and (rows.numel(), rows._version) == (found.count, found.version)


def sparse_gradients(
    used: set[int], grad_rows: Sequence[Tensor], values: Sequence[Tensor], rows: Sequence[int]
) -> list[Tensor | None]:
    """The sparse gradients of the tables ``used``, coalesced, and None for the others."""
    for number in [number for number, rows in list(_ascending.items()) if rows.memory.expired()]:
        _ascending.pop(number, None)
    for t in used:
        _remember(grad_rows[t])
    return [
        torch.sparse_coo_tensor(r[None], v, (n, v.size(1)), is_coalesced=True, check_invariants=False)
        if t in used
        else None
        for t, (r, v, n) in enumerate(zip(grad_rows, values, rows))
    ]


def coalesced(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, ascending, and values of a sparse gradient. Autograd drops the coalesced flag when it stores it in
    ``grad``."""
    rows = grad._indices()[0]
    if not (grad.is_coalesced() or _known_to_ascend(grad) or bool((rows[1:] > rows[:-1]).all())):
        grad = grad.coalesce()
    return grad._indices()[0], grad._values()


_backward = differentiable(torch.ops.rankkernels.embedding_bag_backward.default, _default)


def table_gradients(
    grad_outs: Sequence[Tensor | None], values: Sequence[Tensor], rows: Sequence[int], features: Features, sparse: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of the tables, None for one that none of ``grad_outs`` is about, and of the per-sample weights."""
    used = features.tables_of(grad_outs)
    if not used:
        return nothing(rows), nothing(features.per_sample_weights)
    if sparse:
        check_first_derivative("embedding_bag with sparse gradients")
        grad_rows, grad_values, grad_factors = torch.ops.rankkernels.embedding_bag_backward_sparse.default(
            grad_outs, values, rows, *features
        )
        return sparse_gradients(used, grad_rows, grad_values, rows), grad_factors
    grads, grad_factors = _backward(grad_outs, values, rows, *features)
    return [g if t in used else None for t, g in enumerate(grads)], grad_factors
