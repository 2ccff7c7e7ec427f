"""A model for inference alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops._features import join_names
from rankkernels.ops._rank_plan import Dense, Plan
from rankkernels.ops.rank import run_op
from rankkernels.serve._attention import Attention

FORMAT = 2


class Ranking(NamedTuple):
    """The best candidates: scores [k], the highest first, and their places [k] among the candidates."""

    values: Tensor
    indices: Tensor


class FrozenModel:
    """What ``freeze`` makes of a model: its tables and weights in the form the kernels read, and nothing else.

    Any number of threads may call one object at once; the kernels keep their memory a thread, and no request makes it
    grow beyond what the model's width and the longest history need. Objects can be pickled and forked; a forked process
    computes a request on the thread that asks.
    """

    def __init__(self, inputs: Mapping[str, str], tables: list[Tensor], weights: Tensor, plan: Tensor):
        self.inputs = dict(inputs)
        self.tables, self.weights, self.plan = tables, weights, plan
        self.dtypes = [(n, torch.float32 if kind == "numbers" else torch.int64) for n, kind in self.inputs.items()]
        self.names = join_names([str(name) for name in self.inputs])
        decoded = Plan.decode(plan)
        self._attentions = [Attention(decoded, unit, weights, list(self.inputs)) for unit in decoded.units]
        self._batch_plan = plan if not decoded.units else _without_attention(decoded).encode()
        self._batch_names = join_names([*map(str, self.inputs), *("attention" for _ in decoded.units)])

    def __getstate__(self) -> dict:
        return self.state()

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["inputs"], state["tables"], state["weights"], state["plan"])

    def state(self) -> dict:
        """All of it: tensors, strings and numbers, which ``torch.load(weights_only=True)`` reads."""
        return {
            "format": FORMAT,
            "inputs": self.inputs,
            "tables": self.tables,
            "weights": self.weights,
            "plan": self.plan,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Writes ``state()``; ``load`` reads it, without the model or its library."""
        torch.save(self.state(), path)

    def nbytes(self) -> int:
        """Bytes of the tables and weights."""
        return sum(t.nbytes for t in (*self.tables, self.weights, self.plan))

    def __call__(self, x: Mapping[str, Tensor]) -> Tensor:
        """A batch, {feature name: ids [B] or [B, L], numbers [B] or [B, n]}, -> scores [B], as the model's in eval.

        Raises:
            KeyError: the batch lacks a feature.
            IndexError: an id outside its table, of a feature whose ``oov`` is "error".
            ValueError: a feature has another shape.
        """
        inputs = [value_of(name, dtype, x.get(name), (x,)) for name, dtype in self.dtypes]
        B = len(inputs[0]) if inputs[0].dim() else 1
        if self._attentions:
            found = [attention(inputs, self.tables) for attention in self._attentions]
            return run_op([*inputs, *found], [0] * (len(inputs) + len(found)), self.tables, self.weights,
                          self._batch_plan, self._batch_names, B)  # fmt: skip
        return run_op(inputs, [0] * len(inputs), self.tables, self.weights, self.plan, self.names, B)

    def rank(
        self, user: Mapping[str, object], candidates: Mapping[str, Tensor], k: int | None = None
    ) -> Tensor | Ranking:
        """Scores of one user's candidates. What ``user`` has is computed once; histories are not repeated.

        Args:
            user: {feature name: one id or number, or the ids [L] or [1, L] of a sequence or history}.
            candidates: {feature name: ids [C] or [C, L], numbers [C] or [C, n]}; a feature in both counts here.
            k: return the best k alone.

        Returns:
            scores [C], or with ``k`` a ``Ranking`` of min(k, C). No candidates give an empty result.

        Raises:
            KeyError: a feature in neither, or no candidate features.
            IndexError: an id outside its table, of a feature whose ``oov`` is "error".
            ValueError: a feature has another shape, or is a history of the candidates; ``k`` is negative.
        """
        inputs, sides, C = [], [], None
        for name, dtype in self.dtypes:
            value = candidates.get(name)
            of_user = value is None
            if of_user:
                value = user.get(name)
            if type(value) is not Tensor or value.dtype is not dtype:
                value = value_of(name, dtype, value, (user, candidates))
            if not of_user and C is None:
                C = len(value) if value.dim() else 1
            inputs.append(value)
            sides.append(of_user)
        if C is None:
            raise KeyError(f"rank: candidates must have one of the model's features {list(self.inputs)}")
        scores = run_op(inputs, sides, self.tables, self.weights, self.plan, self.names, C)
        if k is None:
            return scores
        if k < 0:
            raise ValueError(f"rank: k must not be negative, got {k}")
        return Ranking(*torch.topk(scores, min(k, C)))


def value_of(name: str, dtype: torch.dtype, value: object, given: Sequence[Mapping]) -> Tensor:
    """What is given of a feature, as the op takes it: float32, int64 or int32."""
    if value is None:
        raise KeyError(f"rank: feature {name!r} is missing, got {[n for each in given for n in each]}")
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"rank: {name} must be numbers, got {value!r}") from error
    if value.is_complex():
        raise ValueError(f"rank: {name} must be real numbers, got {value.dtype}")
    return value if value.dtype is dtype or (dtype, value.dtype) == (torch.int64, torch.int32) else value.to(dtype)


def _without_attention(plan: Plan) -> Plan:
    """The plan of a batch, whose histories were attended to before: their results are inputs of their own."""
    dense = [
        Dense(
            plan.inputs + i, sum(plan.tables[plan.lookups[h].table].width for h in unit.histories), unit.column, -1, -1
        )
        for i, unit in enumerate(plan.units)
    ]
    lookups = tuple(lookup for lookup in plan.lookups if not lookup.history)
    return plan._replace(inputs=plan.inputs + len(dense), lookups=lookups, dense=(*plan.dense, *dense), units=())
