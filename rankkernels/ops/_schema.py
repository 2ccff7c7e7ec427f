"""Schemas from Python's types: a NamedTuple is a part of a schema, its fields in the schema's order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import get_type_hints

from torch import Tensor

_SCHEMA_TYPES = {
    list[Tensor]: "Tensor[]", list[int]: "int[]", Tensor: "Tensor", Tensor | None: "Tensor?", int: "int",
    float: "float", bool: "bool", str: "str",
}  # fmt: skip


def schema_of(arguments: type) -> str:
    """The part of a schema that a NamedTuple's fields are: ``Tensor x, int[] tables, ...``."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())


def parsed(arguments: Iterable, *parts: type) -> list:
    """The arguments of a schema that consists of these NamedTuples, one after the other."""
    values, new = iter(arguments), tuple.__new__  # namedtuple's own constructors are Python frames
    return [new(part, islice(values, len(part._fields))) for part in parts]


def nothing(values: Sequence) -> list[None]:
    """The gradients of a list of tensors that have none."""
    return [None] * len(values)


def no_gradients(part: type) -> list[None]:
    """What a backward returns for a part of a schema that has no gradients."""
    return [None] * len(part._fields)
