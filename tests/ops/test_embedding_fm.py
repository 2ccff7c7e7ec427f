"""Lookup + FM + linear term in one pass, beyond the cases of test_ops.py, and DeepFM on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankkernels as rk
from rankkernels.nn.embedding import EmbeddingLayer
from rankkernels.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
MODES, TABLES = ["none", "mean", "max", "sum", "none"], [0, 1, 2, 1, 3]


def batch(B: int = 1500, rows=(20, 3000, 50, 7), D: int = 19):
    weights = [torch.randn(r, D, requires_grad=True) for r in rows]
    ids = [torch.randint(0, rows[t], (B,) if m == "none" else (B, 4)) for t, m in zip(TABLES, MODES)]
    return weights, ids, torch.randn(1, len(ids) * D, requires_grad=True)


OPTIONS = dict(modes=MODES, tables=TABLES, padding_idx=[None, 1, 3, None, None], frozen_rows=[None, 1, None, 6])


def apart(weights, ids, linear_weight, dense, **options):
    """The same by the separate ops."""
    (e,) = rk.table_batched_embedding_bag(weights, ids, **options, concat=True)
    fm = rk.fm_interaction(e.view(e.size(0), len(ids), -1))
    linear = None if linear_weight is None else nn.functional.linear(e, linear_weight)
    return torch.cat([e, dense], 1), fm, linear


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("used", ["all", "fm", "linear", "embeddings"])
def test_is_the_separate_ops(sparse, used):
    weights, ids, a = batch()
    dense, results = torch.randn(1500, 3, requires_grad=True), []
    for function in (rk.embedding_fm, apart):
        e, fm, linear = function(weights, ids, a, dense, **OPTIONS, sparse=sparse)
        parts = {"embeddings": e.sin().sum(), "fm": fm.sin().sum(), "linear": linear.sin().sum()}
        loss = sum(parts.values()) if used == "all" else parts[used]
        grads = torch.autograd.grad(loss, [*weights, a, dense], allow_unused=True)
        results.append([e, fm, linear, *grads])
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(*results):
        if theirs is None:
            assert ours is None or (ours == 0).all()
            continue
        assert ours.layout == theirs.layout
        if sparse and ours.layout == torch.sparse_coo:
            assert torch.equal(ours._indices(), theirs._indices())
        assert relative_error(ours.to_dense(), theirs.to_dense()) < 1e-5


@pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise")
def test_bits_do_not_depend_on_threads():
    weights, ids, a = batch()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        e, fm, linear = rk.embedding_fm(weights, ids, a, **OPTIONS)
        loss = e.sin().sum() + fm.sin().sum() + linear.sin().sum()
        results.append([e, fm, linear, *torch.autograd.grad(loss, [*weights, a])])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("optimizer", ["SGD", "RowWiseAdagrad", "Adam"])
def test_fused_optimizer(optimizer):
    results = []
    for function in (rk.embedding_fm, apart):
        torch.manual_seed(0)
        weights, ids, a = batch()
        rows, dense = getattr(rk.optim, optimizer)(weights, lr=1e-3), torch.randn(1500, 2, requires_grad=True)
        for _ in range(2):
            e, fm, linear = function(weights, ids, a, dense, **OPTIONS, optimizer=rows)
            (e.sin().sum() + fm.sin().sum() + linear.sin().sum()).backward()
        assert all(w.grad is None for w in weights)
        results.append([*(w.detach() for w in weights), a.grad, dense.grad])
    for ours, theirs in zip(*results):
        assert relative_error(ours, theirs) < 1e-4


ONE_EACH = dict(modes=["none"] * 4, frozen_rows=[None, 1, None, 6])


def one_each(dtype=torch.float32, B: int = 1500, D: int = 19):
    """A batch of one id a feature, each from a table of its own: their rows are the embeddings."""
    weights = [torch.randn(r, D, dtype=dtype, requires_grad=True) for r in (20, 3000, 50, 7)]
    return weights, [torch.randint(0, w.size(0), (B,)) for w in weights], torch.randn(1, 4 * D, dtype=dtype)


@pytest.mark.parametrize("D", [1, 16, 19, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", ["all", "fm", "linear", "embeddings", "no linear"])
def test_sparse_gradient_of_rows(dtype, D, used):
    """The gradient of lookups that is never stored is the one that is, in the rows and with the bits of any thread."""
    weights, ids, a = one_each(dtype, D=D)
    a.requires_grad_()
    dense, results = torch.randn(1500, 3, dtype=dtype, requires_grad=True), []
    linear_weight = None if used == "no linear" else a

    def gradients(weights, linear_weight, dense, sparse):
        e, fm, linear = rk.embedding_fm(weights, ids, linear_weight, dense, **ONE_EACH, sparse=sparse)
        parts = {"embeddings": e.sin().sum(), "fm": fm.sin().sum()}
        if linear is not None:
            parts["linear"] = linear.sin().sum()
        loss = parts[used] if used in parts else sum(parts.values())
        inputs = [t for t in (*weights, linear_weight, dense) if t is not None]
        return [g for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None]

    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append([g.to_dense() for g in gradients(weights, linear_weight, dense, True)])
    assert all(torch.equal(x, y) for x, y in zip(*results))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for ours, theirs in zip(results[0], gradients(weights, linear_weight, dense, False)):
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize(
    "optimizer", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW", "FTRL", "RowWiseAdam", "RowWiseRMSprop"]
)
@pytest.mark.parametrize("changed", [False, True])
def test_step_on_rows(optimizer, changed):
    """A row's step takes the row as it was looked up, also where another backward has stepped on it since."""
    results = []
    for function in (rk.embedding_fm, apart):
        torch.manual_seed(0)
        weights, ids, a = one_each()
        a.requires_grad_()
        rows, dense = getattr(rk.optim, optimizer)(weights, lr=1e-2), torch.randn(1500, 2)
        losses = []
        for _ in range(2):
            e, fm, linear = function(weights, ids, a, dense, **ONE_EACH, optimizer=rows)
            losses.append(e.sin().sum() + fm.sin().sum() + linear.sin().sum())
            if not changed:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        results.append([*(w.detach() for w in weights), a.grad])
    for ours, theirs in zip(*results):
        assert relative_error(ours, theirs) < 1e-4


def test_tables_that_changed_since_the_lookup():
    weights, ids, a = one_each()
    grads = []
    for change in (False, True):
        e, fm, linear = rk.embedding_fm(weights, ids, a, **ONE_EACH, sparse=True)
        if change:
            with torch.no_grad():
                weights[1].mul_(2)
        grads.append(torch.autograd.grad(fm.sin().sum() + linear.sum(), weights))
    for before, after in zip(*grads):
        assert relative_error(after.to_dense(), before.to_dense()) < 1e-5


def test_one_table_for_two_features_and_one_tensor_for_two_tables():
    weights, ids, a = one_each()
    ids[2] = torch.randint(0, 20, (1500,))
    for chosen, tables in (([weights[0], weights[1], weights[3]], [0, 1, 0, 2]),
                           ([weights[0], weights[1], weights[0], weights[3]], [0, 1, 2, 3])):  # fmt: skip
        grads = []
        for sparse in (False, True):
            e, fm, linear = rk.embedding_fm(chosen, ids, a, modes=["none"] * 4, tables=tables, sparse=sparse)
            loss = e.sin().sum() + fm.sin().sum() + linear.sin().sum()
            grads.append(torch.autograd.grad(loss, [weights[0], weights[1], weights[3]]))
        for dense, sparse in zip(*grads):
            assert relative_error(sparse.to_dense(), dense) < 1e-5


def test_bad_input():
    weights, ids, a = batch()
    with pytest.raises(RuntimeError, match="embedding_fm: features must have one width, but that of .* is 4"):
        rk.embedding_fm([*weights[:3], torch.randn(7, 4)], ids, modes=MODES, tables=TABLES)
    for bad in (a[:, 1:], a.double()):
        with pytest.raises(RuntimeError, match="embedding_fm: linear_weight must have one value a column"):
            rk.embedding_fm(weights, ids, bad, modes=MODES, tables=TABLES)
    for bad in (torch.randn(1500), torch.randn(1499, 2), torch.randn(1500, 2).double()):
        with pytest.raises(
            RuntimeError, match=r"embedding_fm: dense must be \[B, n\] with B = 1500 like the embeddings"
        ):
            rk.embedding_fm(weights, ids, a, bad, modes=MODES, tables=TABLES)
    with pytest.raises(RuntimeError, match=r"with concat, features must give \[B, D\] of one B"):
        rk.embedding_fm(weights, [ids[0][1:], *ids[1:]], modes=MODES, tables=TABLES)
    ids[3][70, 2] = 3000
    rows = rk.optim.Adam(weights)
    before = [w.detach().clone() for w in weights]
    with pytest.raises(
        IndexError, match=r"embedding_bag: d\[70, 2\] = 3000 is out of range for a table with 3000 rows"
    ):
        rk.embedding_fm(weights, ids, a, modes=MODES, tables=TABLES, names=list("abcde"), optimizer=rows)
    assert all(torch.equal(w, old) for w, old in zip(weights, before))


def features():
    return [
        rk.SparseFeature("a", 20, 8, padding_idx=0),
        rk.SparseFeature("b", 30, 8),
        rk.SequenceFeature("s", 20, 8, pooling="mean", shared_with="a", padding_idx=0),
        rk.DenseFeature("d"),
    ]


def deepfm(deep, fm) -> rk.DeepFM:
    torch.manual_seed(0)
    return rk.DeepFM(deep, fm, {"dims": [9]})


def inputs(B: int = 64):
    generator = torch.Generator().manual_seed(1)
    ids = {"a": torch.randint(0, 20, (B,), generator=generator), "b": torch.randint(0, 30, (B,), generator=generator)}
    return {**ids, "s": torch.randint(0, 20, (B, 5), generator=generator), "d": torch.rand(B, generator=generator)}


def losses_and_gradients(model, x):
    out = model(x)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return [out, *grads]


def test_deepfm_takes_it(monkeypatch):
    """One pass where the deep and the FM part have the same tables; the same numbers as by the separate ops."""
    everything, x = features(), inputs()
    model = deepfm(everything, everything[:3])
    assert model.embedding.lookup_fm(x, everything, everything[:3], model.linear.fc.weight) is not None
    ours = losses_and_gradients(model, x)
    monkeypatch.setattr(EmbeddingLayer, "gather", lambda *_: None)
    for a, b in zip(ours, losses_and_gradients(model, x)):
        assert relative_error(a, b, floor=1e-3) < 1e-5


@pytest.mark.parametrize("case", ["fewer in fm", "other order", "repeated", "other width", "own module", "2-D ids"])
def test_deepfm_where_it_does_not_apply(case, monkeypatch):
    deep, x = features(), inputs()
    fm = deep[:3]
    if case == "fewer in fm":
        fm = deep[:2]
    elif case == "other order":
        fm = fm[::-1]
    elif case == "repeated":
        fm = [*fm, deep[0]]
    elif case == "other width":
        deep = [*deep, rk.SparseFeature("e", 9, 4)]
        x["e"] = torch.randint(0, 9, (64,))
    model = deepfm(deep, fm)
    if case == "own module":
        model.embedding.embed_dict["b"] = nn.Embedding(30, 8, max_norm=1.0)
    elif case == "2-D ids":
        x["a"] = x["a"][:, None]
    assert model.embedding.lookup_fm(x, deep, fm, model.linear.fc.weight) is None
    if case != "2-D ids":  # which no layer takes
        assert model(x).shape == (64,)


def test_deepfm_hooks_and_subclasses_run():
    everything, x = features(), inputs()
    model = deepfm(everything, everything[:3])
    expected, seen = model(x), []
    model.fm.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    torch.testing.assert_close(model(x), expected)
    assert seen == [(64, 3, 8)]
    nn.utils.parametrizations.weight_norm(model.linear.fc)
    torch.testing.assert_close(model(x), expected)


def test_deepfm_compiles():
    everything, x = features(), inputs()
    model = deepfm(everything, everything[:3]).double()  # eager, a small batch's MLP has other roundings
    expected = losses_and_gradients(model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(losses_and_gradients(compiled, x), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("way", ["sparse", "fused"])
def test_what_no_graph_can_have_breaks_it(way):
    """Under torch.compile the lookups of sparse gradients and of fused optimizers run outside the graph."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        bag = rk.EmbeddingBag(30, 7, mode="sum", sparse=way == "sparse")
        if way == "fused":
            rk.optim.fuse(bag, rk.optim.Adam(bag.parameters(), lr=0.1))
        function = torch.compile(bag, backend="aot_eager") if compiled else bag
        function(torch.randint(0, 30, (4, 3))).sin().sum().backward()
        results.append(bag.weight.grad.to_dense() if way == "sparse" else bag.weight.detach())
    assert torch.equal(*results)
