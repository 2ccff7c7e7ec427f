"""The embedding layer: all features of a batch looked up in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankkernels import ops
from rankkernels.nn.features import is_dense, is_sequence

_POOLING = {"sum": "sum", "mean": "mean", "concat": "none"}


def _is_plain(table: nn.Module) -> bool:
    """Whether a table is looked up and trained as the op does it."""
    return type(table) is nn.Embedding and table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _pool(rows: Tensor, ids: Tensor, feature) -> Tensor:
    """What the op does after the lookup, for rows [B, L, D] that another module looked up."""
    if not is_sequence(feature) or feature.pooling == "concat":
        return rows
    keep = torch.ones_like(ids, dtype=rows.dtype) if feature.padding_idx is None else (ids != feature.padding_idx)
    keep = keep.to(rows.dtype)[..., None]
    pooled = (rows * keep).sum(1)
    return pooled if feature.pooling == "sum" else pooled / keep.sum(1).clamp(min=1)


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
    """

    def __init__(self, features: Sequence):
        super().__init__()
        self.features = features
        self.embed_dict = nn.ModuleDict()
        self.n_dense = 0
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
                self.embed_dict[feature.name] = feature.get_embedding_layer()
        for feature in features:
            if not is_dense(feature) and self._table_name(feature) not in self.embed_dict:
                raise ValueError(
                    f"EmbeddingLayer: feature {feature.name!r} shares the table of {feature.shared_with!r}, "
                    f"which is not among the features with a table: {', '.join(self.embed_dict) or 'none'}"
                )

    @staticmethod
    def _table_name(feature) -> str:
        return feature.name if feature.shared_with is None else feature.shared_with

    def lookup(self, x: Mapping[str, Tensor], features: Sequence) -> list[Tensor]:
        """One tensor a feature: [B, D] for a sparse or pooled one, [B, L, D] for ``pooling="concat"``, [B, embed_dim]
        float32 for a dense one. A feature that comes twice is looked up once.

        Raises:
            KeyError: the batch lacks a feature.
            IndexError: an id outside the feature's table.
        """
        found: dict[tuple, Tensor] = {}  # by what determines a lookup
        tables: dict[str, int] = {}
        pending, ids_of, modes, table_of, padding = [], [], [], [], []
        keys = []
        for feature in features:
            name = feature.name
            if name not in x:
                raise KeyError(f"EmbeddingLayer: feature {name!r} is missing from the batch, which has {list(x)}")
            if is_dense(feature):
                keys.append((name,))
                values = x[name].float()
                found[keys[-1]] = values if values.dim() > 1 else values.unsqueeze(1)
                continue
            table_name = self._table_name(feature)
            mode = _POOLING[feature.pooling] if is_sequence(feature) else "none"
            key = name, table_name, mode, feature.padding_idx if mode in ("sum", "mean") else None
            keys.append(key)
            if key in found or key in pending:
                continue
            ids = x[name] if x[name].dtype in (torch.int64, torch.int32) else x[name].long()
            if is_sequence(feature) and ids.dim() != 2:
                raise ValueError(
                    f"EmbeddingLayer: sequence feature {name!r} must be [B, L] ids, got shape {list(ids.shape)}"
                )
            table = self.embed_dict[table_name]
            if not _is_plain(table):
                found[key] = _pool(table(ids), ids, feature)
                continue
            pending.append(key)
            ids_of.append(ids)
            modes.append(mode)
            table_of.append(tables.setdefault(table_name, len(tables)))
            padding.append(key[-1])
        if pending:
            embeddings = ops.table_batched_embedding_bag(
                [self.embed_dict[t].weight for t in tables],
                ids_of,
                modes=modes,
                tables=table_of,
                padding_idx=padding,
                frozen_rows=[self.embed_dict[t].padding_idx for t in tables],
                names=[key[0] for key in pending],
            )
            found.update(zip(pending, embeddings))
        return [found[key] for key in keys]

    def forward(self, x: Mapping[str, Tensor], features: Sequence, squeeze_dim: bool = False) -> Tensor:
        """Embeddings of ``features`` from the batch ``x``, {name: ids or values}.

        Args:
            x: ids [B] for sparse features, [B, L] for sequences, numbers [B] or [B, n] for dense ones.
            features: which to look up, in the order of the result.
            squeeze_dim: flatten to [B, sum of the widths], dense values last; the widths may differ. Without it
                the result is [B, F, D] ([B, F, L, D] for sequences with ``pooling="concat"``), and dense features
                beside others are dropped.

        Raises:
            KeyError, IndexError: see ``lookup``.
            ValueError: nothing to return, or features of different shape without ``squeeze_dim``.
        """
        return arrange(features, self.lookup(x, features), squeeze_dim)


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
