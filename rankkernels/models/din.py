"""DIN, with torch-rechub's arguments, parameter names and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from rankkernels.models._lists import check_histories, check_lists, check_pooled, look_up
from rankkernels.nn.attention import ActivationUnit
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.features import check_features
from rankkernels.nn.layers import MLP
from rankkernels.nn.lookup_plan import arrange
from rankkernels.nn.shared_users import check_batch, check_user_features, copied


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
        check_lists("DIN", history_features=history_features, target_features=target_features)
        check_features("DIN", features)
        if len(target_features) < len(history_features):
            raise ValueError(
                f"DIN: each history feature needs its target: {len(history_features)} history_features, "
                f"{len(target_features)} target_features"
            )
        for feature in features:
            check_pooled("DIN", feature)
        check_histories("DIN", history_features, target_features)
        for history, target in zip(history_features, target_features):
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
        others, histories, targets = look_up(self.embedding, x, lists, users)
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
