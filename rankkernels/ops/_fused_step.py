"""When a fused optimizer steps: once a backward, after all lookups, on the tables that it computes gradients for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rankkernels.ops._autograd import check_first_derivative
from rankkernels.ops._exact_table import any_exact, were_flushed
from rankkernels.ops._exchange import Exchange
from rankkernels.ops._features import MODES, Features, joined
from rankkernels.ops._schema import nothing
from rankkernels.ops._tracing import is_transformed
from rankkernels.ops.embedding_bag_backward import coalesced, table_gradients
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
    exchange: Exchange | None  # with other processes, None: it was never asked

    def flush(self) -> None:
        """Brings every row up to date."""

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
    node does not run. With other processes to exchange with, that step comes at the end of the backward.
    """

    def __init__(self, optimizer: Optimizer, tables: Sequence[Tensor]):
        self.optimizer, self.tables = weakref.ref(optimizer), list(tables)
        exchange = optimizer.exchange
        self.exchange = exchange if exchange is not None and exchange.is_needed() else None
        self.ddp = lambda: None  # that has been found to leave the tables out, weakly
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
        """Whether the running backward goes to all leaves and through no lookup but this one, of any process."""
        if self.exchange is not None:
            return False
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

    def _asked(self) -> tuple[set[int], set[int]]:
        """The numbers of the tables that take a step in the running backward, and of those whose gradient
        ``torch.autograd.grad`` returns."""
        if _will_run(self.probe):
            return set(range(len(self.tables))), set()
        stepped, given = set(), set()
        for t, node in enumerate(self.nodes):
            try:
                if _will_run(node):
                    stepped.add(t)
            except RuntimeError:  # the engine's answer for a leaf whose gradient torch.autograd.grad returns
                given.add(t)
        return stepped, given

    def finish(self) -> list[Tensor | None]:
        """One step with all pending lookups. -> the gradients of the tables that ``torch.autograd.grad`` returns, which
        take no step."""
        lookups, grads = self.backwards.pop(torch._C._current_graph_task_id(), None), nothing(self.tables)
        if not lookups and self.exchange is None:
            return grads
        stepped, given = self._asked()
        grad_outs, weights, features = _as_one(lookups or [])
        places = {id(table): i for i, table in enumerate(self.tables)}
        number = [places[id(w)] for w in weights]

        def of(tables: set[int]) -> BagGradients:
            return BagGradients([g if number[t] in tables else None for g, t in zip(grad_outs, features.tables)])

        def gradients_of(tables: set[int], sparse: bool) -> list[Tensor | None]:
            values, rows = weights if features.need_values() else [], [w.size(0) for w in weights]
            found, _ = table_gradients(of(tables).outs, values, rows, features, sparse)
            of_number = dict(zip(number, found))
            return [of_number.get(t) if t in tables else None for t in range(len(self.tables))]

        if given:
            grads = gradients_of(given, sparse=False)
        if self.exchange is not None and stepped:
            frozen = dict(zip(number, features.frozen_rows)) if any_exact(self.tables) else {}
            self.exchange.at_the_end(partial(self._step_together, gradients_of(stepped, sparse=True), frozen))
        elif of(stepped).lookups(features):
            self.optimizer().fused_step(of(stepped), weights, features)
        return grads

    def _step_together(self, grads: Sequence[Tensor | None], frozen: dict[int, int]) -> None:
        """A step with the gradients that all processes have, here sparse ones: their rows are looked up once more.

        ``frozen`` rows, of tables under exact Adam, were brought up to date by lookups of some processes alone. With
        the gradient 0 that dense Adam has for them they are so in all.
        """
        optimizer = self.optimizer()
        rows, values = map(list, zip(*((None, None) if g is None else coalesced(g) for g in grads)))
        for t, row in frozen.items():
            if row >= 0 and rows[t] is not None:
                rows[t] = torch.cat([rows[t], rows[t].new_tensor([row])])
                values[t] = torch.cat([values[t], values[t].new_zeros(1, values[t].size(1))])
        rows, values, flushed = self.exchange.gather(self.tables, rows, values, were_flushed(self.tables))
        if flushed:  # by one of them: rounded alike, the tables keep the same bits
            optimizer.flush()
        stepped = [t for t, r in enumerate(rows) if r is not None]
        if stepped:
            n, none = len(stepped), [-1] * len(stepped)
            ids, modes = [rows[t] for t in stepped], [MODES.index("none")] * n
            features = Features(ids, [], [], list(range(n)), modes, none, none)
            optimizer.fused_step(
                BagGradients([values[t] for t in stepped]), [self.tables[t] for t in stepped], features
            )


def _as_one(lookups: Sequence[_Pending]) -> _Pending:
    """Any number of lookups as one, of distinct tables."""
    if len(lookups) == 1:
        return lookups[0]
    if not lookups:
        return _Pending([], [], Features([], [], [], [], [], [], []))
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
        RuntimeError: DistributedDataParallel is to reduce their gradients, or among other processes; forward mode,
            ``torch.func``. In the backward: it is one inside of another.
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
        tables = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        gate = Gate(optimizer, [p for p in tables if p.device == device])
        if gate.exchange is not None and len(gate.tables) < len(tables):
            raise RuntimeError(f"{name}: where processes exchange gradients all tables must be on one device")
        optimizer.gates[device] = gate
    if DistributedDataParallel._active_ddp_module is not None:
        _check_distributed(name, gate, DistributedDataParallel._active_ddp_module)
    return gate


def _check_distributed(optimizer: str, gate: Gate, ddp: DistributedDataParallel) -> None:
    """Raises a RuntimeError in the forward of a DistributedDataParallel that does not leave the tables to ``gate``."""
    if gate.exchange is not None and ddp._join_config.enable:
        raise RuntimeError(
            f"{optimizer}: DistributedDataParallel.join cannot stand in for a fused step; give processes whose data "
            "have ended empty batches"
        )
    if gate.ddp() is ddp:
        return
    reduced = {id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
    reduced.update(map(id, getattr(ddp, "_delay_all_reduce_params", ())))  # which it counts as ignored
    if any(id(table) in reduced for table in gate.tables):
        raise RuntimeError(
            f"{optimizer}: DistributedDataParallel waits for gradients of the tables, and a fused step makes none. "
            "rankkernels.optim.fuse, which exchanges them itself, comes after init_process_group and before "
            "DistributedDataParallel, and takes the module that this wraps; or take tables with sparse=True and call "
            "the optimizer's step()"
        )
    if gate.exchange is not None and gate.exchange.ranks != dist.get_process_group_ranks(ddp.process_group):
        raise RuntimeError(
            f"{optimizer}: the tables' gradients go to the ranks {gate.exchange.ranks} and DistributedDataParallel's "
            f"to {dist.get_process_group_ranks(ddp.process_group)}: give rankkernels.optim.fuse its process_group"
        )
    gate.ddp = weakref.ref(ddp)
