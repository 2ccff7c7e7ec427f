"""DeepFM and DIN on TorchRec's embeddings: tables sharded over processes by TorchRec, the rest by our kernels.

``import rankkernels.torchrec`` needs TorchRec and FBGEMM, which go with one torch each: with torch 2.13 torchrec 1.8.0
and fbgemm-gpu 1.8.0 (``pip install rankkernels[torchrec]``), on a machine without a GPU fbgemm-gpu-cpu in its place.

TorchRec's own ``torchrec.models.deepfm`` is not the paper's: its ``FactorizationMachine`` takes all F D values of a
sample as one vector and adds up the products of all pairs of values, across columns and within a field. FM adds up the
inner products of pairs of fields, each column with itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from rankkernels.models import DIN, DeepFM
from rankkernels.nn.attention import ActivationUnit
from rankkernels.nn.features import is_dense, is_sequence
from rankkernels.nn.layers import FM, LR, MLP
from rankkernels.nn.lookup_plan import table_name

__all__ = [
    "DINArch", "DeepFMArch", "batch_of", "collection_of", "dense_state_dict", "keyed_jagged_of", "load_collection",
]  # fmt: skip


def _side_by_side(embeddings: KeyedTensor, keys: Sequence[str]) -> Tensor:
    """The embeddings of ``keys`` [B, sum of their widths]; where they are all there is in this order, as they lie."""
    if list(embeddings.keys()) == list(keys):
        return embeddings.values()
    return torch.cat([embeddings[key] for key in keys], 1)


class DeepFMArch(nn.Module):
    """All of ``DeepFM`` but its tables, on what an ``EmbeddingBagCollection`` returns.

    Its parameters have DeepFM's names: ``dense_state_dict`` takes them from a model.

    Args:
        keys: names of the features, in the order of the linear layer and the MLP.
        dim: their width.
        mlp_params: arguments of ``MLP``.
        dense_dim: columns of the dense features, behind the embeddings.
    """

    def __init__(self, keys: Sequence[str], dim: int, mlp_params: Mapping, dense_dim: int = 0):
        super().__init__()
        self.keys, self.dim, self.dense_dim = list(keys), dim, dense_dim
        self.linear = LR(len(self.keys) * dim)
        self.fm = FM(reduce_sum=True)
        self.mlp = MLP(len(self.keys) * dim + dense_dim, **mlp_params)

    def forward(self, embeddings: KeyedTensor, dense: Tensor | None = None) -> Tensor:
        """Pooled embeddings, [B, F D] in all, and dense features [B, dense_dim] -> click probabilities [B].

        Raises:
            ValueError: no dense features where there should be some, or the other way round.
        """
        _check_dense("DeepFMArch", dense, self.dense_dim)
        x = _side_by_side(embeddings, self.keys)
        deep = x if dense is None else torch.cat([x, dense.to(x.dtype)], 1)
        y = self.linear(x) + self.fm(x.view(-1, len(self.keys), self.dim)) + self.mlp(deep)
        return torch.sigmoid(y.squeeze(1))


class DINArch(nn.Module):
    """All of ``DIN`` with ``mask_padding=True`` but its tables, on what an ``EmbeddingCollection`` returns: histories
    go to the attention as they are, values and offsets, without padding.

    Its parameters have DIN's names: ``dense_state_dict`` takes them from a model.

    Args:
        dim: the width of all embeddings.
        history_keys, target_keys: names of the features; the i-th history attends with the i-th target.
        mlp_params, attention_mlp_params: arguments of ``MLP`` and of ``ActivationUnit``.
        keys: names of the other features, pooled ones of an ``EmbeddingBagCollection``.
        dense_dim: columns of the dense features.
    """

    def __init__(
        self,
        dim: int,
        history_keys: Sequence[str],
        target_keys: Sequence[str],
        mlp_params: Mapping,
        attention_mlp_params: Mapping,
        keys: Sequence[str] = (),
        dense_dim: int = 0,
    ):
        super().__init__()
        if not 0 < len(history_keys) <= len(target_keys):
            raise ValueError(
                f"DINArch: each history needs its target, got {len(history_keys)} histories and {len(target_keys)} "
                "targets"
            )
        self.history_keys, self.target_keys, self.keys = list(history_keys), list(target_keys), list(keys)
        self.dense_dim = dense_dim
        width = (len(self.history_keys) + len(self.target_keys) + len(self.keys)) * dim + dense_dim
        self.attention_layers = nn.ModuleList(ActivationUnit(dim, **attention_mlp_params) for _ in history_keys)
        self.mlp = MLP(width, **{"activation": "dice", **mlp_params})

    def forward(
        self, sequences: Mapping[str, JaggedTensor], embeddings: KeyedTensor | None = None, dense: Tensor | None = None
    ) -> Tensor:
        """Histories and targets, one row a sample; the other features' embeddings and dense features, where there are
        any -> click probabilities [B].

        Raises:
            ValueError: dense features or embeddings are missing, or unexpected.
        """
        _check_dense("DINArch", dense, self.dense_dim)
        if (embeddings is None) != (not self.keys):
            raise ValueError(f"DINArch: embeddings must be of {', '.join(self.keys) or 'no features'}")
        targets = [sequences[key].values() for key in self.target_keys]
        pooled = [
            attention(sequences[key].values(), target, offsets=sequences[key].offsets())
            for attention, key, target in zip(self.attention_layers, self.history_keys, targets)
        ]
        others = [_side_by_side(embeddings, self.keys)] if self.keys else []
        dense = [] if dense is None else [dense.to(targets[0].dtype)]
        return torch.sigmoid(self.mlp(torch.cat([*pooled, *targets, *others, *dense], 1)).squeeze(1))


def _check_dense(arch: str, dense: Tensor | None, width: int) -> None:
    if (0 if dense is None else dense.size(1)) != width:
        given = "none" if dense is None else f"shape {list(dense.shape)}"
        raise ValueError(f"{arch}: dense features must be [B, {width}], got {given}")


def dense_state_dict(model: DeepFM | DIN) -> dict[str, Tensor]:
    """What ``DeepFMArch`` and ``DINArch`` load, and give back: a model's parameters and buffers without its tables.

    Back: ``model.load_state_dict(arch.state_dict(), strict=False)``, and ``load_collection``.
    """
    return {name: value for name, value in model.state_dict().items() if not name.startswith("embedding.")}


def _tables_of(model: nn.Module, features: Sequence) -> dict[str, list]:
    """The features of each table, which ``features`` look up."""
    tables: dict[str, list] = {}
    for feature in features:
        if not is_dense(feature) and feature.name not in [f.name for f in tables.get(table_name(feature), ())]:
            tables.setdefault(table_name(feature), []).append(feature)
    return tables


def collection_of(model: DeepFM | DIN, features: Sequence, pooled: bool, device: torch.device | str | None = None):
    """TorchRec's tables for ``features`` of a model, with its weights.

    Args:
        pooled: an ``EmbeddingBagCollection``, as ``DeepFMArch`` and the other features of ``DINArch`` need, or an
            ``EmbeddingCollection`` for histories and targets.
        device: of the tables; "meta" for a model that ``DistributedModelParallel`` shards, which has the weights then
            from its own ``load_state_dict``.

    Raises:
        ValueError: sequences of one table are pooled in different ways: a table has one pooling there.
    """
    pooling_of = {"mean": PoolingType.MEAN, "sum": PoolingType.SUM, None: None}
    configs = []
    for table, of_table in _tables_of(model, features).items():
        weight = model.embedding.embed_dict[table].weight
        common = {
            "name": table, "num_embeddings": weight.size(0), "embedding_dim": weight.size(1),
            "feature_names": [f.name for f in of_table],
        }  # fmt: skip
        if pooled:
            poolings = {f.pooling for f in of_table if is_sequence(f)} or {None}
            if len(poolings) > 1 or not poolings <= pooling_of.keys():
                raise ValueError(f"collection_of: table {table!r} cannot be pooled as {', '.join(map(str, poolings))}")
            configs.append(EmbeddingBagConfig(**common, pooling=pooling_of[poolings.pop()] or PoolingType.SUM))
        else:
            configs.append(EmbeddingConfig(**common))
    made = (EmbeddingBagCollection if pooled else EmbeddingCollection)(tables=configs, device=device)
    if device is None or torch.device(device).type != "meta":
        with torch.no_grad():
            for table, module in _modules(made).items():
                module.weight.copy_(model.embedding.embed_dict[table].weight)
    return made


def _modules(collection: EmbeddingBagCollection | EmbeddingCollection) -> nn.ModuleDict:
    return collection.embedding_bags if isinstance(collection, EmbeddingBagCollection) else collection.embeddings


@torch.no_grad()
def load_collection(model: DeepFM | DIN, collection: EmbeddingBagCollection | EmbeddingCollection) -> None:
    """Copies the tables of an unsharded collection into those of the same name in ``model``."""
    for table, module in _modules(collection).items():
        model.embedding.embed_dict[table].weight.copy_(module.weight)


def keyed_jagged_of(x: Mapping[str, Tensor], features: Sequence) -> KeyedJaggedTensor:
    """A batch as TorchRec takes it: of sparse features one id a sample, of sequences those that are no padding.

    Args:
        x: ids [B] of sparse features, [B, L] of sequences.
        features: which of them; dense ones are left out.
    """
    ids_of, lengths_of = {}, {}
    for feature in features:
        if is_dense(feature) or feature.name in ids_of:
            continue
        ids = x[feature.name].long()
        ids = ids if is_sequence(feature) else ids.view(-1, 1)
        valid = ids != (-1 if feature.padding_idx is None else feature.padding_idx)
        if not is_sequence(feature):
            valid = torch.ones_like(valid)
        ids_of[feature.name], lengths_of[feature.name] = ids[valid], valid.sum(1, dtype=torch.int32)
    return KeyedJaggedTensor.from_lengths_sync(
        list(ids_of), torch.cat(list(ids_of.values())), torch.cat(list(lengths_of.values()))
    )


def batch_of(
    jagged: KeyedJaggedTensor, features: Sequence, dense: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A batch as ``DeepFM`` and ``DIN`` take it: sequences padded at the end to the longest of the batch.

    Args:
        jagged: the ids of the features, at least.
        features: those of the model, sparse and sequences; dense ones are in ``dense``.

    Raises:
        ValueError: a sparse feature has not one id a sample, or a history no ``padding_idx`` to be padded with.
    """
    found, x = jagged.to_dict(), dict(dense or {})
    for feature in features:
        if is_dense(feature):
            continue
        of_feature, padding = found[feature.name], feature.padding_idx
        ids, B = of_feature.values(), of_feature.lengths().numel()
        if is_sequence(feature):
            if padding is None and feature.pooling == "concat":
                raise ValueError(f"batch_of: history {feature.name!r} has no padding_idx to be padded with")
            length = max(1, int(of_feature.lengths().max())) if B else 1
            ids = of_feature.to_padded_dense(length, -1 if padding is None else padding).to(ids.dtype)
        elif ids.numel() != B or bool((of_feature.lengths() != 1).any()):
            raise ValueError(f"batch_of: sparse feature {feature.name!r} must have one id a sample")
        x[feature.name] = ids
    return x
