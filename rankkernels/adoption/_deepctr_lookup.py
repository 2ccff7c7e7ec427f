"""The lookups of DeepCTR-Torch's models: all columns of a batch in one call.

A batch is one matrix X [B, n] of floats, and ``feature_index`` says which columns of it a feature has. A table is an
``nn.Embedding`` of an ``embedding_dict``, looked up as it is or pooled as their ``SequencePoolingLayer`` does: padding
is id 0, or what lies behind the length that the batch has in a column of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat, get_varlen_pooling_list
from torch import Tensor

from rankkernels.nn._tables import KeepsPlans
from rankkernels.nn._transparency import nobody_follows
from rankkernels.nn.embedding import frozen_rows, fused_weight
from rankkernels.ops import fm_interaction
from rankkernels.ops._features import MODES, Features, LookupBatch, join_names
from rankkernels.ops.embedding_bag import run_op
from rankkernels.ops.embedding_fm import run_batch as run_fm


def by_group(columns: Sequence, values: Sequence[Tensor]) -> list[tuple]:
    """Columns and their values in the order of their ``embedding_lookup``: by group, in the groups' order."""
    order = list(dict.fromkeys(c.group_name for c in columns))
    return sorted(zip(columns, values), key=lambda pair: order.index(pair[0].group_name))


def of_tables(columns: Sequence) -> list:
    """Those that are looked up, in the order of their ``input_from_feature_columns``: sequences last."""
    return [c for kind in (SparseFeat, VarLenSparseFeat) for c in columns if isinstance(c, kind)]


def dense_columns(X: Tensor, columns: Sequence, feature_index: Mapping[str, tuple[int, int]]) -> Tensor:
    """The dense features side by side, [B, n]: a view where they are so in X."""
    begin, end = feature_index[columns[0].name][0], feature_index[columns[-1].name][1]
    if end - begin == sum(c.dimension for c in columns) and _in_order(columns, feature_index):
        return X[:, begin:end]
    return torch.cat([X[:, slice(*feature_index[c.name])] for c in columns], 1)


def _in_order(columns: Sequence, feature_index: Mapping[str, tuple[int, int]]) -> bool:
    """Whether each column begins where the one before ends."""
    places = [feature_index[c.name] for c in columns]
    return all(end == begin for (_, end), (begin, _) in zip(places, places[1:]))


class Plan:
    """What a list of columns asks for, whatever the batch: the op's arguments that are no tensors.

    ``pooled`` columns are sums and means; ``unpooled`` ones stay [B, L, D].
    """

    def __init__(self, columns: tuple, unpooled: tuple, feature_index: Mapping[str, tuple[int, int]]):
        self.columns = [*columns, *unpooled]
        self.places = [feature_index[c.name] for c in self.columns]
        self.tables = list(dict.fromkeys(c.embedding_name for c in self.columns))
        self.table_of = [self.tables.index(c.embedding_name) for c in self.columns]
        self.sequences = [isinstance(c, VarLenSparseFeat) for c in self.columns]
        pooled = [s and c not in unpooled and c.combiner != "max" for s, c in zip(self.sequences, self.columns)]
        #: Columns that are looked up as they are, and pooled by their layer: an empty bag's maximum is -1e9 there.
        self.maxima = [f for f, c in enumerate(columns) if self.sequences[f] and not pooled[f]]
        #: A column with a length is a sum weighted with 1 or 1 / length, and 0 behind the length.
        named = [c.length_name if p else None for p, c in zip(pooled, self.columns)]
        self.lengths = [None if name is None else feature_index[name][0] for name in named]
        by_mask = [p and n is None for p, n in zip(pooled, self.lengths)]
        modes = ["none" if not p else c.combiner if m else "sum" for p, m, c in zip(pooled, by_mask, self.columns)]
        self.modes = [MODES.index(mode) for mode in modes]
        self.padding_idx = [0 if m else -1 for m in by_mask]
        self.names = join_names([c.name for c in self.columns])
        #: Columns of X that are ids of one feature each, in runs that lie side by side.
        self.runs = []
        for f, (begin, _) in enumerate(self.places):
            if not self.sequences[f]:
                if not self.runs or self.runs[-1][-1][1] + 1 != begin:
                    self.runs.append([])
                self.runs[-1].append((f, begin))

    def ids(self, X: Tensor) -> list[Tensor]:
        """Of each column, int64: [B], or [B, L] of a sequence."""
        found = [None] * len(self.columns)
        for run in self.runs:
            begin, last = run[0][1], run[-1][1]
            block = X[:, begin : last + 1].t().to(torch.int64, memory_format=torch.contiguous_format)
            for (f, _), ids in zip(run, block.unbind(0)):
                found[f] = ids
        for f, (begin, end) in enumerate(self.places):
            if self.sequences[f]:
                found[f] = X[:, begin:end].long()
        return found

    def weights_of_ids(self, X: Tensor, ids: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What rows are multiplied with in the sums, in the schema's form."""
        if all(place is None for place in self.lengths):
            return []
        factors = [X.new_empty(0, dtype=dtype)] * len(ids)
        for f, place in enumerate(self.lengths):
            if place is not None:
                length = X[:, place : place + 1].long()
                mask = (torch.arange(ids[f].size(1), device=X.device) < length).to(dtype)
                mean = self.columns[f].combiner == "mean"
                factors[f] = mask / (length.to(dtype) + 1e-8) if mean else mask
        return factors


class Lookups(KeepsPlans):
    """A module with a ``feature_index`` and an ``embedding_dict``."""

    def _plan(self, columns: Sequence, unpooled: Sequence = ()) -> Plan:
        return self._plan_of((tuple(columns), tuple(unpooled)), lambda key: Plan(*key, self.feature_index))

    def _arguments(self, X: Tensor, plan: Plan) -> tuple[list[Tensor], Features] | None:
        """The tables and the features for the op; None where a table's call may be seen or has another dtype than X."""
        if not plan.columns or not nobody_follows() or X.dim() != 2:
            return None
        modules = self.embedding_dict._modules
        tables = [modules[t] for t in plan.tables]
        weights = [fused_weight(t) for t in tables]
        if any(w is None or w.dtype != X.dtype for w in weights):
            return None
        ids = plan.ids(X)
        factors = plan.weights_of_ids(X, ids, X.dtype)
        features = Features(ids, [], factors, plan.table_of, plan.modes, plan.padding_idx, frozen_rows(tables, weights))
        return weights, features

    def looked_up(self, X: Tensor, columns: Sequence, unpooled: Sequence = ()) -> list[Tensor] | None:
        """[B, 1, D] for each of ``columns``, [B, L, D] for each of ``unpooled``; None where the op does not serve."""
        plan = self._plan(columns, unpooled)
        arguments = self._arguments(X, plan)
        if arguments is None:
            return None
        weights, features = arguments
        found = run_op(weights, features, plan.names)
        for f in plan.maxima:
            column, embeddings = plan.columns[f], {plan.columns[f].name: found[f]}
            (found[f],) = get_varlen_pooling_list(embeddings, X, self.feature_index, [column], self.device)
        return [e if e.dim() == 3 else e.unsqueeze(1) for e in found]

    def concatenated(self, X: Tensor, columns: Sequence) -> Tensor | None:
        """[B, all widths], the columns side by side; None where the op does not serve, or some are maxima."""
        plan = self._plan(columns)
        arguments = None if plan.maxima else self._arguments(X, plan)
        return None if arguments is None else run_op(*arguments, plan.names, concat=True)[0]

    def with_dense(self, X: Tensor, columns: Sequence, use_fm: bool) -> tuple[Tensor, Tensor | None] | None:
        """All ``columns`` side by side, dense ones last, and with ``use_fm`` the FM of the others [B, 1]; None where
        the op does not serve, or there are none or maxima among them."""
        dense = [c for c in columns if isinstance(c, DenseFeat)]
        plan = self._plan(of_tables(columns))
        arguments = None if plan.maxima else self._arguments(X, plan)
        if arguments is None:
            return None
        weights, features = arguments
        values = [dense_columns(X, dense, self.feature_index)] if dense else []
        if use_fm and len({w.size(1) for w in weights}) > 1:
            return None
        if use_fm and not features.per_sample_weights:
            return run_fm(LookupBatch(weights, features, plan.names, values), None)[:2]
        (out,) = run_op(weights, features, plan.names, concat=True)
        fm = fm_interaction(out.unflatten(1, (len(plan.columns), -1))) if use_fm else None
        return torch.cat([out, *values], 1), fm
