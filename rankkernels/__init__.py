"""Fused kernels for click-through-rate ranking models, behind layers that drop into torch-rechub models."""

from rankkernels import optim
from rankkernels._version import __version__
from rankkernels.adoption import accelerate, explain, restore
from rankkernels.graphs import graphed
from rankkernels.models import BST, DIEN, DIN, FNN, PNN, DeepFM, EmbeddingMLP, FactorizationMachine, WideDeep
from rankkernels.nn import (
    FM,
    LR,
    MLP,
    ActivationUnit,
    DenseFeature,
    Dice,
    EmbeddingBag,
    EmbeddingLayer,
    MultiHeadTargetAttention,
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
    augru,
    din_attention,
    embedding_bag,
    embedding_fm,
    fm_interaction,
    norm_activation,
    table_batched_embedding_bag,
    target_attention,
)
from rankkernels.ops._library import cmake_prefix, library_path
from rankkernels.ops._table import ReferenceWarning
from rankkernels.vocabulary import Vocabulary

__all__ = [
    "BST",
    "DIEN",
    "DIN",
    "FM",
    "FNN",
    "LR",
    "MLP",
    "PNN",
    "ActivationUnit",
    "DeepFM",
    "DenseFeature",
    "Dice",
    "EmbeddingBag",
    "EmbeddingLayer",
    "EmbeddingMLP",
    "FactorizationMachine",
    "MultiHeadTargetAttention",
    "Pretrained",
    "RandomNormal",
    "RandomUniform",
    "ReferenceWarning",
    "SequenceFeature",
    "SparseFeature",
    "TableBatchedEmbeddingBag",
    "Vocabulary",
    "WideDeep",
    "XavierNormal",
    "XavierUniform",
    "__version__",
    "accelerate",
    "augru",
    "cmake_prefix",
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
    "restore",
    "table_batched_embedding_bag",
    "target_attention",
]
