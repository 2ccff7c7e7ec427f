"""The families of cases: a case's number is its seed and chooses its family."""

from __future__ import annotations

import bags
import embedding
import embedding_fm
import embedding_wrong
import exact
import kernels
import layers
import models
import optimizers
import torch
from draw import Draw

FAMILIES = {
    "embedding_bag": embedding.valid,
    "embedding_bag_wrong": embedding_wrong.invalid,
    "embedding_fm": embedding_fm.valid,
    "embedding_fm_wrong": embedding_fm.invalid,
    "sparse_update": embedding.sparse_update,
    "sparse_update_wrong": embedding_wrong.invalid_sparse_update,
    "fm_interaction": kernels.valid("fm_interaction"),
    "fm_interaction_wrong": kernels.wrong("fm_interaction"),
    "cross_network": kernels.valid("cross_network"),
    "cross_network_wrong": kernels.wrong("cross_network"),
    "pairwise_dot": kernels.valid("pairwise_dot"),
    "pairwise_dot_wrong": kernels.wrong("pairwise_dot"),
    "cross_layer": kernels.valid("cross_layer"),
    "mixed_cross_layer": kernels.valid("mixed_cross_layer"),
    "mixed_cross_layer_wrong": kernels.wrong("mixed_cross_layer"),
    "mixed_experts": kernels.valid("mixed_experts"),
    "mixed_experts_wrong": kernels.wrong("mixed_experts"),
    "ffm_interaction": kernels.valid("ffm_interaction"),
    "ffm_interaction_wrong": kernels.wrong("ffm_interaction"),
    "bilinear_interaction": kernels.valid("bilinear_interaction"),
    "bilinear_interaction_wrong": kernels.wrong("bilinear_interaction"),
    "norm_activation": kernels.valid("norm_activation"),
    "norm_activation_wrong": kernels.wrong("norm_activation"),
    "din_attention": kernels.valid("din_attention"),
    "din_attention_wrong": kernels.wrong("din_attention"),
    "augru": kernels.valid("augru"),
    "augru_wrong": kernels.wrong("augru"),
    "target_attention": kernels.valid("target_attention"),
    "target_attention_wrong": kernels.wrong("target_attention"),
    "linear_weight_grad": kernels.linear_weight_grad,
    "linear_weight_grad_wrong": kernels.linear_weight_grad_wrong,
    "deepfm": kernels.deepfm,
    "deepfm_wrong": kernels.deepfm_wrong,
    "layer_embedding_bag": bags.one_table,
    "layer_table_batched": bags.table_batched,
    "look_up": bags.several_tables,
    "layer_fm": layers.valid("fm"),
    "layer_lr": layers.valid("lr"),
    "layer_dice": layers.valid("dice"),
    "layer_mlp": layers.valid("mlp"),
    "layer_activation_unit": layers.valid("activation_unit"),
    "layers_wrong": layers.wrong,
    "layers_constructor_wrong": layers.wrong_constructor,
    "model_embedding_layer": models.valid("embedding_layer"),
    "model_deepfm": models.valid("deepfm"),
    "model_din": models.valid("din"),
    "models_wrong": models.wrong,
    "models_constructor_wrong": models.wrong_constructor,
    "optimizer": optimizers.valid,
    "optimizer_exact": exact.valid,
    "optimizer_wrong": optimizers.wrong,
}


def chosen(only: str) -> list[str]:
    names = [name for name in FAMILIES if only in name]
    if not names:
        raise SystemExit(f"no family's name contains {only!r}: {', '.join(FAMILIES)}")
    return names


def name(case: int, only: str = "") -> str:
    names = chosen(only)
    return names[case % len(names)]


def run(case: int, only: str = "") -> None:
    torch.manual_seed(case)
    torch.set_num_threads(1 + case // 7 % 2)
    FAMILIES[name(case, only)](Draw(case))
