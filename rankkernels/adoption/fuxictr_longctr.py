"""The DIN of FuxiCTR's model zoo for long histories, which is installed with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from model_zoo.LongCTR.DIN.DIN import DIN as _DIN
from torch import Tensor

from rankkernels.adoption.fuxictr_embedding import FeatureEmbedding, FeatureEmbeddingDict, run_lookups
from rankkernels.nn._transparency import are_plain
from rankkernels.ops._tracing import is_tensor


class DIN(_DIN):
    """History and target looked up apart, in the one call that looks up everything: theirs are slices of one tensor,
    and the gradient of a slice is as large as what it was cut from."""

    def forward(self, inputs: tuple[Mapping[str, Tensor], dict[str, Tensor], Tensor]) -> dict[str, Tensor]:
        batch, items, mask = self.get_inputs(inputs)
        embeddings = self._look_up(batch, items, mask)
        if embeddings is None:
            return super().forward(inputs)
        *context, history, target = embeddings
        pooled = self.attention_layers(target, history, mask)
        return {"y_pred": self.dnn(torch.cat([*context, target, pooled], dim=-1))}

    def _look_up(self, batch: Mapping[str, Tensor], items: Mapping[str, Tensor], mask: Tensor) -> list[Tensor] | None:
        """The embeddings of the batch's features, [B, D] each, of the history [B, L, D] and of the target [B, D]; None
        where they are not all lookups of ids, or a module's call may be seen."""
        layer = self.embedding_layer
        if not are_plain((layer, layer.embedding_layer), (FeatureEmbedding, FeatureEmbeddingDict)):
            return None
        tables, order, B = layer.embedding_layer, list(self.feature_map.features), mask.shape[0]
        context, item = (sorted(tables.wanted(inputs, (), ()), key=order.index) for inputs in (batch, items))
        if not B or not all(is_tensor(items[f]) and items[f].dim() == 1 and items[f].size(0) % B == 0 for f in item):
            return None
        ids = {f: items[f].view(B, -1) for f in item}
        lookups = [
            *tables.lookups(context, batch).items(),
            *tables.lookups(item, {f: ids[f][:, :-1] for f in item}).items(),
            *tables.lookups(item, {f: ids[f][:, -1] for f in item}).items(),
        ]
        n, m = len(context), len(item)
        if len(lookups) != n + 2 * m or any(lookup.encoder is not None for _, lookup in lookups):
            return None
        if sum(lookup.weight.size(1) for _, lookup in lookups[n + m :]) != self.item_info_dim:
            return None
        found = run_lookups(lookups)
        if any(embedding.dim() != 2 for embedding in found[:n]):
            return None
        history, target = (e[0] if m == 1 else torch.cat(e, -1) for e in (found[n : n + m], found[n + m :]))
        return [*found[:n], history, target]
