"""Weights of multi-value features, ids outside their table, and vocabularies of strings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rankkernels as rk

B, L, V, D = 7, 5, 11, 4


def build(pooling: str, weights: str | None = "scores") -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    tags = rk.SequenceFeature("tags", V, D, pooling=pooling, padding_idx=0, weights=weights)
    features = [rk.SparseFeature("item", V, D), tags]
    layer = rk.EmbeddingLayer(features).double()
    nn.init.normal_(layer.embed_dict["tags"].weight)
    return layer, features


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = {"item": torch.randint(0, V, (B,), generator=generator)}
    x["tags"] = torch.randint(0, V, (B, L), generator=generator)
    x["tags"][0] = 0
    return x | {"scores": torch.rand(B, L, generator=generator, dtype=torch.float64)}


CHANGES = {
    "fused": lambda layer: None,
    "one table called": lambda layer: layer.embed_dict["item"].register_forward_hook(lambda m, a, out: out * 1),
    "its table called": lambda layer: layer.embed_dict["tags"].register_forward_hook(lambda m, a, out: out * 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_weights_scale_the_rows(pooling, change):
    layer, features = build(pooling)
    CHANGES[change](layer)
    x = batch()
    scores = x["scores"].requires_grad_()
    found = layer(x, features, squeeze_dim=True)[:, D:]
    table = layer.embed_dict["tags"].weight
    valid = (x["tags"] != 0).double()
    expected = ((valid * scores)[..., None] * table[x["tags"]]).sum(1)
    if pooling == "mean":
        expected = expected / valid.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.sin().sum(), (table, scores)) for y in (found, expected)]
    torch.testing.assert_close(grads[0][1], grads[1][1])
    torch.testing.assert_close(grads[0][0][1:], grads[1][0][1:])  # the padding row has none


@pytest.mark.parametrize("training", [True, False])
def test_deepfm_with_weights(training):
    """The model's one pass over the tables, against its layers called one after the other."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        wide = {"padding_idx": 0, "initializer": rk.RandomNormal()}
        features = [rk.SparseFeature("item", V, D, **wide)]
        features.append(rk.SequenceFeature("tags", V, D, "mean", **wide, weights="scores"))
        models.append(rk.DeepFM(features, features, {"dims": [6]}).double().train(training))
    models[1].embedding.register_forward_hook(lambda *arguments: None)
    y = [model(batch()) for model in models]
    torch.testing.assert_close(y[0], y[1])
    without = batch() | {"scores": torch.ones(B, L)}
    assert not torch.allclose(models[0](without), y[0])


def test_features_of_one_name_with_other_weights_are_others():
    tags = [rk.SequenceFeature("tags", V, D, "sum", padding_idx=0, weights=w) for w in (None, "scores")]
    layer = rk.EmbeddingLayer(tags)
    found = layer(batch(), tags)
    assert found.shape == (B, 2, D) and not torch.allclose(found[:, 0], found[:, 1])


def test_bad_weights_name_the_feature():
    with pytest.raises(ValueError, match="SequenceFeature 'tags': weights need pooling mean or sum, got 'concat'"):
        rk.SequenceFeature("tags", V, D, "concat", weights="scores")
    layer, features = build("sum")
    x = batch()
    with pytest.raises(KeyError, match="feature 'scores' is missing from the batch"):
        layer({name: x[name] for name in ("item", "tags")}, features)
    with pytest.raises(RuntimeError, match=r"per_sample_weights of tags must have its shape \[7, 5\]"):
        layer(x | {"scores": x["scores"][:, :2]}, features)
    for change in CHANGES.values():
        layer, features = build("sum")
        change(layer)
        with pytest.raises(ValueError, match=r"feature 'scores' must be \[B, L\] weights, got shape \[0\]"):
            layer(x | {"scores": torch.empty(0)}, features)


# ------------------------------------------------------------------------------------------------ ids outside a table

UNKNOWN = [-1, V, 10**12, -(2**62), 2**63 - 1]


def looked_up(oov: str, ids: list[int], padding_idx: int | None = None, sequence: bool = False, change: str = "fused"):
    """The rows of the table that the ids got, told by their values."""
    kind = rk.SequenceFeature if sequence else rk.SparseFeature
    feature = kind("item", V, D, padding_idx=padding_idx, oov=oov, **({"pooling": "concat"} if sequence else {}))
    layer = rk.EmbeddingLayer([feature])
    with torch.no_grad():
        layer.embed_dict["item"].weight.copy_(torch.arange(V)[:, None].expand(V, D))
    if change == "called":
        layer.embed_dict["item"].register_forward_hook(lambda *arguments: None)
    x = torch.tensor(ids)[:, None] if sequence else torch.tensor(ids)
    return layer({"item": x}, [feature], squeeze_dim=True)[:, 0].long().tolist()


@pytest.mark.parametrize("change", ["fused", "called"])
@pytest.mark.parametrize("sequence", [False, True])
def test_unknown_ids(sequence, change):
    known = list(range(V))
    assert looked_up("row", known + UNKNOWN, None, sequence, change) == known + [V - 1] * len(UNKNOWN)
    hashed = looked_up("hash", known + UNKNOWN, None, sequence, change)
    assert hashed[:V] == known and all(0 <= row < V for row in hashed)
    assert hashed == looked_up("hash", known + UNKNOWN, None, sequence, change)
    with pytest.raises(IndexError):
        looked_up("error", UNKNOWN, None, sequence, change)


@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
def test_hashes_fill_the_table_but_for_the_padding(padding_idx):
    rows = torch.tensor(looked_up("hash", list(range(V, 200 * V)), padding_idx)).bincount(minlength=V)
    others = V if padding_idx is None else V - 1
    if padding_idx is not None:
        assert rows[padding_idx] == 0
        rows = torch.cat([rows[: padding_idx % V], rows[padding_idx % V + 1 :]])
    assert rows.min() > 0.6 * 199 * V / others and rows.max() < 1.5 * 199 * V / others


def test_unknown_ids_of_a_model():
    """Their rows are trained like others, in every form of ids."""
    features = [rk.SparseFeature("item", V, D, oov="row"), rk.SparseFeature("shop", V, D, oov="hash")]
    model = rk.DeepFM(features, features, {"dims": [6]})
    for dtype in (torch.int32, torch.int64, torch.float32):
        model.zero_grad()
        model({name: torch.tensor([1, V, 5 * V, -2], dtype=dtype) for name in ("item", "shop")}).sum().backward()
        touched = model.embedding.embed_dict["item"].weight.grad.abs().sum(1).nonzero().flatten().tolist()
        assert touched == [1, V - 1]
    assert model.eval()({name: torch.tensor([10**6]) for name in ("item", "shop")}).shape == (1,)
    with pytest.raises(ValueError, match="feature 'item': oov must be one of error, row, hash, got 'drop'"):
        rk.SparseFeature("item", V, D, oov="drop")
    for rows, padding_idx, oov in ((V, V - 1, "row"), (V, -1, "row"), (1, 0, "hash")):
        with pytest.raises(ValueError, match=f"feature 'item': oov='{oov}' needs a row besides that of padding_idx"):
            rk.SparseFeature("item", rows, D, padding_idx=padding_idx, oov=oov)


# --------------------------------------------------------------------------------------------------------- vocabularies

SHOPS = ["b", "a", "c", "a"]


def test_a_vocabulary_counts_from_the_padding():
    vocabulary = rk.Vocabulary(SHOPS, padding="")
    assert vocabulary.values == ["b", "a", "c"] and len(vocabulary) == 5
    ids = vocabulary([["a", "", "?"], ["c", "b", "d"]])
    assert ids.dtype == torch.int64 and ids.tolist() == [[2, 0, 4], [3, 1, 4]]
    numbers = rk.Vocabulary(np.array([10**12, 7]), unknown="error")
    for column in ([7, 10**12], np.array([7, 10**12]), torch.tensor([7, 10**12])):
        assert numbers(column).tolist() == [2, 1]
    assert numbers(np.array([], dtype=np.int64)).tolist() == []
    with pytest.raises(KeyError, match="Vocabulary: 8 is not among the 2 known values"):
        numbers([7, 8])


def test_unknown_values_are_hashed_alike_everywhere(tmp_path):
    vocabulary = rk.Vocabulary(SHOPS, unknown="hash", hash_rows=10, padding="")
    unknown = [f"é{i}" for i in range(100)]
    ids = vocabulary(unknown)
    assert ids.min() >= 4 and ids.max() < len(vocabulary) == 14 and len(ids.unique()) == 10
    assert vocabulary(["é0", "é1", "é2"]).tolist() == [7, 5, 9]  # in every process
    vocabulary.save(tmp_path / "shops.json")
    loaded = rk.Vocabulary.load(tmp_path / "shops.json")
    assert torch.equal(loaded(unknown + SHOPS), vocabulary(unknown + SHOPS)) and len(loaded) == len(vocabulary)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"values": ["a", 1]}, TypeError, "all strings or all integers, got int, str"),
        ({"values": [1.5]}, TypeError, "got float"),
        ({"values": [], "unknown": "drop"}, ValueError, "one of error, row, hash, got 'drop'"),
        ({"values": [], "unknown": "hash"}, ValueError, "hash_rows must be positive for 'hash' and 0 else, got 0"),
        ({"values": [], "hash_rows": 3}, ValueError, "hash_rows must be positive for 'hash' and 0 else, got 3"),
    ],
)
def test_bad_vocabularies(arguments, error, text):
    with pytest.raises(error, match=text):
        rk.Vocabulary(**arguments)
