"""Fused layers inside a model that is already built."""

from __future__ import annotations

from torch import nn

from rankkernels import models
from rankkernels.nn import FM, LR, MLP, ActivationUnit, Dice, EmbeddingLayer
from rankkernels.nn.embedding import InputMask

# Ours have the attributes, parameters and submodules of their namesakes, so that an object can change its class.
_NAMESAKES = {
    cls.__name__: cls
    for cls in (FM, LR, MLP, Dice, EmbeddingLayer, InputMask, ActivationUnit, models.DeepFM, models.DIN)
}


def accelerate(model: nn.Module) -> nn.Module:
    """Makes every torch-rechub layer in ``model`` that has a fused namesake one of ours, in place; returns ``model``.

    Parameters, buffers, hooks and optimizers that hold them stay what they are, and so do the numbers. Subclasses of
    torch-rechub's layers are left alone: only their author knows what they changed. Twice is once.

    Raises:
        ValueError: ``model`` has neither such a layer nor one of ours.
    """
    found = False
    for module in model.modules():
        cls = type(module)
        if cls.__module__.startswith("torch_rechub.") and cls.__name__ in _NAMESAKES:
            module.__class__ = _NAMESAKES[cls.__name__]
        found |= type(module) in _NAMESAKES.values()
    if not found:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no torch-rechub layer among {', '.join(sorted(_NAMESAKES))}"
        )
    return model
