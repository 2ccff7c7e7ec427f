"""Steps for which nothing waits: learning rate, number of the step and loss scale stay on the tables' device.

A CUDA graph repeats launches with the arguments that they had. So with ``capturable=True`` these are no arguments, and
with a ``GradScaler`` neither: whether a backward was finite is known on the device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rankkernels.ops.embedding_bag_update import OPTIMIZERS, Live, infinite, is_captured, is_live


class Scaled(NamedTuple):
    """What a step's gradients were multiplied with, None for 1, and whether one of them is infinite, None for no."""

    scale: Tensor | None = None
    infinite: Tensor | None = None


class LiveSteps:
    """What an optimizer has for them. ``capturable``: whether all its steps are such.

    Raises a RuntimeError where another's step, or a first one, would become part of a CUDA graph.
    """

    def __init__(self, optimizer: str, capturable: bool):
        self.optimizer, self.capturable = optimizer, capturable
        self._constants: dict[tuple[torch.device, float], Tensor] = {}

    def _constant(self, value: float, device: torch.device) -> Tensor:
        found = self._constants.get((device, value))
        if found is None:
            if len(self._constants) > 64:  # a schedule's rates
                self._constants.clear()
            found = self._constants[device, value] = torch.full((), value, dtype=torch.float32, device=device)
        return found

    def place(self, group: dict) -> None:
        """The learning rate of a capturable group, as a tensor where graphs read it. Raises a ValueError if its tables
        are not where graphs are."""
        if not self.capturable or not group["params"]:
            return
        first, *others = group["params"]
        if not is_live(group["params"]) or any(p.device != first.device for p in others):
            raise ValueError(f"{self.optimizer}: with capturable=True the tables of a group must be on one GPU")
        group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=first.device)

    def check_capture(self, tables: Sequence[Tensor]) -> None:
        if not self.capturable and is_captured(tables):
            raise RuntimeError(
                f"{self.optimizer}: a CUDA graph would repeat this step's number and learning rate for ever; make the "
                "optimizer with capturable=True"
            )

    def unscaled(self) -> Scaled | float:
        """The scale of gradients that nobody scaled."""
        return Scaled() if self.capturable else 1.0

    def of_fused(
        self, grad_scaler: torch.amp.GradScaler | None, grads: Sequence[Tensor], tables: Sequence[Tensor]
    ) -> Scaled | None:
        """For a step in a backward of a loss that ``grad_scaler`` scaled; None where the host takes part."""
        if grad_scaler is not None and is_live(tables):
            return Scaled(grad_scaler._get_scale_async(), infinite(grads))
        return Scaled() if self.capturable else None

    def of_step(self, optimizer: torch.optim.Optimizer, tables: Sequence[Tensor]) -> Scaled | None:
        """For a step with what ``GradScaler.step`` has set."""
        found = getattr(optimizer, "found_inf", None)
        if self.capturable or (isinstance(found, Tensor) and tables and is_live(tables)):
            return Scaled(getattr(optimizer, "grad_scale", None), found)
        return None

    def calls(self, optimizer: torch.optim.Optimizer, update, scaled: Scaled) -> tuple[list[Callable], list[dict]]:
        """As ``RowOptimizer._calls``; the step itself counts."""
        op, before, params, groups, after = update
        for p, group in zip(params, groups):
            if not optimizer.state.get(p):
                self._check_first(p)
                optimizer.state[p] = {"step": 0, **optimizer._new_state(p, group)}
        states, tensors = [optimizer.state[p] for p in params], []
        for p, group, state in zip(params, groups, states):
            tensors += [state[name] for name in optimizer._states]
            tensors += self._tensors(state, group["lr"], float(group.get("lr_decay", 0.0)), scaled, p)
        given = [(id(group), rounding) for group, rounding in zip(groups, optimizer._roundings(params, groups))]
        distinct = dict(zip(given, groups))
        of_each = {key: optimizer._hyper(group, 0.0, 1, 1.0, key[1]) for key, group in distinct.items()}
        hyper = [number for key in given for number in of_each[key]]
        return [
            partial(op._op, *before, tensors, *after, OPTIMIZERS.index(optimizer._kind), hyper),
            partial(torch.autograd.graph.increment_version, list(params)),
        ], states

    def _tensors(self, state: dict, lr: float | Tensor, decay: float, scaled: Scaled, table: Tensor) -> Live:
        """What the step of ``table`` reads. ``decay``: its rate is lr / (1 + (t - 1) decay) in step t."""
        device, count = table.device, state["step"]
        if not isinstance(count, Tensor) or count.device != device:
            self._check_first(table)
            count = state["step"] = torch.full((), float(count), dtype=torch.float32, device=device)
        lr = lr.to(device, torch.float32) if isinstance(lr, Tensor) else self._constant(float(lr), device)
        lr = lr / (1 + count * decay) if decay else lr
        scale = self._constant(1.0, device) if scaled.scale is None else scaled.scale.to(device)
        skip = self._constant(0.0, device) if scaled.infinite is None else scaled.infinite.to(device)
        return Live(count, lr, scale, skip)

    def _check_first(self, table: Tensor) -> None:
        if is_captured([table]):
            raise RuntimeError(
                f"{self.optimizer}: take a step before a CUDA graph is captured: in it the state is made, and a graph "
                "would make it again each time"
            )
