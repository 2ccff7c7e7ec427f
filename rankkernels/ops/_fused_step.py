"""When a fused optimizer steps: once a backward, after all lookups, on the tables that it computes gradients for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rankkernels.ops._autograd import check_first_derivative
from rankkernels.ops._features import Features, joined
from rankkernels.ops._schema import nothing
from rankkernels.ops._tracing import is_transformed
from rankkernels.ops.embedding_bag_backward import table_gradients
from rankkernels.ops.embedding_bag_update import BagGradients

_will_run = torch._C._will_engine_execute_node  # of a node, in the backward that is running


class Gradients(Protocol):
    """The gradients of a lookup's results, None for those that autograd has none of."""

    def lookups(self, features: Features) -> list[int]:
        """The features whose lookups get a gradient."""

    def update(self, weights: Sequence[Tensor]) -> tuple[torch._ops.OpOverload, tuple]:
        """The op that steps on ``weights``, and its arguments before the optimizer's states."""

    def of_inputs(self, returned) -> tuple:
        """What that op returned: the gradients of the per-sample weights, a list, and of each other input."""

    def of_lookups(self, features: Features) -> tuple:
        """The gradients of the lookups alone, one a feature, and of each other input: the step can follow apart."""


class Optimizer(Protocol):
    """What a fused step needs of an optimizer: see ``rankkernels.optim``."""

    param_groups: list[dict]
    gates: dict[torch.device, Gate]  # of its tables; emptied when they change

    def fused_step(self, grads: Gradients, weights: Sequence[Tensor], features: Features) -> tuple:
        """Steps on ``weights``, which are distinct. -> the inputs' gradients, as ``Gradients.of_inputs`` has them."""


class _Node(torch.autograd.Function):
    """Lies between all lookups and the tables in every graph. ``probe`` is a private leaf, which only a backward to all
    leaves reaches: ``backward(inputs=...)`` and ``torch.autograd.grad`` do not."""

    @staticmethod
    def forward(ctx, gate, probe, *tables):
        ctx.set_materialize_grads(False)
        ctx.gate = gate
        return probe.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _grad):
        return None, None, *ctx.gate().finish()


class _Pending(NamedTuple):
    """A lookup whose step is left to ``Gate.finish``."""

    grad_outs: list[Tensor | None]
    weights: Sequence[Tensor]
    features: Features


class _Backward(list):
    """The pending lookups of one backward; a list itself has no weak references."""


class Gate:
    """An optimizer's tables on one device, as leaves behind the one node that all their lookups' nodes lead to.

    A lookup that is the only one of a backward steps at once. Several hand their gradients to the node, which autograd
    runs after all of them, and then each table takes one step. In a backward that computes no gradient of a table the
    node does not run.
    """

    def __init__(self, optimizer: Optimizer, tables: Sequence[Tensor]):
        self.optimizer, self.tables = weakref.ref(optimizer), list(tables)
        self.dtypes = {id(table): table.dtype for table in tables}
        self.lookups = weakref.WeakSet()  # nodes of graphs that are alive
        self.backwards = weakref.WeakValueDictionary()  # by the number of autograd's task
        with torch.enable_grad():
            probe = torch.empty(0, device=tables[0].device, requires_grad=True)
            self.anchor = _Node.apply(weakref.ref(self), probe, *tables)
        #: The anchor's gradient: a tensor and not None, so that autograd synchronizes a GPU's streams.
        self.no_grad = self.anchor.detach()
        self.probe, *self.nodes = [node for node, _ in self.anchor.grad_fn.next_functions]

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether all are among its tables, and have the dtypes that they had when it was made."""
        return all(self.dtypes.get(id(w)) is w.dtype for w in weights)

    def is_alone(self, lookup) -> bool:
        """Whether the running backward goes to all leaves and through no lookup but this one."""
        return _will_run(self.probe) and not any(_will_run(other) for other in self.lookups if other is not lookup)

    def add(self, *pending) -> None:
        """Leaves a lookup to ``finish``."""
        task = torch._C._current_graph_task_id()
        lookups = self.backwards.get(task)
        if lookups is None:
            lookups = self.backwards[task] = _Backward()
            # The engine's task owns the list, so a backward that fails drops it.
            torch.autograd.Variable._execution_engine.queue_callback(lookups.clear)
        lookups.append(_Pending(*pending))

    def finish(self) -> list[Tensor | None]:
        """One step with all pending lookups. -> the gradients of the tables that ``torch.autograd.grad`` returns, which
        take no step."""
        lookups, grads = self.backwards.pop(torch._C._current_graph_task_id(), None), nothing(self.tables)
        if not lookups:
            return grads
        grad_outs, weights, features = _as_one(lookups)
        places = {id(table): i for i, table in enumerate(self.tables)}
        stepped, given = set(range(len(weights))), set()
        if not _will_run(self.probe):
            for t, weight in enumerate(weights):
                try:
                    if not _will_run(self.nodes[places[id(weight)]]):
                        stepped.discard(t)
                except RuntimeError:  # the engine's answer for a leaf whose gradient torch.autograd.grad returns
                    stepped.discard(t)
                    given.add(t)

        def of(tables: set[int]) -> BagGradients:
            return BagGradients([g if t in tables else None for g, t in zip(grad_outs, features.tables)])

        if given:
            values, rows = weights if features.need_values() else [], [w.size(0) for w in weights]
            found, _ = table_gradients(of(given).outs, values, rows, features, sparse=False)
            for t in given:
                grads[places[id(weights[t])]] = found[t]
        if of(stepped).lookups(features):
            self.optimizer().fused_step(of(stepped), weights, features)
        return grads


def _as_one(lookups: Sequence[_Pending]) -> _Pending:
    """Several lookups as one, of distinct tables."""
    if len(lookups) == 1:
        return lookups[0]
    features = joined((len(lookup.weights), lookup.features) for lookup in lookups)
    weights = [w for lookup in lookups for w in lookup.weights]
    return _Pending([g for lookup in lookups for g in lookup.grad_outs], *features.of_distinct_tables(weights))


class FusedLookup:
    """One call of a lookup op with an optimizer's step in its backward: what is kept between the two that is no tensor
    of the graph. Each op derives from it and says how it runs and what the gradients of its results are.

    Args:
        weights: the tables, which may repeat.

    Raises:
        ValueError: a table is frozen, has hooks on its gradient, is not among the optimizer's params, or has two
            frozen rows.
        RuntimeError: DistributedDataParallel is to reduce their gradients; forward mode, ``torch.func``. In the
            backward: it is one inside of another.
    """

    op: str

    def __init__(self, optimizer: Optimizer, weights: Sequence[Tensor], features: Features):
        self.optimizer, self.gate = optimizer, _gate_of(optimizer, weights)
        self.weights, self.features = features.of_distinct_tables(weights)
        self.in_backward = torch._C._current_graph_task_id() != -1  # checkpointing runs the forward again

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The op's results. ``inputs`` are those of its arguments beside the tables that may have gradients."""
        return FusedStep.apply(self, self.gate.anchor, *inputs)

    def run(self, *inputs: Tensor | None) -> Sequence[Tensor]:
        """The op's results."""
        raise NotImplementedError

    def saved(self, outs: Sequence[Tensor], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """What ``gradients`` needs of them."""
        return ()

    def gradients(self, grads: Sequence[Tensor | None], saved: Iterator[Tensor | None]) -> tuple[Gradients, tuple]:
        """The gradients of the lookup, and those of ``inputs`` that the step does not return."""
        raise NotImplementedError

    def of_inputs(self, of_per_sample_weights: Sequence[Tensor | None], *others: Tensor | None) -> Sequence:
        """The gradients of ``inputs``, from what the step and ``gradients`` returned."""
        raise NotImplementedError


class FusedStep(torch.autograd.Function):
    """A lookup with an optimizer's step in its backward; the tables get no gradient of their own.

    ``anchor``, the gate's, stands for the tables in the graph: one input and not many.
    """

    @staticmethod
    def forward(ctx, lookup: FusedLookup, anchor, *inputs):
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():  # the op's own autograd would hand the lists on once more
            outs = lookup.run(*inputs)
        features, values = lookup.features, lookup.weights if lookup.features.need_values() else ()
        # Saved tensors must not have changed when the backward reads them; the tables' values may, where it does not.
        ctx.save_for_backward(*features.tensors(), *lookup.saved(outs, *inputs), *values)
        lookup.features = features.without_tensors()
        ctx.lookup = lookup
        lookup.gate.lookups.add(ctx)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        lookup, gate = ctx.lookup, ctx.lookup.gate
        check_first_derivative(f"{lookup.op} with a fused optimizer")
        _, _, *wanted = ctx.needs_input_grad
        if all(g is None for g in grads):
            return None, gate.no_grad, *nothing(wanted)
        if lookup.in_backward:
            raise RuntimeError(
                f"{lookup.op}: a fused optimizer cannot step in a backward inside of a backward, which is what a "
                "checkpoint with use_reentrant=True runs: pieces that follow would look up rows that have stepped. "
                "Checkpoint with use_reentrant=False"
            )
        saved = iter(ctx.saved_tensors)
        features = lookup.features.with_tensors(saved)
        gradients, *rest = lookup.gradients(grads, saved)
        if gate.is_alone(ctx):
            of_inputs = lookup.optimizer.fused_step(gradients, lookup.weights, features)
        else:
            grad_outs, *others = gradients.of_lookups(features)
            gate.add(grad_outs, lookup.weights, features)
            of_inputs = nothing(features.per_sample_weights), *others
            if features.per_sample_weights and any(wanted):
                rows = [w.size(0) for w in lookup.weights]
                _, grad_psw = table_gradients(grad_outs, lookup.weights, rows, features, sparse=True)
                of_inputs = grad_psw, *others
        return None, gate.no_grad, *lookup.of_inputs(*of_inputs, *rest)


def group_of_each(optimizer: Optimizer, weights: Sequence[Tensor]) -> list[dict]:
    """The optimizer's group of each table. Raises a ValueError for one that is frozen or not among its params."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = [group_of.get(id(weight)) for weight in weights]
    for t, (weight, group) in enumerate(zip(weights, groups)):
        if group is None or not weight.requires_grad:
            fault = "is not among its params" if group is None else "is frozen"
            raise ValueError(f"{type(optimizer).__name__}: table {t} of shape {list(weight.shape)} {fault}")
    return groups


def _gate_of(optimizer: Optimizer, weights: Sequence[Tensor]) -> Gate:
    """The gate of ``weights``. Raises as ``FusedLookup`` says."""
    name = type(optimizer).__name__
    if is_transformed():
        raise RuntimeError(
            f"{name}: a fused optimizer steps in an ordinary backward, not in forward mode nor under torch.func"
        )
    _check_not_distributed(name, weights)
    for t, weight in enumerate(weights):
        if not weight.requires_grad:
            raise ValueError(f"{name}: table {t} of shape {list(weight.shape)} is frozen")
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name}: table {t} of shape {list(weight.shape)} has hooks on its gradient, and a fused step makes "
                "none"
            )
    device = weights[0].device
    gate = optimizer.gates.get(device)
    if gate is None or not gate.holds(weights):
        group_of_each(optimizer, weights)
        tables = [p for group in optimizer.param_groups for p in group["params"] if p.device == device]
        gate = optimizer.gates[device] = Gate(optimizer, [p for p in tables if p.requires_grad])
    return gate


def _check_not_distributed(optimizer: str, weights: Sequence[Tensor]) -> None:
    """Raises a RuntimeError in the forward of a DistributedDataParallel that is to reduce the tables' gradients."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None:
        return
    reduced = {id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
    reduced.update(map(id, getattr(ddp, "_delay_all_reduce_params", ())))  # which it counts as ignored
    if any(id(w) in reduced for w in weights):
        raise RuntimeError(
            f"{optimizer}: a fused step sees the gradients of its own process alone, so under "
            "DistributedDataParallel the processes' tables would drift apart; take tables with sparse=True and call "
            "the optimizer's step() instead of rankkernels.optim.fuse"
        )
