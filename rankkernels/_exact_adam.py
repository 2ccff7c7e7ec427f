"""Dense Adam's trajectory from the rows that batches touch: what an optimizer does for it before and after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops._exact_table import Ledger, StepHistory, attach, catch_up, flush
from rankkernels.ops._features import Features
from rankkernels.ops._idle_steps import truncation

_ops = torch.ops.rankkernels
#: The largest relative error that the series in place of idle steps may have.
MOST_TRUNCATION = 1e-5


class Lists(NamedTuple):
    """Of the tables of a step: their rows' last steps, histories and clocks, as the ops take them. ``by_itself``: the
    step's op brings the rows up to date and marks them."""

    by_itself: bool
    last_steps: list[Tensor]
    histories: list[Tensor]
    clocks: list[float]

    def step(self, before: tuple, states: list[Tensor], features: Features, hyper: list[float]) -> Callable:
        """The call of the op that does so."""
        op = _ops.embedding_bag_exact_update.default._op
        return partial(op, *before, states, self.last_steps, self.histories, *features, hyper, self.clocks)


def _settings(group: dict) -> tuple[tuple[float, float], float]:
    """What all steps of a history have in common: betas and eps."""
    beta1, beta2 = group["betas"]
    return (float(beta1), float(beta2)), float(group["eps"])


def _moments(state: dict) -> tuple[Tensor, Tensor]:
    return state["exp_avg"], state["exp_avg_sq"]


class ExactSteps:
    """The tables of one optimizer, whose ``name`` errors begin with. Those of a group share a history for as long as
    they step together."""

    def __init__(self, name: str):
        self.name = name
        self.ledgers: dict[Tensor, Ledger] = {}

    def _check(self, group: dict) -> None:
        """Raises a ValueError for hyperparameters that leave an idle row no trajectory in closed form."""
        if group["stochastic_rounding"]:
            raise ValueError(
                f"{self.name}: with exact=True stochastic_rounding must be False: rows would not be where dense Adam "
                "has them"
            )
        decay = float(group["weight_decay"])
        if decay and not group["decoupled_weight_decay"]:
            raise ValueError(
                f"{self.name}: with exact=True weight_decay must be 0, got {decay}: coupled, it is a gradient of every "
                "row in every step; AdamW's is decoupled"
            )
        if float(group["lr"]) * decay >= 1:
            raise ValueError(f"{self.name}: with exact=True lr weight_decay must be below 1, got {group['lr']} {decay}")

    def _check_betas(self, betas: tuple[float, float]) -> None:
        if not truncation(*betas) <= MOST_TRUNCATION:
            raise ValueError(
                f"{self.name}: with exact=True the second of betas must fade much more slowly than the first, as in "
                f"(0.9, 0.999) or (0.8, 0.99), got {betas}"
            )

    def attach(self, groups: Iterable[dict], state: dict) -> None:
        """Lets the groups' tables follow dense Adam from here on. Those that have a state are as of its step."""
        for group in groups:
            (betas, eps), histories = _settings(group), {}
            self._check(group)
            self._check_betas(betas)
            for p in group["params"]:
                step = state[p]["step"] if state.get(p) else 0
                if step not in histories:
                    histories[step] = StepHistory(betas, eps, step)
                ledger = self.ledgers[p] = attach(p, histories[step])
                if step:
                    ledger.states = m, v = _moments(state[p])
                    ledger.last_steps = torch.where((m != 0).any(1) | (v != 0).any(1), step, -step).int()

    def flush(self) -> None:
        """Brings every row up to date. What follows does not depend on the steps before: it is as after a restart."""
        flush(self.ledgers.values())
        for history in {id(ledger.history): ledger.history for ledger in self.ledgers.values()}.values():
            history.begin_again(history.betas, history.eps)

    def before(
        self, params: Sequence[Tensor], groups: Sequence[dict], ops: Sequence[Callable], touched: Features
    ) -> Lists:
        """Makes room for a step of these tables by ``ops`` in their histories, and brings the rows up to date that it
        moves, unless there is an op for both."""
        together: dict[tuple[int, torch.device], list[Ledger]] = {}
        settings = {}
        for group in groups:
            if id(group) not in settings:
                self._check(group)
                settings[id(group)] = _settings(group)
        for p, group in zip(params, groups):
            ledger, (betas, eps) = self.ledgers[p], settings[id(group)]
            if p.ledger is not ledger:
                raise RuntimeError(f"{self.name}: a table of shape {list(p.shape)} is another optimizer's by now")
            if (betas, eps) != (ledger.history.betas, ledger.history.eps):
                self._check_betas(betas)
                ledger.history.begin_again(betas, eps)
            together.setdefault((id(ledger.history), p.device), []).append(ledger)
        for (_, device), ledgers in together.items():
            history = ledgers[0].history
            if len(ledgers) < len(history.ledgers):
                history = history.fork(ledgers)
            history.make_room(device)
        by_itself = list(ops) == [_ops.embedding_bag_update.default] and not touched.need_values()
        if not by_itself:
            catch_up(params, touched)
        histories, last_steps = [self.ledgers[p].history for p in params], [self.ledgers[p].last_steps for p in params]
        for i, p in enumerate(params):
            if last_steps[i] is None:
                last_steps[i] = torch.zeros(p.shape[:1], dtype=torch.int32, device=p.device)
        clocks = [number for history in histories for number in history.clock()]
        return Lists(by_itself, last_steps, [history.numbers for history in histories], clocks)

    def after(
        self, params: Sequence[Tensor], groups: Sequence[dict], states: Sequence[dict], lists: Lists, touched: Features
    ) -> list[Callable]:
        """What follows a step on rows of ``params``, from the lookups whose gradients it took: calls of C."""
        begins, adds, steps = [], {}, []
        for p, group, state, last in zip(params, groups, states, lists.last_steps):
            ledger = self.ledgers[p]
            if ledger.last_steps is None:
                begins.append(partial(ledger.__dict__.update, states=_moments(state), last_steps=last))
            steps.append(ledger.history.step + 1)
            adds[id(ledger.history)] = ledger.history, group
        if not lists.by_itself:
            begins.append(partial(_ops.embedding_mark_steps.default._op, lists.last_steps, *touched, steps))
        of_histories = [history.add(float(g["lr"]), float(g["weight_decay"])) for history, g in adds.values()]
        return [*begins, *(call for calls in of_histories for call in calls)]
