"""What a list of features asks of a batch, worked out once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.nn.features import check_features, is_dense, is_sequence
from rankkernels.ops import few_lookups
from rankkernels.ops._features import MODES, NO_UNKNOWN, UNKNOWN, Features, Known, join_names

POOLING = {"sum": "sum", "mean": "mean", "concat": "none"}


class Lookup(NamedTuple):
    """What determines a lookup: features that agree in it are looked up once."""

    name: str
    table: str
    mode: str
    padding_idx: int | None
    is_sequence: bool
    weights: str | None  # the key in the batch of what scales each row
    known: Known


def table_name(feature) -> str:
    return feature.name if feature.shared_with is None else feature.shared_with


def _lookup_of(feature) -> Lookup | str:
    """A feature's lookup, or its name if it is dense."""
    if is_dense(feature):
        return feature.name
    mode = POOLING[feature.pooling] if is_sequence(feature) else "none"
    padding_idx = None if mode == "none" else feature.padding_idx
    weights = getattr(feature, "weights", None)
    return Lookup(
        feature.name, table_name(feature), mode, padding_idx, is_sequence(feature), weights, _known_of(feature)
    )


def _known_of(feature) -> Known:
    oov, size, padding_idx = getattr(feature, "oov", "error"), feature.vocab_size, feature.padding_idx
    if oov == "error":
        return NO_UNKNOWN
    return Known(UNKNOWN.index(oov), size, -1 if padding_idx is None else padding_idx % size)


class Plan:
    """What a list of features asks for, whatever the batch: the op's arguments that are no tensors."""

    def __init__(self, features: list):
        check_features("EmbeddingLayer", features)
        keys = [_lookup_of(f) for f in features]
        self.features = features
        self.lookups = list(dict.fromkeys(k for k in keys if isinstance(k, Lookup)))
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
        has_unknown = any(k.known != NO_UNKNOWN for k in self.lookups)
        self.known = [v for k in self.lookups for v in k.known] if has_unknown else []
        self.has_weights = any(k.weights is not None for k in self.lookups)
        #: Whether the tables' own calls give the same: see few_lookups.
        self.may_be_few = 0 < len(self.lookups) <= few_lookups.MOST_FEATURES and all(
            k.mode == "none" and k.weights is None and k.known == NO_UNKNOWN for k in self.lookups
        )
        if len(self.lookups) > 1:
            self.may_be_few &= all(is_dense(f) or f.embed_dim <= few_lookups.MOST_WIDTH for f in features)
        #: Whether the lookups, side by side, are what ``EmbeddingLayer.forward`` returns but for dense values.
        self.in_order = len(self.order) == len(places) and len(self.lookups) > 0
        self.in_order &= [i for i in self.order if i < len(self.lookups)] == list(range(len(self.lookups)))
        self.in_order &= all(k.mode != "none" or not k.is_sequence for k in self.lookups)

    def ids(self, x: Mapping[str, Tensor]) -> list[Tensor]:
        """The ids of each lookup as they come, int32 or int64."""
        ids_of = []
        for lookup in self.lookups:
            ids = x.get(lookup.name)
            dtype = getattr(ids, "dtype", None)
            if dtype is not torch.int64 and dtype is not torch.int32:
                ids = column(lookup.name, x).long()
            if lookup.is_sequence and ids.dim() != 2:
                raise bad_shape("sequence", lookup.name, "[B, L] ids", ids)
            ids_of.append(ids)
        return ids_of

    def dense_columns(
        self, x: Mapping[str, Tensor], dtype: torch.dtype, ids: list[Tensor], one_batch: bool = True
    ) -> list[Tensor]:
        """The dense features' values, [B, n]: rounded to float32 as torch-rechub does, then in ``dtype``."""
        values = []
        for name in self.dense:
            v = column(name, x)
            if v.dtype is not torch.float32 or dtype is not torch.float32:
                v = v.float().to(dtype)
            if v.dim() != 2:
                if v.dim() != 1:
                    raise bad_shape("dense", name, "[B] or [B, n] numbers", v)
                v = v.unsqueeze(1)
            first = ids[0] if ids else values[0] if values else v
            if one_batch and v.size(0) != first.size(0):
                raise bad_batch(name, v, (self.names or self.dense)[0], first)
            values.append(v)
        return values

    def sample_weights(self, x: Mapping[str, Tensor], tables: Sequence[Tensor]) -> list[Tensor]:
        """What scales the rows of each lookup, in the dtype of its table; as the ops take them."""
        if not self.has_weights:
            return []
        of_each = [(lookup.weights, tables[t]) for lookup, t in zip(self.lookups, self.table_of)]
        return [w.new_empty(0) if name is None else factors(name, x).to(w.dtype) for name, w in of_each]

    def with_ids(self, ids: list[Tensor], sample_weights: list[Tensor], frozen_rows: list[int]) -> Features:
        return Features(ids, [], sample_weights, self.table_of, self.modes, self.padding_idx, frozen_rows, self.known)


def column(name: str, x: Mapping[str, Tensor]) -> Tensor:
    """What the batch has of a feature, if it is a tensor of real numbers."""
    value = x.get(name)
    if value is None:
        raise KeyError(f"EmbeddingLayer: feature {name!r} is missing from the batch, which has {list(x)}")
    if not isinstance(value, Tensor) or value.is_complex():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"EmbeddingLayer: feature {name!r} must be a tensor of real numbers, got {kind}")
    return value


def factors(name: str, x: Mapping[str, Tensor]) -> Tensor:
    """What the batch has to scale a lookup's rows, [B, L]. To the op none would be an empty vector."""
    value = column(name, x)
    if value.dim() != 2:
        raise bad_shape("sequence", name, "[B, L] weights", value)
    return value


def bad_shape(kind: str, name: str, expected: str, value: Tensor) -> ValueError:
    return ValueError(f"EmbeddingLayer: {kind} feature {name!r} must be {expected}, got shape {list(value.shape)}")


def bad_batch(name: str, value: Tensor, first_name: str, first: Tensor) -> ValueError:
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
