"""FuxiCTR's layers accelerated, one by one, against the same layers untouched: every option, training and eval."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import rankkernels as rk

layers = pytest.importorskip("fuxictr.pytorch.layers", reason="FuxiCTR is not installed")
fuxi = pytest.importorskip("bench.harness.fuxictr_models")


def compare(
    untouched: nn.Module, *inputs, training: bool = True, tolerance: float = 2e-5, ours: nn.Module | None = None
):
    """Output, gradients of inputs and parameters, buffers, of one pass with one seed. -> the accelerated layer."""
    ours = rk.accelerate(copy.deepcopy(untouched)) if ours is None else ours
    found = []
    for layer in (untouched, ours):
        torch.manual_seed(3)
        own = [x.detach().clone().requires_grad_() if is_float(x) else copy.deepcopy(x) for x in inputs]
        layer.train(training).zero_grad()
        out = layer(*own)
        outs = list(out.values()) if isinstance(out, dict) else [out]
        sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outs).backward()
        grads = [x.grad for x in own if is_float(x)] + [p.grad for p in layer.parameters()]
        found.append(([g for g in grads if g is not None], outs, list(layer.buffers())))
    (grads, *values), (our_grads, *our_values) = found
    assert len(grads) == len(our_grads)
    scale = max([g.abs().max().item() for g in grads if g.numel()], default=0.0)
    for a, b in zip(our_grads, grads):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-3))
    for a, b in zip(itertools.chain(*our_values), itertools.chain(*values)):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return ours


def is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64


@pytest.mark.parametrize("output", ["product_sum", "bi_interaction"])
@pytest.mark.parametrize("shape", [(5, 4, 3), (1, 1, 7), (3, 26, 16), (0, 3, 2)])
def test_inner_product(output, shape):
    ours = compare(layers.InnerProductInteraction(shape[1], output), torch.randn(shape))
    assert type(ours) is not layers.InnerProductInteraction


@pytest.mark.parametrize("training", [True, False])
def test_dice(training):
    dice = layers.Dice(6)
    with torch.no_grad():
        dice.alpha.copy_(torch.randn(6))
    dice.bn.running_var.copy_(torch.rand(6) + 0.5)
    for shape in ((9, 6), (200, 6)):
        compare(dice, torch.randn(shape), training=training)


BLOCKS = [
    {"hidden_units": units, "hidden_activations": act, "output_dim": out, "output_activation": out_act,
     "dropout_rates": p, "batch_norm": norm, "bn_only_once": once, "use_bias": bias}
    for units, act in (([], "ReLU"), ([5], "Dice"), ([6, 4], ["ReLU", "Dice"]), ([6, 4], ["PReLU", None]))
    for out, out_act in ((None, None), (2, "Sigmoid"), (1, None))
    for p in (0.0, 0.4)
    for norm, once in ((False, False), (True, False), (True, True))
    for bias in (True, False)
]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "every"), [(11, 7), (900, 17), pytest.param(11, 1, marks=pytest.mark.slow)], ids=["few", "many", "all"]
)
def test_mlp_block(rows, every):
    x = torch.randn(rows, 7)
    for i, options in enumerate(BLOCKS[::every]):
        torch.manual_seed(i)
        block = layers.MLP_Block(7, **options)
        for training in (True, False):
            compare(block, x, training=training)


def attention(softmax: bool, activation="Dice", **options) -> nn.Module:
    torch.manual_seed(0)
    layer = layers.DIN_Attention(6, [5, 4], activation, use_softmax=softmax, **options)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4)
    return layer


MASK = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1]])
MASKS = {"none": None, "bool": MASK.bool(), "float": MASK.double(), "int": MASK, "soft": MASK.double() * 0.5}
OPTIONS = [
    {"activation": act, "batch_norm": norm, "output_activation": out, "dropout_rate": p}
    for act, norm, out, p in (
        ("Dice", False, None, 0), ("Dice", True, None, 0), ("ReLU", True, None, 0), ("Sigmoid", False, "Sigmoid", 0),
        ("Dice", False, None, 0.3), (["ReLU", "Sigmoid"], False, None, 0), ("Tanh", False, None, 0),
        (None, False, None, 0),
    )
]  # fmt: skip


@pytest.mark.parametrize("softmax", [False, True], ids=["sum", "softmax"])
@pytest.mark.parametrize("mask", MASKS)
def test_din_attention(softmax, mask):
    """An empty history among the others: a softmax then weighs its pads alike."""
    target, history = torch.randn(5, 6), torch.randn(5, 4, 6)
    for options, training in itertools.product(OPTIONS, (True, False)):
        compare(attention(softmax, **options), target, history, MASKS[mask], training=training)


def test_din_attention_of_slices():
    """As LongCTR cuts target and history from one tensor."""
    items = torch.randn(5, 5, 6)
    layer = attention(True)
    ours = rk.accelerate(copy.deepcopy(layer))
    expected = layer(items[:, -1], items[:, :-1], MASK.float())
    torch.testing.assert_close(ours(items[:, -1], items[:, :-1], MASK.float()), expected)


def test_din_attention_is_one_op():
    """Where nothing forbids it: or the rest of this file compares FuxiCTR with itself."""
    layer = rk.accelerate(attention(True))
    with torch.profiler.profile() as profile:
        layer(torch.randn(5, 6), torch.randn(5, 4, 6), MASK.bool())
    names = [event.key for event in profile.key_averages()]
    assert "rankkernels::din_attention" in names and "aten::softmax" not in names


SPECS = {
    "n0": {"type": "numeric"},
    "c0": {"type": "categorical", "vocab_size": 9, "padding_idx": 0},
    "n1": {"type": "numeric"},
    "n2": {"type": "numeric"},
    "c1": {"type": "categorical", "vocab_size": 7},
    "wide": {"type": "categorical", "vocab_size": 7, "embedding_dim": 6},
    "own": {"type": "embedding", "pretrain_dim": 3},
    "s0": {"type": "sequence", "vocab_size": 9, "padding_idx": 0, "share_embedding": "c0"},
    "sum": {"type": "sequence", "vocab_size": 9, "feature_encoder": "layers.MaskedSumPooling()"},
    "mean": {"type": "sequence", "vocab_size": 9, "padding_idx": 0, "feature_encoder": "layers.MaskedAveragePooling()"},
    "linear": {"type": "categorical", "vocab_size": 9, "feature_encoder": "nn.Linear(4, 4)"},
}
SIZES = {"n0": None, "n1": None, "n2": None, "own": 3}


def batch(names, B=5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    made = {}
    for name in names:
        kind = SPECS[name]["type"]
        if kind == "numeric":
            made[name] = torch.rand(B, dtype=torch.float64)
        elif kind == "embedding":
            made[name] = torch.rand(B, 3, dtype=torch.float64)
        else:
            made[name] = torch.randint(0, 7, (B, 4) if kind == "sequence" else (B,)).double()
    return made


def embedding(cls: type, names, D: int = 4, **options) -> nn.Module:
    torch.manual_seed(0)
    return cls(fuxi.feature_map({n: SPECS[n] for n in names}, D), D, embedding_initializer="nn.init.normal_", **options)


@pytest.mark.parametrize("drawn", [list(SPECS), ["s0", "c0"], ["n1"], ["sum", "c1", "c0"]], ids="-".join)
def test_feature_embedding_dict(drawn):
    compare(embedding(layers.FeatureEmbeddingDict, SPECS), batch(drawn))


def test_feature_embedding_dict_filters():
    layer = embedding(layers.FeatureEmbeddingDict, SPECS)
    ours = rk.accelerate(copy.deepcopy(layer))
    for kinds in (["numeric"], ["categorical"], ["sequence", "embedding"]):
        found, expected = (m(batch(SPECS), feature_type=kinds) for m in (ours, layer))
        assert list(found) == list(expected) and all(torch.equal(found[f], expected[f]) for f in found)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "names",
    [["c0", "c1"], ["n0", "c0", "n1", "n2", "c1"], ["n0", "n1"], ["c0", "own", "n0", "sum", "linear"], ["mean", "c0"]],
    ids="-".join,
)
def test_feature_embedding(names, flatten):
    layer = embedding(layers.FeatureEmbedding, names)
    compare(layer, batch(names), [], [], flatten)


def test_feature_embedding_of_several_widths():
    names = ["n0", "c0", "wide", "c1"]
    layer = embedding(layers.FeatureEmbedding, names)
    ours = compare(layer, batch(names), [], [], True)
    with pytest.raises(RuntimeError):
        ours(batch(names))


def test_logistic_regression():
    """Tables of width 1, of sequences the sum."""
    names = [n for n in SPECS if n != "own"]
    for bias in (True, False):
        layer = layers.LogisticRegression(fuxi.feature_map({n: SPECS[n] for n in names}, 4), use_bias=bias)
        compare(layer, batch(names))


@pytest.mark.parametrize("change", ["max_norm", "hook", "frozen", "global hook"])
def test_tables_with_settings(change):
    """What a table was told still happens, beside the lookup of the others."""
    names, calls = ["c0", "c1", "n0"], []
    layer = embedding(layers.FeatureEmbedding, names)
    ours = rk.accelerate(copy.deepcopy(layer))
    handle = None
    for model in (layer, ours):
        table = model.embedding_layer.embedding_layers["c0"]
        if change == "max_norm":
            table.max_norm = 0.5
        elif change == "hook":
            table.register_forward_hook(lambda *_: calls.append(1))
        elif change == "frozen":
            table.weight.requires_grad_(False)
    if change == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m)))
    compare(layer, batch(names), ours=ours)
    if handle is not None:
        handle.remove()
    assert len(calls) == {"hook": 2, "global hook": 2 * 5}.get(change, 0)


def test_ids_out_of_range():
    ours = rk.accelerate(embedding(layers.FeatureEmbedding, ["c0", "c1"]))
    bad = {**batch(["c0", "c1"]), "c1": torch.tensor([0, 1, 2, 7, 0])}
    with pytest.raises(IndexError, match="c1"):
        ours(bad)


def test_pretrained_tables(tmp_path):
    """Looked up, masked and projected by FuxiCTR's own modules, beside the one lookup of the others."""
    import json

    import numpy as np

    np.savez(tmp_path / "emb.npz", key=np.array(["a", "b"]), value=np.random.rand(2, 3))
    (tmp_path / "feature_vocab.json").write_text(json.dumps({"p": {"a": 1, "b": 2}, "c0": {"x": 1}}))
    for usage, freeze in itertools.product(("init", "sum", "concat"), (True, False)):
        spec = {"type": "categorical", "vocab_size": 4, "oov_idx": 3, "padding_idx": 0, "pretrained_emb": "emb.npz",
                "pretrain_dim": 3, "pretrain_usage": usage, "freeze_emb": freeze}  # fmt: skip
        features = fuxi.feature_map({"p": spec, "c0": SPECS["c0"]}, 4, str(tmp_path))
        layer = layers.FeatureEmbedding(features, 4, embedding_initializer="nn.init.normal_")
        inputs = {"p": torch.tensor([0, 1, 2, 3, 1]), "c0": torch.tensor([1, 2, 0, 1, 1])}
        for flatten in (False, True):
            compare(layer, inputs, [], [], flatten)
