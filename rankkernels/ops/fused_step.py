"""When a fused optimizer steps: once a backward, after all lookups of its tables, on those a gradient is asked for."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rankkernels.ops.embedding_bag import distinct, needs_values, table_gradients

if TYPE_CHECKING:
    from rankkernels.ops.embedding_bag import Optimizer

_runs = torch._C._will_engine_execute_node  # in the backward that is going on


class _Node(torch.autograd.Function):
    """Lies between the lookups and the tables in every graph; ``asked_of_all`` is a leaf that nobody can ask for."""

    @staticmethod
    def forward(ctx, gate, asked_of_all, *tables):
        ctx.set_materialize_grads(False)
        ctx.gate = gate
        return asked_of_all.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _grad):
        return None, None, *ctx.gate().finish()


class _Lookup(NamedTuple):
    """The gradients that a lookup's backward was given, and the op's other arguments."""

    grad_outs: list
    weights: Sequence[Tensor]
    lists: Sequence
    features: Sequence


class _Backward(list):
    """The lookups of one backward."""


class Gate:
    """An optimizer's tables on one device, as leaves behind the one node that all their lookups' nodes lead to.

    A lookup that is the only one of a backward steps at once. Several hand their gradients to the node, which autograd
    runs after all of them, and then a table's are one step. The node does not run where no table is asked for.
    """

    def __init__(self, optimizer: Optimizer, tables: Sequence[Tensor]):
        self.optimizer, self.tables = weakref.ref(optimizer), list(tables)
        self.dtypes = {id(table): table.dtype for table in tables}
        self.lookups = weakref.WeakSet()  # nodes of graphs that are alive
        self.backwards = weakref.WeakValueDictionary()  # by the number of autograd's task
        with torch.enable_grad():
            asked_of_all = torch.empty(0, device=tables[0].device, requires_grad=True)
            self.anchor = _Node.apply(weakref.ref(self), asked_of_all, *tables)
        #: What a lookup's backward gives for it: a tensor, so that autograd has streams of a GPU wait for each other.
        self.no_grad = self.anchor.detach()
        self.asked_of_all, *self.nodes = [node for node, _ in self.anchor.grad_fn.next_functions]

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether all are among its tables, and these as they were when it was made."""
        return all(self.dtypes.get(id(w)) is w.dtype for w in weights)

    def alone(self, lookup) -> bool:
        """Whether the backward that is going on asks for every table, and runs no lookup but this node's."""
        return _runs(self.asked_of_all) and not any(_runs(other) for other in self.lookups if other is not lookup)

    def add(self, *lookup) -> None:
        """Leaves a lookup to ``finish``."""
        task = torch._C._current_graph_task_id()
        lookups = self.backwards.get(task)
        if lookups is None:
            lookups = self.backwards[task] = _Backward()
            # Held by autograd's task, so that they are gone with it when the backward fails.
            torch.autograd.Variable._execution_engine.queue_callback(lookups.clear)
        lookups.append(_Lookup(*lookup))

    def finish(self) -> list[Tensor | None]:
        """One step with all lookups of the backward. -> the gradients of tables that ``torch.autograd.grad`` is to give
        back, which take no step."""
        lookups, grads = self.backwards.pop(torch._C._current_graph_task_id(), None), [None] * len(self.tables)
        if not lookups:
            return grads
        grad_outs, weights, lists, features = _joined(lookups)
        places = {id(table): i for i, table in enumerate(self.tables)}
        stepped, given = set(range(len(weights))), set()
        if not _runs(self.asked_of_all):
            for t, weight in enumerate(weights):
                try:
                    if not _runs(self.nodes[places[id(weight)]]):
                        stepped.discard(t)
                except RuntimeError:  # autograd's answer for a leaf whose gradient it gives back
                    stepped.discard(t)
                    given.add(t)

        def of(tables):
            return [g if t in tables else None for g, t in zip(grad_outs, features[0])]

        if given:
            values = weights if needs_values(features[1], lists[2]) else []
            found, _ = table_gradients(of(given), values, [w.size(0) for w in weights], lists, features, sparse=False)
            for t in given:
                grads[places[id(weights[t])]] = found[t]
        if any(g is not None for g in of(stepped)):
            self.optimizer().update(of(stepped), weights, lists, features)
        return grads


def _joined(lookups: Sequence[_Lookup]) -> _Lookup:
    """Lookups as one, of distinct tables."""
    if len(lookups) == 1:
        return lookups[0]
    absent = lookups[0].lists[0][0].new_empty(0)
    weights, grad_outs, tables, frozen_rows = [], [], [], []
    lists, features = ([], [], []), ([], [])
    for lookup in lookups:
        tables += [len(weights) + t for t in lookup.features[0]]
        weights += lookup.weights
        grad_outs += lookup.grad_outs
        frozen_rows += lookup.features[3]
        for joined, values in zip(lists, lookup.lists):
            joined += values or [absent] * len(lookup.grad_outs)
        for joined, values in zip(features, lookup.features[1:3]):
            joined += values
    lists = [values if any(k.lists[i] for k in lookups) else [] for i, values in enumerate(lists)][1:]
    weights, tables, frozen_rows = distinct(weights, tables, frozen_rows)
    return _Lookup(
        grad_outs, weights, [sum((list(k.lists[0]) for k in lookups), []), *lists], (tables, *features, frozen_rows)
    )


def check_not_distributed(optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
    """Raises a RuntimeError in the forward of a DistributedDataParallel that is to reduce the tables' gradients."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    reduced = {id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
    if any(id(w) in reduced for w in weights):
        raise RuntimeError(
            f"{type(optimizer).__name__}: a fused step sees the gradients of its own process alone, so under "
            "DistributedDataParallel the processes' tables would drift apart; take tables with sparse=True and call "
            "the optimizer's step() instead of rankkernels.optim.fuse"
        )
