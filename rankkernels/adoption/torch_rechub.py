"""torch-rechub: a layer with a namesake of ours becomes one."""

from __future__ import annotations

from torch import nn

from rankkernels import models
from rankkernels.adoption._report import name_of, why_subclass_is_left
from rankkernels.models.dcn import RegulationModule
from rankkernels.nn import (
    FFM,
    FM,
    LR,
    MLP,
    ActivationUnit,
    BiLinearInteractionLayer,
    CrossLayer,
    CrossNetMix,
    CrossNetV2,
    CrossNetwork,
    Dice,
    EmbeddingLayer,
)
from rankkernels.nn.embedding import InputMask
from rankkernels.nn.recurrent import AUGRU, AUGRU_Cell
from rankkernels.nn.target_attention import InteractingLayer

LIBRARY = "torch-rechub"
_INTERACTIONS = FFM, BiLinearInteractionLayer, CrossLayer, CrossNetMix, CrossNetV2, CrossNetwork

# Ours have the attributes, parameters and submodules of their namesakes, so that an object can change its class.
_NAMESAKES = {
    f"torch_rechub.{module}.{cls.__name__}": cls
    for module, classes in {
        "basic.layers": (FM, LR, MLP, EmbeddingLayer, InputMask, InteractingLayer, *_INTERACTIONS),
        "basic.activation": (Dice,),
        "models.ranking.din": (ActivationUnit, models.DIN),
        "models.ranking.deepfm": (models.DeepFM,),
        "models.ranking.dcn": (models.DCN,),
        "models.ranking.dcn_v2": (models.DCNv2,),
        "models.ranking.edcn": (RegulationModule, models.EDCN),
        "models.ranking.widedeep": (models.WideDeep,),
        "models.ranking.bst": (models.BST,),
        "models.ranking.dien": (AUGRU_Cell, AUGRU, models.DIEN),
    }.items()
    for cls in classes
}


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """The class that ``module`` of ``model`` is given, why it is left, or None for what is no layer of theirs."""
    cls = type(module)
    if (ours := _NAMESAKES.get(name_of(cls))) is not None:
        return ours
    if cls.__module__.startswith("torch_rechub.models."):
        return "its own forward runs, over the layers below"
    if cls.__module__.startswith("torch_rechub."):
        return "no kernel for it"
    return why_subclass_is_left(cls, [b for b in cls.__mro__ if name_of(b) in _NAMESAKES])
