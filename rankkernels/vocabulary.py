"""The ids of a feature's values as they come: strings, or numbers that are no rows of a table."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_POLICIES = ("error", "row", "hash")


class Vocabulary:
    """Turns a column of strings or integers into ids, 0 for padding, then one id a known value, then the unknown ones.

    ``len`` of it is the ``vocab_size`` of its feature, and 0 the ``padding_idx``.

    Args:
        values: the known values, strings or integers, the first of equal ones counts. Their order is that of the ids.
        unknown: what a value gets that is not among them: "error" raises a KeyError, "row" gives all of them one id,
            "hash" spreads them over ``hash_rows`` ids, by CRC-32 of its text: the same in every process.
        hash_rows: for "hash".
        padding: the value that gets id 0.

    Raises:
        TypeError: a value is neither a string nor an integer, or they are of both kinds.
        ValueError: another ``unknown``, or ``hash_rows`` where they are not positive or not used.
    """

    def __init__(
        self, values: Iterable[str | int], unknown: str = "row", hash_rows: int = 0, padding: str | int | None = None
    ):
        if unknown not in _POLICIES:
            raise ValueError(f"Vocabulary: unknown must be one of {', '.join(_POLICIES)}, got {unknown!r}")
        if (hash_rows > 0) != (unknown == "hash") or hash_rows < 0:
            raise ValueError(f"Vocabulary: hash_rows must be positive for 'hash' and 0 else, got {hash_rows}")
        # numpy's scalars become Python's, which json can write.
        plain = [v.item() if isinstance(v, np.generic) else v for v in values]
        self.unknown, self.hash_rows, self.padding = unknown, hash_rows, padding
        self.values = [v for v in dict.fromkeys(plain) if v != padding]
        kinds = {type(v) for v in (*self.values, *(() if padding is None else (padding,)))}
        if not kinds <= {str} and not kinds <= {int}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"Vocabulary: values must be all strings or all integers, got {names}")
        self._ids = {v: i for i, v in enumerate(self.values, 1)} | ({} if padding is None else {padding: 0})

    def __len__(self) -> int:
        """The number of ids: a table for them has so many rows."""
        return 1 + len(self.values) + {"error": 0, "row": 1, "hash": self.hash_rows}[self.unknown]

    def __call__(self, column: Any) -> Tensor:
        """ids, int64, of a column of values: a list, nested or not, an array, a Series, or a tensor of integers.

        Raises:
            KeyError: a value that is not known, where ``unknown`` is "error".
        """
        column = column.numpy() if isinstance(column, Tensor) else np.asarray(column)
        values, place = np.unique(column, return_inverse=True)  # each value is looked for once
        ids = np.array([self._id(v) for v in values.tolist()], dtype=np.int64)
        return torch.from_numpy(ids[place].reshape(column.shape))

    def _id(self, value: str | int) -> int:
        found = self._ids.get(value)
        if found is not None:
            return found
        if self.unknown == "error":
            raise KeyError(f"Vocabulary: {value!r} is not among the {len(self.values)} known values")
        first = 1 + len(self.values)
        return first if self.unknown == "row" else first + zlib.crc32(str(value).encode()) % self.hash_rows

    def save(self, path: str | PathLike) -> None:
        """Writes it as JSON, to lie beside the model's weights."""
        state = {name: getattr(self, name) for name in ("values", "unknown", "hash_rows", "padding")}
        Path(path).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike) -> Vocabulary:
        """The vocabulary that ``save`` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
