"""Fused kernels for click-through-rate ranking models, behind layers that drop into torch-rechub models."""

from rankkernels import optim
from rankkernels._version import __version__
from rankkernels.adoption import accelerate, explain, restore
from rankkernels.graphs import graphed
from rankkernels.models import DIN, DeepFM
from rankkernels.nn import (
    FFM,
    FM,
    LR,
    MLP,
    ActivationUnit,
    BiLinearInteractionLayer,
    CrossNetMix,
    CrossNetV2,
    CrossNetwork,
    DenseFeature,
    Dice,
    EmbeddingBag,
    EmbeddingLayer,
    Pretrained,
    RandomNormal,
    RandomUniform,
    SequenceFeature,
    SparseFeature,
    TableBatchedEmbeddingBag,
    XavierNormal,
    XavierUniform,
    look_up,
)
from rankkernels.ops import (
    cross_network,
    din_attention,
    embedding_bag,
    embedding_fm,
    fm_interaction,
    norm_activation,
    pairwise_dot,
    table_batched_embedding_bag,
)
from rankkernels.ops._library import cmake_prefix, library_path
from rankkernels.ops._table import ReferenceWarning
from rankkernels.vocabulary import Vocabulary

__all__ = [
    "DIN",
    "FFM",
    "FM",
    "LR",
    "MLP",
    "ActivationUnit",
    "BiLinearInteractionLayer",
    "CrossNetMix",
    "CrossNetV2",
    "CrossNetwork",
    "DeepFM",
    "DenseFeature",
    "Dice",
    "EmbeddingBag",
    "EmbeddingLayer",
    "Pretrained",
    "RandomNormal",
    "RandomUniform",
    "ReferenceWarning",
    "SequenceFeature",
    "SparseFeature",
    "TableBatchedEmbeddingBag",
    "Vocabulary",
    "XavierNormal",
    "XavierUniform",
    "__version__",
    "accelerate",
    "cmake_prefix",
    "cross_network",
    "din_attention",
    "embedding_bag",
    "embedding_fm",
    "explain",
    "fm_interaction",
    "graphed",
    "library_path",
    "look_up",
    "norm_activation",
    "optim",
    "pairwise_dot",
    "restore",
    "table_batched_embedding_bag",
]
