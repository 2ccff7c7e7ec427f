"""A frozen model's scores of one user's candidates: csrc/cpu/serve/rank.cpp.

What the user has is computed once; the candidates fill the lanes of vectors (rank_layers_kernel.h). The layers of
``rankkernels.serve`` make the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._features import MODES, names_of
from rankkernels.ops._library import define, lib
from rankkernels.ops._rank_plan import (
    DICE,
    DICE_BATCH_NORM,
    LEAKY,
    RELU,
    SIGMOID,
    Layer,
    Lookup,
    Plan,
    Table,
    Unit,
    dequantize,
)
from rankkernels.ops._table import notice_reference

# ``inputs`` are ids and numbers, each the user's or, where ``sides`` is 0, the candidates'. ``plan`` and ``weights``:
# ops/_rank_plan.py.
define(
    "rank(Tensor[] inputs, int[] sides, Tensor[] tables, Tensor weights, Tensor plan, str names, SymInt candidates) "
    "-> Tensor"
)
# Rows of a table as ``Plan`` has it, ids.shape + [width].
define("frozen_rows(Tensor table, int bits, int width, Tensor ids, str name) -> Tensor")


@torch.library.register_fake("rankkernels::rank", lib=lib)
def _(inputs, sides, tables, weights, plan, names, candidates):
    return weights.new_empty((candidates,))


@torch.library.register_fake("rankkernels::frozen_rows", lib=lib)
def _(table, bits, width, ids, name):
    return table.new_empty((*ids.shape, width), dtype=torch.float32)


class Request:
    """The definition of correct, sample by sample and row by row. ``rows_of(t, ids)`` are rows of table t in float32.
    No shape and no step depends on values, so that exporters can follow."""

    def __init__(self, inputs, sides, rows_of, weights, plan, candidates):
        self.inputs, self.sides, self.rows_of, self.weights = inputs, sides, rows_of, weights
        self.plan, self.C = plan, candidates

    def floats(self, place: int, size: int) -> Tensor:
        return self.weights[place : place + size]

    def ids(self, lookup: Lookup) -> Tensor:
        """An input's ids as rows of the table: [1 or C, L]."""
        given = self.inputs[lookup.input]
        rows, width = 1, given.numel()
        if not self.sides[lookup.input]:
            rows, width = self.C, math.prod(given.shape[1:])
        return lookup.rows_of(given.long().reshape(rows, width))

    def check_ids(self, lookup: Lookup, name: str, R: int) -> None:
        """Raises for an id that is no row of a table with R rows."""
        ids = self.ids(lookup)
        unknown = (ids < 0) | (ids >= R)
        if bool(unknown.any()):
            at = unknown.nonzero()[0].tolist()
            given = self.inputs[lookup.input]
            index = ", ".join(map(str, at)) if given.dim() > 1 else at[0] * ids.size(1) + at[1]
            raise RuntimeError(
                f"rank: {name}[{index}] = {int(ids[tuple(at)])} is out of range for a table with {R} rows"
            )

    def rows(self, lookup: Lookup) -> Tensor:
        """[1 or C, D], of a history [L, D]."""
        ids = self.ids(lookup)
        rows = self.rows_of(lookup.table, ids)
        if lookup.history:
            return rows[0]
        if MODES[lookup.mode] == "none":
            return rows[:, 0]
        kept = (ids != lookup.padding_idx)[..., None]
        pooled = (rows * kept).sum(1)
        return pooled / kept.sum(1).clamp(min=1) if MODES[lookup.mode] == "mean" else pooled

    def activated(self, layer: Layer, z: Tensor) -> Tensor:
        alpha = self.floats(layer.alpha, layer.units)
        if layer.activation == LEAKY:
            return torch.where(z > 0, z, alpha * z)
        if layer.activation == RELU:
            return z.relu()
        if layer.activation == SIGMOID:
            return z.sigmoid()
        if layer.activation == DICE_BATCH_NORM:
            p = torch.sigmoid(z * self.floats(layer.v_scale, layer.units) + self.floats(layer.v_shift, layer.units))
            return p * z + (1 - p) * alpha * z
        assert layer.activation == DICE
        return reference.dice(z, alpha, self.weights[layer.epsilon] / layer.units)

    def score(self, layers: Sequence[Layer], z: Tensor) -> Tensor:
        """What follows the first product z [N, H]: [N]."""
        for layer, following in zip(layers, [*layers[1:], None]):
            z = self.activated(layer, z)
            if following is not None:
                z = F.linear(z, following.weight_of(self.weights), self.floats(following.bias, following.units))
        return z @ self.floats(layers[-1].score_weight, layers[-1].units) + self.weights[layers[-1].score_bias]

    def pooled(self, unit: Unit, found: list[Tensor]) -> Tensor:
        history = torch.cat([found[i] for i in unit.histories], -1)
        target = torch.cat([found[i].expand(self.C, -1) for i in unit.targets], -1)
        first, L = self.plan.lookups[unit.histories[0]], history.size(0)
        valid = torch.ones(L, dtype=torch.bool)
        if unit.masked:
            valid = self.inputs[first.input].reshape(-1) != first.padding_idx
        if unit.length >= 0:
            valid = valid & (torch.arange(L) < self.inputs[unit.length].reshape(1))
        of_target, of_history, of_product = unit.first_weights(self.weights)
        z = F.linear(history, of_history, self.floats(unit.layers[0].bias, unit.layers[0].units))
        z = z + F.linear(target, of_target)[:, None] + F.linear(target[:, None] * history, of_product)
        score = self.score(unit.layers, z.flatten(0, 1)).view(self.C, L)
        if unit.use_softmax:  # where padding counts and there is nothing else, it has all the weight
            lowest = torch.finfo(score.dtype).min if unit.count_padding else -torch.inf
            score = score.masked_fill(~valid, lowest).softmax(-1)
        return (score if unit.use_softmax and unit.count_padding else torch.where(valid, score, 0.0)) @ history

    def scores(self) -> Tensor:
        plan = self.plan
        x = self.weights.new_zeros(self.C, plan.width)
        logit = self.weights[plan.constant] + x.new_zeros(self.C)
        fields = []
        found = [self.rows(lookup) for lookup in plan.lookups]
        dense = [self.inputs[d.input].reshape(1 if self.sides[d.input] else self.C, d.width) for d in plan.dense]
        for part, number in zip(plan.dense, dense):
            if part.field >= 0:
                fields.append((number * self.floats(part.field, plan.fm_width)).expand(self.C, -1))
        for part, value in zip([*plan.lookups, *plan.dense], [*found, *dense]):
            if isinstance(part, Lookup) and part.history:
                continue
            if part.column >= 0:
                x[:, part.column : part.column + value.size(1)] = value
            if part.weight >= 0:
                logit = logit + value @ self.floats(part.weight, value.size(1))
            if isinstance(part, Lookup) and part.fm:
                fields.append(value.expand(self.C, -1))
        for unit in plan.units:
            pooled = self.pooled(unit, found)
            x[:, unit.column : unit.column + pooled.size(1)] = pooled
        if fields:
            logit = logit + reference.fm_interaction(torch.stack(fields, 1), True).squeeze(1)
        if plan.layers:
            first = plan.layers[0]
            z = F.linear(x, first.weight_of(self.weights), self.floats(first.bias, first.units))
            logit = logit + self.score(plan.layers, z)
        return logit.sigmoid() if plan.sigmoid else logit


def definition(inputs, sides, tables, weights, plan, names, candidates):
    """The op's definition of correct, with its check of the ids."""
    plan, names = Plan.decode(plan), names_of(names, len(inputs))

    def rows_of(t: int, ids: Tensor) -> Tensor:
        return dequantize(tables[t][ids], plan.tables[t])

    request = Request(inputs, sides, rows_of, weights, plan, candidates)
    for lookup in plan.lookups:
        request.check_ids(lookup, names[lookup.input], tables[lookup.table].size(0))
    return request.scores()


@torch.library.impl(lib, "rank", "CompositeExplicitAutograd")
def _(inputs, sides, tables, weights, plan, names, candidates):
    notice_reference("rank", weights)
    return definition(inputs, sides, tables, weights, plan, names, candidates)


@torch.library.impl(lib, "frozen_rows", "CompositeExplicitAutograd")
def _(table, bits, width, ids, name):
    notice_reference("frozen_rows", table)
    R = table.size(0)
    bad = ((ids < 0) | (ids >= R)).nonzero()
    if len(bad):
        index = bad[0].tolist()
        raise RuntimeError(
            f"rank: {name}[{', '.join(map(str, index))}] = {int(ids[tuple(index)])} is out of range for a table with "
            f"{R} rows"
        )
    return dequantize(table[ids.long()], Table(bits, width))


def _documented(error: RuntimeError) -> Exception:
    """What an error of the C++ is in Python: about an id, or about what else is given."""
    message = str(error).splitlines()[0]
    if not message.startswith("rank: "):
        return error
    return (IndexError if "is out of range" in message else ValueError)(message)


def frozen_rows(stored: Tensor, table: Table, ids: Tensor, name: str) -> Tensor:
    """Rows of a table as it is stored, ids.shape + [D] in float32; an IndexError for an id outside it."""
    try:
        return torch.ops.rankkernels.frozen_rows.default(stored, table.bits, table.width, ids, name)
    except RuntimeError as error:
        raise _documented(error) from None


def run_op(
    inputs: Sequence[Tensor], sides: Sequence[int], tables: Sequence[Tensor], weights: Tensor, plan: Tensor,
    names: str, candidates: int,
) -> Tensor:  # fmt: skip
    """The op on the schema's arguments; an IndexError for an id outside its table, a ValueError for what else is
    wrong with the inputs."""
    try:
        return torch.ops.rankkernels.rank.default(inputs, sides, tables, weights, plan, names, candidates)
    except RuntimeError as error:
        raise _documented(error) from None
