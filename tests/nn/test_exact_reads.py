"""Tables under exact Adam are up to date for whoever reads them, by whatever means; what becomes of copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from exact_adam import Dense, bag, behind, close, draw, through_file, train
from torch import nn

import rankkernels as rk
from rankkernels.ops import _exact_table

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
ALL = torch.arange(30)
READS = {
    "state_dict": lambda m: m.state_dict()["weight"],
    "save state_dict": lambda m: through_file(m.state_dict())["weight"],
    "save module": lambda m: through_file(m).weight,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)).weight,
    "deepcopy": lambda m: copy.deepcopy(m).weight,
    "copy": lambda m: copy.copy(m.weight),
    "our lookup": lambda m: m(ALL[:, None]),
    "our lookup without grad": lambda m: torch.no_grad()(m)(ALL[:, None]),
    "torch's lookup": lambda m: F.embedding(ALL, m.weight),
    "torch's lookup by name": lambda m: F.embedding(input=ALL, weight=m.weight),
    "torch's bag": lambda m: F.embedding_bag(ALL[:, None], m.weight, mode="sum"),
    "our lookup of a batch of vmap's": lambda m: torch.vmap(lambda i: rk.embedding_bag(m.weight, i[None, None]))(ALL)[
        :, 0
    ],
    "the same without grad": lambda m: torch.no_grad()(READS["our lookup of a batch of vmap's"])(m),
    "our FM of a batch of vmap's": lambda m: torch.vmap(lambda i: rk.embedding_fm([m.weight], [i[None]])[0])(ALL)[:, 0],
    "torch's lookup of a batch of vmap's": lambda m: torch.vmap(lambda i: F.embedding(i, m.weight))(ALL[:, None])[:, 0],
    "torch's module": lambda m: of_torch(m.weight)(ALL),
    "index_select": lambda m: m.weight.index_select(0, ALL),
    "indexing": lambda m: m.weight[ALL],
    "rows": lambda m: torch.stack(list(m.weight)),
    "detach": lambda m: m.weight.detach(),
    "data": lambda m: m.weight.data,
    "numpy": lambda m: torch.from_numpy(m.weight.detach().numpy()),
    "in a list": lambda m: torch.cat([m.weight, m.weight])[:30],
    "out of place": lambda m: m.weight * 1.0,
    "another op of ours": lambda m: rk.cross_network(m.weight, [torch.zeros(1, 5).double()], [torch.zeros(5).double()]),
    "vector": lambda m: nn.utils.parameters_to_vector(m.parameters()).view(30, 5),
    "EMA": lambda m: ema(m).module.weight,
    "text": lambda m: [str(m.weight), m.weight][1],
    "pointer": lambda m: [m.weight.data_ptr(), m.weight][1],
    "eval": lambda m: m.eval().weight,
}


#: Readers of memory that torch asks no tensor about.
SEEN_BY_NOBODY = {
    "torch.tensor": lambda m: torch.tensor(m.weight),
    "torch.asarray": lambda m: torch.asarray(m.weight, copy=True, requires_grad=False),
    "as_subclass": lambda m: m.weight.as_subclass(torch.Tensor),
    "vmap over it": lambda m: torch.vmap(lambda row: row * 1.0)(m.weight),
    "grad of it": lambda m: torch.func.grad(lambda p: (p**2).sum() / 2)(m.weight),
    "traced": lambda m: torch.jit.trace(lambda p: p * 1.0, ALL)(m.weight),
}


def of_torch(weight: nn.Parameter) -> nn.Embedding:
    module = nn.Embedding(*weight.shape)
    module.weight = weight
    return module


def ema(module: nn.Module) -> torch.optim.swa_utils.AveragedModel:
    averaged = torch.optim.swa_utils.AveragedModel(bag(), avg_fn=lambda old, new, n: new)
    averaged.update_parameters(module)
    return averaged


@pytest.mark.parametrize("way", READS)
def test_nobody_reads_a_stale_row(way):
    module, optimizer, expected = behind()
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        assert not torch.allclose(module.weight, expected, rtol=1e-6)
    found = READS[way](module)
    with torch._C.DisableTorchFunctionSubclass():
        close(found, expected)


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:`torch.jit.trace` is deprecated")
@pytest.mark.parametrize("way", SEEN_BY_NOBODY)
def test_a_flush_is_seen_by_all(way):
    module, optimizer, expected = behind()
    optimizer.flush()
    close(SEEN_BY_NOBODY[way](module), expected)


def test_reads_of_some_rows_leave_the_others():
    module, optimizer, expected = behind()
    F.embedding(ALL[:5], module.weight)
    assert module.weight.ledger.is_behind()
    close(module(ALL[5:10, None]), expected[5:10])  # and leaves them to the step, which writes them
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        close(module.weight[:5], expected[:5])
        assert not torch.allclose(module.weight[5:10], expected[5:10], rtol=1e-6)
        assert not torch.allclose(module.weight, expected, rtol=1e-6)
    module.zero_grad()
    for name in ("shape", "dtype", "grad", "requires_grad", "__len__", "ledger"):
        getattr(module.weight, name)
    assert len(list(module.parameters())) == 1 and module.weight.ledger.is_behind()
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([30]), module.weight)
    with pytest.raises(IndexError, match=r"input\[0, 0\] = -1 is out of range"):
        module(torch.tensor([[-1]]))
    optimizer.flush()
    assert not module.weight.ledger.is_behind()
    close(module.weight, expected)


def test_what_is_copied_is_plain():
    module, optimizer, expected = behind()
    module.fused_optimizer = None
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), through_file(module)):
        assert type(other.weight) is nn.Parameter and other.weight.requires_grad
    assert isinstance(module.weight, nn.Parameter)
    both = copy.deepcopy([module, optimizer])
    ids, grad = draw(50)
    for m, o in ([module, optimizer], both):
        rk.optim.fuse(m, o)
        train(m, o, None, range(20, 25))
    assert type(both[0].weight) is type(module.weight)
    close(both[0].weight, module.weight)


def test_torchs_embedding_trains_exactly():
    """A module of torch's with sparse gradients: its own lookup reads rows that are up to date."""
    torch.manual_seed(0)
    module = nn.Embedding(30, 5, sparse=True).double()
    optimizer = rk.optim.AdamW(module.parameters(), lr=0.01, exact=True)
    dense = Dense("AdamW", module, weight_decay=0.01)
    for step in range(30):
        ids, _ = draw(step)
        module.zero_grad()
        module(ids).sin().sum().backward()
        optimizer.step()
        dense.step(ids, dense.weight.detach()[ids].cos())
    close(module.weight, dense.weight)


def test_writes_are_of_rows_that_are_up_to_date():
    module, optimizer, expected = behind()
    with torch.no_grad():
        module.weight[3] = 7.0
    expected = expected.index_fill(0, torch.tensor([3]), 7.0)
    close(module.weight, expected)
    train(module, optimizer, None, range(3))
    module.load_state_dict({"weight": expected})
    close(module.weight, expected)


def deepfm(rows: int = 40) -> tuple[rk.DeepFM, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    features = [rk.SparseFeature(name, rows, 8) for name in ("user", "item")]
    model = rk.DeepFM([*features, rk.DenseFeature("age")], features, {"dims": [16], "dropout": 0})
    x = {name: torch.randint(rows, (32,)) for name in ("user", "item")} | {"age": torch.rand(32)}
    return model, x


def trained_deepfm():
    """A model in training, a batch that names rows which lag behind, and the same model with none that does."""
    models = []
    for _ in range(2):
        model, x = deepfm()
        optimizer = rk.optim.AdamW(model.embedding.parameters(), lr=0.1, exact=True)
        rk.optim.fuse(model, optimizer)
        for step in range(20):
            model({name: ids[step : step + 2] for name, ids in x.items()}).sum().backward()
        models.append(model)
    optimizer.flush()
    assert any(p.ledger.is_behind() for p in models[0].embedding.parameters())
    return models[0], x, models[1]


@pytest.mark.parametrize("training", [True, False])
def test_compiled_models(training):
    model, x, current = trained_deepfm()
    model.mlp.eval(), current.mlp.eval()
    compiled = torch.compile(model, backend="eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x), current(x))
    if training:
        compiled(x).sum().backward(), current(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), current(x))


def test_exported_models():
    model, x, current = trained_deepfm()
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), current.eval()(x))


def test_evaluation_in_one_pass_and_layer_by_layer():
    model, x, current = trained_deepfm()
    with torch.inference_mode():
        model.training = model.mlp.training = False  # without eval(), which brings all up to date
        for module in model.mlp.modules():
            module.training = False
        torch.testing.assert_close(model(x), current.eval()(x))
    assert any(p.ledger.is_behind() for p in model.embedding.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_attributes_of_many_tables_are_read_without_asking(training, monkeypatch):
    """A table's ``__torch_function__`` takes a microsecond, and there is a table a feature."""
    features = [rk.SparseFeature(f"f{i}", 20, 4) for i in range(30)]
    mlp = {"dims": [64], "activation": "relu"}
    x = {f.name: torch.arange(20).repeat(100) for f in features}  # enough to multiply for one pass
    for model in (rk.models.DeepFM(features, features, mlp), rk.models.WideDeep(features, features, mlp)):
        rk.optim.fuse(model, rk.optim.Adam(model.embedding.parameters(), exact=True))
        model(x).sum().backward()
        asked, ask = [], _exact_table._Exact.__torch_function__.__func__
        count = classmethod(lambda cls, *call: asked.append(call) or ask(cls, *call))
        monkeypatch.setattr(_exact_table._Exact, "__torch_function__", count)
        with torch.set_grad_enabled(training):
            out = model.train(training)(x)
        if training:
            out.sum().backward()
        monkeypatch.undo()
        assert len(asked) < 10
