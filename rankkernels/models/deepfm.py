"""DeepFM, with torch-rechub's arguments, parameter names and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rankkernels.models._lists import check_lists, check_pooled, look_up, look_up_arranged
from rankkernels.nn._transparency import are_plain, is_plain
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.features import is_dense
from rankkernels.nn.layers import FM, LR, MLP, run_layers
from rankkernels.nn.lookup_plan import arrange
from rankkernels.nn.shared_users import check_batch, check_user_features, copied, first_layer, fm_and_linear
from rankkernels.ops import deepfm
from rankkernels.ops._features import LookupBatch
from rankkernels.ops._tracing import is_tensor
from rankkernels.ops.embedding_fm import run_batch as lookup_fm


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
        check_lists("DeepFM", deep_features=deep_features, fm_features=fm_features)
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
            check_pooled("DeepFM", feature)
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
        lists = self.deep_features, self.fm_features
        return self._of_inputs(*look_up_arranged(self.embedding, x, lists, (True, False)))

    def _of_inputs(self, input_deep: Tensor, input_fm: Tensor) -> Tensor:
        """The logits [B, 1], layer by layer, of the MLP's input [B, deep_dims] and the fields [B, F, D]."""
        return self.linear(input_fm.flatten(1)) + self.fm(input_fm) + self.mlp(input_deep)

    def _by_user(self, x: Mapping[str, Tensor], user_index: Tensor) -> Tensor:
        """The logits [B, 1] of samples that share users."""
        users, lists = set(self.user_features), (self.deep_features, self.fm_features)
        if not users:
            raise ValueError("DeepFM: user_index needs user_features, which are a user's, got none")
        check_batch("DeepFM", x, [*self.deep_features, *self.fm_features], users, user_index)
        deep, fm = look_up(self.embedding, x, lists, users)
        layers = list(self.mlp.mlp._modules.values()) if is_plain(self.mlp, MLP) else []
        if not (
            self._is_served() and layers and is_plain(self.mlp.mlp, nn.Sequential) and is_plain(layers[0], nn.Linear)
        ):
            deep, fm = (copied(features, e, users, user_index) for features, e in zip(lists, (deep, fm)))
            return self._of_inputs(arrange(self.deep_features, deep, True), arrange(self.fm_features, fm, False))
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
