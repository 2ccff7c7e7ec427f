"""Random FuxiCTR models with batches, by seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import model_zoo.LongCTR as zoo
import torch
from torch import nn

from bench.harness import fuxictr_models as fuxi


class Case(NamedTuple):
    """A model as FuxiCTR makes it, and ``batch()``, another one each time."""

    model: nn.Module
    batch: Callable[[], object]


def mlp(r: random.Random, last: int | None = None) -> dict:
    """Arguments of MLP_Block but for its widths of input and output."""
    units = [r.choice([3, 8, 16]) for _ in range(r.randint(1, 3))]
    units = [*units, last] if last else units
    activations = [r.choice(["ReLU", "Dice", "PReLU", "Sigmoid", "LeakyReLU", "Tanh", None]) for _ in units]
    return {
        "hidden_units": units,
        "hidden_activations": r.choice([activations, activations[0] or "relu"]),
        "dropout_rates": r.choice([0.0, 0.0, 0.3]),
        "batch_norm": r.random() < 0.5,
        "bn_only_once": r.random() < 0.3,
        "use_bias": r.random() < 0.8,
    }


def attention(r: random.Random, units: str = "attention_units") -> dict:
    """Arguments of DIN_Attention but for its width."""
    return {
        units: [r.choice([4, 8]) for _ in range(r.randint(1, 2))],
        "hidden_activations": r.choice(["Dice", "Dice", "ReLU", "Sigmoid"]),
        "output_activation": r.choice([None, None, "Sigmoid"]),
        "dropout_rate": r.choice([0, 0, 0.2]),
        "batch_norm": r.random() < 0.3,
        "use_softmax": r.random() < 0.5,
    }


def regularizers(r: random.Random) -> dict:
    return {
        "embedding_regularizer": r.choice([None, 1e-3, "l1(1e-4)"]),
        "net_regularizer": r.choice([None, 1e-3]),
        "learning_rate": 1e-3,
    }


def fields(r: random.Random, sequences: bool = True) -> dict[str, dict]:
    """Numbers, categories and pooled sequences in any order, some of them sharing a table."""
    specs = {f"n{i}": {"type": "numeric"} for i in range(r.randint(0, 3))}
    specs |= {
        f"c{i}": {"type": "categorical", "vocab_size": r.choice([5, 30]), "padding_idx": r.choice([0, None])}
        for i in range(r.randint(1, 4))
    }
    for i in range(r.randint(0, 2) if sequences else 0):
        pooling = r.choice(["layers.MaskedSumPooling()", "layers.MaskedAveragePooling()"])
        specs[f"s{i}"] = {"type": "sequence", "vocab_size": 30, "padding_idx": 0, "feature_encoder": pooling}
    names = list(specs)
    r.shuffle(names)
    specs = {name: specs[name] for name in names}
    owners = [f for f, s in specs.items() if s.get("vocab_size") == 30 and s.get("padding_idx") == 0]
    for sharer in owners[1:] if r.random() < 0.5 else ():
        specs[sharer]["share_embedding"] = owners[0]
    return specs


def batch_of(specs: dict[str, dict], B: int, L: int = 4) -> dict[str, torch.Tensor]:
    """As the npz loader gives it: columns of one float64 array."""
    columns = {
        "numeric": lambda s: torch.rand(B),
        "categorical": lambda s: torch.randint(0, s["vocab_size"], (B,)),
        "sequence": lambda s: fuxi.history_ids(B, L, s["vocab_size"]),
    }
    batch = {f: columns[s["type"]](s).double() for f, s in specs.items()}
    return {**batch, "label": torch.randint(0, 2, (B,)).double()}


def deepfm(seed: int) -> Case:
    r = random.Random(seed)
    D, specs, B = r.choice([4, 10]), fields(r), r.choice([7, 33])
    return Case(fuxi.DeepFM(fuxi.feature_map(specs, D), D, mlp(r), **regularizers(r)), lambda: batch_of(specs, B))


def nfm(seed: int) -> Case:
    r = random.Random(seed)
    D, specs, B = r.choice([4, 10]), fields(r), r.choice([7, 33])
    return Case(fuxi.NFM(fuxi.feature_map(specs, D), D, mlp(r), **regularizers(r)), lambda: batch_of(specs, B))


def din(seed: int) -> Case:
    r = random.Random(seed)
    D, B, L, specs = r.choice([4, 8]), r.choice([7, 20]), r.choice([1, 5]), fields(r, sequences=False)
    for name in "ab":
        specs[f"{name}_id"] = {"type": "categorical", "vocab_size": 30, "padding_idx": 0}
        specs[f"{name}s"] = {"type": "sequence", "vocab_size": 30, "padding_idx": 0, "share_embedding": f"{name}_id"}
    together = r.random() < 0.5
    targets = [("a_id", "b_id")] if together else [("a_id",), ("b_id",)]
    sequences = [("as", "bs")] if together else [("as",), ("bs",)]
    model = fuxi.DIN(fuxi.feature_map(specs, D), D, targets, sequences, attention(r), mlp(r), **regularizers(r))
    return Case(model, lambda: batch_of(specs, B, L))


def _long(r: random.Random) -> tuple[dict[str, dict], Callable]:
    specs = {f"u{i}": {"type": "categorical", "source": "user", "vocab_size": 9} for i in range(r.randint(0, 3))}
    for i in range(r.randint(1, 2)):
        specs[f"item{i}"] = {"type": "categorical", "source": "item", "vocab_size": 20, "padding_idx": 0}
    B, L = r.choice([6, 17]), r.choice([1, 5])
    return specs, lambda: fuxi.long_batch(specs, B, L)


def long_din(seed: int) -> Case:
    r = random.Random(seed)
    (specs, batch), D, block, unit = _long(r), r.choice([4, 8]), mlp(r), attention(r)
    del unit["batch_norm"]
    model = zoo.DIN(
        fuxi.feature_map(specs, D), embedding_dim=D, dnn_hidden_units=block["hidden_units"],
        dnn_activations=block["hidden_activations"], net_dropout=block["dropout_rates"],
        batch_norm=block["batch_norm"], attention_hidden_units=unit["attention_units"],
        attention_hidden_activations=unit["hidden_activations"],
        attention_output_activation=unit["output_activation"], attention_dropout=unit["dropout_rate"],
        din_use_softmax=unit["use_softmax"], model_root=".", **fuxi.SETTINGS, **regularizers(r),
    )  # fmt: skip
    return Case(model, batch)


def dcn(seed: int) -> Case:
    r = random.Random(seed)
    (specs, batch), D, block = _long(r), r.choice([4, 8]), mlp(r)
    model = zoo.DCNv2(
        fuxi.feature_map(specs, D), embedding_dim=D, model_structure=r.choice(["parallel", "stacked"]),
        stacked_dnn_hidden_units=block["hidden_units"], parallel_dnn_hidden_units=block["hidden_units"],
        dnn_activations=block["hidden_activations"], net_dropout=block["dropout_rates"],
        batch_norm=block["batch_norm"], model_root=".", **fuxi.SETTINGS, **regularizers(r),
    )  # fmt: skip
    return Case(model, batch)


CASES = {"DeepFM": deepfm, "NFM": nfm, "DIN": din, "LongCTR-DIN": long_din, "LongCTR-DCNv2": dcn}
