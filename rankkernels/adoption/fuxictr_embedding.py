"""FuxiCTR's embeddings: all tables of a batch looked up in one call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from fuxictr.pytorch import layers
from fuxictr.utils import not_in_whitelist
from torch import Tensor, nn

from rankkernels.nn._transparency import is_plain, is_untouched, nobody_follows
from rankkernels.nn.embedding import frozen_rows, fused_weight
from rankkernels.ops._features import MODES, Features, join_names
from rankkernels.ops._tracing import is_tensor
from rankkernels.ops.embedding_bag import run_op

_NONE, _SUM = MODES.index("none"), MODES.index("sum")


class Lookup(NamedTuple):
    """A feature's part in the op's call. ``encoder``: what is still to be called with its embeddings, if anything."""

    table: nn.Embedding
    weight: Tensor
    ids: Tensor
    mode: int
    encoder: nn.Module | None


class _StandsFor(type):
    """A class that equals its base: FuxiCTR's regularizers find the embeddings by ``type(module) ==
    FeatureEmbeddingDict``."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other in cls.__bases__

    def __hash__(cls) -> int:
        return hash(cls.__bases__[0])


class FeatureEmbeddingDict(layers.FeatureEmbeddingDict, metaclass=_StandsFor):
    """All ids in one call of the op (``rankkernels.table_batched_embedding_bag``); everything else by its module."""

    def forward(
        self, inputs: Mapping[str, Tensor], feature_source: Sequence = (), feature_type: Sequence = ()
    ) -> OrderedDict[str, Tensor]:
        wanted = self.wanted(inputs, feature_source, feature_type)
        lookups = self.lookups(wanted, inputs)
        if not lookups:
            return super().forward(inputs, feature_source, feature_type)
        embeddings, found = dict(zip(lookups, run_lookups(lookups.items()))), OrderedDict()
        for feature in wanted:
            if feature not in lookups:
                found.update(super().forward({feature: inputs[feature]}))
                continue
            encoder, embedding = lookups[feature].encoder, embeddings[feature]
            found[feature] = embedding if encoder is None else encoder(embedding)
        return found

    def wanted(self, names, feature_source: Sequence, feature_type: Sequence) -> list[str]:
        """Those of the features ``names`` that FuxiCTR gives an embedding."""
        tables, found = self.embedding_layers._modules, []
        for feature in names:
            spec = self._feature_map.features[feature]  # of a feature that it does not know, an error there, too
            if feature_source and not_in_whitelist(spec["source"], feature_source):
                continue
            if feature_type and not_in_whitelist(spec["type"], feature_type):
                continue
            if feature in tables:
                found.append(feature)
        return found

    def lookups(self, features: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Lookup]:
        """The features whose modules nobody could tell are not called."""
        found: dict[str, Lookup] = {}
        if not nobody_follows():
            return found
        specs, tables = self._feature_map.features, self.embedding_layers._modules
        encoders = self.feature_encoders._modules
        for feature in features:
            weight, ids = fused_weight(tables[feature]), inputs[feature]
            if weight is None or specs[feature]["type"] not in ("categorical", "sequence") or not is_tensor(ids):
                continue
            if ids.dtype is not torch.int64 and ids.dtype is not torch.int32:
                ids = ids.long()
            encoder, mode = encoders.get(feature), _NONE
            if encoder is not None and ids.dim() == 2 and is_untouched(encoder, layers.MaskedSumPooling):
                encoder, mode = None, _SUM  # of pads too, whose row is zero or, without padding_idx, counts
            found[feature] = Lookup(tables[feature], weight, ids, mode, encoder)
        return found if len({lookup.weight.dtype for lookup in found.values()}) == 1 else {}

    def side_by_side(
        self, inputs: Mapping[str, Tensor], feature_source: Sequence, feature_type: Sequence, flatten_emb: bool
    ) -> Tensor | None:
        """``dict2tensor(forward(...))`` with the embeddings written to their place by the op, None if it cannot."""
        wanted = set(self.wanted(inputs, feature_source, feature_type))
        features = [f for f in self._feature_map.features if f in wanted]
        lookups = self.lookups(features, inputs)
        if not _fit(list(lookups.values()), flatten_emb):
            return None
        (out,) = run_lookups(lookups.items(), concat=True)
        D = next(iter(lookups.values())).weight.size(1)
        if len(lookups) < len(features):
            others = super().forward({f: inputs[f] for f in features if f not in lookups})
            if any(e.dim() != 2 or (not flatten_emb and e.size(1) != D) for e in others.values()):
                return None  # FuxiCTR's error
            blocks, begin = [], 0
            for is_lookup, run in groupby(features, key=lookups.__contains__):
                if not is_lookup:
                    blocks += [others[f] for f in run]
                    continue
                width = sum(lookups[f].weight.size(1) for f in run)
                blocks.append(out.narrow(1, begin, width))
                begin += width
            out = torch.cat(blocks, 1)
        return out if flatten_emb else out.view(-1, len(features), D)


def _fit(lookups: list[Lookup], flatten_emb: bool) -> bool:
    """Whether the op can write the lookups side by side, in one width unless ``flatten_emb``."""
    if not lookups:
        return False
    N, D = lookups[0].ids.size(0), lookups[0].weight.size(1)
    for _, weight, ids, mode, encoder in lookups:
        if encoder is not None or ids.size(0) != N or (mode == _NONE and ids.dim() != 1):
            return False
        if not flatten_emb and weight.size(1) != D:
            return False
    return True


def run_lookups(lookups: Iterable[tuple[str, Lookup]], concat: bool = False) -> list[Tensor]:
    """One tensor a lookup, each with its feature's name, or all side by side in one."""
    names, values = zip(*lookups)
    weights = {lookup.table: lookup.weight for lookup in values}
    place = {table: t for t, table in enumerate(weights)}
    features = Features(
        [lookup.ids for lookup in values], [], [], [place[lookup.table] for lookup in values],
        [lookup.mode for lookup in values], [-1] * len(values), frozen_rows(list(weights), list(weights.values())),
    )  # fmt: skip
    return run_op(list(weights.values()), features, join_names(names), concat=concat)


class FeatureEmbedding(layers.FeatureEmbedding):
    """All ids of a batch in one call, written where FuxiCTR stacks or concatenates them."""

    def forward(
        self,
        X: Mapping[str, Tensor],
        feature_source: Sequence = (),
        feature_type: Sequence = (),
        flatten_emb: bool = False,
    ) -> Tensor:
        tables, out = self.embedding_layer, None
        if is_plain(tables, FeatureEmbeddingDict):
            out = tables.side_by_side(X, feature_source, feature_type, flatten_emb)
        return super().forward(X, feature_source, feature_type, flatten_emb) if out is None else out
