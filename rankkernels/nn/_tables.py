"""What layers of embedding tables have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn
from torch.compiler import is_compiling

from rankkernels.ops import _exact_table

#: Plans that a module keeps: a model looks one or two lists of features up.
MAX_PLANS = 8


def raise_unscriptable(module: nn.Module) -> NoReturn:
    """What ``torch.jit.script`` is told: it would fail somewhere inside, on Python that it cannot compile."""
    raise NotImplementedError(
        f"torch.jit.script cannot compile rankkernels' {type(module).__name__}, which decides in Python what to call: "
        "use torch.jit.trace, torch.export or torch.onnx.export (docs/export.md)"
    )


class KeepsPlans:
    """A module that looks lists of features up, and makes the plan of a list once."""

    _kept_by_adoption = ("_plans",)
    _plans: tuple[tuple[Any, Any], ...] = ()

    def _plan_of(self, key: Any, make: Callable[[Any], Any]) -> Any:
        """``make(key)``, kept for the lists seen last."""
        for known, plan in self._plans:
            if known == key:
                return plan
        plan = make(key)
        if not is_compiling():
            self._plans = ((key, plan), *self._plans[: MAX_PLANS - 1])
        return plan


class TableLayer(nn.Module):
    """A layer that looks tables up, and lets an optimizer step on them in the backward."""

    fused_optimizer = None  # see rankkernels.optim.fuse

    def __prepare_scriptable__(self):
        raise_unscriptable(self)

    def train(self, mode: bool = True):
        """As of any module. Leaving training brings all rows up to date that lag behind ``optim.Adam(exact=True)``."""
        if not mode and _exact_table.in_use:
            _exact_table.flush_tables(self.parameters())
        return super().train(mode)
