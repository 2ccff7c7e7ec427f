"""DIEN, with torch-rechub's arguments, parameter names and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankkernels.models._lists import check_histories, check_lists, check_pooled, look_up_beside
from rankkernels.nn._transparency import is_plain
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.nn.features import check_features
from rankkernels.nn.layers import MLP
from rankkernels.nn.recurrent import AUGRU, run_gru
from rankkernels.ops._tracing import has_nothing


class DIEN(nn.Module):
    """Zhou et al., "Deep Interest Evolution Network" (2019): a GRU over each history, an AUGRU over its states, which
    attend to the target, then an MLP. torch-rechub's ``DIEN``.

    Both recurrences are one op each (``rankkernels.augru``), over as many positions as a sample has.

    Args:
        features: the user's and the context's features; dense ones are welcome. May be empty.
        history_features: sequences of ids with ``pooling="concat"``; the i-th evolves towards the i-th target.
        neg_history_features: as many, of what was not chosen: for the auxiliary loss.
        target_features: at least as many sparse features, each of its history's width.
        mlp_params: arguments of the last ``MLP``; the activation is dice unless given.
        alpha: weight of the auxiliary loss.

    Raises:
        TypeError: what is no feature in a list of features.
        ValueError: an empty list but ``features``, a history that is no concat sequence, lists of unequal length,
            widths that differ.
    """

    def __init__(
        self,
        features: Sequence,
        history_features: Sequence,
        neg_history_features: Sequence,
        target_features: Sequence,
        mlp_params: Mapping,
        alpha: float = 0.2,
    ):
        super().__init__()
        lists = {"history_features": history_features, "neg_history_features": neg_history_features}
        check_lists("DIEN", **lists, target_features=target_features)
        check_features("DIEN", features)
        for feature in features:
            check_pooled("DIEN", feature)
        check_histories("DIEN", [*history_features, *neg_history_features], target_features)
        if not len(history_features) == len(neg_history_features) <= len(target_features):
            raise ValueError(
                f"DIEN: each history feature needs its negative and its target: {len(history_features)} "
                f"history_features, {len(neg_history_features)} neg_history_features, {len(target_features)} "
                "target_features"
            )
        for trio in zip(history_features, neg_history_features, target_features):
            if len({f.embed_dim for f in trio}) > 1:
                raise ValueError(
                    f"DIEN: history feature {trio[0].name!r}, its negative and its target must have one embed_dim, got "
                    f"{', '.join(str(f.embed_dim) for f in trio)}"
                )
        self.alpha = alpha
        self.features = features
        self.history_features = history_features
        self.neg_history_features = neg_history_features
        self.target_features = target_features
        self.all_dims = sum(f.embed_dim for f in [*features, *history_features, *target_features])
        self.embedding = EmbeddingLayer([*features, *history_features, *neg_history_features, *target_features])
        self.interest_extractor_layers = nn.ModuleList(
            [nn.GRU(f.embed_dim, f.embed_dim, batch_first=True) for f in history_features]
        )
        self.interest_evolving_layers = nn.ModuleList([AUGRU(f.embed_dim) for f in history_features])
        self.mlp = MLP(self.all_dims, **{"activation": "dice", **mlp_params})
        self.BCELoss = nn.BCELoss()

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A batch, {feature name: ids [B] or [B, L], numbers [B]}, -> click probabilities [B], and ``alpha`` times the
        auxiliary loss."""
        lists = self.history_features, self.neg_history_features, self.target_features
        context, (histories, negatives, targets) = look_up_beside(self.embedding, x, self.features, lists)
        loss, extracted, evolved = 0, [], []
        for gru, feature, history, negative in zip(
            self.interest_extractor_layers, self.history_features, histories, negatives
        ):
            mask = self._mask(x, feature)
            # The recurrences are not run of no rows, as torch-rechub's: no gradient of theirs, and not zeros.
            extracted.append(torch.zeros_like(history) if has_nothing(mask) else run_gru(gru, history, mask.sum(1)))
            loss = loss + self.auxiliary(extracted[-1], history, negative, mask)
        for augru, feature, states, target in zip(
            self.interest_evolving_layers, self.history_features, extracted, targets
        ):
            evolved.append(_last_state(augru, states, target, self._mask(x, feature)))
        y = self.mlp(torch.cat([*evolved, *targets, *context], dim=1))
        return torch.sigmoid(y.squeeze(1)), self.alpha * loss

    def _mask(self, x: Mapping[str, Tensor], feature) -> Tensor:
        """[B, L], true at what is no padding."""
        return self.embedding.input_mask(x, feature).squeeze(1).bool()

    def auxiliary(self, outs: Tensor, pos_emb: Tensor, neg_emb: Tensor, mask: Tensor | None = None) -> Tensor:
        """How well each state tells what was chosen next, ``pos_emb`` [B, L, D], from what was not, ``neg_emb``; over
        neighbours that the ``mask`` [B, L] both has."""
        h = outs[:, :-1]
        valid = None if mask is None else mask[:, :-1] & mask[:, 1:]
        scores = [(h * e[:, 1:]).sum(-1) for e in (pos_emb, neg_emb)]
        if is_plain(self.BCELoss, nn.BCELoss) and self.BCELoss.weight is None and self.BCELoss.reduction == "mean":
            # Of sigmoid(s) the two losses are softplus(-s) and softplus(s).
            losses = F.softplus(-scores[0]) + F.softplus(scores[1])
            if valid is None:
                return losses.sum() / max(losses.numel(), 1)
            return torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1)
        positive, negative = (torch.sigmoid(s.flatten() if valid is None else s[valid]) for s in scores)
        if not positive.numel():
            return outs.new_zeros(())
        chosen = self.BCELoss(positive, torch.ones_like(positive))
        return chosen + self.BCELoss(negative, torch.zeros_like(negative))


def _last_state(augru: nn.Module, states: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """What ``augru`` ends with, [B, D]: zeros where the ``mask`` [B, L] has nothing."""
    if has_nothing(mask):
        return states.new_zeros(states.shape[0], states.shape[2])
    if is_plain(augru, AUGRU) and augru.is_served():
        # A position that the mask leaves out has no attention, and moves nothing: the last one in it ends a sample.
        lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
        out = augru.states(states, augru.attention(states, target, mask), lengths)
        return out[torch.arange(len(out), device=out.device), (lengths - 1).clamp(min=0)]
    last, some = torch.zeros_like(states[:, 0]), mask.any(1)
    if some.any():
        _, last[some] = augru(states[some], target[some], mask[some])
    return last
