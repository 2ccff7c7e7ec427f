"""The embedding layer: all features of a batch looked up in one call."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn._tables import KeepsPlans, TableLayer
from rankkernels.nn._transparency import is_plain, is_untouched, nobody_follows
from rankkernels.nn.features import check_features, is_dense, is_sequence
from rankkernels.nn.lookup_plan import POOLING, Lookup, Plan, arrange, bad_batch, bad_shape, factors, table_name
from rankkernels.ops import few_lookups
from rankkernels.ops._embedding_checks import row_of
from rankkernels.ops._exact_table import as_plain
from rankkernels.ops._features import Features, LookupBatch
from rankkernels.ops._library import use_huge_pages
from rankkernels.ops._tracing import is_tensor
from rankkernels.ops.embedding_bag import run_op
from rankkernels.ops.embedding_fm import run_batch as run_fm


def fused_weight(table: nn.Module) -> Tensor | None:
    """The table's weight, if the op may replace the module's call (given ``nobody_follows``), else None."""
    if is_untouched(table, nn.Embedding):
        own = table.__dict__
        if own["max_norm"] is None and not own["scale_grad_by_freq"] and not own["sparse"]:
            weight = own["_parameters"].get("weight")
            return weight if type(weight) is nn.Parameter or is_tensor(weight) else None
    return None


def look_up(tables: Sequence[nn.Embedding], ids: Sequence[Tensor]) -> list[Tensor]:
    """``[table(i) for table, i in zip(tables, ids)]`` in one call, forward and backward.

    Where a table's call may be seen (a hook, a subclass, a parametrization), or one has ``max_norm``,
    ``scale_grad_by_freq`` or ``sparse``, the tables are called one after the other.

    Args:
        tables: ``nn.Embedding`` modules, [R, D] each, of one dtype; the same one may come several times.
        ids: int32 or int64, of any shape, for each of ``tables`` -> embeddings, ids.shape + [D].

    Raises:
        ValueError: another number of ``ids`` than of ``tables``.
        IndexError: an id outside its table.
    """
    tables = list(tables)
    if len(tables) != len(ids):
        raise ValueError(f"look_up: ids must have one tensor for each of {len(tables)} tables, got {len(ids)}")
    own = list(dict.fromkeys(tables))
    weights = [fused_weight(t) for t in own] if nobody_follows() else [None]
    if any(w is None for w in weights) or len({w.dtype for w in weights}) != 1:
        return [table(i) for table, i in zip(tables, ids)]
    return ops.table_batched_embedding_bag(
        weights,
        ids,
        modes=["none"] * len(tables),
        tables=[own.index(t) for t in tables],
        frozen_rows=[t.padding_idx for t in own],
        names=[f"ids[{n}]" for n in range(len(tables))],
    )


class InputMask(nn.Module):
    """1.0 where an id of ``features``, one or a list, is not padding, else 0.0: [B, features, L]. torch-rechub's."""

    def forward(self, x: Mapping[str, Tensor], features) -> Tensor:
        masks = []
        for feature in features if isinstance(features, list) else [features]:
            if is_dense(feature):
                raise ValueError(f"InputMask: feature {feature.name!r} is dense, only ids have a mask")
            padding_idx = -1 if feature.padding_idx is None else feature.padding_idx
            masks.append((x[feature.name].long() != padding_idx).unsqueeze(1).float())
        return torch.cat(masks, dim=1)


def _pool(rows: Tensor, mask: Tensor, mode: str, weights: Tensor | None) -> Tensor:
    """Pools as the op does, for rows [B, L, D] that a module looked up, their mask [B, 1, L] and weights [B, L]."""
    if mode == "none":
        return rows
    mask = mask.to(rows.dtype)
    pooled = torch.bmm(mask if weights is None else mask * weights.to(rows.dtype)[:, None], rows).squeeze(1)
    return pooled if mode == "sum" else pooled / mask.sum(-1).clamp(min=1)


class EmbeddingLayer(KeepsPlans, TableLayer):
    """The tables of a model's features, and their lookup. torch-rechub's ``EmbeddingLayer``.

    ``embed_dict`` holds one ``nn.Embedding`` for each sparse or sequence feature with ``shared_with=None``; a feature
    that shares a table uses its owner's, whose ``padding_idx`` row gets no gradient, while its pooling leaves out its
    own ``padding_idx``.

    Args:
        features: sparse, sequence and dense features, ours or torch-rechub's; the first of a name makes its table.

    Raises:
        ValueError: a feature shares the table of one that is not among ``features``, has another pooling than sum, mean
            and concat, or a name that no module can have (empty, with a dot, or a method of ``nn.ModuleDict``).
        TypeError: one of ``features`` is no feature.
    """

    def __init__(self, features: Sequence):
        super().__init__()
        check_features("EmbeddingLayer", features)
        self.features = features
        self.embed_dict = nn.ModuleDict()
        self.n_dense = 0
        self.input_mask = InputMask()
        for feature in features:
            if is_dense(feature):
                self.n_dense += 1
            elif is_sequence(feature) and feature.pooling not in POOLING:
                raise ValueError(
                    f"EmbeddingLayer: feature {feature.name!r} has pooling {feature.pooling!r}, expected one of "
                    f"{', '.join(POOLING)}"
                )
            elif feature.shared_with is None and feature.name not in self.embed_dict:
                if hasattr(self.embed_dict, feature.name) or "." in feature.name or not feature.name:
                    raise ValueError(
                        f"EmbeddingLayer: feature {feature.name!r} cannot own a table: torch allows no module of that "
                        "name in a ModuleDict"
                    )
                R, padding_idx = feature.vocab_size, feature.padding_idx
                if padding_idx is not None:
                    row_of("EmbeddingLayer", f"feature {feature.name!r}: padding_idx", padding_idx, R)
                table = self.embed_dict[feature.name] = feature.get_embedding_layer()
                use_huge_pages(table.weight)
        for feature in features:
            if not is_dense(feature) and table_name(feature) not in self.embed_dict:
                raise ValueError(
                    f"EmbeddingLayer: feature {feature.name!r} shares the table of {feature.shared_with!r}, "
                    f"which is not among the features with a table: {', '.join(self.embed_dict) or 'none'}"
                )

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_plans", None)
        self._modules.setdefault("input_mask", InputMask())  # of before there was one

    def _plan(self, features: Sequence) -> Plan:
        """The plan of ``features``, made once for each list of the same objects."""
        return self._plan_of(list(features), Plan)

    def _tables(self, plan: Plan) -> tuple[list[nn.Module], list[Tensor | None]]:
        """The plan's tables as they are now, and the weight of each that the op serves."""
        modules = self.embed_dict._modules  # ModuleDict's own lookup takes ten times as long
        tables = [modules[t] for t in plan.tables]
        if not nobody_follows():
            return tables, [None] * len(tables)
        return tables, [fused_weight(t) for t in tables]

    def lookup(self, x: Mapping[str, Tensor], features: Sequence, one_batch: bool = True) -> list[Tensor]:
        """One tensor a feature: [B, D] for a sparse or pooled one, [B, L, D] for ``pooling="concat"``, [B, embed_dim]
        in the tables' dtype for a dense one. A feature that comes twice is looked up once, but by a table whose call
        may be seen. Without ``one_batch`` each feature may have a B of its own.

        The attributes of a feature object are read when a list of features is first seen.

        Raises:
            KeyError: the batch lacks a feature.
            IndexError: an id outside the feature's table.
            TypeError: a feature of the batch is no tensor, or complex.
            ValueError: a feature of the batch has another shape, or another B than the others.
        """
        plan = self._plan(features)
        ids = plan.ids(x)
        for lookup, i in zip(plan.lookups, ids):
            if i.dim() != 1 and not lookup.is_sequence:
                raise bad_shape("sparse", lookup.name, "[B] ids", i)
        return self._look_up(x, plan, ids, one_batch)

    def _look_up(self, x: Mapping[str, Tensor], plan: Plan, ids: list[Tensor], one_batch: bool = True) -> list[Tensor]:
        """``lookup`` for ids of any shape."""
        for lookup, i in zip(plan.lookups, ids if one_batch else ()):
            if i.shape[:1] != ids[0].shape[:1]:
                raise bad_batch(lookup.name, i, plan.names[0], ids[0])
        few = None if plan.dense else self._few(plan, ids)
        if few is not None:
            return [few[i] for i in plan.order]
        tables, weights = self._tables(plan)
        masked = is_plain(self.input_mask, InputMask)
        fused = [
            i
            for i, (t, lookup) in enumerate(zip(plan.table_of, plan.lookups))
            if weights[t] is not None and (masked or not lookup.is_sequence)
        ]
        found = {}
        if fused and len(fused) == len(plan.lookups):  # as nearly always: the plan has the op's arguments
            features = plan.with_ids(ids, plan.sample_weights(x, weights), frozen_rows(tables, weights))
            found = dict(enumerate(run_op(weights, features, plan.joined_names, optimizer=self.fused_optimizer)))
        elif fused:
            place = {t: n for n, t in enumerate(dict.fromkeys(plan.table_of[i] for i in fused))}
            embeddings = ops.table_batched_embedding_bag(
                [weights[t] for t in place],
                [plan.lookups[i].known.rows_of(ids[i]) for i in fused],
                modes=[plan.lookups[i].mode for i in fused],
                tables=[place[plan.table_of[i]] for i in fused],
                per_sample_weights=[
                    None if name is None else factors(name, x).to(weights[plan.table_of[i]].dtype)
                    for i, name in zip(fused, (plan.lookups[i].weights for i in fused))
                ],
                padding_idx=[plan.lookups[i].padding_idx for i in fused],
                frozen_rows=[tables[t].padding_idx for t in place],
                names=[plan.names[i] for i in fused],
                optimizer=self.fused_optimizer,
            )
            found = dict(zip(fused, embeddings))
        found.update(enumerate(plan.dense_columns(x, self._dtype(weights), ids, one_batch), len(plan.lookups)))
        return [
            found[i] if i in found else self._called(x, feature, ids[i], tables[plan.table_of[i]], plan.lookups[i])
            for i, feature in zip(plan.order, plan.features)
        ]

    def _few(self, plan: Plan, ids: list[Tensor]) -> list[Tensor] | None:
        """The plan's lookups by the tables' own calls, where they are so few that this is the faster way."""
        if not plan.may_be_few or (self.fused_optimizer is not None and torch.is_grad_enabled()):
            return None
        if plan.has_sequence and not is_plain(self.input_mask, InputMask):
            return None
        modules = self.embed_dict._modules
        tables = [modules[lookup.table] for lookup in plan.lookups]
        return few_lookups.call(tables, ids) if few_lookups.are_faster(tables, ids) else None

    def _called(self, x: Mapping[str, Tensor], feature, ids: Tensor, table: nn.Module, lookup: Lookup) -> Tensor:
        """``feature`` looked up by calling the modules, in torch-rechub's order."""
        if self.fused_optimizer is not None and torch.is_grad_enabled():
            raise RuntimeError(
                f"EmbeddingLayer: the table of feature {feature.name!r} is trained by a fused optimizer, which cannot "
                "step where the table is called as a module: it, or all modules, got a hook, a parametrization or "
                "another setting after rankkernels.optim.fuse"
            )
        mask = self.input_mask(x, feature) if is_sequence(feature) else None
        weights = None if lookup.weights is None else factors(lookup.weights, x)
        return _pool(table(lookup.known.rows_of(ids).long()), mask, lookup.mode, weights)

    def _dtype(self, weights: Sequence[Tensor | None]) -> torch.dtype:
        """Of these tables; of the layer's, whatever they are, where the op serves none of them."""
        with as_plain():
            found = {w.dtype for w in weights if w is not None}
        if not found:
            found = {next((p.dtype for p in self.embed_dict.parameters() if p.is_floating_point()), torch.float32)}
        return functools.reduce(torch.promote_types, found)

    def _together(
        self, x: Mapping[str, Tensor], plan: Plan, ids: list[Tensor], one_width: bool
    ) -> tuple[list[Tensor], Features] | None:
        """The weights and the features of all of the plan's lookups, if one tensor can hold these side by side."""
        if not plan.in_order:
            return None
        # Lists, not generators: of a feature or two, what is asked takes as long as the lookup.
        if any([i.dim() != 1 and not lookup.is_sequence for i, lookup in zip(ids, plan.lookups)]):
            return None
        tables, weights = self._tables(plan)
        if any([w is None for w in weights]):
            return None
        with as_plain():
            if len({(w.dtype, w.size(1) if one_width else 0) for w in weights}) > 1:
                return None
        if plan.has_sequence and not is_plain(self.input_mask, InputMask):
            return None
        return weights, plan.with_ids(ids, plan.sample_weights(x, weights), frozen_rows(tables, weights))

    def _concat(self, x: Mapping[str, Tensor], plan: Plan, ids: list[Tensor], squeeze_dim: bool) -> Tensor | None:
        """What ``forward`` returns, written by the op in one piece; None if that is not possible."""
        if plan.may_be_few and plan.in_order and ids[0].dim() == 1:
            few = self._few(plan, ids)
            if few is not None and squeeze_dim:
                few += plan.dense_columns(x, few[0].dtype, ids) if plan.dense else ()
                return few[0] if len(few) == 1 else torch.cat(few, 1)
            if few is not None and len({f.shape for f in few}) == 1:
                return torch.cat(few, 1).view(-1, len(few), few[0].shape[1]) if len(few) > 1 else few[0].unsqueeze(1)
        arguments = self._together(x, plan, ids, not squeeze_dim)
        if arguments is None:
            return None
        weights, features = arguments
        (out,) = run_op(weights, features, plan.joined_names, concat=True, optimizer=self.fused_optimizer)
        if squeeze_dim:
            return torch.cat([out, *plan.dense_columns(x, out.dtype, features.indices)], 1) if plan.dense else out
        return out.view(-1, len(features.indices), weights[0].size(1))

    def gather(
        self, x: Mapping[str, Tensor], deep_features: Sequence, fm_features: Sequence, dtype: torch.dtype
    ) -> LookupBatch | None:
        """Everything that DeepFM looks up, as arguments of one call of an op.

        None where that is not possible: the sparse and sequence features of the two lists differ or repeat one, their
        widths differ, a table is not of ``dtype`` or is looked up by a module of its own.
        """
        deep, fm = self._plan(deep_features), self._plan(fm_features)
        if deep.lookups != fm.lookups or len(fm.order) != len(fm.lookups):
            return None
        arguments = self._together(x, deep, deep.ids(x), True)
        if arguments is None:
            return None
        weights, features = arguments
        if weights[0].dtype != dtype:
            return None
        dense = deep.dense_columns(x, dtype, features.indices)
        return LookupBatch(weights, features, deep.joined_names, dense, self.fused_optimizer)

    def lookup_fm(
        self, x: Mapping[str, Tensor], deep_features: Sequence, fm_features: Sequence, linear_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What ``forward`` returns of ``deep_features`` with ``squeeze_dim``, and the FM [B, 1] and the linear term
        [B, 1] of ``fm_features``, in one pass over the tables: see ``rankkernels.embedding_fm``.

        None where that is not possible: see ``gather``.
        """
        batch = self.gather(x, deep_features, fm_features, linear_weight.dtype)
        return None if batch is None else run_fm(batch, linear_weight)

    def forward(self, x: Mapping[str, Tensor], features: Sequence, squeeze_dim: bool = False) -> Tensor:
        """Embeddings of ``features`` from the batch ``x``, {name: ids or values}.

        Args:
            x: ids [B] for sparse features, [B, L] for sequences, numbers [B] or [B, n] for dense ones.
            features: which to look up, in the order of the result.
            squeeze_dim: flatten to [B, sum of the widths], dense values last; the widths may differ. Without it
                the result is [B, F, D] ([B, F, L, D] for sequences with ``pooling="concat"``), and dense features
                beside others are dropped.

        Raises:
            KeyError, IndexError, TypeError: see ``lookup``.
            ValueError: nothing to return, features of different shape without ``squeeze_dim``, and see ``lookup``.
            RuntimeError: features of one shape with another B.
        """
        plan = self._plan(features)
        ids = plan.ids(x)
        out = self._concat(x, plan, ids, squeeze_dim)
        if out is None:
            out = arrange(features, self._look_up(x, plan, ids), squeeze_dim)
        return out


def frozen_rows(tables: Sequence[nn.Embedding], weights: Sequence[Tensor]) -> list[int]:
    """Of each table the row that gets no gradient, as the op takes it."""
    return [
        -1 if t.padding_idx is None else row_of("EmbeddingLayer", "padding_idx", t.padding_idx, w.size(0))
        for t, w in zip(tables, weights)
    ]
