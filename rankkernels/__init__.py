"""Fused kernels for click-through-rate ranking models, behind layers that drop into torch-rechub models."""

from rankkernels.models import DIN, DeepFM
from rankkernels.nn import (
    FM,
    LR,
    MLP,
    ActivationUnit,
    DenseFeature,
    Dice,
    EmbeddingLayer,
    Pretrained,
    RandomNormal,
    RandomUniform,
    SequenceFeature,
    SparseFeature,
    XavierNormal,
    XavierUniform,
)
from rankkernels.ops import din_attention, embedding_bag, fm_interaction, table_batched_embedding_bag
from rankkernels.ops._library import ReferenceWarning

__version__ = "0.1.0"

__all__ = [
    "DIN",
    "FM",
    "LR",
    "MLP",
    "ActivationUnit",
    "DeepFM",
    "DenseFeature",
    "Dice",
    "EmbeddingLayer",
    "Pretrained",
    "RandomNormal",
    "RandomUniform",
    "ReferenceWarning",
    "SequenceFeature",
    "SparseFeature",
    "XavierNormal",
    "XavierUniform",
    "din_attention",
    "embedding_bag",
    "fm_interaction",
    "table_batched_embedding_bag",
]
