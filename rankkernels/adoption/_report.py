"""What was replaced in a model, and what was left."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from rankkernels.adoption._tables import Table, said_of

_HEAD = ("layer", "class", "library", "replaced by", "left because")


def name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def why_subclass_is_left(cls: type, known: Container[type]) -> str | None:
    """The reason why a layer of class ``cls`` is left, if that derives from one of a library's ``known`` classes."""
    base = next((b for b in cls.__mro__ if b in known), None)
    return base and f"a subclass of {base.__name__}: only its author knows what it changes"


@dataclass(frozen=True)
class Entry:
    """One layer of a model.

    Attributes:
        path: its name in ``named_modules``; "" is the model.
        cls: the name of its class before ``accelerate``.
        library: where that comes from.
        replaced_by: the class it has, or is given by ``accelerate``; None where it is left.
        reason: why it is left, "" where it is not.
        done: whether it is replaced already.
    """

    path: str
    cls: str
    library: str
    replaced_by: str | None
    reason: str
    done: bool


@dataclass(frozen=True)
class Report:
    """The layers of a model that a library of ours knows, in the order of ``named_modules``; prints as a table.

    Attributes:
        model: the name of its class.
        entries: its layers.
        tables: those of its tables that get dense gradients, and what Adam moves of them in a step.
    """

    model: str
    entries: list[Entry]
    tables: list[Table] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        """Those that ``accelerate`` replaces or has replaced."""
        return [e for e in self.entries if e.replaced_by is not None]

    @property
    def left(self) -> list[Entry]:
        """Those that run as they are."""
        return [e for e in self.entries if e.replaced_by is None]

    def __str__(self) -> str:
        if not self.entries:
            return f"{self.model} has no layer of torch-rechub, FuxiCTR or DeepCTR-Torch, and no nn.EmbeddingBag"
        done = sum(e.done for e in self.entries)
        counts = f"{done} layers are replaced, {len(self.replaced) - done} more can be, {len(self.left)} are left"
        rows = [_HEAD, *((e.path or "(model)", e.cls, e.library, e.replaced_by or "", e.reason) for e in self.entries)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([f"{self.model}: {counts}", *lines, *said_of(self.tables)])
