"""DeepFM and DIN, with torch-rechub's arguments, parameter names and numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from rankkernels.nn._transparency import are_plain, is_plain
from rankkernels.nn.attention import ActivationUnit
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.features import check_features, is_dense, is_sequence
from rankkernels.nn.layers import FM, LR, MLP, run_layers
from rankkernels.nn.lookup_plan import arrange
from rankkernels.nn.shared_users import check_batch, check_user_features, copied, first_layer, fm_and_linear
from rankkernels.ops import deepfm
from rankkernels.ops._features import LookupBatch
from rankkernels.ops._tracing import is_tensor
from rankkernels.ops.embedding_fm import run_batch as lookup_fm


def _check_lists(model: str, **lists: Sequence) -> None:
    for name, features in lists.items():
        if not features:
            raise ValueError(f"{model}: {name} must not be empty")
        check_features(model, features)


class DeepFM(nn.Module):
    """Guo et al., "DeepFM" (2017): linear + FM + MLP, then a sigmoid. torch-rechub's ``DeepFM``.

    Args:
        deep_features: sparse, sequence and dense features of the MLP; their widths may differ.
        fm_features: sparse and pooled sequence features of the linear and the FM part, of one width. Features in both
            lists are looked up once.
        mlp_params: arguments of ``MLP``: dims, activation, dropout, output_layer.
        user_features: names of the features that are a user's: see ``forward``.

    Raises:
        TypeError: what is no feature in a list of features.
        ValueError: an empty list, a dense feature among ``fm_features``, widths that differ there, a user feature that
            is in neither list.
    """

    user_features: Sequence[str] = ()

    def __init__(
        self, deep_features: Sequence, fm_features: Sequence, mlp_params: Mapping, user_features: Sequence = ()
    ):
        super().__init__()
        _check_lists("DeepFM", deep_features=deep_features, fm_features=fm_features)
        for feature in fm_features:
            if is_dense(feature):
                raise ValueError(
                    f"DeepFM: fm_features must have embeddings, {feature.name!r} is a dense feature: "
                    "give it in deep_features only"
                )
            if feature.embed_dim != fm_features[0].embed_dim:
                raise ValueError(
                    f"DeepFM: fm_features must have one embed_dim, {fm_features[0].name!r} has "
                    f"{fm_features[0].embed_dim} and {feature.name!r} has {feature.embed_dim}"
                )
        for feature in [*deep_features, *fm_features]:
            _pooled("DeepFM", feature)
        self.user_features = check_user_features("DeepFM", user_features, [*deep_features, *fm_features])
        self.deep_features = deep_features
        self.fm_features = fm_features
        self.deep_dims = sum(f.embed_dim for f in deep_features)
        self.fm_dims = sum(f.embed_dim for f in fm_features)
        self.linear = LR(self.fm_dims)
        self.fm = FM(reduce_sum=True)
        self.embedding = EmbeddingLayer([*deep_features, *fm_features])
        self.mlp = MLP(self.deep_dims, **mlp_params)

    def forward(self, x: Mapping[str, Tensor], user_index: Tensor | None = None) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B].

        With ``user_index`` [B], int32 or int64 in any order, ``user_features`` have a row for each of U users, and
        sample b is of user ``user_index[b]``: their lookups, their FM sums, their linear term and their part of the
        MLP's first layer are computed once a user.
        """
        if user_index is not None:
            return torch.sigmoid(self._by_user(x, user_index).squeeze(1))
        weight, batch = None, None
        if is_plain(self.embedding, EmbeddingLayer) and self._is_served():
            weight, bias = self.linear.fc.weight, self.linear.fc.bias
            batch = self.embedding.gather(x, self.deep_features, self.fm_features, weight.dtype)
        if batch is None:
            y = self._by_layers(x)
        elif (layers := self._inference_layers(batch, weight)) is not None:
            y = deepfm.run_batch(batch, weight, layers) + bias
        else:
            input_deep, fm, linear = lookup_fm(batch, weight)
            y = linear + bias + fm + self.mlp(input_deep)
        return torch.sigmoid(y.squeeze(1))

    def _by_layers(self, x: Mapping[str, Tensor]) -> Tensor:
        """The logits [B, 1], layer by layer; the embedding layer is called where its call may be seen."""
        if is_plain(self.embedding, EmbeddingLayer):
            embeddings = self.embedding.lookup(x, [*self.deep_features, *self.fm_features])
            n = len(self.deep_features)
            return self._of_embeddings(embeddings[:n], embeddings[n:])
        input_deep = self.embedding(x, self.deep_features, squeeze_dim=True)
        input_fm = self.embedding(x, self.fm_features, squeeze_dim=False)
        return self.linear(input_fm.flatten(1)) + self.fm(input_fm) + self.mlp(input_deep)

    def _of_embeddings(self, deep: Sequence[Tensor], fm: Sequence[Tensor]) -> Tensor:
        """The logits [B, 1], layer by layer, of the embeddings of both lists of features."""
        input_deep = arrange(self.deep_features, deep, squeeze_dim=True)
        input_fm = arrange(self.fm_features, fm, squeeze_dim=False)
        return self.linear(input_fm.flatten(1)) + self.fm(input_fm) + self.mlp(input_deep)

    def _by_user(self, x: Mapping[str, Tensor], user_index: Tensor) -> Tensor:
        """The logits [B, 1] of samples that share users."""
        users, features, n = set(self.user_features), [*self.deep_features, *self.fm_features], len(self.deep_features)
        if not users:
            raise ValueError("DeepFM: user_index needs user_features, which are a user's, got none")
        check_batch("DeepFM", x, features, users, user_index)
        if is_plain(self.embedding, EmbeddingLayer):
            embeddings = self.embedding.lookup(x, features, one_batch=False)
        else:
            lists = self.deep_features, self.fm_features
            embeddings = [e for features in lists for e in _called(self.embedding, x, features, users)]
        deep, fm = embeddings[:n], embeddings[n:]
        layers = list(self.mlp.mlp._modules.values()) if is_plain(self.mlp, MLP) else []
        if not (
            self._is_served() and layers and is_plain(self.mlp.mlp, nn.Sequential) and is_plain(layers[0], nn.Linear)
        ):
            deep, fm = (
                copied(f, e, users, user_index) for f, e in ((self.deep_features, deep), (self.fm_features, fm))
            )
            return self._of_embeddings(deep, fm)
        y = fm_and_linear(self.fm_features, fm, self.linear.fc.weight, users, user_index) + self.linear.fc.bias
        hidden = first_layer(self.deep_features, deep, layers[0], users, user_index)
        return y + run_layers(layers[1:], hidden)

    def _is_served(self) -> bool:
        """Whether the linear and the FM part are what ``embedding_fm`` does, and nobody could tell."""
        return (
            are_plain((self.fm, self.linear), (FM, LR))
            and self.fm.reduce_sum
            and not self.linear.sigmoid
            and is_plain(self.linear.fc, nn.Linear)
            and is_tensor(self.linear.fc.weight)
            and is_tensor(self.linear.fc.bias)
        )

    def _inference_layers(self, batch: LookupBatch, linear_weight: Tensor) -> list[Tensor] | None:
        """The MLP's weights and biases, if the batch is evaluated faster in one pass than layer by layer."""
        if self.training or not deepfm.has_kernel_for(batch) or not is_plain(self.mlp, MLP):
            return None
        first = next(iter(self.mlp.mlp), None)
        if type(first) is not nn.Linear or not deepfm.is_faster(batch, first.weight):
            return None
        layers = self.mlp.relu_layers()
        layers = None if layers is None else list(layers)
        return layers if layers is not None and deepfm.is_served(batch, linear_weight, layers) else None


class DIN(nn.Module):
    """Zhou et al., "Deep Interest Network" (2018): attention over histories, then an MLP. torch-rechub's ``DIN``.

    Args:
        features: the user's and the context's features; dense ones are welcome. May be empty.
        history_features: sequences of ids with ``pooling="concat"``; the i-th attends with the i-th target.
        target_features: at least as many sparse features, each of its history's width.
        mlp_params: arguments of the last ``MLP``; the activation is dice unless given.
        attention_mlp_params: arguments of ``ActivationUnit``: dims, activation, use_softmax, dropout.
        mask_padding: leave padded history positions (the feature's ``padding_idx``) out of the attention. torch-rechub
            does not: there pads count in the softmax and in the batch statistics.
        user_features: names of those of ``features`` that are a user's, as all histories are: see ``forward``.

    Raises:
        TypeError: what is no feature in a list of features.
        ValueError: empty history or target features, a history that is no concat sequence or lacks its target, widths
            that differ, ``mask_padding`` of a history without ``padding_idx``, a user feature that is not in
            ``features``.
    """

    mask_padding = False
    user_features: Sequence[str] = ()

    def __init__(
        self,
        features: Sequence,
        history_features: Sequence,
        target_features: Sequence,
        mlp_params: Mapping,
        attention_mlp_params: Mapping,
        mask_padding: bool = False,
        user_features: Sequence = (),
    ):
        super().__init__()
        _check_lists("DIN", history_features=history_features, target_features=target_features)
        check_features("DIN", features)
        if len(target_features) < len(history_features):
            raise ValueError(
                f"DIN: each history feature needs its target: {len(history_features)} history_features, "
                f"{len(target_features)} target_features"
            )
        for feature in features:
            _pooled("DIN", feature)
        for feature in target_features:
            if is_dense(feature) or is_sequence(feature):
                raise ValueError(f"DIN: target feature {feature.name!r} must be a sparse feature, got {feature!r}")
        for history, target in zip(history_features, target_features):
            if getattr(history, "pooling", None) != "concat":
                raise ValueError(
                    f"DIN: history feature {history.name!r} must be a sequence feature with pooling='concat', "
                    f"got {history!r} with pooling {getattr(history, 'pooling', None)!r}"
                )
            if history.embed_dim != target.embed_dim:
                raise ValueError(
                    f"DIN: history feature {history.name!r} and its target {target.name!r} must have one embed_dim, "
                    f"got {history.embed_dim} and {target.embed_dim}"
                )
        if mask_padding:
            for history in history_features:
                _padding_idx(history)
        self.user_features = check_user_features("DIN", user_features, features)
        self.features = features
        self.history_features = history_features
        self.target_features = target_features
        self.mask_padding = mask_padding
        self.num_history_features = len(history_features)
        everything = [*features, *history_features, *target_features]
        self.all_dims = sum(f.embed_dim for f in everything)
        self.embedding = EmbeddingLayer(everything)
        self.attention_layers = nn.ModuleList(
            [ActivationUnit(f.embed_dim, **attention_mlp_params) for f in history_features]
        )
        self.mlp = MLP(self.all_dims, **{"activation": "dice", **mlp_params})

    def forward(self, x: Mapping[str, Tensor], user_index: Tensor | None = None) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B].

        With ``user_index`` [B], int32 or int64 in any order, histories and ``user_features`` have a row for each of U
        users, and sample b is of user ``user_index[b]``. They are looked up once a user, and histories are never
        copied (``history_index`` of ``rankkernels.din_attention``).
        """
        lists = self.features, self.history_features, self.target_features
        users = set()
        if user_index is not None:
            users = {*self.user_features, *(f.name for f in self.history_features)}
            check_batch("DIN", x, list(chain(*lists)), users, user_index)
        if is_plain(self.embedding, EmbeddingLayer):
            embeddings = self.embedding.lookup(x, list(chain(*lists)), one_batch=user_index is None)
        else:
            embeddings = [e for features in lists for e in _called(self.embedding, x, features, users)]
        embeddings = iter(embeddings)
        others, histories, targets = ([next(embeddings) for _ in features] for features in lists)
        shared = {}
        if user_index is not None:
            others, shared = copied(self.features, others, users, user_index), {"history_index": user_index}
        pooled = []
        for attention, feature, history, target in zip(
            self.attention_layers, self.history_features, histories, targets
        ):
            mask = {"mask": x[feature.name] != _padding_idx(feature)} if self.mask_padding else {}
            pooled.append(attention(history, target, **mask, **shared))
        mlp_in = [*pooled, *targets]
        if self.features:
            mlp_in.append(arrange(self.features, others, squeeze_dim=True))
        y = self.mlp(torch.cat(mlp_in, dim=1))
        return torch.sigmoid(y.squeeze(1))


def _padding_idx(history) -> int:
    if history.padding_idx is None:
        raise ValueError(f"DIN: mask_padding needs the padding_idx of history feature {history.name!r}, which has none")
    return history.padding_idx


def _called(
    embedding: nn.Module, x: Mapping[str, Tensor], features: Sequence, users: Collection[str] = ()
) -> list[Tensor]:
    """One tensor a feature by calling ``embedding``: once, as torch-rechub does, or once each where their shapes
    differ."""
    shapes = [
        (is_dense(f), f.embed_dim, _length(x, f), f.name in users) for f in features
    ]  # while exporting no set can have them
    if all(shape == shapes[0] for shape in shapes[1:]) and features and not is_dense(features[0]):
        return list(embedding(x, features).unbind(1))
    return [embedding(x, [f], squeeze_dim=True) if is_dense(f) else embedding(x, [f]).squeeze(1) for f in features]


def _length(x: Mapping[str, Tensor], feature) -> int:
    """Of a sequence that is not pooled, L; 0 of other features."""
    return x[feature.name].shape[1] if is_sequence(feature) and feature.pooling == "concat" else 0


def _pooled(model: str, feature) -> None:
    if is_sequence(feature) and feature.pooling == "concat":
        raise ValueError(
            f"{model}: feature {feature.name!r} has pooling='concat', a tensor [B, L, D] that no MLP can take: "
            "pool it with 'mean' or 'sum'"
        )
