"""The optimizers that step on rows: what each keeps of a table, and the numbers that a step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """What a kind of optimizer keeps of a table, states of an element [R, D] before those of a row [R], and the names
    of its own settings."""

    elementwise: int
    row_wise: int
    settings: tuple[str, ...] = ()


#: By the optimizers' number in the schemas; kRules of csrc/embedding/params.h.
RULES = {
    "sgd": Rule(0, 0),
    "adagrad": Rule(1, 0),
    "rowwise_adagrad": Rule(0, 1),
    "adam": Rule(2, 0),
    "adamw": Rule(2, 0),
    "ftrl": Rule(2, 0, ("lr_power", "beta", "l1", "l2")),
    "rowwise_adam": Rule(1, 1),
    "rowwise_rmsprop": Rule(0, 2, ("ar_alpha", "min_shrinkage")),
}
OPTIMIZERS = tuple(RULES)


class Hyper(NamedTuple):
    """The settings of ``reference.optimizer_step`` that all have, and how a table of 16 bits is rounded: the schemas'
    ``hyper`` has them of each table, in this order and followed by the kind's own. ``rounding`` is 0, to the nearest,
    or the key of ``reference.rounding_bits``, an integer."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float
    grad_factor: float
    max_norm: float
    rounding: float


#: Their places in a table's part of ``hyper``.
STEP, ROUNDING = map(Hyper._fields.index, ("step", "rounding"))


class Live(NamedTuple):
    """What changes from step to step, on the tables' device: each one float32. A table's states may end with these, and
    then take the place of ``lr``, ``step`` and ``grad_factor``: nothing waits for a value, and a CUDA graph repeats the
    step and not its numbers. ``count`` of a table is its own, and goes on by one where the step is taken: unless
    ``skip`` is not 0. ``scale`` is what the gradients were multiplied with."""

    count: Tensor
    lr: Tensor
    scale: Tensor
    skip: Tensor


def settings(kind: str, hyper: Sequence[float]) -> dict[str, float]:
    """A table's part of ``hyper``, by name, as ``reference.optimizer_step`` takes it: without ``rounding``."""
    named = dict(zip(Hyper._fields + RULES[kind].settings, hyper))
    del named["rounding"]
    return named
