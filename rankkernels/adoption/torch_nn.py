"""torch's own layers, wherever they are."""

from __future__ import annotations

from torch import nn

from rankkernels.nn import EmbeddingBag

LIBRARY = "torch"


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """The class that ``module`` of ``model`` is given, why it is left, or None for what is no layer of ours."""
    return EmbeddingBag if type(module) is nn.EmbeddingBag else None
