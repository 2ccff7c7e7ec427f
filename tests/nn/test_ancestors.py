"""FNN, PNN, factorization machines and the base model: against FuxiCTR's layers, the papers' sums, and each other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankkernels as rk

B, L, V, D = 9, 5, 12, 4


def features(*names: str, D: int = D) -> list:
    """Sparse features, the mean of a history among them, which shares the first one's table."""
    found = [rk.SparseFeature(name, V, D, initializer=rk.RandomNormal(0, 1)) for name in names]
    return [*found, rk.SequenceFeature("history", V, D, "mean", names[0], padding_idx=0)]


def batch(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randint(V, (B,)) for name in names} | {"history": torch.randint(V, (B, L))}


def fuxictr_mlp(ours: rk.MLP, width: int) -> nn.Module:
    """FuxiCTR's MLP_Block with the weights of an MLP of ours."""
    layers = pytest.importorskip("fuxictr.pytorch.layers", reason="FuxiCTR is not installed")
    units = [m.out_features for m in ours.mlp if isinstance(m, nn.Linear)][:-1]
    theirs = layers.MLP_Block(width, units, "ReLU", output_dim=1, batch_norm=True)
    kinds = nn.Linear, nn.BatchNorm1d
    for own, other in zip(*([m for m in mlp if isinstance(m, kinds)] for mlp in (ours.mlp, theirs.mlp))):
        other.load_state_dict(own.state_dict())
    return theirs


@pytest.mark.parametrize("training", [True, False])
def test_pnn_is_fuxictrs(training, float64):
    layers = pytest.importorskip("fuxictr.pytorch.layers", reason="FuxiCTR is not installed")
    chosen, x = features("user", "item", "shop"), batch("user", "item", "shop")
    ours = rk.PNN(chosen, {"dims": [7, 6]}).train(training)
    fields = ours.embedding(x, chosen).detach().requires_grad_()
    theirs = fuxictr_mlp(ours.mlp, 4 * D + 6).train(training)
    products = layers.InnerProductInteraction(4, output="inner_product")
    expected = torch.sigmoid(theirs(torch.cat([fields.flatten(1), products(fields)], 1)).squeeze(1))
    y = ours(x)
    torch.testing.assert_close(y, expected)
    grad = torch.linspace(-1, 1, B)
    (of_fields,) = torch.autograd.grad(expected, fields, grad)
    tables = [ours.embedding.embed_dict[name].weight for name in ("user", "item", "shop")]
    of_tables = torch.autograd.grad(ours.embedding(x, chosen), tables, of_fields)
    torch.testing.assert_close(torch.autograd.grad(y, tables, grad), of_tables)


@pytest.mark.parametrize("training", [True, False])
def test_base_model_is_fuxictrs_dnn(training, float64):
    chosen = [*features("user", "item"), rk.DenseFeature("age")]
    x = batch("user", "item") | {"age": torch.rand(B)}
    ours = rk.EmbeddingMLP(chosen, {"dims": [7, 6]}).train(training)
    theirs = fuxictr_mlp(ours.mlp, 3 * D + 1).train(training)
    mean = ours.embedding.embed_dict["user"](x["history"]) * (x["history"] != 0)[..., None]
    mean = mean.sum(1) / (x["history"] != 0).sum(1, keepdim=True).clamp(min=1)
    fields = [ours.embedding.embed_dict[name](x[name]) for name in ("user", "item")]
    expected = torch.sigmoid(theirs(torch.cat([*fields, mean, x["age"][:, None]], 1)).squeeze(1))
    torch.testing.assert_close(ours(x), expected)


def test_pnns_outer_products():
    """The superposition is the sum of all pairs' matrices; without it those of i < j stand one behind the other."""
    chosen, x = features("user", "item"), batch("user", "item")
    superposed, each = (rk.PNN(chosen, {"dims": [5]}, "outer", superpose) for superpose in (True, False))
    f = superposed.embedding(x, chosen)
    everything = torch.einsum("bid,bje->bijde", f, f)
    torch.testing.assert_close(superposed._products(f), everything.sum((1, 2)).flatten(1))
    expected = torch.cat([everything[:, i, j].flatten(1) for i, j in ((0, 1), (0, 2), (1, 2))], 1)
    torch.testing.assert_close(each._products(f), expected)
    for model, width in ((superposed, D * D), (each, 3 * D * D)):
        assert model.product_dims == width and model.mlp.mlp[0].in_features == 3 * D + width
        model(x).sum().backward()
        assert model(x).shape == (B,) and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("library", ["rankkernels", "torch-rechub"])
def test_fnn_begins_with_what_a_factorization_machine_learnt(library):
    chosen, x = features("user", "item"), batch("user", "item")
    if library == "rankkernels":
        fm = rk.FactorizationMachine(chosen)
    else:
        fm = pytest.importorskip("torch_rechub.models.ranking").DeepFM(chosen, chosen, {"dims": [4]})
    before = copy.deepcopy(fm.state_dict())
    fnn = rk.FNN.from_fm(fm, {"dims": [6]})
    assert list(fnn.embedding.embed_dict) == ["user", "item"] and isinstance(fnn.mlp.mlp[2], nn.Tanh)
    optimizer = torch.optim.SGD(fnn.parameters(), lr=1.0)
    for name, table in fnn.embedding.embed_dict.items():
        assert torch.equal(table.weight, fm.embedding.embed_dict[name].weight)
    fnn(x).sum().backward()
    optimizer.step()
    for name, table in fnn.embedding.embed_dict.items():
        assert not torch.equal(table.weight, fm.embedding.embed_dict[name].weight)
    torch.testing.assert_close(fm.state_dict(), before, rtol=0, atol=0)


def test_factorization_machine_is_deepfm_without_the_mlp(float64):
    chosen, x = features("user", "item"), batch("user", "item")
    fm, deepfm = rk.FactorizationMachine(chosen), rk.DeepFM(chosen, chosen, {"dims": [4]})
    deepfm.linear.load_state_dict(fm.linear.state_dict())
    nn.init.zeros_(deepfm.mlp.mlp[-1].weight), nn.init.zeros_(deepfm.mlp.mlp[-1].bias)
    torch.testing.assert_close(fm(x), deepfm(x))
    fields = fm.embedding(x, chosen)
    pairs = sum((fields[:, i] * fields[:, j]).sum(1) for i in range(3) for j in range(i))
    torch.testing.assert_close(fm(x), torch.sigmoid(fm.linear(fields.flatten(1)).squeeze(1) + pairs))


def test_an_empty_batch():
    chosen = features("user", "item")
    x = {name: ids[:0] for name, ids in batch("user", "item").items()}
    models = rk.PNN(chosen, {"dims": [4]}), rk.WideDeep(chosen, chosen, {}), rk.FactorizationMachine(chosen)
    for model in (*models, rk.FNN(chosen, {}), rk.EmbeddingMLP(chosen, {})):
        y = model.eval()(x)
        y.sum().backward()
        assert y.shape == (0,)


CONCAT = rk.SequenceFeature("history", V, D, "concat")
SPARSE, WIDER, DENSE = rk.SparseFeature("user", V, D), rk.SparseFeature("item", V, D + 1), rk.DenseFeature("age")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: rk.WideDeep([], [SPARSE], {}), "WideDeep: wide_features must not be empty"),
        (lambda: rk.WideDeep([SPARSE], [CONCAT], {}), "WideDeep: feature 'history' has pooling='concat'"),
        (lambda: rk.EmbeddingMLP([], {}), "EmbeddingMLP: features must not be empty"),
        (lambda: rk.FNN([CONCAT], {}), "FNN: feature 'history' has pooling='concat'"),
        (lambda: rk.PNN([SPARSE, DENSE], {}), "PNN: features must have embeddings, 'age' is a dense feature"),
        (lambda: rk.PNN([SPARSE, WIDER], {}), "PNN: features must have one embed_dim, 'user' has 4 and 'item' has 5"),
        (lambda: rk.PNN([SPARSE], {}, "cross"), "PNN: product must be one of inner, outer, got 'cross'"),
        (lambda: rk.FactorizationMachine([DENSE]), "FactorizationMachine: fm_features must have embeddings"),
    ],
)
def test_what_is_refused(build, message):
    with pytest.raises(ValueError) as error:
        build()
    assert str(error.value).startswith(message)


def test_what_is_no_factorization_machine():
    with pytest.raises(TypeError, match="FNN.from_fm: fm must have fm_features and an embedding, got a Linear"):
        rk.FNN.from_fm(nn.Linear(2, 2), {})
