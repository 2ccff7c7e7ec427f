"""What a table optimizer asks of a state_dict before it reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_form(optimizer: str, state_dict: object) -> None:
    """Raises a ValueError, in the name of ``optimizer``, for what is built otherwise than a state_dict."""
    state, groups = (state_dict.get(n) if isinstance(state_dict, dict) else None for n in ("state", "param_groups"))
    if not (
        isinstance(state, dict)
        and isinstance(groups, (list, tuple))
        and all(isinstance(each, dict) for each in (*state.values(), *groups))
        and all(isinstance(group.get("params"), (list, tuple)) for group in groups)
        and all(isinstance(i, (int, str)) for group in groups for i in group["params"])  # str: distributed checkpoints
    ):
        raise ValueError(
            f"{optimizer}: the state to load must be what state_dict() gives: a dict with state, a dict of a dict a "
            "table, and param_groups, a list of dicts with a list of the numbers of its params each"
        )
    for table, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and not _has_numbers(value):
                nested = "nested " if value.is_nested else ""
                raise ValueError(
                    f"{optimizer}: the state of table {table} must have strided tensors of real numbers, got {name} "
                    f"that is {nested}{value.layout}, {value.dtype}, on {value.device}"
                )


def _has_numbers(value: Tensor) -> bool:
    """Whether every element of it is there and a real number, so that it can be copied to a strided tensor."""
    held = value.layout == torch.strided and not value.is_nested and not value.is_meta
    return held and not (value.is_quantized or value.is_complex())


def step_of(optimizer: str, table: int | str, saved: Mapping, shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of steps in the state of a table. Raises a ValueError, in the name of ``optimizer``, if that has not
    tensors of these names and ``shapes`` and such a number."""
    step = saved.get("step", 0)
    saved = {name: value for name, value in saved.items() if value is not None}  # SGD's momentum_buffer
    if not {"step", *shapes} >= set(saved) >= set(shapes) or any(
        not isinstance(saved[name], Tensor) or saved[name].shape != shape for name, shape in shapes.items()
    ):
        raise ValueError(
            f"{optimizer}: the state of table {table} must have "
            + (" and ".join(f"{name} of shape {list(shape)}" for name, shape in shapes.items()) or "a step alone")
            + ", got " + ", ".join(f"{k} {list(getattr(v, 'shape', []))}" for k, v in saved.items())
        )  # fmt: skip
    try:
        count = int(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        count = -1
    if count < 0 or count != step:
        raise ValueError(f"{optimizer}: the state of table {table} must have a number of steps, got {step!r}")
    return count
