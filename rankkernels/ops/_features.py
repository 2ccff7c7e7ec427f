"""The features of a lookup, as every embedding op's schema has them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankkernels import reference
from rankkernels.ops._schema import nothing

#: Pooling modes, by their number in the schema; "none" looks every id up on its own.
MODES = ("none", "sum", "mean", "max")


#: What becomes of an id that is no row of its table: ``Unknown`` of csrc/embedding/params.h.
UNKNOWN = ("error", "row", "hash")


class Known(NamedTuple):
    """What becomes of ids outside 0 .. size - 1, and the row that a hash leaves out, -1: none."""

    unknown: int
    size: int
    padding_idx: int

    def rows_of(self, ids: Tensor) -> Tensor:
        """ids as they come -> rows of the table."""
        if UNKNOWN[self.unknown] == "error":
            return ids
        return reference.known_rows(ids, self.size, UNKNOWN[self.unknown] == "hash", self.padding_idx)


#: Of a feature whose ids all have to be rows.
NO_UNKNOWN = Known(UNKNOWN.index("error"), 0, -1)


class Features(NamedTuple):
    """One entry a feature, but ``frozen_rows``: one entry a table.

    ``offsets`` and ``per_sample_weights`` have an empty tensor for a feature without, and are empty lists where no
    feature has any (torch.library has no autograd for lists of optional tensors). Pooled 1-D indices, and only they,
    have offsets. ``modes`` are numbers of MODES. ``padding_idx`` is the id that a feature's pooling leaves out,
    ``frozen_rows`` the row of a table that gets no gradient; -1 stands for none. ``known`` has the three numbers of
    ``Known`` of each feature, or nothing where all ids have to be rows.
    """

    indices: list[Tensor]
    offsets: list[Tensor]
    per_sample_weights: list[Tensor]
    tables: list[int]
    modes: list[int]
    padding_idx: list[int]
    frozen_rows: list[int]
    known: list[int] = []  # nobody changes it

    def known_of(self, f: int) -> Known:
        n = len(Known._fields)
        return Known(*self.known[n * f : n * f + n]) if self.known else NO_UNKNOWN

    def as_rows(self) -> Features:
        """The same lookups by ids that all have to be rows."""
        if not self.known:
            return self
        return self._replace(indices=[self.known_of(f).rows_of(ids) for f, ids in enumerate(self.indices)], known=[])

    def without_empty_lists(self) -> Features:
        """For torch.export: AOTInductor makes None of an empty list, of which its packages then fail."""
        F, absent = len(self.indices), self.indices[0].new_empty(0)
        return self._replace(
            offsets=self.offsets or [absent] * F,
            per_sample_weights=self.per_sample_weights or [absent] * F,
            known=self.known or [*NO_UNKNOWN] * F,
        )

    def mode(self, f: int) -> str:
        return MODES[self.modes[f]]

    def offsets_of(self, f: int) -> Tensor | None:
        return self.offsets[f] if self.offsets and self.indices[f].dim() == 1 and self.mode(f) != "none" else None

    def bags_of(self, f: int) -> int:
        """The number of a feature's results, but for mode none with indices of several dimensions."""
        offsets = self.offsets_of(f)
        return (self.indices[f] if offsets is None else offsets).size(0)

    def per_sample_weights_of(self, f: int) -> Tensor | None:
        absent = not self.per_sample_weights or self.per_sample_weights[f].shape == (0,)
        return None if absent else self.per_sample_weights[f]

    def need_values(self) -> bool:
        """Whether a gradient depends on the tables' values and not on the ids alone."""
        return MODES.index("max") in self.modes or any(w.numel() for w in self.per_sample_weights)

    def tables_of(self, grad_outs: Sequence[Tensor | None]) -> set[int]:
        """The tables that get a gradient from the features' outputs."""
        return {t for t, g in zip(self.tables, grad_outs) if g is not None}

    def tensors(self) -> tuple[Tensor, ...]:
        """What a backward saves; ``without_tensors`` is the rest, and ``with_tensors`` joins the two."""
        return *self.indices, *self.offsets, *self.per_sample_weights

    def without_tensors(self) -> Features:
        return Features(nothing(self.indices), nothing(self.offsets), nothing(self.per_sample_weights), *self.numbers())

    def with_tensors(self, saved: Iterator[Tensor]) -> Features:
        indices, offsets, factors = len(self.indices), len(self.offsets), len(self.per_sample_weights)
        return Features(
            list(islice(saved, indices)), list(islice(saved, offsets)), list(islice(saved, factors)), *self.numbers()
        )

    def numbers(self) -> tuple[list[int], ...]:
        """What is no tensor."""
        return self.tables, self.modes, self.padding_idx, self.frozen_rows, self.known

    def gradients(self, of_per_sample_weights: Sequence[Tensor | None] | None = None) -> Features:
        """What a backward returns for these arguments: only the per-sample weights have gradients."""
        if of_per_sample_weights is None:
            of_per_sample_weights = nothing(self.per_sample_weights)
        return Features(nothing(self.indices), nothing(self.offsets), of_per_sample_weights, *nothing(self.numbers()))

    def subset(self, kept: Collection[int]) -> tuple[list[int], Features]:
        """The numbers of the tables that the features ``kept`` look up, and these features over those tables alone."""
        tables = sorted({self.tables[f] for f in kept})
        place = {t: i for i, t in enumerate(tables)}

        def of(values: list) -> list:
            return [values[f] for f in kept] if values else []

        return tables, Features(
            of(self.indices), of(self.offsets), of(self.per_sample_weights), [place[self.tables[f]] for f in kept],
            of(self.modes), of(self.padding_idx), [self.frozen_rows[t] for t in tables],
            [v for f in kept for v in self.known_of(f)] if self.known else [],
        )  # fmt: skip

    def of_distinct_tables(self, weights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Features]:
        """The same lookup with every table given once, as an optimizer's step needs them.

        Raises:
            ValueError: a table has two frozen rows.
        """
        if len(set(map(id, weights))) == len(weights):
            return weights, self
        frozen_rows, first = self.frozen_rows, {id(w): t for t, w in reversed(list(enumerate(weights)))}
        for t, w in enumerate(weights):
            if frozen_rows[t] != frozen_rows[first[id(w)]]:
                raise ValueError(
                    f"embedding_bag: tables {first[id(w)]} and {t} are one, but their frozen rows differ, "
                    f"{frozen_rows[first[id(w)]]} and {frozen_rows[t]}"
                )
        kept = sorted(first.values())
        place = {t: i for i, t in enumerate(kept)}
        tables = [place[first[id(weights[t])]] for t in self.tables]
        return [weights[t] for t in kept], self._replace(tables=tables, frozen_rows=[frozen_rows[t] for t in kept])


class LookupBatch(NamedTuple):
    """A batch whose lookups are one call of an op: what ``embedding_fm`` and ``deepfm`` take of it."""

    weights: list[Tensor]
    features: Features
    names: str
    dense: list[Tensor]  # more columns, [B, n] each, in the tables' dtype
    optimizer: Any = None  # that steps in the backward, if any: see ``_fused_step.Optimizer``

    def dense_columns(self) -> Tensor | None:
        """The dense features side by side, [B, n]. Joined column by column, as a batch holds them."""
        return torch.cat([v.t() for v in self.dense]).t() if self.dense else None


def joined(lookups: Iterable[tuple[int, Features]]) -> Features:
    """Several lookups as one, each of its own number of tables, which come one after the other."""
    parts, shift, lookups = [], 0, list(lookups)
    for num_tables, features in lookups:
        parts.append(features.without_empty_lists()._replace(tables=[shift + t for t in features.tables]))
        shift += num_tables
    whole = Features(*([v for values in field for v in values] for field in zip(*parts)))
    return whole._replace(
        offsets=whole.offsets if any(f.offsets for _, f in lookups) else [],
        per_sample_weights=whole.per_sample_weights if any(f.per_sample_weights for _, f in lookups) else [],
        known=whole.known if any(f.known for _, f in lookups) else [],
    )


def join_names(names: Sequence[str]) -> str:
    """The features' names in the schema's form, one a line."""
    return "\n".join([name.replace("\n", " ") for name in names])


def names_of(names: str, n: int) -> list[str]:
    """The features' names from the schema's; of those without one, what it is in the schema."""
    given = names.split("\n")
    return [name or f"indices[{f}]" for f, name in enumerate((given + [""] * n)[:n])]
