"""The activations that the ops have, by their number in the schemas."""

from __future__ import annotations

import torch

#: What each activation adds to the parameters of a layer: prelu its slope and dice its alpha, [1] or [H];
#: dice_batch_norm alpha, weight and bias [H] of its normalization.
ACTIVATIONS = {"linear": 0, "sigmoid": 0, "relu": 0, "leakyrelu": 0, "prelu": 1, "dice": 1, "dice_batch_norm": 3}
#: By their number in the schemas (a str argument of a C++ op leaks a copy at every call, torch 2.13).
NAMES = tuple(ACTIVATIONS)


def number_of(op: str, activation: str) -> int:
    """The schema's number. Raises a ValueError for an unknown name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}, expected one of {', '.join(NAMES)}")
    return NAMES.index(activation)


def check_activation(op: str, activation: int) -> None:
    last = len(NAMES) - 1
    torch._check(0 <= activation <= last, lambda: f"{op}: activation must be 0 .. {last}, got {activation}")
