"""The embedding layer: all features of a batch looked up in one call."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn._transparency import is_plain, is_tensor, is_untouched, nobody_follows
from rankkernels.nn.features import check_features, is_dense, is_sequence
from rankkernels.ops._library import use_huge_pages
from rankkernels.ops.deepfm import call as call_deepfm
from rankkernels.ops.embedding_bag import MODES, call, join_names
from rankkernels.ops.embedding_fm import call as call_fm

_POOLING = {"sum": "sum", "mean": "mean", "concat": "none"}


def fused_weight(table: nn.Module) -> Tensor | None:
    """The table's weight, if the op looks it up and trains it as calling the module would; where ``nobody_follows``."""
    if is_untouched(table, nn.Embedding):
        own = table.__dict__
        if own["max_norm"] is None and not own["scale_grad_by_freq"] and not own["sparse"]:
            weight = own["_parameters"].get("weight")
            return weight if is_tensor(weight) else None
    return None


class _Lookup(NamedTuple):
    """What determines a lookup: features that agree in it are looked up once."""

    name: str
    table: str
    mode: str
    padding_idx: int | None
    is_sequence: bool


def _table_name(feature) -> str:
    return feature.name if feature.shared_with is None else feature.shared_with


def _lookup_of(feature) -> _Lookup | str:
    """A feature's lookup, or its name if it is dense."""
    if is_dense(feature):
        return feature.name
    mode = _POOLING[feature.pooling] if is_sequence(feature) else "none"
    return _Lookup(
        feature.name, _table_name(feature), mode, None if mode == "none" else feature.padding_idx, is_sequence(feature)
    )


class _Plan:
    """What a list of features asks for, whatever the batch: the op's arguments that are no tensors."""

    def __init__(self, features: list):
        check_features("EmbeddingLayer", features)
        keys = [_lookup_of(f) for f in features]
        self.features = features
        self.lookups = list(dict.fromkeys(k for k in keys if isinstance(k, _Lookup)))
        self.dense = list(dict.fromkeys(k for k in keys if isinstance(k, str)))
        self.tables = list(dict.fromkeys(k.table for k in self.lookups))
        places = {k: i for i, k in enumerate([*self.lookups, *self.dense])}
        self.order = [places[k] for k in keys]
        self.table_of = [self.tables.index(k.table) for k in self.lookups]
        self.modes = [MODES.index(k.mode) for k in self.lookups]
        self.padding_idx = [-1 if k.padding_idx is None else k.padding_idx for k in self.lookups]
        self.names = [k.name for k in self.lookups]
        self.joined_names = join_names(self.names)
        self.has_sequence = any(k.is_sequence for k in self.lookups)
        #: Whether the lookups, side by side, are what ``EmbeddingLayer.forward`` returns but for dense values.
        self.in_order = len(self.order) == len(places) and len(self.lookups) > 0
        self.in_order &= [i for i in self.order if i < len(self.lookups)] == list(range(len(self.lookups)))
        self.in_order &= all(k.mode != "none" or not k.is_sequence for k in self.lookups)


class InputMask(nn.Module):
    """Which ids of ``features``, one or a list, are no padding: [B, features, L], 1.0 or 0.0. torch-rechub's."""

    def forward(self, x: Mapping[str, Tensor], features) -> Tensor:
        masks = []
        for feature in features if isinstance(features, list) else [features]:
            if is_dense(feature):
                raise ValueError(f"InputMask: feature {feature.name!r} is dense, only ids have a mask")
            padding_idx = -1 if feature.padding_idx is None else feature.padding_idx
            masks.append((x[feature.name].long() != padding_idx).unsqueeze(1).float())
        return torch.cat(masks, dim=1)


def _pool(rows: Tensor, mask: Tensor, mode: str) -> Tensor:
    """What the op does after the lookup, for rows [B, L, D] that another module looked up, and their mask [B, 1, L]."""
    if mode == "none":
        return rows
    mask = mask.to(rows.dtype)
    pooled = torch.bmm(mask, rows).squeeze(1)
    return pooled if mode == "sum" else pooled / mask.sum(-1).clamp(min=1)


class EmbeddingLayer(nn.Module):
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

    fused_optimizer = None  # see rankkernels.optim.fuse
    _plans: tuple[_Plan, ...] = ()

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
            elif is_sequence(feature) and feature.pooling not in _POOLING:
                raise ValueError(
                    f"EmbeddingLayer: feature {feature.name!r} has pooling {feature.pooling!r}, expected one of "
                    f"{', '.join(_POOLING)}"
                )
            elif feature.shared_with is None and feature.name not in self.embed_dict:
                if hasattr(self.embed_dict, feature.name) or "." in feature.name or not feature.name:
                    raise ValueError(
                        f"EmbeddingLayer: feature {feature.name!r} cannot own a table: torch allows no module of that "
                        "name in a ModuleDict"
                    )
                table = self.embed_dict[feature.name] = feature.get_embedding_layer()
                use_huge_pages(table.weight)
        for feature in features:
            if not is_dense(feature) and _table_name(feature) not in self.embed_dict:
                raise ValueError(
                    f"EmbeddingLayer: feature {feature.name!r} shares the table of {feature.shared_with!r}, "
                    f"which is not among the features with a table: {', '.join(self.embed_dict) or 'none'}"
                )

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_plans", None)
        self._modules.setdefault("input_mask", InputMask())  # of before there was one

    def _plan(self, features: Sequence) -> _Plan:
        """The plan of ``features``, made once for each list of the same objects."""
        features = list(features)
        for plan in self._plans:
            if plan.features == features:
                return plan
        plan = _Plan(features)
        if not torch.compiler.is_compiling():
            self._plans = (plan, *self._plans[:7])
        return plan

    def _ids(self, x: Mapping[str, Tensor], plan: _Plan) -> list[Tensor]:
        """The ids of each lookup, int32 or int64."""
        ids_of = []
        for lookup in plan.lookups:
            ids = x.get(lookup.name)
            dtype = getattr(ids, "dtype", None)
            if dtype is not torch.int64 and dtype is not torch.int32:
                ids = _column(lookup.name, x).long()
            if lookup.is_sequence and ids.dim() != 2:
                raise _bad_shape("sequence", lookup.name, "[B, L] ids", ids)
            ids_of.append(ids)
        return ids_of

    def _tables(self, plan: _Plan) -> tuple[list[nn.Module], list[Tensor | None]]:
        """The plan's tables as they are now, and the weight of each that the op serves."""
        modules = self.embed_dict._modules  # itself: ModuleDict looks up a name in ten times the time
        tables = [modules[t] for t in plan.tables]
        if not nobody_follows():
            return tables, [None] * len(tables)
        return tables, [fused_weight(t) for t in tables]

    def lookup(self, x: Mapping[str, Tensor], features: Sequence) -> list[Tensor]:
        """One tensor a feature: [B, D] for a sparse or pooled one, [B, L, D] for ``pooling="concat"``, [B, embed_dim]
        in the tables' dtype for a dense one. A feature that comes twice is looked up once, but by a table whose call
        may be seen.

        The attributes of a feature object are read when a list of features is first seen.

        Raises:
            KeyError: the batch lacks a feature.
            IndexError: an id outside the feature's table.
            TypeError: a feature of the batch is no tensor, or complex.
            ValueError: a feature of the batch has another shape, or another B than the others.
        """
        plan = self._plan(features)
        ids = self._ids(x, plan)
        for lookup, i in zip(plan.lookups, ids):
            if i.dim() != 1 and not lookup.is_sequence:
                raise _bad_shape("sparse", lookup.name, "[B] ids", i)
        return self._look_up(x, plan, ids)

    def _look_up(self, x: Mapping[str, Tensor], plan: _Plan, ids: list[Tensor]) -> list[Tensor]:
        """``lookup`` for ids of any shape."""
        for lookup, i in zip(plan.lookups, ids):
            if i.shape[:1] != ids[0].shape[:1]:
                raise _bad_batch(lookup.name, i, plan.names[0], ids[0])
        tables, weights = self._tables(plan)
        masked = is_plain(self.input_mask, InputMask)
        fused = [
            i
            for i, (t, lookup) in enumerate(zip(plan.table_of, plan.lookups))
            if weights[t] is not None and (masked or not lookup.is_sequence)
        ]
        found = {}
        if fused and len(fused) == len(plan.lookups):  # as nearly always: the plan has the op's arguments
            features = plan.table_of, plan.modes, plan.padding_idx, _frozen_rows(tables, weights), plan.joined_names
            found = dict(enumerate(call(weights, ids, [], [], *features, optimizer=self.fused_optimizer)))
        elif fused:
            place = {t: n for n, t in enumerate(dict.fromkeys(plan.table_of[i] for i in fused))}
            embeddings = ops.table_batched_embedding_bag(
                [weights[t] for t in place],
                [ids[i] for i in fused],
                modes=[plan.lookups[i].mode for i in fused],
                tables=[place[plan.table_of[i]] for i in fused],
                padding_idx=[plan.lookups[i].padding_idx for i in fused],
                frozen_rows=[tables[t].padding_idx for t in place],
                names=[plan.names[i] for i in fused],
                optimizer=self.fused_optimizer,
            )
            found = dict(zip(fused, embeddings))
        dtype = functools.reduce(torch.promote_types, {w.dtype for w in weights if w is not None} or {self._dtype()})
        found.update(enumerate(self._dense(x, plan, dtype, ids), len(plan.lookups)))
        return [
            found[i] if i in found else self._called(x, feature, tables[plan.table_of[i]], plan.lookups[i].mode)
            for i, feature in zip(plan.order, plan.features)
        ]

    def _called(self, x: Mapping[str, Tensor], feature, table: nn.Module, mode: str) -> Tensor:
        """``feature`` looked up by calling the modules, in torch-rechub's order."""
        if self.fused_optimizer is not None and torch.is_grad_enabled():
            raise RuntimeError(
                f"EmbeddingLayer: the table of feature {feature.name!r} is trained by a fused optimizer, which cannot "
                "step where the table is called as a module: it, or all modules, got a hook, a parametrization or "
                "another setting after rankkernels.optim.fuse"
            )
        mask = self.input_mask(x, feature) if is_sequence(feature) else None
        return _pool(table(x[feature.name].long()), mask, mode)

    def _dtype(self) -> torch.dtype:
        """Of the layer's tables, whatever they are."""
        return next((p.dtype for p in self.embed_dict.parameters() if p.is_floating_point()), torch.float32)

    @staticmethod
    def _dense(x: Mapping[str, Tensor], plan: _Plan, dtype: torch.dtype, ids: list[Tensor]) -> list[Tensor]:
        """The dense features' values, [B, n]: rounded to float32 as torch-rechub does, then in ``dtype``."""
        values = []
        for name in plan.dense:
            v = _column(name, x)
            if v.dtype is not torch.float32 or dtype is not torch.float32:
                v = v.float().to(dtype)
            if v.dim() != 2:
                if v.dim() != 1:
                    raise _bad_shape("dense", name, "[B] or [B, n] numbers", v)
                v = v.unsqueeze(1)
            first = ids[0] if ids else values[0] if values else v
            if v.size(0) != first.size(0):
                raise _bad_batch(name, v, (plan.names or plan.dense)[0], first)
            values.append(v)
        return values

    def _together(self, x: Mapping[str, Tensor], plan: _Plan, one_width: bool) -> tuple | None:
        """The op's arguments for all of the plan's lookups side by side in one tensor; None if that is not possible."""
        if not plan.in_order:
            return None
        ids = self._ids(x, plan)
        if any(i.dim() != 1 for i, lookup in zip(ids, plan.lookups) if not lookup.is_sequence):
            return None
        tables, weights = self._tables(plan)
        if any(w is None for w in weights) or len({(w.dtype, w.size(1) if one_width else 0) for w in weights}) > 1:
            return None
        if plan.has_sequence and not is_plain(self.input_mask, InputMask):
            return None
        return (
            weights,
            ids,
            plan.table_of,
            plan.modes,
            plan.padding_idx,
            _frozen_rows(tables, weights),
            plan.joined_names,
        )

    def _concat(self, x: Mapping[str, Tensor], plan: _Plan, squeeze_dim: bool) -> Tensor | None:
        """What ``forward`` returns, written by the op in one piece; None if that is not possible."""
        arguments = self._together(x, plan, not squeeze_dim)
        if arguments is None:
            return None
        weights, ids, *features = arguments
        (out,) = call(weights, ids, [], [], *features, concat=True, optimizer=self.fused_optimizer)
        if squeeze_dim:
            return torch.cat([out, *self._dense(x, plan, out.dtype, ids)], 1) if plan.dense else out
        return out.view(-1, len(ids), weights[0].size(1))

    def lookup_fm(
        self, x: Mapping[str, Tensor], deep_features: Sequence, fm_features: Sequence, linear_weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What ``forward`` returns of ``deep_features`` with ``squeeze_dim``, and the FM [B, 1] and the linear term
        [B, 1] of ``fm_features``, in one pass over the tables: see ``rankkernels.embedding_fm``.

        None where that is not possible: the sparse and sequence features of the two lists differ or repeat one, their
        widths or dtypes differ, or a table is looked up by a module of its own.
        """
        arguments = self._fm_arguments(x, deep_features, fm_features, linear_weight)
        if arguments is None:
            return None
        *arguments, dense = arguments
        # On a GPU the op would copy the embeddings beside them: joining all at once is a launch less.
        together = dense and all(v.device.type == "cpu" for v in dense)
        joined = _side_by_side(dense) if together else None
        out, interaction, linear = call_fm(*arguments, linear_weight, joined, optimizer=self.fused_optimizer)
        return torch.cat([out, *dense], 1) if dense and not together else out, interaction, linear

    def _fm_arguments(self, x, deep_features, fm_features, linear_weight) -> tuple | None:
        """The op's arguments for ``lookup_fm`` and the list of the dense values; None where it gives None."""
        deep, fm = self._plan(deep_features), self._plan(fm_features)
        if deep.lookups != fm.lookups or len(fm.order) != len(fm.lookups):
            return None
        arguments = self._together(x, deep, True)
        if arguments is None or arguments[0][0].dtype != linear_weight.dtype:
            return None
        return *arguments, self._dense(x, deep, linear_weight.dtype, arguments[1])

    def deepfm(
        self,
        x: Mapping[str, Tensor],
        deep_features: Sequence,
        fm_features: Sequence,
        linear_weight: Tensor,
        layers: Iterable[Tensor],
    ) -> Tensor | None:
        """Linear term + FM + MLP, [B, 1]: ``lookup_fm`` and then ``layers`` (see ``MLP.relu_layers``), block by block.

        For inference in float32 on the CPU; None elsewhere, where ``lookup_fm`` is None, and with pooled features.
        """
        found = self._fm_arguments(x, deep_features, fm_features, linear_weight)
        if found is None:
            return None
        weights, ids, tables, modes, _padding_idx, _frozen_rows, names, dense = found
        if any(modes):
            return None
        layers = list(layers)
        everything = [*weights, *dense, linear_weight, *layers]
        if any(t.dtype is not torch.float32 or t.device.type != "cpu" for t in everything):
            return None
        return call_deepfm(weights, ids, tables, names, linear_weight, _side_by_side(dense) if dense else None, layers)

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
        out = self._concat(x, plan, squeeze_dim)
        if out is None:
            out = arrange(features, self._look_up(x, plan, self._ids(x, plan)), squeeze_dim)
        return out


def _frozen_rows(tables: Sequence[nn.Embedding], weights: Sequence[Tensor]) -> list[int]:
    """Of each table the row that gets no gradient, as the op takes it."""
    return [-1 if t.padding_idx is None else _row(t.padding_idx, w) for t, w in zip(tables, weights)]


def _row(padding_idx: int, weight: Tensor) -> int:
    """A table's ``padding_idx`` counted from its beginning."""
    R = weight.size(0)
    if not -R <= padding_idx < R:
        raise ValueError(f"EmbeddingLayer: padding_idx {padding_idx} is no row of a table with {R} rows")
    return padding_idx % R


def _side_by_side(columns: Sequence[Tensor]) -> Tensor:
    """Tensors [B, n] joined to one, column by column: that is how a batch has them."""
    return torch.cat([v.t() for v in columns]).t()


def _column(name: str, x: Mapping[str, Tensor]) -> Tensor:
    """What the batch has of a feature, if it is a tensor of real numbers."""
    value = x.get(name)
    if value is None:
        raise KeyError(f"EmbeddingLayer: feature {name!r} is missing from the batch, which has {list(x)}")
    if not isinstance(value, Tensor) or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"EmbeddingLayer: feature {name!r} must be a tensor of real numbers, got {kind}")
    return value


def _bad_shape(kind: str, name: str, expected: str, value: Tensor) -> ValueError:
    return ValueError(f"EmbeddingLayer: {kind} feature {name!r} must be {expected}, got shape {list(value.shape)}")


def _bad_batch(name: str, value: Tensor, first_name: str, first: Tensor) -> ValueError:
    return ValueError(
        f"EmbeddingLayer: features must have one batch size B, but {first_name!r} has shape {list(first.shape)} and "
        f"{name!r} {list(value.shape)}"
    )


def arrange(features: Sequence, embeddings: Sequence[Tensor], squeeze_dim: bool) -> Tensor:
    """The embeddings of ``features`` as one tensor, see ``EmbeddingLayer.forward``."""
    dense = [e for f, e in zip(features, embeddings) if is_dense(f)]
    tables = [(f, e) for f, e in zip(features, embeddings) if not is_dense(f)]
    if squeeze_dim:
        if not features:
            raise ValueError("EmbeddingLayer: features must not be empty")
        return torch.cat([*(e.flatten(1) for _, e in tables), *dense], dim=1)
    if not tables:
        raise ValueError(
            f"EmbeddingLayer: without squeeze_dim, features must have a sparse or a sequence feature, got {features}"
        )
    first, shape = tables[0][0], tables[0][1].shape[1:]
    for feature, e in tables:
        if e.shape[1:] != shape:
            raise ValueError(
                f"EmbeddingLayer: features {first.name!r} and {feature.name!r} have embeddings of shape "
                f"{list(shape)} and {list(e.shape[1:])}: they can only be combined with squeeze_dim=True"
            )
    return torch.stack([e for _, e in tables], dim=1)
