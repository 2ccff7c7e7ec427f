"""The state of table optimizers to and from FBGEMM's ``SplitTableBatchedEmbeddingBagsCodegen``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankkernels._row_optimizer import RowOptimizer
from rankkernels.ops.embedding_bag_update import state_shapes

#: By our kind, FBGEMM's optimizer that takes the same steps, with the same states in the same order.
_THEIRS = {
    "adagrad": "exact_adagrad",
    "rowwise_adagrad": "exact_row_wise_adagrad",
    "adamw": "adam",
    "rowwise_adam": "partial_row_wise_adam",
    "rowwise_rmsprop": "row_wise_rmsprop_ar",
}


def _tables(name: str, optimizer: RowOptimizer, module: Any) -> list[tuple[dict, Tensor, list[Tensor]]]:
    """The optimizer's tables in the order of its params, each with its group and FBGEMM's states of it."""
    ours, theirs = type(optimizer).__name__, str(module.optimizer)
    if _THEIRS.get(optimizer._kind) != theirs:
        raise ValueError(f"{name}: FBGEMM's {theirs} and {ours} have no state in common")
    tables = [(group, p) for group in optimizer.param_groups for p in group["params"]]
    states = module.split_optimizer_states()
    expected = [state_shapes(optimizer._kind, p.shape) for _, p in tables]
    given = [[state.shape for state in of_table] for of_table in states]
    if given != expected:
        raise ValueError(
            f"{name}: the tables must be the same and in the same order: the states of {ours} are of the shapes "
            f"{[[list(shape) for shape in shapes] for shapes in expected]}, FBGEMM's of "
            f"{[[list(shape) for shape in shapes] for shapes in given]}"
        )
    return [(*table, of_table) for table, of_table in zip(tables, states)]


@torch.no_grad()
def to_fbgemm(optimizer: RowOptimizer, module: Any) -> Any:
    """Copies the state of ``optimizer`` into FBGEMM's ``SplitTableBatchedEmbeddingBagsCodegen``; returns it.

    ``module`` has the same tables, in the order of the optimizer's params, and the optimizer EXACT_ADAGRAD for
    ``Adagrad``, EXACT_ROWWISE_ADAGRAD for ``RowWiseAdagrad``, ADAM for ``AdamW``, PARTIAL_ROWWISE_ADAM for
    ``RowWiseAdam`` or ROWWISE_RMSPROP_AR for ``RowWiseRMSprop``. Tables and hyperparameters are not copied.

    Raises:
        ValueError: ``module`` has another optimizer or other tables, or the tables have taken different numbers of
            steps, of which FBGEMM has one for all. It is then as it was.
    """
    tables = _tables("to_fbgemm", optimizer, module)
    states = [optimizer.state.get(p) or {} for _, p, _ in tables]
    counts = {state.get("step", 0) for state in states}
    if len(counts) > 1:
        raise ValueError(f"to_fbgemm: FBGEMM has one number of steps for all tables, here they are {sorted(counts)}")
    for (group, p, theirs), state in zip(tables, states):
        made = state or optimizer._new_state(p, group)
        for name, their in zip(optimizer._states, theirs):
            their.copy_(made[name])
    for counter in (module.iter, getattr(module, "iter_cpu", module.iter)):
        counter.fill_(*counts)
    return module


@torch.no_grad()
def from_fbgemm(optimizer: RowOptimizer, module: Any) -> RowOptimizer:
    """The way back: the state of FBGEMM's ``module``, as ``to_fbgemm`` has it, for ``optimizer``; returns it.

    Raises:
        ValueError: ``module`` has another optimizer or other tables. ``optimizer`` is then as it was.
    """
    count = int(module.iter)
    for group, p, theirs in _tables("from_fbgemm", optimizer, module):
        state = optimizer._new_state(p, group)
        for name, their in zip(optimizer._states, theirs):
            state[name].copy_(their)
        optimizer.state[p] = {"step": count, **state}
    return optimizer
