"""Accelerated models of DeepCTR-Torch and FuxiCTR in onnxruntime. torch-rechub's go through its own trainers:
test_rechub_tools.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves, tree_map

import rankkernels as rk

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
ROWS, L, D = 30, 7, 4


def deepctr(kind: str, **options) -> nn.Module:
    inputs = pytest.importorskip("deepctr_torch.inputs", reason="DeepCTR-Torch is not installed")
    models = pytest.importorskip("deepctr_torch.models")
    columns = [inputs.SparseFeat(name, ROWS, D) for name in ("user", "item")]
    if kind == "DeepFM":
        columns += [inputs.DenseFeat("price")]
        return models.DeepFM(columns, columns, dnn_hidden_units=(8,))
    history = inputs.SparseFeat("hist_item", ROWS, D, embedding_name="item")
    columns += [inputs.VarLenSparseFeat(history, L, length_name="length")]
    return models.DIN(columns, ["item"], dnn_hidden_units=(8,), att_hidden_size=(6,), **options)


def matrix(model: nn.Module, B: int) -> Tensor:
    """DeepCTR-Torch's batch, column by column."""
    columns = {
        "user": lambda: torch.randint(ROWS, (B, 1)), "item": lambda: torch.randint(1, ROWS, (B, 1)),
        "price": lambda: torch.rand(B, 1), "length": lambda: torch.randint(0, L + 1, (B, 1)),
        "hist_item": lambda: torch.randint(1, ROWS, (B, L)),
    }  # fmt: skip
    return torch.cat([columns[name]().float() for name in model.feature_index], 1)


class Scores(nn.Module):
    """A FuxiCTR model, whose result is a dictionary."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.model(x)["y_pred"]


def fuxictr(kind: str, folder: str, **attention) -> nn.Module:
    models = pytest.importorskip("bench.harness.fuxictr_models", reason="FuxiCTR is not installed")
    specs = {"user": {"type": "categorical", "vocab_size": ROWS, "padding_idx": None}}
    specs["item"] = specs["user"] | {"padding_idx": 0}
    mlp = {"hidden_units": [8], "batch_norm": True}
    if kind == "DeepFM":
        return Scores(models.DeepFM(models.feature_map(specs, D, folder), D, mlp))
    specs["history"] = specs["item"] | {"type": "sequence", "share_embedding": "item"}
    settings = {"attention_units": [6], "hidden_activations": "Dice", **attention}
    return Scores(models.DIN(models.feature_map(specs, D, folder), D, [("item",)], [("history",)], settings, mlp))


def columns(B: int, history: bool) -> dict[str, Tensor]:
    x = {"user": torch.randint(ROWS, (B,)), "item": torch.randint(1, ROWS, (B,))}
    lengths = torch.randint(0, L + 1, (B, 1))
    return x | ({"history": torch.randint(1, ROWS, (B, L)) * (torch.arange(L) < lengths)} if history else {})


MODELS = [
    pytest.param("deepctr", "DeepFM", {}, marks=pytest.mark.slow),
    ("deepctr", "DIN", {"att_weight_normalization": True, "att_activation": "dice"}),
    pytest.param("fuxictr", "DeepFM", {}, marks=pytest.mark.slow),
    pytest.param("fuxictr", "DIN", {}, marks=pytest.mark.slow),
    ("fuxictr", "DIN", {"use_softmax": True}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library, kind, options", MODELS)
def test_accelerated(library, kind, options, tmp_path):
    model = deepctr(kind, **options) if library == "deepctr" else fuxictr(kind, str(tmp_path), **options)
    rk.accelerate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.eval()

    def batch(B: int) -> dict:
        """The argument of ``forward``, by its name: a matrix or columns."""
        return {"X": matrix(model, B)} if library == "deepctr" else {"x": columns(B, kind == "DIN")}

    path, dynamic = str(tmp_path / "model.onnx"), tree_map(lambda t: {0: Dim.DYNAMIC}, batch(4))
    torch.onnx.export(model, (), path, kwargs=batch(4), dynamic_shapes=dynamic, dynamo=True, verbose=False)
    session, x = onnxruntime.InferenceSession(path), batch(9)
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tree_leaves(x), strict=True)}
    scores = torch.as_tensor(session.run(None, given)[0])
    torch.testing.assert_close(scores, model(**x).detach(), rtol=1e-6, atol=1e-6)
