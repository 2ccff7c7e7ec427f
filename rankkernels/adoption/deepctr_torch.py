"""DeepCTR-Torch: its layers keep their classes as bases."""

from __future__ import annotations

from torch import nn

LIBRARY = "DeepCTR-Torch"


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """The class that ``module`` of ``model`` is given, why it is left, or None for what is no layer of theirs."""
    return "no kernel for it" if type(module).__module__.startswith("deepctr_torch.") else None
