"""DeepCTR-Torch's models and layers, accelerated and not: the same losses, gradients, buffers and tools."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import rankkernels as rk
from tests.outcomes import outcome

inputs = pytest.importorskip("deepctr_torch.inputs", reason="DeepCTR-Torch is not installed")
models = pytest.importorskip("deepctr_torch.models")
activation = pytest.importorskip("deepctr_torch.layers.activation")
core = pytest.importorskip("deepctr_torch.layers.core")
interaction = pytest.importorskip("deepctr_torch.layers.interaction")
sequence = pytest.importorskip("deepctr_torch.layers.sequence")
ours = pytest.importorskip("rankkernels.adoption.deepctr_torch")

V = 13


class Data:
    """Columns, and batches of them: ids, lengths and numbers in one matrix, and clicks."""

    def __init__(self, chooser: random.Random, history: bool = False, one_width: bool = True, varlen: bool = True):
        D, self.maxlen = chooser.choice([4, 8]), chooser.choice([3, 6])
        widths = [D] * 4 if one_width else [chooser.choice([2, 4, 8]) for _ in range(4)]
        groups = ["default_group"] * 4 if chooser.random() < 0.5 else ["a", "b", "a", "b"]
        names = ["user", "item", "city", "category"][: chooser.choice([2, 4])]
        self.columns = [inputs.SparseFeat(n, V, d, group_name=g) for n, d, g in zip(names, widths, groups)]
        if history:
            self.columns += [self._sequence(f"hist_{n}", n, d, "length") for n, d in zip(names[1:4:2], widths[1:4:2])]
        combiners = ["mean", "sum"] if history or not varlen else ["mean", "sum", "max"]
        if varlen and chooser.random() < 0.7:
            self.columns.append(self._sequence("tags", "tags", D, None, chooser.choice(combiners)))
        if varlen and not history and chooser.random() < 0.5:
            self.columns.append(
                self._sequence("shops", names[0], widths[0], "shops_length", chooser.choice(combiners[:2]))
            )
        for name, dimension in [("age", 1), ("price", 2)][: chooser.choice([0, 2])]:
            self.columns.append(inputs.DenseFeat(name, dimension))
        if chooser.random() < 0.7:
            chooser.shuffle(self.columns)
        self.history = names[1:4:2]

    def _sequence(self, name, table, width, length, combiner="mean"):
        feature = inputs.SparseFeat(name, V, width, embedding_name=table)
        return inputs.VarLenSparseFeat(feature, self.maxlen, combiner, length)

    def batch(self, B: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        generator, x = torch.Generator().manual_seed(seed), {}
        for c in self.columns:
            if isinstance(c, inputs.DenseFeat):
                x[c.name] = torch.randn(B, c.dimension, generator=generator)
                continue
            length = c.maxlen if isinstance(c, inputs.VarLenSparseFeat) else 1
            x[c.name] = torch.randint(0, V, (B, length), generator=generator)
            if length > 1:
                lengths = torch.randint(0, length + 1, (B, 1), generator=generator)
                x[c.name] = x[c.name].clamp(min=1) * (torch.arange(length) < lengths)
                if c.length_name:
                    x[c.length_name] = lengths
        return x, torch.randint(0, 2, (B, 1), generator=generator).float()

    def matrix(self, model: nn.Module, B: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.batch(B, seed)
        return torch.cat([x[name].float() for name in model.feature_index], 1), y


def mlp_options(chooser: random.Random) -> dict:
    return {
        "dnn_hidden_units": chooser.choice([(9,), (12, 7)]),
        "dnn_activation": chooser.choice(["relu", "sigmoid", "prelu", "linear"]),
        "dnn_dropout": chooser.choice([0, 0.2]),
        "l2_reg_dnn": chooser.choice([0, 1e-3]),
        "l2_reg_embedding": chooser.choice([0, 1e-3]),
        "init_std": 0.3,
        "task": chooser.choice(["binary", "regression"]),
    }


def attention_options(chooser: random.Random, activations: list[str]) -> dict:
    return {
        "att_activation": chooser.choice(activations),
        "att_weight_normalization": chooser.choice([False, True]),
    }


def deepfm(chooser):
    use_fm = chooser.random() < 0.8
    data, options = Data(chooser, one_width=use_fm), mlp_options(chooser)
    linear = data.columns[: chooser.choice([1, len(data.columns)])]
    options["dnn_use_bn"] = chooser.choice([False, True])
    return data, lambda: models.DeepFM(linear, data.columns, use_fm=use_fm, **options)


def nfm(chooser):
    data, options = Data(chooser), mlp_options(chooser)
    options["bi_dropout"] = chooser.choice([0, 0.2])
    return data, lambda: models.NFM(data.columns, data.columns, **options)


def din(chooser):
    data, options = Data(chooser, history=True, one_width=False), mlp_options(chooser)
    options |= attention_options(chooser, ["Dice", "sigmoid", "prelu", "relu"])
    options |= {"att_hidden_size": chooser.choice([(5,), (7, 3)]), "dnn_use_bn": chooser.choice([False, True])}
    return data, lambda: models.DIN(data.columns, data.history, **options)


def dien(chooser):
    data, options = Data(chooser, history=True, varlen=False), mlp_options(chooser)
    options |= attention_options(chooser, ["Dice", "sigmoid"])
    options |= {"att_hidden_units": chooser.choice([(5,), (7, 3)])}
    options |= {"gru_type": chooser.choice(["GRU", "AIGRU", "AGRU", "AUGRU"])}
    return data, lambda: models.DIEN(data.columns, data.history, **options)


FAMILIES = {"DeepFM": deepfm, "DIN": din, "NFM": nfm, "DIEN": dien}


def made(name: str, number: int) -> tuple[Data, nn.Module, nn.Module]:
    """A random configuration of a model, accelerated and not, with the same parameters."""
    data, make = FAMILIES[name](random.Random(f"{name} {number}"))
    untouched, model = make(), rk.accelerate(make())
    with torch.no_grad():  # theirs are too small for anything but the bias to matter
        for a, b in zip(untouched.parameters(), model.parameters()):
            b.copy_(a.uniform_(-0.5, 0.5))
    return data, untouched, model


def step(model: nn.Module, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss that their ``fit`` takes the gradient of; the same units are dropped each time."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = nn.functional.mse_loss(model(X), y, reduction="sum") + model.get_regularization_loss() + model.aux_loss
    loss.backward()
    return loss.detach()


def check_gradients(untouched: nn.Module, model: nn.Module, X: torch.Tensor, y: torch.Tensor) -> None:
    losses = [step(m, X, y) for m in (untouched, model)]
    assert_close(*losses)
    for (name, a), b in zip(untouched.named_parameters(), model.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert_close(b.grad, a.grad, msg=lambda text: f"{name}: {text}")
    for (name, a), b in zip(untouched.named_buffers(), model.buffers()):
        assert_close(b, a, msg=lambda text: f"{name}: {text}")


CASES = [
    pytest.param(name, n, marks=[pytest.mark.slow] if n > 2 else [], id=f"{name}-{n}")
    for name in FAMILIES
    for n in range(10)
]


@pytest.mark.parametrize("name, number", CASES)
def test_gradients_and_buffers(name, number, float64):
    data, untouched, model = made(name, number)
    X, y = data.matrix(model, 17)
    check_gradients(untouched, model, X.double(), y.double())


@pytest.mark.parametrize("name, number", CASES)
def test_losses(name, number):
    data, untouched, model = made(name, number)
    assert type(model) is getattr(ours, name) and isinstance(model, getattr(models, name))
    assert list(model.state_dict()) == list(untouched.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=2e-3, momentum=0.9) for m in (untouched, model)]
    for i in range(20):
        X, y = data.matrix(model, 17, seed=i)
        losses = []
        for m, optimizer in zip((untouched, model), optimizers):
            losses.append(step(m, X, y) / 17)
            optimizer.step()
        assert_close(*losses, rtol=0, atol=1e-5)
    untouched.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(untouched.state_dict(), strict=True)
    X, _ = data.matrix(model, 17, seed=99)
    before = untouched.eval()(X)
    assert_close(model.eval()(X), before, rtol=0, atol=1e-5)
    rk.restore(model)
    for a, b in zip(model.modules(), untouched.modules()):
        assert type(a) is type(b) and list(a.__dict__) == list(b.__dict__)
    assert torch.equal(model(X), before)


def every_model(data: Data) -> dict:
    """What is left of their models, by name."""
    sparse = [c for c in data.columns if isinstance(c, inputs.SparseFeat)]
    both = sparse, sparse
    tasks = {"task_types": ["binary", "binary"], "task_names": ["a", "b"]}
    return {
        "WDL": lambda: models.WDL(data.columns, data.columns), "xDeepFM": lambda: models.xDeepFM(*both),
        "AFM": lambda: models.AFM(*both), "DIFM": lambda: models.DIFM(*both), "IFM": lambda: models.IFM(*both),
        "AutoInt": lambda: models.AutoInt(*both), "DCN": lambda: models.DCN(data.columns, data.columns),
        "DCNMix": lambda: models.DCNMix(*both), "FiBiNET": lambda: models.FiBiNET(*both),
        "MLR": lambda: models.MLR(sparse, base_feature_columns=sparse), "ONN": lambda: models.ONN(*both),
        "PNN": lambda: models.PNN(data.columns), "CCPM": lambda: models.CCPM(*both), "AFN": lambda: models.AFN(*both),
        "SharedBottom": lambda: models.SharedBottom(data.columns, **tasks),
        "ESMM": lambda: models.ESMM(data.columns, task_types=["binary"] * 2),
        "MMOE": lambda: models.MMOE(data.columns, **tasks), "PLE": lambda: models.PLE(data.columns, **tasks),
    }  # fmt: skip


@pytest.mark.parametrize("name", every_model(Data(random.Random(5))))
def test_other_models(name, float64):
    data = Data(random.Random(5))
    make = every_model(data)[name]
    untouched, model = make(), rk.accelerate(make())
    assert type(model) is getattr(ours, name)
    X, y = data.matrix(model, 11)
    outputs = [m(X.double()) for m in (untouched, model)]
    check_gradients(untouched, model, X.double(), y.double().expand(-1, outputs[0].size(1)))
    assert_close(*outputs)


def test_every_model_is_tried():
    theirs = {n for n, m in vars(models).items() if isinstance(m, type) and issubclass(m, nn.Module)}
    assert theirs == {*FAMILIES, *every_model(Data(random.Random(5)))}


@pytest.mark.parametrize(
    "name, optimizer", [("DeepFM", "adam"), ("DIN", "adagrad"), ("NFM", "sgd"), ("DIN", "rmsprop")]
)
def test_their_training_loop(name, optimizer):
    data, untouched, model = made(name, 0)
    results = []
    for m in (untouched, model):
        m.compile(optimizer, "mse", metrics=["mse"])
        assert (m is model and optimizer != "rmsprop") == bool(m.optim.defaults.get("fused"))
        torch.manual_seed(0)
        x, y = data.batch(70)
        x = {key: value.numpy() for key, value in x.items()}
        history = m.fit(x, y.numpy(), batch_size=16, epochs=2, verbose=0, validation_split=0.2)
        metrics = m.evaluate(x, y.numpy(), batch_size=16)
        results.append((history.history["loss"], list(metrics.values()), m.predict(x, batch_size=16)))
    for a, b in zip(*results):
        assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DeepFM", "DIN", "DIEN"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(name, copied):
    data, _, model = made(name, 1)
    X, y = data.matrix(model, 9)
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(step(other, X, y), step(model, X, y))
    other.embedding_dict["user"].weight.data.zero_()
    assert not torch.equal(other.eval()(X), model.eval()(X))


def parts(make) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    untouched = make().double()
    return untouched, rk.accelerate(copy.deepcopy(untouched))


def check_layer(untouched: nn.Module, layer: nn.Module, *arguments, training: bool = True) -> None:
    leaves = [[a.clone().requires_grad_(a.is_floating_point()) for a in arguments] for _ in range(2)]
    outputs = [m.train(training)(*a) for m, a in zip((untouched, layer), leaves)]
    assert_close(*outputs)
    wanted, found = (
        torch.autograd.grad(out, [a for a in x if a.requires_grad] + list(m.parameters()), torch.ones_like(out) * 0.7)
        for m, x, out in zip((untouched, layer), leaves, outputs)
    )
    for a, b in (*zip(wanted, found), *zip(untouched.buffers(), layer.buffers())):
        assert_close(b, a)


@pytest.mark.parametrize("training", [True, False])
def test_layers(training):
    x = torch.randn(6, 5, 4, dtype=torch.double)
    for make, inputs_ in (
        (interaction.FM, x),
        (interaction.BiInteractionPooling, x),
        (lambda: activation.Dice(4, 3), x),
        (lambda: activation.Dice(5, 2), x[:, :, 0]),
        (lambda: core.DNN(4, [7, 3], "dice", dice_dim=3), x),
        (lambda: core.DNN(4, [7, 3], "dice", dice_dim=2, use_bn=True), x[:, 0]),
        (lambda: core.DNN(4, [7, 3], "prelu", use_bn=True, dropout_rate=0.0), x[:, 0]),
        (lambda: core.DNN(4, [5], "relu", use_bn=True), x),  # over the positions
    ):
        untouched, layer = parts(make)
        assert type(layer).__module__ == ours.__name__
        check_layer(untouched, layer, inputs_, training=training)


@pytest.mark.parametrize("act", ["dice", "sigmoid", "relu", "prelu", "linear"])
@pytest.mark.parametrize("training", [True, False])
def test_attention(act, training):
    D, L = 6, 7
    query, keys = torch.randn(9, 1, D, dtype=torch.double), torch.randn(9, L, D, dtype=torch.double)
    check_layer(*parts(lambda: core.LocalActivationUnit([5, 3], D, act)), query, keys, training=training)
    lengths = torch.tensor([0, 7, 3, 1, 0, 9, 2, 7, 4])[:, None]
    for normalized, score, masked in ((a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)):
        untouched, layer = parts(
            lambda: sequence.AttentionSequencePoolingLayer([5, 3], act, normalized, score, masked, D)
        )
        mask = torch.rand(9, L) < 0.5
        mask[4] = False
        check_layer(untouched, layer, query, keys, lengths, *([mask] if masked else []), training=training)


def calls(model: nn.Module, run) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model)
    return [e.name for e in profile.events()]


@pytest.mark.parametrize("name", ["DeepFM", "DIN"])
def test_what_runs(name):
    """One lookup of all tables and one of the linear model's, one attention; none of torch's for either."""
    data, _, model = made(name, 1)
    X, y = data.matrix(model, 9)
    names = calls(model, lambda m: step(m, X, y))
    assert "aten::embedding" not in names
    assert names.count("rankkernels::din_attention") == (name == "DIN")


@pytest.mark.parametrize("name", ["DeepFM", "DIN"])
def test_compiled(name):
    """In one graph, whether or not the model ran before."""
    data, untouched, model = made(name, 1)
    X, _ = data.matrix(model, 9)
    with torch.no_grad():
        before = untouched.eval()(X)
        compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
        assert_close(compiled(X), before)
        assert_close(model(X), before)


def test_a_hook_on_a_table_is_called():
    data, untouched, model = made("DeepFM", 1)
    seen = []
    model.embedding_dict["item"].register_forward_hook(lambda *_: seen.append(1))
    X, _ = data.matrix(model, 9)
    assert_close(model.eval()(X), untouched.eval()(X))
    assert seen


def test_an_id_outside_its_table_is_named():
    data, _, model = made("DeepFM", 1)
    X, _ = data.matrix(model, 9)
    X[3, model.feature_index["item"][0]] = V
    with pytest.raises(IndexError, match="item"):
        model(X)


def test_layers_that_are_left_say_why():
    report = rk.explain(models.DCN([inputs.SparseFeat("a", 3, 4)] * 1, [inputs.SparseFeat("a", 3, 4)]))
    reasons = {e.cls: e.reason for e in report.left}
    assert reasons["CrossNet"] and "DNN" not in reasons

    class Mine(core.DNN):
        pass

    with pytest.warns(UserWarning, match="a subclass of DNN"):
        rk.accelerate(Mine(3, [2]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, *every_model(Data(random.Random(5)))])
def test_an_empty_batch(name, training, float64):
    """The same gradients and buffers of no samples, or the same kind of error."""
    if name in FAMILIES:
        data, *pair = made(name, 0)
    else:
        data = Data(random.Random(5))
        make = every_model(data)[name]
        pair = [make(), rk.accelerate(make())]
    found = []
    for model in pair:
        X, _ = data.matrix(model, 11)
        model.train(training)
        found.append(outcome(model, lambda model=model, X=X: model(X[:0].double())))
    if name == "DIN":  # theirs cannot reshape an empty batch
        assert found[0] is RuntimeError and found[1][0].shape == (0, 1)
    elif isinstance(found[0], type):
        assert found[1] is found[0]
    else:
        assert_close(found[1], found[0])
