"""Text tables, plain, gzipped or in a zip: every error names the file, the line and what was expected there."""

from __future__ import annotations

import csv
import gzip
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd


class DataError(Exception):
    """A file that cannot be used. ``line`` counts from 1; None where the file cannot be opened at all."""

    def __init__(self, source, line: int | None, message: str):
        super().__init__(f"{source}, line {line}: {message}" if line else f"{source}: {message}")


def open_bytes(source):
    """``source`` is a Path or a zipfile.Path."""
    file = source.open("rb")
    return gzip.open(file) if source.name.endswith(".gz") else file


@dataclass
class Table:
    """A text table, every cell a string category: ids and numbers are worked out on the distinct values."""

    source: object
    frame: pd.DataFrame
    first_line: int

    @classmethod
    def read(cls, source, names: list[str], expected: str, separator: str = "\t", header: bool = False):
        line = 0
        try:
            with open_bytes(source) as file:
                for line, text in enumerate(file, 1):
                    found = text.count(separator.encode()) + 1
                    if found != len(names):
                        raise DataError(source, line, f"expected {expected}, got {found} column{'s' * (found > 1)}")
                    if b"\r" in text.rstrip(b"\r\n") or b"\0" in text:
                        raise DataError(source, line, f"expected {expected}, got a control character")
                    text.decode()
            if line <= header:
                raise DataError(source, line + 1, f"expected {expected}, got the end of the file")
            with open_bytes(source) as file:
                frame = pd.read_csv(
                    file,
                    sep=separator,
                    names=names,
                    header=None,
                    skiprows=int(header),
                    dtype=str,
                    keep_default_na=False,
                    quoting=csv.QUOTE_NONE,
                )
        except UnicodeDecodeError:
            raise DataError(source, line, f"expected {expected}, got bytes that are not UTF-8") from None
        except (OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                source, line + 1 if line else None, f"expected {expected}, cannot be read: {reason}"
            ) from None
        return cls(source, frame.astype("category"), 1 + header)

    def fail(self, bad_rows: np.ndarray, expected: str, column: str):
        row = int(np.flatnonzero(bad_rows)[0])
        message = f"expected {expected} in column {column!r}, got {self.frame[column].iloc[row]!r}"
        raise DataError(self.source, self.first_line + row, message)

    def numbers(self, column: str, expected: str = "a number", choices=None, empty: float | None = None) -> np.ndarray:
        """The column as float64 [N]; an empty cell is ``empty`` where that is given, and an error elsewhere."""
        cells = self.frame[column].cat
        values = pd.to_numeric(cells.categories, errors="coerce").to_numpy(np.float64)
        if empty is not None:
            values = np.where(cells.categories == "", empty, values)
        values = values[cells.codes]
        bad = ~np.isfinite(values) if choices is None else ~np.isin(values, choices)
        if bad.any():
            self.fail(bad, expected, column)
        return values

    def ids(self, column: str) -> np.ndarray:
        """The column's distinct values numbered from 1, int64 [N]."""
        return self.frame[column].cat.codes.to_numpy().astype(np.int64) + 1

    def find(self, column: str, other: Table, key: str) -> np.ndarray:
        """For each row the row of ``other`` whose ``key`` equals this row's ``column``."""
        rows = pd.Index(other.frame[key].astype(str)).get_indexer(self.frame[column].astype(str))
        if (rows < 0).any():
            self.fail(rows < 0, f"one that {other.source.name} has", column)
        return rows
