"""Drop-in layers: torch-rechub's names, signatures, parameter names and numbers, on the fused ops."""

from rankkernels.nn.attention import ActivationUnit
from rankkernels.nn.batch_norm import SyncBatchNorm1d
from rankkernels.nn.embedding import EmbeddingLayer, look_up
from rankkernels.nn.embedding_bag import EmbeddingBag, TableBatchedEmbeddingBag
from rankkernels.nn.features import (
    DenseFeature,
    Pretrained,
    RandomNormal,
    RandomUniform,
    SequenceFeature,
    SparseFeature,
    XavierNormal,
    XavierUniform,
)
from rankkernels.nn.interaction import (
    FFM,
    BiLinearInteractionLayer,
    CrossLayer,
    CrossNetMix,
    CrossNetV2,
    CrossNetwork,
)
from rankkernels.nn.layers import FM, LR, MLP, Dice
from rankkernels.nn.target_attention import InteractingLayer, MultiHeadTargetAttention

__all__ = [
    "FFM",
    "FM",
    "LR",
    "MLP",
    "ActivationUnit",
    "BiLinearInteractionLayer",
    "CrossLayer",
    "CrossNetMix",
    "CrossNetV2",
    "CrossNetwork",
    "DenseFeature",
    "Dice",
    "EmbeddingBag",
    "EmbeddingLayer",
    "InteractingLayer",
    "MultiHeadTargetAttention",
    "Pretrained",
    "RandomNormal",
    "RandomUniform",
    "SequenceFeature",
    "SparseFeature",
    "SyncBatchNorm1d",
    "TableBatchedEmbeddingBag",
    "XavierNormal",
    "XavierUniform",
    "look_up",
]
