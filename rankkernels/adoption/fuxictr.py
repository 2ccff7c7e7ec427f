"""FuxiCTR: its layers keep their classes as bases, and their own forward where a fused one is not right."""

from __future__ import annotations

from fuxictr.pytorch import layers
from fuxictr.pytorch.models import BaseModel
from torch import nn

from rankkernels.adoption._report import why_subclass_is_left
from rankkernels.adoption.fuxictr_embedding import FeatureEmbedding, FeatureEmbeddingDict
from rankkernels.adoption.fuxictr_layers import (
    Dice,
    DIN_Attention,
    InnerProductInteraction,
    MLP_Block,
    MultiHeadTargetAttention,
)
from rankkernels.nn.embedding import fused_weight

LIBRARY = "FuxiCTR"

_FUSED = {
    layers.InnerProductInteraction: InnerProductInteraction,
    layers.Dice: Dice,
    layers.MLP_Block: MLP_Block,
    layers.DIN_Attention: DIN_Attention,
    layers.MultiHeadTargetAttention: MultiHeadTargetAttention,
    layers.FeatureEmbedding: FeatureEmbedding,
    layers.FeatureEmbeddingDict: FeatureEmbeddingDict,
}

_BY_PARTS = "its own forward runs, over the layers below"
_LEFT = {
    layers.ScaledDotProductAttention: "its target attention does its work",
    layers.LogisticRegression: _BY_PARTS,
    layers.FactorizationMachine: _BY_PARTS,
    layers.PretrainedEmbedding: "its own forward runs: it masks and projects what it looks up",
    layers.MaskedSumPooling: "as the encoder of a sequence, the lookup of the sequence does its sum",
}


def replacement(module: nn.Module, model: nn.Module) -> type | str | None:
    """The class that ``module`` of ``model`` is given, why it is left, or None for what is no layer of theirs."""
    cls = type(module)
    if cls is layers.InnerProductInteraction and module._output_type not in ("product_sum", "bi_interaction"):
        return f"no kernel for output {module._output_type!r}"
    if cls in _FUSED:
        return _FUSED[cls]
    if (cls.__module__, cls.__name__) == ("model_zoo.LongCTR.DIN.DIN", "DIN"):
        from rankkernels.adoption.fuxictr_longctr import DIN

        return DIN
    if cls is nn.Embedding:
        return _why_called(module, model)
    if isinstance(module, BaseModel):
        return _BY_PARTS
    if cls.__module__.startswith("fuxictr."):
        return _LEFT.get(cls, "no kernel for it")
    return why_subclass_is_left(cls, _FUSED)


def _why_called(table: nn.Embedding, model: nn.Module) -> str | None:
    """Why ``table``, if it is one of FuxiCTR's, is not looked up together with the others."""
    if fused_weight(table) is not None:
        return None
    settings = [s for s in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(table, s)]
    owners = (m for m in model.modules() if isinstance(m, layers.FeatureEmbeddingDict))
    if not any(table is t for owner in owners for t in owner.embedding_layers.values()):
        return None
    return f"called on its own, for {', '.join(settings) or 'a hook or a weight of its own'}"
