"""torch-rechub's tools on our classes: trainers from fit to export, loaders, masks; and on accelerated models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rankkernels as rk

features_ = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
basic = pytest.importorskip("torch_rechub.basic.layers")
ranking = pytest.importorskip("torch_rechub.models.ranking")
multi_task = pytest.importorskip("torch_rechub.models.multi_task")
trainers = pytest.importorskip("torch_rechub.trainers")
data = pytest.importorskip("torch_rechub.utils.data")
model_utils = pytest.importorskip("torch_rechub.utils.model_utils")
N, L, V, D = 96, 4, 20, 4
TASKS = ["classification", "classification"]
SLOW = pytest.mark.slow


def described(library) -> dict[str, object]:
    """One feature of each kind, of one of the two libraries."""
    return {
        "user": library.SparseFeature("user", V, D),
        "item": library.SparseFeature("item", V, D, padding_idx=0),
        "tags": library.SequenceFeature("tags", V, D, pooling="mean", padding_idx=0),
        "history": library.SequenceFeature("history", V, D, pooling="concat", shared_with="item", padding_idx=0),
        "price": library.DenseFeature("price"),
        "vector": library.DenseFeature("vector", 3),
    }


def columns() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    ids = {name: generator.integers(0, V, N) for name in ("user", "item")}
    ids |= {name: generator.integers(0, V, (N, L)) for name in ("tags", "history")}
    return ids | {"price": generator.random(N), "vector": generator.random((N, 3))}


def build(name: str, f: dict, library) -> nn.Module:
    if name == "DeepFM":
        fm = [f["user"], f["item"], f["tags"]]
        return library.DeepFM([*fm, f["price"], f["vector"]], fm, {"dims": [6]})
    if name == "DIN":
        return library.DIN([f["user"], f["tags"]], [f["history"]], [f["item"]], {"dims": [6]}, {"dims": [5]})
    everything = [f[n] for n in ("user", "item", "tags", "price")]
    towers = [{"dims": [5]}, {"dims": [5]}]
    return {
        "WideDeep": lambda: ranking.WideDeep(everything, everything[:3], {"dims": [6]}),
        "MMOE": lambda: multi_task.MMOE(everything, TASKS, 2, {"dims": [6]}, towers),
        "SharedBottom": lambda: multi_task.SharedBottom(everything, TASKS, {"dims": [6]}, towers),
    }[name]()


def three(name: str) -> list[nn.Module]:
    """A model as torch-rechub has it, accelerated, and of our classes as far as there are."""
    models = []
    for library, layers in ((features_, ranking), (features_, ranking), (rk, rk)):
        torch.manual_seed(0)
        models.append(build(name, described(library), layers))
        for module in models[-1].modules():
            if isinstance(module, nn.Embedding):  # torch-rechub's of 1e-4 are lost in the rounding of what they join
                nn.init.normal_(module.weight, std=0.5)
    rk.accelerate(models[1]), rk.accelerate(models[2])
    return models


@pytest.mark.parametrize("name", ["user", "item", "tags", "history", "price", "vector"])
def test_our_features_are_theirs(name):
    ours, theirs = described(rk)[name], described(features_)[name]
    for kind in ("SparseFeature", "SequenceFeature", "DenseFeature"):
        assert isinstance(ours, getattr(features_, kind)) == isinstance(theirs, getattr(features_, kind))
        assert isinstance(ours, getattr(rk, kind)) == (type(theirs).__name__ == kind)
    assert repr(ours) == repr(theirs)


def test_input_mask():
    x = {name: torch.as_tensor(column) for name, column in columns().items()}
    layers = []
    for library, layer in ((features_, basic.EmbeddingLayer), (rk, rk.EmbeddingLayer), (rk, basic.EmbeddingLayer)):
        f = described(library)
        layers.append((layer(list(f.values())), f))
    for names in (["item"], ["history"], ["tags", "history"], ["user"]):
        masks = [layer.input_mask(x, [f[n] for n in names]) for layer, f in layers]
        assert torch.equal(masks[1], masks[0]) and torch.equal(masks[2], masks[0])


def loaders(y: np.ndarray):
    return data.DataGenerator(columns(), y).generate_dataloader(split_ratio=[0.6, 0.2], batch_size=16)


def trained(trainer, name: str, tmp_path, model: nn.Module, y: np.ndarray, **options):
    """What a trainer's user sees of a model: the weights after two epochs, its scores, its predictions."""
    torch.manual_seed(1)
    train, validate, test = loaders(y)
    arguments = () if trainer is trainers.CTRTrainer else (TASKS,)
    # Adam would step along the signs of gradients that are nothing but rounding, of a bias before a BatchNorm.
    options |= {"optimizer_fn": torch.optim.SGD, "optimizer_params": {"lr": 0.1, "weight_decay": 1e-5}}
    run = trainer(model, *arguments, n_epoch=2, model_path=str(tmp_path), **options)
    run.fit(train, validate)
    (path,) = tmp_path.glob("*.pth")
    saved = torch.load(path)
    for key, value in model.state_dict().items():
        assert torch.equal(saved[key], value)
    unlabelled = test if trainer is trainers.CTRTrainer else [x for x, _ in test]
    return run, list(model.state_dict().values()), run.evaluate(model, test), run.predict(model, unlabelled)


def same(found, expected):
    torch.testing.assert_close(
        [torch.as_tensor(v, dtype=torch.float64) for v in found],
        [torch.as_tensor(v, dtype=torch.float64) for v in expected],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["DeepFM", "DIN", "WideDeep"])
def test_ctr_trainer(name, tmp_path):
    y = (np.random.default_rng(1).random(N) < 0.5).astype(np.float32)
    options = {"regularization_params": {"embedding_l2": 1e-4, "dense_l1": 1e-4}}
    runs = [trained(trainers.CTRTrainer, name, tmp_path, model, y, **options) for model in three(name)]
    for _, weights, score, predicted in runs[1:]:
        same(weights, runs[0][1])
        assert score == pytest.approx(runs[0][2], abs=1e-6)
        same(predicted, runs[0][3])


@pytest.mark.parametrize("method", [None, "uwl"])  # torch-rechub 0.9.0's others stop at a loss that was never set
@pytest.mark.parametrize("name", ["MMOE", "SharedBottom"])
def test_mtl_trainer(name, method, tmp_path):
    y = (np.random.default_rng(1).random((N, 2)) < 0.5).astype(np.float32)
    adaptive = None if method is None else {"method": method}
    runs = [trained(trainers.MTLTrainer, name, tmp_path, m, y, adaptive_params=adaptive) for m in three(name)]
    for _, weights, _, predicted in runs[1:]:
        same(weights, runs[0][1])
        same(predicted, runs[0][3])


@pytest.mark.parametrize(
    "name", ["DIN", *(pytest.param(n, marks=pytest.mark.slow) for n in ("DeepFM", "WideDeep", "MMOE"))]
)
def test_export_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    x = {n: torch.as_tensor(c[:8]) for n, c in columns().items()}
    x |= {n: x[n].float() for n in ("price", "vector")}
    for i, model in enumerate(three(name)):
        path = tmp_path / f"{i}.onnx"
        kind = trainers.MTLTrainer if name == "MMOE" else trainers.CTRTrainer
        arguments = (TASKS,) if name == "MMOE" else ()
        assert kind(model, *arguments).export_onnx(str(path), dummy_input=x, seq_length=L)
        session = onnxruntime.InferenceSession(str(path))
        (out,) = session.run(None, {i.name: x[i.name].numpy() for i in session.get_inputs()})
        torch.testing.assert_close(torch.as_tensor(out), model.eval()(x).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["DeepFM", "DIN", "WideDeep"])
def test_reflection_finds_the_features(name):
    found = [model_utils.extract_feature_info(model) for model in three(name)]
    assert found[1]["input_names"] == found[2]["input_names"] == found[0]["input_names"]
    dummies = [model_utils.generate_dummy_input(f["features"], batch_size=3) for f in found]
    assert [[t.shape for t in d] for d in dummies[1:]] == [[t.shape for t in dummies[0]]] * 2


@pytest.mark.parametrize("name", ["DeepFM", "DIN", "WideDeep"])
def test_visualization(name, monkeypatch):
    """Draws what runs: modules whose work a fused layer does are not in it."""
    pytest.importorskip("torchview", reason="torchview is not installed")
    graphviz = pytest.importorskip("graphviz", reason="graphviz is not installed")
    monkeypatch.setattr(graphviz.Digraph, "view", lambda self, *arguments, **keywords: None)
    monkeypatch.setattr(graphviz.Digraph, "render", lambda self, *arguments, **keywords: None)
    theirs, *ours = (trainers.CTRTrainer(model).visualization().visual_graph.source for model in three(name))
    assert "MLP" in theirs and all("MLP" in source and len(source) < len(theirs) for source in ours)


#: What their loaders make of a column: DataGenerator keeps numpy's dtype, ParquetIterableDataset gives float32.
FORMS = {
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "uint8": torch.uint8, "bool": torch.bool,
    "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["DeepFM", "DIN", "WideDeep"])
def test_columns_in_every_form(name, form):
    x = {n: torch.as_tensor(c) for n, c in columns().items()}
    if form == "bool":
        x = {n: t % 2 if not t.is_floating_point() else t > 0.5 for n, t in x.items()}
    x = {n: t.to(FORMS[form]) for n, t in x.items()}
    expected, *found = (model.eval()(x) for model in three(name))
    torch.testing.assert_close(found, [expected] * 2, rtol=1e-5, atol=1e-6)


def test_ids_of_one_column():
    """[N, 1], as a table with one column a feature gives them, where torch-rechub flattens them."""
    x = {n: torch.as_tensor(c) for n, c in columns().items()}
    features = [described(features_)[n] for n in ("user", "item")]
    theirs = basic.EmbeddingLayer(features)
    expected = theirs({n: x[n][:, None] for n in ("user", "item")}, features, squeeze_dim=True)
    rk.accelerate(theirs)
    found = theirs({n: x[n][:, None] for n in ("user", "item")}, features, squeeze_dim=True)
    assert torch.equal(found, expected) and found.shape == (N, 2 * D)
