"""The attention of a frozen model's batches, where every sample has a history of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankkernels.ops._rank_plan import DICE, DICE_BATCH_NORM, LEAKY, RELU, SIGMOID, Plan, Unit
from rankkernels.ops.din_attention import din_attention
from rankkernels.ops.rank import frozen_rows

_NAMES = {LEAKY: "prelu", RELU: "relu", SIGMOID: "sigmoid", DICE: "dice", DICE_BATCH_NORM: "dice_batch_norm"}


class Attention:
    """``rankkernels.din_attention`` with the folded layers of a plan's unit."""

    def __init__(self, plan: Plan, unit: Unit, weights: Tensor, names: Sequence[str]):
        self.plan, self.unit, self.names = plan, unit, names
        self.params, self.running_stats = [], []
        for i, layer in enumerate(unit.layers):
            H = layer.units
            if i == 0:
                target, history, product = unit.first_weights(weights)
                weight = torch.cat([target, history, torch.zeros_like(target), product], 1)
            else:
                weight = layer.weight_of(weights)
            self.params += [weight.contiguous(), weights[layer.bias :][:H].clone()]
            if layer.activation in (LEAKY, DICE, DICE_BATCH_NORM):
                self.params.append(weights[layer.alpha :][:H].clone())
            if layer.activation == DICE_BATCH_NORM:
                self.params += [weights[p:][:H].clone() for p in (layer.v_scale, layer.v_shift)]
                self.running_stats += [torch.zeros(H), torch.ones(H)]
        self.params += [weights[layer.score_weight :][None, :H].clone(), weights[layer.score_bias :][:1].clone()]
        self.activation = _NAMES[layer.activation]
        self.dice_eps = float(weights[layer.epsilon]) / H if layer.activation == DICE else 0.0

    def _rows(self, inputs: Sequence[Tensor], tables: Sequence[Tensor], lookups: Sequence[int]) -> Tensor:
        found = []
        for lookup in map(self.plan.lookups.__getitem__, lookups):
            ids, table = lookup.rows_of(inputs[lookup.input]), self.plan.tables[lookup.table]
            found.append(frozen_rows(tables[lookup.table], table, ids, self.names[lookup.input]))
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def __call__(self, inputs: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
        """Of each sample's history [B, L] and target [B]: [B, D]."""
        unit, first = self.unit, self.plan.lookups[self.unit.histories[0]]
        rows = {}
        if unit.masked:
            rows["mask"] = inputs[first.input] != first.padding_idx
        elif unit.length >= 0:
            rows["lengths"] = inputs[unit.length].flatten().clamp(0, inputs[first.input].size(1))
        return din_attention(
            self._rows(inputs, tables, unit.histories), self._rows(inputs, tables, unit.targets), self.params,
            self.running_stats, activation=self.activation, batch_norm=False, use_softmax=unit.use_softmax,
            count_padding=unit.count_padding, training=False, dice_eps=self.dice_eps, **rows,
        )[0]  # fmt: skip
