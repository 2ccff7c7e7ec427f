"""What every family of cases draws from, and what a finding is.

A case is its number: the seed of a ``Draw``. A family (a module of this folder) makes of it either a valid call, whose
result is compared with the float64 reference, or a call with one argument made wrong, which must be refused.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rankkernels.testing import TOLERANCE, relative_error

FLOATS = tuple(TOLERANCE)
#: What no message to a user may show.
INTERNAL = re.compile(
    r"API call failed|\.cpp|\.h[:, ]|stableivalue|Traceback|list index out of range|INTERNAL ASSERT|site-packages"
)


class Finding(AssertionError):
    """A case that went wrong."""


class Draw(random.Random):
    """Seeded draws of sizes, dtypes and tensors."""

    def __init__(self, case: int):
        super().__init__(case)
        self.generator = torch.Generator().manual_seed(case)

    def size(self, most: int = 300) -> int:
        """Mostly small, with the sizes of vectors, tiles and blocks and their neighbours among the others."""
        kind = self.random()
        if kind < 0.05:
            return 0
        if kind < 0.5:
            return min(self.randint(1, 9), most)
        if kind < 0.7:
            return min(max(self.choice((8, 16, 32, 64, 128, 256)) + self.randint(-1, 1), 1), most)
        return self.randint(1, most)

    def width(self) -> int:
        return max(self.size(200), self.random() > 0.1)  # 0 now and then

    def dtype(self) -> torch.dtype:
        return self.choices(FLOATS, (3, 5, 1, 1))[0]

    def chance(self, p: float) -> bool:
        return self.random() < p

    def normal(self, shape: Iterable[int], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(tuple(shape), dtype=torch.float64, generator=self.generator).to(dtype)

    def ids(self, rows: int, shape: Iterable[int]) -> Tensor:
        """Ids of a table's rows; now and then a few rows have most of them."""
        shape = tuple(shape)
        if rows == 0 and torch.Size(shape).numel():
            raise ValueError("an empty table has no ids")
        few = min(rows, self.randint(1, 3)) if self.chance(0.2) else rows
        ids = torch.randint(0, max(few, 1), shape, generator=self.generator)
        return self.strided(ids.to(self.choice((torch.int64, torch.int32))))

    def strided(self, t: Tensor, overlap: bool = False) -> Tensor:
        """The values of ``t`` in other strides; with ``overlap`` perhaps one row for all of them, other values then."""
        kind = self.choice(("as it is", "as it is", "columns", "steps", "transposed", "expanded"))
        if t.dim() == 0 or kind == "as it is" or (kind == "expanded" and not (overlap and t.size(0))):
            return t
        if kind == "expanded":
            return t[:1].expand_as(t)
        if kind == "transposed":
            return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
        step = 1 if kind == "columns" else 2
        wide = t.new_zeros((*t.shape[:-1], step * t.size(-1) + 3))
        view = wide[..., 1 : 1 + step * t.size(-1) : step]
        view.copy_(t)
        return view


def check_close(what: str, actual: Tensor, expected: Tensor, dtype: torch.dtype, floor: float = 0.0) -> None:
    """``floor``: the norm of the terms that the values may be a small difference of."""
    if actual.shape != expected.shape or actual.dtype != dtype:
        raise Finding(f"{what}: {actual.dtype} {list(actual.shape)}, expected {dtype} {list(expected.shape)}")
    if not actual.numel():
        return
    error = relative_error(actual, expected, floor)
    if not error < TOLERANCE[dtype]:
        raise Finding(f"{what}: relative error {error:.2e} in {dtype} {list(actual.shape)}")


def tensors_of(value) -> list[Tensor]:
    """All tensors of an argument or of nested lists of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for v in value for t in tensors_of(v)]


def bits(t: Tensor) -> Tensor:
    t = t.detach()
    if t.layout != torch.strided:
        t = t.to_dense()
    return t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def snapshot(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(t, bits(t)) for t in tensors if t.device.type == "cpu"]


def check_unchanged(before: list[tuple[Tensor, Tensor]], what: str) -> None:
    for t, old in before:
        if not torch.equal(bits(t), old):
            raise Finding(f"{what} has written to a tensor of shape {list(t.shape)}")


def message_of(error: Exception) -> str:
    return str(error).split("\nException raised from")[0]


def refused(what: str, name: str, call: Callable, arguments) -> str:
    """``call`` must raise a clear error that says ``name``, and change none of the tensors in ``arguments``."""
    before = snapshot(tensors_of(arguments))
    try:
        call()
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        message = message_of(error)
        if INTERNAL.search(message):
            raise Finding(f"{what}: an unclear error: {type(error).__name__}: {message}") from error
        if name not in message:
            raise Finding(f"{what}: an error that does not name {name}: {type(error).__name__}: {message}") from error
    else:
        raise Finding(f"{what}: accepted")
    check_unchanged(before, f"{what}: the refused call")
    return message
