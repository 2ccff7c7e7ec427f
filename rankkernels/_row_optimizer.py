"""What the optimizers of ``rankkernels.optim`` have in common: their arguments, their state, and when they step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels._exact_adam import ExactSteps, Lists
from rankkernels._live_steps import LiveSteps, Scaled
from rankkernels._settings import check_group
from rankkernels._state_dict import check_form, step_of
from rankkernels.ops._exact_table import as_plain
from rankkernels.ops._exchange import Exchange
from rankkernels.ops._features import Features
from rankkernels.ops._fused_step import Gate, Gradients, group_of_each
from rankkernels.ops._library import use_huge_pages
from rankkernels.ops.embedding_bag_backward import coalesced
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, BagGradients, Hyper, infinite, state_shapes

#: Settings of torch's groups that ours lack; none changes the numbers once _check_kind has passed.
_TORCHS = {"momentum", "dampening", "nesterov", "amsgrad", "maximize", "foreach", "capturable", "differentiable",
           "fused", "decoupled_weight_decay"}  # fmt: skip
#: Settings that say which kind of optimizer it is: a group cannot have others.
_FIXED = ("decoupled_weight_decay",)


class _Update(NamedTuple):
    """A call of an op that steps on ``params``, each of its own group; its arguments are ``before``, the states,
    ``after``, the optimizer and the hyperparameters."""

    op: torch._ops.OpOverload
    before: tuple
    params: Sequence[Tensor]
    groups: Sequence[dict]
    after: tuple


class RowOptimizer(torch.optim.Optimizer):
    """``_kind`` is one of ``OPTIMIZERS``; ``_states`` names what its rule keeps of a table."""

    _step_supports_amp_scaling = True  # GradScaler.step sets grad_scale and found_inf for the time of a step
    grad_scaler: torch.amp.GradScaler | None = None  # of a fused optimizer
    exchange: Exchange | None = None  # of a fused optimizer, with other processes

    _kind: str
    _states: tuple[str, ...] = ()
    _exact: ExactSteps | None = None  # what an optimizer with exact=True does for idle rows

    def __init__(self, params: Iterable, capturable: bool = False, stochastic_rounding: bool = False, **defaults):
        self.gates: dict[torch.device, Gate] = {}
        self._live = LiveSteps(type(self).__name__, capturable)
        super().__init__(params, {**defaults, "stochastic_rounding": stochastic_rounding, "rounding_seed": None})

    def __getstate__(self) -> dict:
        self.flush()
        own = {"exact": self._exact is not None, "capturable": self._live.capturable, "exchange": self.exchange}
        return super().__getstate__() | {"grad_scaler": self.grad_scaler} | own

    def __setstate__(self, state: dict) -> None:
        self.gates, self._live = {}, LiveSteps(type(self).__name__, state.pop("capturable", False))
        exact = state.pop("exact", False)
        super().__setstate__(state)
        if exact:
            self._follow_dense()

    def _follow_dense(self) -> None:
        """Lets the tables follow dense Adam from the state they have. Raises as ``ExactSteps.attach``."""
        exact = ExactSteps(type(self).__name__)
        exact.attach(self.param_groups, self.state)
        self._exact = exact

    def flush(self) -> None:
        """Brings every row up to date; there is something to do with ``exact=True`` alone.

        For readers of a table's memory that torch does not see, and before tables are read by several threads.
        """
        if self._exact is not None:
            self._exact.flush()

    @torch.no_grad()
    def make_state(self) -> None:
        """Makes the state of every table that has taken no step, as it is before its first: a place for what
        ``torch.distributed.checkpoint`` loads. Otherwise a table's first step makes it."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state.get(p):
                    self.state[p] = {"step": 0, **self._new_state(p, group)}

    def state_dict(self) -> dict:
        """As ``torch.optim.Optimizer``, with every row up to date."""
        self.flush()
        return super().state_dict()

    def add_param_group(self, param_group: dict) -> None:
        """As ``torch.optim.Optimizer``. Raises a ValueError, and adds nothing, for what the constructor refuses."""
        groups = list(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            self._draw_seed(self.param_groups[-1])
            self._live.place(self.param_groups[-1])
            if self._exact is not None:
                self._exact.attach(self.param_groups[-1:], self.state)
        except BaseException:
            self.param_groups[:] = groups
            raise
        self.gates.clear()

    @property
    def rounding_seed(self) -> int | None:
        """The seed of stochastic rounding, None before a group asks for it."""
        return next((g["rounding_seed"] for g in self.param_groups if g["rounding_seed"] is not None), None)

    def take_seed(self, seed: int | None) -> None:
        """Rounds with this seed, another process's, from here on."""
        for group in self.param_groups:
            group["rounding_seed"] = seed

    def _draw_seed(self, group: dict) -> None:
        """Gives a group that rounds stochastically the optimizer's seed: torch's generator is asked once, if at all."""
        if group["stochastic_rounding"] and group["rounding_seed"] is None:
            seed, generator = self.rounding_seed, torch.default_generator
            if seed is None:
                seed = int(torch.randint(2**32, (), generator=generator, device=generator.device))
            group["rounding_seed"] = seed

    def _check(self, group: dict) -> None:
        """Raises as ``check_group``."""
        check_group(type(self).__name__, group, bool(self._states))

    def _new_state(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """The state's tensors for ``p``. A row's two elementwise ones are adjacent in memory, so that a step finds them
        in one place: they are views of one tensor."""
        rule, value = RULES[self._kind], float(group.get("initial_accumulator_value", 0.0))
        shapes = [(p.shape[0], rule.elementwise, *p.shape[1:])] if rule.elementwise else []
        shapes += [(p.shape[0], 1)] * rule.row_wise
        dtype = torch.promote_types(p.dtype, torch.float32)
        wholes = [torch.full(shape, value, dtype=dtype, device=p.device) for shape in shapes]
        for whole in wholes:
            use_huge_pages(whole)
        return dict(zip(self._states, (state for whole in wholes for state in whole.unbind(1))))

    def _roundings(self, params: Sequence[Tensor], groups: Sequence[dict]) -> list[float]:
        """How each of these tables is rounded, ``Hyper.rounding``. The number of a table among all that the optimizer
        has is in the key, so that equal rows of two tables are rounded apart."""
        if not any(group["stochastic_rounding"] for group in groups):
            return [0.0] * len(params)
        every = (p for group in self.param_groups for p in group["params"])
        number = {id(p): i for i, p in enumerate(every, 1)}
        return [
            float(number[id(p)] << 32 | group["rounding_seed"])
            if group["stochastic_rounding"] and p.element_size() == 2
            else 0.0
            for p, group in zip(params, groups)
        ]

    def _hyper(self, group: dict, rate: float, step: int, scale: float, rounding: float) -> tuple[float, ...]:
        """What a step takes, for a gradient times ``scale``."""
        beta1, beta2 = group.get("betas", (0.0, group.get("ema_beta", 0.0)))
        common = Hyper(
            rate, float(beta1), float(beta2), float(group.get("eps", 0.0)),
            float(group.get("weight_decay", 0.0)), float(step), 1 / scale, float(group["max_row_norm"] or 0.0),
            rounding,
        )  # fmt: skip
        return (*common, *(float(group[name]) for name in RULES[self._kind].settings))

    def _calls(self, update: _Update, scale: float | Scaled, exact: Lists | None) -> tuple[list[Callable], list[dict]]:
        """The step of an update and its counts, calls of C of which the first is the op's, and its tables' states."""
        if isinstance(scale, Scaled):
            return self._live.calls(self, update, scale)
        op, before, params, groups, after = update
        states = [self.state.get(p) for p in params]
        new = {t: {"step": 0, **self._new_state(params[t], groups[t])} for t, state in enumerate(states) if not state}
        states = [new.get(t, state) for t, state in enumerate(states)] if new else states
        counts, hyper, hypers = [int(state["step"]) + 1 for state in states], [], {}
        for group, count, rounding in zip(groups, counts, self._roundings(params, groups)):
            key = id(group), count, rounding  # mostly one for all tables
            if key not in hypers:
                hypers[key] = self._hyper(group, self._learning_rate(group, count), count, scale, rounding)
            hyper += hypers[key]
        tensors = [state[name] for state in states for name in self._states]
        # Dense Adam's formula is AdamW's; SparseAdam's has eps at another place.
        rule = OPTIMIZERS.index(self._kind if self._exact is None else "adamw")
        step = partial(op._op, *before, tensors, *after, rule, hyper)
        return [
            exact.step(before, tensors, after, hyper) if exact is not None and exact.by_itself else step,
            partial(list, map(dict.__setitem__, states, repeat("step"), counts)),
            *(partial(self.state.__setitem__, params[t], state) for t, state in new.items()),
            partial(torch.autograd.graph.increment_version, list(params)),
        ], states

    def _apply(self, updates: Sequence[_Update], scale: float | Scaled, touched: Features) -> list:
        """Runs updates -> what their ops return. ``touched`` are the lookups whose gradients they take.

        The steps and their counts are one call of C: an interrupt (Ctrl-C) comes before all or after all. If an op
        raises, nothing of its own has changed.
        """
        params = [p for update in updates for p in update.params]
        groups = [group for update in updates for group in update.groups]
        self._live.check_capture(params)
        exact = None
        if self._exact is not None:
            exact = self._exact.before(params, groups, [update.op for update in updates], touched)
        calls, states, firsts = [], [], []
        for update in updates:
            firsts.append(len(calls))
            own, of_tables = self._calls(update, scale, exact)
            calls += own
            states += of_tables
        if exact is not None:
            calls += self._exact.after(params, groups, states, exact, touched)
        try:
            returned = list(map(partial.__call__, calls))
        except RuntimeError:
            for p in params:
                self._check_state(p)
            raise
        return [returned[i] for i in firsts]

    def _learning_rate(self, group: dict, step: int) -> float:
        return float(group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step on the rows of every sparse gradient.

        Raises:
            RuntimeError: a gradient is dense: every row of it would have to be touched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not given:
            return loss
        scale = None if self._exact is not None else self._live.of_step(self, [p for p, _ in given])
        if scale is None and float(getattr(self, "found_inf", 0)) > 0:
            return loss
        if scale is None:  # a grad_scale of None: the scaler has divided by it
            scale = 1.0 if getattr(self, "grad_scale", None) is None else float(self.grad_scale)
        for p, _ in given:
            if not p.grad.is_sparse:
                raise RuntimeError(
                    f"{type(self).__name__}: the gradient of a table of shape {list(p.shape)} is dense; make it "
                    "with sparse=True, or take torch.optim's"
                )
            if p.grad.sparse_dim() != 1:
                raise RuntimeError(
                    f"{type(self).__name__}: the gradient of a table of shape {list(p.shape)} must have rows of values "
                    f"and so one sparse dimension, got {p.grad.sparse_dim()}"
                )
            self._check_state(p)
        grads = [coalesced(p.grad) for p, _ in given]
        op, T = torch.ops.rankkernels.sparse_update.default, len(given)
        updates = [_Update(op, (p,), [p], [group], grad) for (p, group), grad in zip(given, grads)]
        touched = Features([rows for rows, _ in grads], [], [], list(range(T)), [0] * T, [-1] * T, [-1] * T)
        with self._as_plain():
            self._apply(updates, scale, touched)
        return loss

    def _as_plain(self):
        """Within, tables under exact Adam are read as they are."""
        return nullcontext() if self._exact is None else as_plain()

    def _check_state(self, p: Tensor) -> None:
        """Raises a RuntimeError if ``p`` has another shape, dtype or device than when its state was made."""
        dtype = torch.promote_types(p.dtype, torch.float32)
        for name, shape in zip(self._states, state_shapes(self._kind, p.shape)) if self.state.get(p) else ():
            state = self.state[p][name]
            if state.shape != shape:
                raise RuntimeError(
                    f"{type(self).__name__}: a table of shape {list(p.shape)} has {name} of shape {list(state.shape)}: "
                    "it was replaced after its state was made"
                )
            if state.dtype != dtype or state.device != p.device:
                raise RuntimeError(
                    f"{type(self).__name__}: a table of {p.dtype} on {p.device} has {name} of {state.dtype} on "
                    f"{state.device}: it was moved after its state was made; "
                    "optimizer.load_state_dict(optimizer.state_dict()) takes the state along"
                )

    @torch.no_grad()
    def fused_step(self, grads: Gradients, weights: Sequence[Tensor], features: Features) -> tuple:
        """The step in the backward of a lookup, see ``rankkernels.ops._fused_step.Optimizer``."""
        self._opt_called = True  # as step() does for learning-rate schedulers, which warn without it
        with self._as_plain():
            groups, lookups = group_of_each(self, weights), grads.lookups(features)
            scaled = self.grad_scaler is not None and self.grad_scaler.is_enabled()
            every = len(lookups) == len(features.indices)
            stepped = set(features.tables if every else [features.tables[f] for f in lookups])
            if scaled or len(stepped) < len(weights) or (self._exact and not every):
                grad_outs, *others = grads.of_lookups(features)
                return self._partial_step(grad_outs, weights, groups, features, scaled), *others
            update = _Update(*grads.update(weights), weights, groups, features)
            (returned,) = self._apply([update], self._live.unscaled(), features)
            return grads.of_inputs(returned)

    def _partial_step(
        self, grad_outs: Sequence[Tensor | None], weights: Sequence[Tensor], groups: Sequence[dict], features: Features,
        scaled: bool,
    ) -> list[Tensor]:  # fmt: skip
        """A step of the tables that have a gradient, none if ``scaled`` ones are not finite. -> the gradients of the
        per-sample weights."""
        of_factors = [torch.zeros_like(w) for w in features.per_sample_weights]
        kept = [f for f, g in enumerate(grad_outs) if g is not None]
        grads = [grad_outs[f] for f in kept]
        scale = None if self._exact else self._live.of_fused(self.grad_scaler if scaled else None, grads, weights)
        if scale is None:
            if scaled and bool(infinite(grads)):
                return of_factors
            scale = self.grad_scaler.get_scale() if scaled else 1.0
        tables, of_kept = features.subset(kept)
        weights, groups = [weights[t] for t in tables], [groups[t] for t in tables]
        update = _Update(*BagGradients(grads).update(weights), weights, groups, of_kept)
        (returned,) = self._apply([update], scale, of_kept)
        of_returned = dict(zip(kept, returned))
        return [of_returned.get(f, zeros) for f, zeros in enumerate(of_factors)]

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As ``torch.optim.Optimizer``, but state keeps its precision where the tables have less.

        Takes that of torch's optimizer of the same name (``SparseAdam`` for ``Adam``) over the same tables, too; what
        it does not say, like a weight decay for ``SparseAdam``, stays as it was given to this optimizer.

        Raises:
            ValueError: it is no state_dict, or of an optimizer of another kind, or of one with momentum, amsgrad or
                maximize, or has hyperparameters that the constructor refuses. The optimizer is then as it was.
        """
        check_form(type(self).__name__, state_dict)
        self._check_kind(state_dict["param_groups"])
        self.flush()
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(state_dict)
            ids = [i for group in state_dict["param_groups"] for i in group["params"]]
            groups = [self._merged(group, old) for group, old in zip(self.param_groups, before["param_groups"])]
            self.param_groups[:] = groups
            group_of = [(p, group) for group in groups for p in group["params"]]
            for i, (p, group) in zip(ids, group_of):
                if saved := state_dict["state"].get(i):
                    self.state[p] = self._loaded(i, p, group, saved)
            if self._exact is not None:
                self._follow_dense()
        except BaseException:
            self.__dict__.update(before)
            raise

    def _check_kind(self, groups: Sequence[dict]) -> None:
        """Raises a ValueError for groups of another kind of optimizer, which goes by the names in them."""
        for group in groups:
            for name in ("momentum", "amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"{type(self).__name__}: there is no {name} here, the state to load has it")
            ours = "max_row_norm" in group
            if not (ours or self._is_torchs(set(group))) or any(
                name in self.defaults and name in group and group[name] != self.defaults[name] for name in _FIXED
            ):
                raise ValueError(
                    f"{type(self).__name__}: the state to load is of an optimizer of another kind, with "
                    + ", ".join(f"{name} {value}" for name, value in group.items() if name != "params")
                )

    @staticmethod
    def _is_torchs(names: set[str]) -> bool:
        """Whether a group with these names is of torch's optimizer of this kind."""
        return False

    def _merged(self, group: dict, old: dict) -> dict:
        """A loaded group without what only torch's optimizers have, and with what they have not, checked."""
        group = {**old, **{name: value for name, value in group.items() if name in old or name not in _TORCHS}}
        self._check(group)
        self._draw_seed(group)
        self._live.place(group)
        return group

    def _loaded(self, i: int, p: Tensor, group: dict, saved: dict) -> dict:
        """The state of ``p`` from a saved one. Raises a ValueError if that is of another kind."""
        shapes = dict(zip(self._states, state_shapes(self._kind, p.shape)))
        count = step_of(type(self).__name__, i, saved, shapes)
        state = self._new_state(p, group)
        for name in self._states:
            state[name].copy_(saved[name])
        return {"step": count, **state}
