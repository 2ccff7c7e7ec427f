"""What a request to a frozen model looks like: its type, limits, and how it is read from JSON or .npy."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator
from typing_extensions import NotRequired, TypedDict

JSON, NPY = "application/json", "application/x-npy"


@dataclass(frozen=True)
class Limits:
    candidates: int = 2000
    history: int = 500
    body: int = 1 << 20  # bytes
    waiting: int = 32  # requests accepted and not yet answered
    seconds: float = 0.1  # that a request may have waited when its turn comes


class Refused(Exception):
    """A request is not ranked: the status of its answer, and what is wrong in which field."""

    def __init__(self, status: int, *wrong: dict[str, Any]):
        self.status, self.wrong = status, wrong


Id = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-3.4e38, le=3.4e38)]


def to_array(value: Any, check: Callable[[Any], list], dtype: type) -> np.ndarray:
    if isinstance(value, np.ndarray):  # of an .npy: checked as the list that it stands for, and kept
        check(value.tolist())
        return np.asarray(value, dtype)
    checked = check(value)
    try:
        return np.array(checked, dtype)
    except ValueError:
        raise ValueError("its lists must have one length") from None


def array_of(element: Any, longest: int, dtype: type = np.int64) -> Any:
    convert = WrapValidator(partial(to_array, dtype=dtype))
    return Annotated[list[element], Field(max_length=longest), convert]


def equally_long(candidates: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    first, *others = candidates
    for name in others:
        if len(candidates[name]) != len(candidates[first]):
            raise ValueError(f"{first} has {len(candidates[first])} candidates, {name} {len(candidates[name])}")
    return candidates


def struct(name: str, types: dict[str, Any]) -> Any:
    made = TypedDict(name, types)
    made.__pydantic_config__ = ConfigDict(extra="forbid")
    return made


def request_type(inputs: dict[str, str], of_candidates: Collection[str], limits: Limits) -> TypeAdapter:
    """The type of requests to a model with these ``inputs``: feature -> ids, sequence, history or numbers."""
    if wrong := [name for name in of_candidates if inputs.get(name, "history") == "history"]:
        raise ValueError(f"candidates cannot have {wrong}: the model's inputs are {inputs}")
    C, several = limits.candidates, array_of(Id, limits.history)
    numbers = Number | Annotated[list[Number], Field(max_length=limits.history)]
    of_user = {"ids": Id, "numbers": numbers, "sequence": several, "history": several}
    of_candidate = {
        "ids": array_of(Id, C),
        "numbers": array_of(numbers, C, np.float32),
        "sequence": array_of(Annotated[list[Id], Field(max_length=limits.history)], C),
    }
    user = {name: of_user[kind] for name, kind in inputs.items() if name not in of_candidates}
    candidates = {name: of_candidate[inputs[name]] for name in of_candidates}
    request = {
        "user": struct("User", user),
        "candidates": Annotated[struct("Candidates", candidates), AfterValidator(equally_long)],
        "k": NotRequired[Annotated[int, Field(strict=True, ge=1, le=limits.candidates)]],
    }
    return TypeAdapter(struct("RankRequest", request))


def unpacked(body: bytes) -> dict[str, Any]:
    """An .npy, one record with the fields ``user.FEATURE``, ``candidates.FEATURE`` and ``k``, as a nested request."""
    request: dict[str, Any] = {"user": {}, "candidates": {}}
    try:
        record = np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
        for name in record.dtype.names:
            side, _, feature = name.partition(".")
            value = record[name] if record[name].ndim else record[name].item()
            if feature and side in ("user", "candidates"):
                request[side][feature] = value
            else:
                request[name] = value
    except Exception as error:  # whatever numpy raises for bytes that are no .npy
        raise Refused(422, {"loc": [], "msg": f"the body must be an .npy of one record: {error}"}) from None
    return request


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """An .npy, one record with these fields."""
    record = np.empty((), [(name, array.dtype, array.shape) for name, array in arrays.items()])
    for name, array in arrays.items():
        record[name] = array
    np.save(body := io.BytesIO(), record)
    return body.getvalue()


def parse(content_type: str, body: bytes, kind: TypeAdapter) -> dict[str, Any]:
    """A request of the type ``kind``: {"user": {...}, "candidates": {...}} and perhaps "k".

    Raises:
        Refused: with one entry for each field that is wrong, ten at most.
    """
    try:
        if content_type == JSON:
            return kind.validate_json(body)
        if content_type == NPY:
            return kind.validate_python(unpacked(body))
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        raise Refused(422, *wrong[:10]) from None
    raise Refused(415, {"loc": ["content-type"], "msg": f"must be {JSON} or {NPY}, got {content_type!r}"})
