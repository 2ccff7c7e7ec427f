"""BST, with torch-rechub's arguments, parameter names and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankkernels.models._lists import check_histories, check_lists, check_pooled, look_up_beside
from rankkernels.nn._transparency import is_plain
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.features import check_features
from rankkernels.nn.layers import MLP
from rankkernels.nn.target_attention import is_last_position_enough, last_position


class BST(nn.Module):
    """Chen et al., "Behavior Sequence Transformer" (2019): a transformer over history and target, of which an MLP takes
    the target's position. torch-rechub's ``BST``.

    The last layer computes the target's position alone: nobody reads the others. In evaluation, and in training without
    ``dropout``, the numbers are torch-rechub's; with it fewer random numbers are drawn in training, those of one
    position, and so others.

    Args:
        features: the user's and the context's features; dense ones are welcome. May be empty.
        history_features: sequences of ids with ``pooling="concat"``. Together they are one item a position.
        target_features: sparse features; their widths sum up to those of the histories.
        mlp_params: arguments of the last ``MLP``.
        nhead, dropout, num_layers: of the transformer.
        max_seq_len: positions at most, the target's included.

    Raises:
        TypeError: what is no feature in a list of features.
        ValueError: empty history or target features, a history that is no concat sequence, widths whose sums differ or
            are no multiple of ``nhead``; in ``forward`` more positions than ``max_seq_len``.
    """

    def __init__(
        self,
        features: Sequence,
        history_features: Sequence,
        target_features: Sequence,
        mlp_params: Mapping,
        nhead: int = 8,
        dropout: float = 0.2,
        num_layers: int = 1,
        max_seq_len: int = 51,
    ):
        super().__init__()
        check_lists("BST", history_features=history_features, target_features=target_features)
        check_features("BST", features)
        for feature in features:
            check_pooled("BST", feature)
        check_histories("BST", history_features, target_features)
        self.features = features
        self.history_features = history_features
        self.target_features = target_features
        self.max_seq_len = max_seq_len
        self.item_dim = sum(f.embed_dim for f in history_features)
        target_dim = sum(f.embed_dim for f in target_features)
        if self.item_dim != target_dim:
            raise ValueError(
                f"BST: the widths of history_features and of target_features must have one sum, got {self.item_dim} "
                f"and {target_dim}"
            )
        if self.item_dim % nhead:
            raise ValueError(f"BST: the histories' width {self.item_dim} must be a multiple of nhead = {nhead}")
        self.all_dims = sum(f.embed_dim for f in [*features, *target_features]) + self.item_dim
        self.embedding = EmbeddingLayer([*features, *history_features, *target_features])
        self.pos_embedding = nn.Embedding(max_seq_len, self.item_dim)
        layer = nn.TransformerEncoderLayer(
            self.item_dim, nhead, dropout=dropout, activation=nn.LeakyReLU(), batch_first=True
        )
        self.transformer_layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.mlp = MLP(self.all_dims, **mlp_params)

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B]."""
        lists = self.history_features, self.target_features
        context, (histories, targets) = look_up_beside(self.embedding, x, self.features, lists)
        target = torch.cat(targets, dim=-1)
        sequence = torch.cat([torch.cat(histories, dim=-1), target[:, None]], dim=1)
        L = sequence.shape[1]
        if L > self.max_seq_len:
            raise ValueError(f"BST: the positions, with the target's, must be {self.max_seq_len} at most, got {L}")
        sequence = sequence + self.pos_embedding(torch.arange(L, device=sequence.device)[None])
        mlp_in = [self._interest(sequence, self._valid(x)), target, *context]
        return torch.sigmoid(self.mlp(torch.cat(mlp_in, dim=1)).squeeze(1))

    def _valid(self, x: Mapping[str, Tensor]) -> Tensor:
        """[B, L], false at positions whose histories all are padding; the target's never is."""
        valid = None
        for feature in self.history_features:
            of_feature = x[feature.name].long() != (0 if feature.padding_idx is None else feature.padding_idx)
            valid = of_feature if valid is None else valid | of_feature
        return nn.functional.pad(valid, (0, 1), value=True)

    def _interest(self, sequence: Tensor, valid: Tensor) -> Tensor:
        """What the transformer gives at the last position of sequence [B, L, D], [B, D]."""
        encoder = self.transformer_layers
        if not (is_plain(encoder, nn.TransformerEncoder) and is_plain(encoder.layers, nn.ModuleList)):
            return encoder(sequence, src_key_padding_mask=~valid)[:, -1]
        *layers, last = encoder.layers
        if encoder.norm is not None or not is_last_position_enough(last):
            return encoder(sequence, src_key_padding_mask=~valid)[:, -1]
        for layer in layers:
            sequence = layer(sequence, src_key_padding_mask=~valid)
        return last_position(last, sequence, valid)
