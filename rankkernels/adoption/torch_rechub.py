"""torch-rechub: a layer with a namesake of ours becomes one."""

from __future__ import annotations

from torch import nn

from rankkernels import models
from rankkernels.nn import FM, LR, MLP, ActivationUnit, Dice, EmbeddingLayer
from rankkernels.nn.embedding import InputMask

LIBRARY = "torch-rechub"

# Ours have the attributes, parameters and submodules of their namesakes, so that an object can change its class.
_NAMESAKES = {
    f"torch_rechub.{module}.{cls.__name__}": cls
    for module, classes in {
        "basic.layers": (FM, LR, MLP, EmbeddingLayer, InputMask),
        "basic.activation": (Dice,),
        "models.ranking.din": (ActivationUnit, models.DIN),
        "models.ranking.deepfm": (models.DeepFM,),
    }.items()
    for cls in classes
}


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """The class that ``module`` of ``model`` is given, why it is left, or None for what is no layer of theirs."""
    cls = type(module)
    if (ours := _NAMESAKES.get(_name(cls))) is not None:
        return ours
    if cls.__module__.startswith("torch_rechub.models."):
        return "its own forward runs, over the layers below"
    if cls.__module__.startswith("torch_rechub."):
        return "no kernel for it"
    if base := next((b for b in cls.__mro__ if _name(b) in _NAMESAKES), None):
        return f"a subclass of {base.__name__}: only its author knows what it changes"
    return None
