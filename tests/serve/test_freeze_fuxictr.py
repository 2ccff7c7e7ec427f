"""Frozen models of FuxiCTR score as the models do: every kind of field, of MLP and of attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankkernels as rk
from rankkernels import serve
from tests.serve.models import R, batch

pytest.importorskip("fuxictr.pytorch")
zoo = pytest.importorskip("model_zoo.LongCTR")

from bench.harness import fuxictr_models as fuxi  # noqa: E402

CATEGORY = {"type": "categorical", "vocab_size": R, "padding_idx": 0}
SUMMED = {"type": "sequence", "vocab_size": R, "padding_idx": 0, "feature_encoder": "layers.MaskedSumPooling()"}
HISTORY = {"type": "sequence", "vocab_size": R, "padding_idx": 0}
C, L = 13, 5


def randomized(model: nn.Module) -> nn.Module:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 2)
        elif value.is_floating_point():
            nn.init.normal_(value, 0, 0.4)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0
    return model.eval()


def check(model: nn.Module, inputs: dict[str, str], of_user: set[str], expected_of) -> None:
    """``inputs``: the features' kinds, as a frozen model names them."""
    user, candidates = {}, {}
    for name, kind in inputs.items():
        n = 1 if name in of_user else C
        shape = (n, L) if kind in ("sequence", "history") else (n,)
        value = torch.randn(shape) if kind == "numbers" else torch.randint(0, R, shape)
        (user if name in of_user else candidates)[name] = value
    x = batch(user, candidates)
    with torch.no_grad():
        expected = expected_of(x)
    assert expected.std() > 1e-3
    for of in (model, rk.accelerate(model)):
        frozen = serve.freeze(of)
        assert frozen.inputs == inputs
        for scores in (frozen.rank(user, candidates), frozen(x)):
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    rk.restore(model)
    for tables in ("bfloat16", "int8"):
        torch.testing.assert_close(serve.freeze(model, tables).rank(user, candidates), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "mlp",
    [
        {"hidden_units": [9, 5]},
        {"hidden_units": [8], "hidden_activations": "Dice", "batch_norm": True},
        {"hidden_units": [7, 6], "batch_norm": True, "bn_only_once": True, "use_bias": False, "dropout_rates": 0.3},
        {"hidden_units": []},
    ],
)
@pytest.mark.parametrize("of_user", [set(), {"n0", "c0", "tags"}])
def test_deepfm(mlp, of_user):
    torch.manual_seed(1)
    specs = {"n0": {"type": "numeric"}, "c0": CATEGORY, "tags": SUMMED, "n1": {"type": "numeric"}, "c1": CATEGORY}
    specs["c2"] = {"type": "categorical", "vocab_size": R}
    model = randomized(fuxi.DeepFM(fuxi.feature_map(specs, 6), 6, mlp))
    kinds = {"n0": "numbers", "c0": "ids", "tags": "sequence", "n1": "numbers", "c1": "ids", "c2": "ids"}
    check(model, kinds, of_user, lambda x: model(x)["y_pred"].flatten())


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("activation", ["Dice", "ReLU"])
def test_din(use_softmax, activation):
    """A history of two fields, which are not neighbours, and one of one."""
    torch.manual_seed(2)
    specs = {
        "shop_history": {**HISTORY, "share_embedding": None}, "item": CATEGORY, "age": CATEGORY,
        "item_history": {**HISTORY, "share_embedding": "item"}, "price": {"type": "numeric"}, "shop": CATEGORY,
        "query_history": HISTORY, "tags": SUMMED, "query": CATEGORY,
    }  # fmt: skip
    attention = {"attention_units": [7, 4], "hidden_activations": activation, "use_softmax": use_softmax}
    targets, histories = [("item", "shop"), "query"], [("item_history", "shop_history"), "query_history"]
    mlp = {"hidden_units": [9, 5], "batch_norm": True}
    features = fuxi.feature_map(specs, 6)
    model = randomized(fuxi.DIN(features, 6, targets, histories, attention, mlp))
    kinds = {
        "item": "ids", "age": "ids", "price": "numbers", "shop": "ids", "tags": "sequence", "query": "ids",
        "item_history": "history", "shop_history": "history", "query_history": "history",
    }  # fmt: skip
    of_user = {"age", "tags", *(name for name, kind in kinds.items() if kind == "history")}
    check(model, kinds, of_user, lambda x: model(x)["y_pred"].flatten())


@pytest.mark.parametrize("options", [{}, {"din_use_softmax": True, "batch_norm": True, "net_dropout": 0.2}])
def test_din_for_long_histories(options):
    torch.manual_seed(3)
    specs = {"age": CATEGORY, "item": {**CATEGORY, "source": "item"}, "shop": {**CATEGORY, "source": "item"}}
    settings = {**fuxi.SETTINGS, "model_root": ".", "embedding_dim": 6, "dnn_hidden_units": [9]}
    model = randomized(zoo.DIN(fuxi.feature_map(specs, 6), attention_hidden_units=[7], **settings, **options))
    histories = {"item_history": "history", "shop_history": "history"}

    def expected(x):
        items = {f: torch.cat([x[f"{f}_history"], x[f][:, None]], 1).flatten() for f in ("item", "shop")}
        return model(({"age": x["age"]}, items, (x["item_history"] != 0).float()))["y_pred"].flatten()

    check(model, {"age": "ids", "item": "ids", "shop": "ids", **histories}, {"age", *histories}, expected)


def test_what_is_not_served_is_named():
    features = fuxi.feature_map({"c0": CATEGORY, "c1": CATEGORY}, 6)
    with pytest.raises(serve.NotServed, match="mlp has the activation Tanh"):
        serve.freeze(fuxi.DeepFM(features, 6, {"hidden_units": [4], "hidden_activations": "Tanh"}))
    with pytest.raises(serve.NotServed, match="NFM is not served"):
        serve.freeze(fuxi.NFM(features, 6, {"hidden_units": [4]}))

    class Doubled(fuxi.DeepFM):
        def logits(self, X):
            return 2 * super().logits(X)

    model = randomized(Doubled(features, 6, {"hidden_units": [4]})).train()
    with pytest.raises(serve.NotServed, match="Doubled.forward computes something else"):
        serve.freeze(model)
    assert all(module.training for module in model.modules())
