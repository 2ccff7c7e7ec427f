"""The features of a call, as the embedding kernels find them in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankkernels._triton import _alignment
from rankkernels._triton.embedding_bag_numbers import described
from rankkernels._triton.embedding_bag_numbers import numbers as on_device
from rankkernels.ops._features import MODES, Features

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


#: What brings numbers to a device: a launch for them alone, or one that does something else, too.
Bring = Callable[[Sequence[int], torch.device], Tensor]


class Feature(NamedTuple):
    """What the kernels know of a feature: the columns of embedding_bag_blocks.py, in their order."""

    first: int  # of a launch's blocks
    number: int  # in the call
    weight: int  # the table's address, 0: not given
    stride: int
    rows: int
    bags: int
    length: int  # ids a bag, 0: by offsets
    mode: int
    padding: int
    unknown: int
    size: int
    hidden: int
    out_stride: int
    lookup: int  # the first of all features' lookups, 0: in numbers
    key: int  # of its table's first row
    frozen: int
    itemsize: int
    by_lookup: bool  # lookups have gradients of their own, not their bag's


class Tile(NamedTuple):
    """Rows of one dtype, width and alignment, which a launch is for, and how many of them a program holds."""

    dtype: torch.dtype
    D: int
    ALIGN: int

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def types(self) -> tuple[tl.dtype, tl.dtype]:
        """Of the rows and of their sums."""
        return DTYPES[self.dtype], DTYPES[self.accumulator]

    @property
    def BLOCK_D(self) -> int:
        return triton.next_power_of_2(self.D)

    @property
    def rows(self) -> int:
        """So many are four loads of 16 bytes a thread, if they are aligned, and two in 16 bits: of four, a maximum and
        its place are more than the registers hold."""
        return max(1, min(256, 8192 // self.accumulator.itemsize // self.BLOCK_D))

    @property
    def sums(self) -> int:
        """So many are 64 bytes of sums a thread, beside which an optimizer's state has a place in registers."""
        return min(128, self.rows)


def matrix_of(t: Tensor) -> Tensor:
    """[.., D] as [n, D] with elements side by side in a row."""
    if t.dim() != 2:
        t = t.reshape(math.prod(t.shape[:-1]), t.size(-1))
    return t if t.stride(1) == 1 or t.size(1) <= 1 else t.contiguous()


def alignment(t: Tensor) -> int:
    """``_alignment.alignment`` of a matrix, with the place where it begins."""
    return math.gcd(_alignment.alignment(t), _alignment.address(t) // t.element_size())


def same_dtype(tensors: list[Tensor | None]) -> tuple[list[Tensor | None], bool]:
    """The integers, contiguous and int64 if one of them is, and whether they are."""
    wide = any(t is not None and t.dtype == torch.int64 for t in tensors)
    dtype = torch.int64 if wide else torch.int32
    return [None if t is None else (t if t.dtype == dtype else t.to(dtype)).contiguous() for t in tensors], wide


class Call:
    """A call's features: ``outs`` are their results or the gradients of these, [bags, D], None of one that is left out.

    ``weights`` are the tables, or empty where their values do not matter, and ``rows`` their numbers of rows.
    """

    def __init__(
        self, features: Features, outs: Sequence[Tensor | None], weights: Sequence[Tensor], rows: Sequence[int]
    ):
        F = len(features.indices)
        self.features, self.outs, self.weights, self.rows = features, list(outs), weights, rows
        self.device = features.indices[0].device
        self.ids, self.wide_ids = same_dtype(list(features.indices))
        self.offsets, self.wide_offsets = same_dtype([features.offsets_of(f) for f in range(F)])
        self.has_offsets = any(t is not None for t in self.offsets)
        self.factors = [features.per_sample_weights_of(f) for f in range(F)]
        self.factors = [None if t is None else t.contiguous() for t in self.factors]
        self.has_factors = any(t is not None for t in self.factors)
        counts = [ids.numel() if out is not None and out.numel() else 0 for ids, out in zip(self.ids, self.outs)]
        self.first_lookup = [sum(counts[:f]) for f in range(F)]
        self.lookups = sum(counts)
        self.first_key = [sum(rows[:t]) for t in range(len(rows))]
        self.keys = sum(rows)

    def replaced(self, outs: Sequence[Tensor | None], factors: Sequence[Tensor | None]) -> Call:
        """The same with other results and per-sample weights."""
        other = copy.copy(self)
        other.outs, other.factors = outs, factors
        return other

    def numbers(self, others: Iterable[int] = (), bring: Bring = on_device) -> Tensor:
        """What of the features is of this call alone, [rows, F], with ``others`` behind it."""
        found = [*map(_alignment.address, self.ids), *map(_alignment.address, self.outs)]
        if self.has_offsets:
            found += [*map(_alignment.address, self.offsets), *(ids.numel() for ids in self.ids), *self.first_lookup]
        if self.has_factors:
            found += map(_alignment.address, self.factors)
        return bring([*found, *others], self.device)

    @property
    def flags(self) -> tuple[bool, ...]:
        """WIDE_IDS, HAS_KNOWN, HAS_OFFSETS, WIDE_OFFSETS."""
        return self.wide_ids, bool(self.features.known), self.has_offsets, self.wide_offsets

    def chosen(self, is_chosen: Callable[[int], bool] = lambda f: True) -> list[int]:
        """The features that have results with something in them, of those ``is_chosen``."""
        return [f for f, out in enumerate(self.outs) if out is not None and out.numel() and is_chosen(f)]

    def tiles(self, chosen: Sequence[int]) -> dict[Tile, list[int]]:
        """These features by what a launch is for; their tables are given."""
        found: dict[Tile, list[int]] = {}
        for f in chosen:
            weight, out = self.weights[self.features.tables[f]], self.outs[f]
            found.setdefault(Tile(out.dtype, out.size(1), math.gcd(alignment(weight), alignment(out))), []).append(f)
        return found

    def described(self, chosen: Sequence[int], bags: int, by_lookup: Sequence[int] = ()) -> tuple[Tensor, int]:
        """The columns of these features, and the blocks of ``bags`` that they have in all."""
        described_features, first = [], 0
        for f in chosen:
            described_features.append(self._feature(f, first, f in by_lookup))
            first += -(-described_features[-1].bags // bags)  # Triton's cdiv costs the host 2 µs
        return described(tuple(v for column in zip(*described_features) for v in column), self.device), first

    def _feature(self, f: int, first: int, by_lookup: bool) -> Feature:
        features, out, t = self.features, self.outs[f], self.features.tables[f]
        pooled, weight = features.mode(f) != "none", self.weights[t] if self.weights else None
        return Feature(
            first, f, _alignment.address(weight), 0 if weight is None else weight.stride(0), self.rows[t],
            features.bags_of(f) if pooled else self.ids[f].numel(), self.length(f), features.modes[f],
            features.padding_idx[f] if pooled else -1, *features.known_of(f), out.stride(0),
            0 if self.has_offsets else self.first_lookup[f], self.first_key[t], features.frozen_rows[t],
            out.element_size(), by_lookup,
        )  # fmt: skip

    def length(self, f: int) -> int:
        """Ids a bag of feature f, 0 if its offsets say it."""
        if self.offsets[f] is not None:
            return 0
        return self.features.indices[f].size(1) if self.features.mode(f) != "none" else 1

    def has_mode(self, mode: str, chosen: Sequence[int]) -> bool:
        return any(self.features.modes[f] == MODES.index(mode) for f in chosen)
