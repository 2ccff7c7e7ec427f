"""FuxiCTR's models accelerated, against the same models untouched."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import rankkernels as rk
from tests.outcomes import outcome

layers = pytest.importorskip("fuxictr.pytorch.layers", reason="FuxiCTR is not installed")
dataloaders = pytest.importorskip("fuxictr.pytorch.dataloaders")
fuxi = pytest.importorskip("bench.harness.fuxictr_models")
cases = pytest.importorskip("fuxictr_cases")

CASES = [
    pytest.param(name, seed, id=f"{name}-{seed}", marks=[pytest.mark.slow] if seed > 0 else [])
    for name in cases.CASES
    for seed in range(10)
]


def pair(name: str, seed: int):
    """A model as it is, the same accelerated, and batches for both. FuxiCTR's embeddings of 1e-4 are made 0.1, so that
    they matter and a normalization does not enlarge their rounding."""
    torch.manual_seed(seed)
    untouched, batch = cases.CASES[name](seed)
    with torch.no_grad():
        for table in untouched.modules():
            if isinstance(table, nn.Embedding):
                table.weight.mul_(1000)
    return untouched, rk.accelerate(copy.deepcopy(untouched)), batch


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, batch: object, seed: int) -> float:
    """A training step as FuxiCTR's own does it, but for the gradients, which stay."""
    torch.manual_seed(seed)  # for dropout
    model.optimizer.zero_grad()
    loss = model.compute_loss(model(copy.deepcopy(batch)), model.get_labels(batch))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    model.optimizer.step()
    return loss.item()


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float):
    """On the scale of the largest: sums in another order, and no more."""
    assert list(ours) == list(theirs)
    scale = max((t.abs().max().item() for t in theirs.values() if t.numel()), default=0.0)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance * scale, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_training_curves(name, seed):
    untouched, ours, make_batch = pair(name, seed)
    for i in range(20):
        batch = make_batch()
        expected, loss = (step(model.train(), batch, i) for model in (untouched, ours))
        assert loss == pytest.approx(expected, abs=1e-5), f"step {i}"
        if i == 0:
            assert_equal(gradients(ours), gradients(untouched), 1e-5)
            assert_equal(dict(ours.named_buffers()), dict(untouched.named_buffers()), 1e-5)
    # Biases before a normalization have noise for a gradient, which Adam makes a step of: same weights for eval.
    ours.load_state_dict(untouched.state_dict(), strict=True)
    batch = make_batch()
    with torch.no_grad():
        expected, found = (model.eval()(copy.deepcopy(batch))["y_pred"] for model in (untouched, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", cases.CASES)
def test_state_dicts_and_the_way_back(name):
    untouched, ours, make_batch = pair(name, 1)
    step(ours, make_batch(), 0)
    untouched.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(untouched.state_dict(), strict=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in untouched.named_parameters()]
    rk.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in untouched.modules()]
    ours.optimizer, untouched.optimizer = (type(m.optimizer)(m.parameters()) for m in (ours, untouched))
    for i in range(3):
        batch = make_batch()
        assert step(ours, batch, i) == step(untouched, batch, i)
    for a, b in zip(ours.state_dict().values(), untouched.state_dict().values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, copied):
    _, ours, make_batch = pair(name, 2)
    other, batch = copied(ours), make_batch()
    assert [type(m) for m in other.modules()] == [type(m) for m in ours.modules()]
    with torch.no_grad():
        assert torch.equal(other.eval()(copy.deepcopy(batch))["y_pred"], ours.eval()(batch)["y_pred"])


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.CASES)
def test_compiled(name):
    """Whole, but for what FuxiCTR's own forward breaks: its masks and its printing."""
    untouched, ours, make_batch = pair(name, 4)
    torch._dynamo.reset()
    batch = make_batch()
    compiled = torch.compile(ours.eval(), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(copy.deepcopy(batch))["y_pred"], untouched.eval()(batch)["y_pred"], rtol=1e-5, atol=1e-5
        )


def test_their_own_training_loop(tmp_path):
    """fit, checkpoints, early stopping, evaluate and predict, on npz files."""
    specs = {
        "price": {"type": "numeric"},
        "user": {"type": "categorical", "vocab_size": 40, "padding_idx": 0},
        "item": {"type": "categorical", "vocab_size": 30, "padding_idx": 0},
        "seen": {"type": "sequence", "vocab_size": 30, "padding_idx": 0, "share_embedding": "item", "max_len": 4,
                 "feature_encoder": "layers.MaskedAveragePooling()"},
    }  # fmt: skip
    columns = {f: v.numpy() for f, v in cases.batch_of(specs, 600).items()}
    columns["label"] = (columns["user"] % 2).astype(float)  # to be learnt
    np.savez(tmp_path / "data.npz", **columns)
    (tmp_path / "generated").mkdir()
    features = fuxi.feature_map(specs, 8, str(tmp_path))
    logs = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        mlp = {"hidden_units": [16], "hidden_activations": "ReLU"}
        model = fuxi.DeepFM(features, 8, mlp, embedding_regularizer=1e-5, learning_rate=1e-2)
        if accelerated:
            rk.accelerate(model)
        train, valid = (
            dataloaders.RankDataLoader(features, "test", test_data=str(tmp_path / "data.npz"), batch_size=100)
            for _ in range(2)
        )
        model.fit(train, epochs=3, validation_data=valid)
        logs.append(model.evaluate(valid))
        assert model.predict(valid).shape == (600,)
    assert logs[1] == pytest.approx(logs[0], abs=1e-4) and logs[1]["AUC"] > 0.7


def test_fused_adam():
    """torch's own, as docs/from_fuxictr.md has it, of an optimizer that has made steps already."""
    untouched, ours, make_batch = pair("DeepFM", 0)
    for i in range(4):
        batch = make_batch()
        assert step(ours, batch, i) == pytest.approx(step(untouched, batch, i), abs=1e-5)
        for group in ours.optimizer.param_groups:
            group["fused"] = True


def test_regularizers_see_the_embeddings():
    """By ``type(module) == FeatureEmbeddingDict``: the tables by their own regularizer, the rest by the other."""
    untouched, ours, _ = pair("DeepFM", 0)
    for model in (untouched, ours):
        model._embedding_regularizer, model._net_regularizer = 0.3, "l1(0.1)"
    assert ours.regularization_loss() == untouched.regularization_loss() > 0
    ours_dict, their_dict, other = type(ours.embedding_layer.embedding_layer), layers.FeatureEmbeddingDict, nn.Module
    assert ours_dict is not their_dict and ours_dict == their_dict and their_dict == ours_dict
    assert ours_dict != other and ours_dict != layers.FeatureEmbedding and {ours_dict: 1}[their_dict] == 1


def test_report():
    untouched, _, _ = pair("DIN", 0)
    tables = untouched.embedding_layer.embedding_layers
    tables["c0"].max_norm = 1.0
    replaced = {e.cls for e in rk.explain(untouched).replaced}
    assert replaced >= {"FeatureEmbeddingDict", "DIN_Attention", "MLP_Block"}
    reasons = {e.path: e.reason for e in rk.explain(untouched).left}
    assert reasons[""] == "its own forward runs, over the layers below"
    assert reasons["embedding_layer.embedding_layers.c0"] == "called on its own, for max_norm"


@pytest.mark.parametrize("name", ["DeepFM", "LongCTR-DIN"])
def test_a_layer_is_fuxictrs_before_and_after(name):
    """The zoo's models are of a package of their own, which is installed with FuxiCTR."""
    untouched, ours, _ = pair(name, 0)
    reports = [rk.explain(model).entries for model in (untouched, ours)]
    assert {e.library for entries in reports for e in entries} == {"FuxiCTR"}
    assert [(e.path, e.cls) for e in reports[1]] == [(e.path, e.cls) for e in reports[0]]


def test_subclasses_and_other_outputs_are_left():
    class Mine(layers.MLP_Block):
        pass

    product = layers.InnerProductInteraction
    model = nn.Sequential(Mine(2, [3]), product(3, "inner_product"), product(3), layers.GELU())
    rk.accelerate(model)
    assert [e.path for e in rk.explain(model).replaced] == ["2"]
    assert [type(m) for m in model][:2] == [Mine, layers.InnerProductInteraction]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", cases.CASES)
def test_an_empty_batch(name, training):
    """The same shape, gradients and buffers of no samples, or the same kind of error."""
    untouched, ours, make_batch = pair(name, 0)
    batch = torch.utils._pytree.tree_map(lambda t: t[:0], make_batch())
    found = []
    for model in (untouched, ours):
        model.train(training)
        found.append(outcome(model, lambda model=model: model(copy.deepcopy(batch))["y_pred"]))
    if isinstance(found[0], type):
        assert found[1] is found[0]
    else:
        torch.testing.assert_close(found[1], found[0])
