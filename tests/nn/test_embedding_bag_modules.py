"""EmbeddingBag against torch.nn.EmbeddingBag, TableBatchedEmbeddingBag against one table at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import rankkernels as rk
from rankkernels.testing import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")


def pair(**options):
    torch.manual_seed(0)
    theirs = nn.EmbeddingBag(30, 7, **options)
    torch.manual_seed(0)
    ours = rk.EmbeddingBag(30, 7, **options)
    assert [(k, v.tolist()) for k, v in ours.state_dict().items()] == [
        (k, v.tolist()) for k, v in theirs.state_dict().items()
    ]
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours, theirs, *inputs, weights=None):
    """Results, the tables' gradients and those of the per-sample weights."""
    outs, grads = [], []
    for module in (ours, theirs):
        factors = None if weights is None else weights.clone().requires_grad_()
        outs.append(module(*inputs, per_sample_weights=factors))
        torch.manual_seed(1)
        wanted = [module.weight] if factors is None else [module.weight, factors]
        grads.append(torch.autograd.grad(outs[-1], wanted, torch.randn(outs[-1].shape)))
    torch.testing.assert_close(*outs)
    assert torch.equal(ours.weight, theirs.weight)  # max_norm writes to both
    for a, b in zip(*grads):
        assert a.layout == b.layout
        torch.testing.assert_close(a.to_dense(), b.to_dense())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3, -2])
@pytest.mark.parametrize(
    "options",
    [{}, {"sparse": True}, {"max_norm": 0.5}, {"max_norm": 1.0, "norm_type": 1.0}, {"scale_grad_by_freq": True}],
)
def test_every_option_of_torchs(mode, padding_idx, options):
    if mode == "max" and (options.get("sparse") or options.get("scale_grad_by_freq")):
        pytest.skip("torch has neither for max")
    ids = torch.randint(0, 30, (40,))
    for include_last_offset, dtype in itertools.product((False, True), (torch.int64, torch.int32)):
        ours, theirs = pair(mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset, **options)
        offsets = torch.tensor([0, 0, 3, 20, 40, 40] if include_last_offset else [0, 0, 3, 20, 40])
        compare(ours, theirs, ids.to(dtype), offsets.to(dtype))
        compare(ours, theirs, ids.view(8, 5).to(dtype))
        if mode == "sum" and not options.get("scale_grad_by_freq"):
            compare(ours, theirs, ids.to(dtype), offsets.to(dtype), weights=torch.randn(40))


def test_ids_after_the_last_offset_are_in_no_bag():
    """torch reads past the end of the gradient here, and its mean counts ids that it does not sum."""
    module, _ = pair(include_last_offset=True)
    ids, offsets = torch.randint(0, 30, (9,)), torch.tensor([0, 2, 7])
    out, expected = module(ids, offsets), module(ids[:7], offsets)
    assert torch.equal(out, expected)
    grads = (torch.autograd.grad(o.sin().sum(), module.weight)[0] for o in (out, expected))
    assert torch.equal(*grads)
    module.sparse = True
    (grad,) = torch.autograd.grad(module(ids, offsets).sin().sum(), module.weight)
    assert torch.equal(grad._indices()[0], ids[:7].unique())
    for sparse in (False, True):  # max_norm is of all ids, as torch's
        module, theirs = pair(include_last_offset=True, max_norm=0.5, sparse=sparse)
        module(ids, offsets)
        torch.embedding_renorm_(theirs.weight.detach(), ids, 0.5, 2.0)
        assert torch.equal(module.weight, theirs.weight)


def test_from_pretrained():
    weight = torch.randn(9, 4)
    ours = rk.EmbeddingBag.from_pretrained(weight, mode="sum", padding_idx=1)
    theirs = nn.EmbeddingBag.from_pretrained(weight, mode="sum", padding_idx=1)
    assert type(ours) is rk.EmbeddingBag and not ours.weight.requires_grad
    ids = torch.randint(0, 9, (5, 3))
    torch.testing.assert_close(ours(ids), theirs(ids))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_samples_of_pytorch(dtype):
    """What PyTorch's own tests feed to nn.functional.embedding_bag, results and gradients."""
    pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [o for o in op_db if o.name == "nn.functional.embedding_bag"]
    compared = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        weight, (ids,), options = sample.input, sample.args, dict(sample.kwargs)
        expected = info.op(weight, ids, **options)
        given = {name: options.pop(name) for name in ("offsets", "per_sample_weights") if name in options}
        module = rk.EmbeddingBag.from_pretrained(weight.detach(), False, **options)
        del module._parameters["weight"]  # for the sample's own tensor
        module.weight = weight
        options = {**options, **given}
        out = module(ids, **given)
        assert out.shape == expected.shape and out.dtype == expected.dtype
        assert relative_error(out, expected) < 2 * TOLERANCE[dtype]
        factors = options.get("per_sample_weights")
        inputs = [weight] if factors is None else [weight, factors]
        grad_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, grad_out)
        for a, b in zip(grads, torch.autograd.grad(expected, inputs, grad_out)):
            assert relative_error(a, b) < 2 * TOLERANCE[dtype]
        compared += 1
    assert compared > 20


def test_beyond_torchs():
    """Weighted mean, mixed index dtypes, sparse gradients of max."""
    ours = rk.EmbeddingBag(30, 7, mode="mean")
    ids, offsets = torch.randint(0, 30, (12,)).int(), torch.tensor([0, 5, 5])
    factors = torch.rand(12)
    rows = ours.weight[ids.long()] * factors[:, None]
    expected = torch.stack([rows[:5].mean(0), torch.zeros(7), rows[5:].mean(0)])
    torch.testing.assert_close(ours(ids, offsets, factors), expected)
    dense, sparse = (rk.EmbeddingBag.from_pretrained(ours.weight, False, mode="max", sparse=s) for s in (False, True))
    for module in (dense, sparse):
        module(ids, offsets).sin().sum().backward()
    assert torch.equal(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_sparse_gradients_are_coalesced():
    weights = [torch.randn(1000, d, requires_grad=True) for d in (3, 16, 5)]
    ids = [torch.where(torch.rand(500, 4) < 0.4, 7, torch.randint(0, 1000, (500, 4))) for _ in range(4)]
    options = dict(modes=["sum", "mean", "max", "sum"], tables=[0, 1, 0, 1], frozen_rows=[7, None, None])
    outs = rk.table_batched_embedding_bag(weights, ids, **options)
    sparse_outs = rk.table_batched_embedding_bag(weights, ids, **options, sparse=True)
    grad_outs = [torch.randn_like(o) for o in outs]
    dense = torch.autograd.grad(outs, weights[:2], grad_outs)
    sparse = torch.autograd.grad(sparse_outs, weights, grad_outs, allow_unused=True)
    assert sparse[2] is None
    for a, b, t in zip(sparse, dense, range(2)):
        assert a.is_coalesced() and torch.equal(a.to_dense(), b)
        looked_up = torch.cat([i.flatten() for i, table in zip(ids, options["tables"]) if table == t]).unique()
        assert torch.equal(a.indices()[0], looked_up[looked_up != 7] if t == 0 else looked_up)


def test_no_lookups_no_sparse_rows():
    module = rk.EmbeddingBag(5, 3, mode="sum", sparse=True, padding_idx=1)
    module(torch.full((4, 2), 1)).sum().backward()
    assert module.weight.grad._nnz() == 0


@pytest.mark.parametrize("concat", [True, False])
def test_table_batched(concat):
    modes, tables = ["sum", "mean", "max", "none"], [0, 1, 1, 0]
    module = rk.TableBatchedEmbeddingBag(
        [20, 30], [4, 6], modes=modes, tables=tables, padding_idx=[2, None], concat=concat
    )
    assert list(module.state_dict()) == ["weights.0", "weights.1"] and (module.weights[0][2] == 0).all()
    ids = [torch.randint(0, 20, (9, 3)), torch.randint(0, 30, (40,)), torch.randint(0, 30, (9, 2))]
    ids.append(torch.randint(0, 20, (9,) if concat else (9, 5)))
    offsets = [None, torch.arange(0, 36, 4), None, None]
    out = module(ids, offsets)
    apart = [
        nn.functional.embedding_bag(
            ids[f], module.weights[t], offsets[f], mode=modes[f], padding_idx=module.padding_idx[t]
        )
        for f, t in enumerate(tables[:3])
    ]
    apart.append(nn.functional.embedding(ids[3], module.weights[0], padding_idx=2))
    if concat:
        out, apart = [out], [torch.cat(apart, 1)]
    grad_outs = [torch.randn_like(o) for o in out]
    for a, b in zip(out, apart, strict=True):
        torch.testing.assert_close(a, b)
    parameters = list(module.parameters())
    for a, b in zip(torch.autograd.grad(out, parameters, grad_outs), torch.autograd.grad(apart, parameters, grad_outs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(embedding_dims=[3]), "embedding_dims must have 2 entries, got 1"),
        (dict(modes=["sum"]), "modes must have 2 entries, got 1"),
        (dict(tables=[0, 2]), r"tables must be in 0 .. 1, got \[0, 2\]"),
        (dict(names=["a"]), "names must have 2 entries, got 1"),
        (dict(padding_idx=[1]), "padding_idx must have 2 entries, got 1"),
    ],
)
def test_table_batched_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"TableBatchedEmbeddingBag: {message}"):
        rk.TableBatchedEmbeddingBag(**{"num_embeddings": [4, 5], "embedding_dims": 3, **arguments})


def test_bad_input_of_embedding_bag():
    with pytest.raises(ValueError, match="padding_idx 5 is no row of a table with 5 rows"):
        rk.embedding_bag(torch.randn(5, 3), torch.zeros(2, 2).long(), padding_idx=5)
    module = rk.EmbeddingBag(5, 3, include_last_offset=True)
    with pytest.raises(ValueError, match=r"input must be \[B, L\] without offsets or \[N\] with them"):
        module(torch.zeros(2, 3).long(), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"input must be \[B, L\] without offsets or \[N\] with them"):
        module(torch.zeros(6).long())
    with pytest.raises(ValueError, match=r"offsets must be \[B \+ 1\], got \[0\]"):
        module(torch.zeros(6).long(), torch.zeros(0).long())
    with pytest.raises(IndexError, match=r"input\[4\] = 5 is out of range for a table with 5 rows"):
        module(torch.arange(1, 7), torch.tensor([0, 6]))


def test_modules_compile():
    ids, offsets = torch.randint(0, 30, (9,)), torch.tensor([0, 2, 5, 9])
    bag = rk.EmbeddingBag(30, 7, mode="sum", include_last_offset=True, padding_idx=2)
    tables = rk.TableBatchedEmbeddingBag([30, 40], 8, modes=["sum", "mean"])
    for module, inputs in ((bag, (ids, offsets)), (tables, ([ids.view(3, 3), ids.view(3, 3)],))):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        results = []
        for function in (module, compiled):
            out = function(*inputs)
            results.append([out, *torch.autograd.grad(out.sin().sum(), list(module.parameters()))])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        exported = torch.export.export(module, inputs).module()
        assert torch.equal(exported(*inputs), module(*inputs))


@pytest.mark.parametrize(
    "change",
    [
        lambda tables: prune.l1_unstructured(tables, "0", 0.5),
        lambda tables: parametrize.register_parametrization(tables, "0", nn.Tanh()),
        lambda tables: nn.utils.parametrizations.weight_norm(tables, "1"),
        lambda tables: nn.utils.weight_norm(tables, "0"),
    ],
    ids=["prune", "parametrize", "weight_norm", "old_weight_norm"],
)
def test_tables_that_are_no_longer_plain_parameters(change):
    """Their parameters have other names then, and come in another order."""
    bag = rk.TableBatchedEmbeddingBag([5, 5], 4)
    change(bag.weights)
    ids = [torch.tensor([[1, 2]]), torch.tensor([[0, 3]])]
    expected = torch.cat([nn.functional.embedding_bag(i, w, mode="sum") for i, w in zip(ids, bag.weights)], 1)
    torch.testing.assert_close(bag(ids), expected)


def test_loops_over_embedding_modules_that_ask_for_their_weight():
    one, two = rk.TableBatchedEmbeddingBag([5], 4), rk.TableBatchedEmbeddingBag([5, 6], 4)
    assert one.weights.weight is one.weights[0] and not hasattr(two.weights, "weight")
    with pytest.raises(AttributeError, match="no one weight, but 2 tables"):
        two.weights.weight.normal_()
    assert list(two.state_dict()) == ["weights.0", "weights.1"]
