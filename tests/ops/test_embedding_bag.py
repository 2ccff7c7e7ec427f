"""The embedding bag beyond the small cases of test_ops.py: sizes at which it sorts in tiles and runs on threads."""

from __future__ import annotations

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

import rankkernels as rk
from rankkernels import embedding_bag, reference, table_batched_embedding_bag
from rankkernels.testing import TOLERANCE, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
needs_kernels = pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise")
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def skewed_ids(rows: int, shape) -> torch.Tensor:
    """Half of the ids are one row, the others are anything."""
    return torch.where(torch.rand(shape) < 0.5, rows // 2, torch.randint(0, rows, shape))


def torch_bag(weight, ids, offsets, mode, factors, padding_idx):
    """What torch computes in float64; its mean takes no per-sample weights."""
    if mode == "mean" and factors is not None:
        total = torch_bag(weight, ids, offsets, "sum", factors, padding_idx)
        kept = torch.ones_like(ids) if padding_idx is None else (ids != padding_idx).long()
        if offsets is None:
            return total / kept.sum(1).clamp(min=1)[:, None]
        counts = torch.cat([c.sum()[None] for c in kept.tensor_split(offsets[1:])])
        return total / counts.clamp(min=1)[:, None]
    return F.embedding_bag(ids.long(), weight, offsets, mode=mode, per_sample_weights=factors, padding_idx=padding_idx)


@DTYPES
@pytest.mark.parametrize("D", [1, 3, 8, 16, 17, 64, 100])
@pytest.mark.parametrize(
    "mode, weighted", [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("max", False)]
)
def test_is_torchs(dtype, D, mode, weighted):
    rows, B, L, padding_idx = 50, 300, 5, 7
    weight = torch.randn(rows, D, dtype=torch.float64).to(dtype).requires_grad_()
    for jagged in (False, True):
        offsets = None
        if jagged:
            counts = torch.randint(0, L, (B,))
            offsets = counts.cumsum(0) - counts
            ids = skewed_ids(rows, (int(counts.sum()),))
        else:
            ids = skewed_ids(rows, (B, L))
        factors = torch.rand(ids.shape, dtype=torch.float64).to(dtype).requires_grad_() if weighted else None
        inputs = [weight] if factors is None else [weight, factors]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        out = embedding_bag(weight, ids.int(), offsets, mode=mode, per_sample_weights=factors, padding_idx=padding_idx)
        expected = torch_bag(exact[0], ids, offsets, mode, exact[1] if weighted else None, padding_idx)
        assert relative_error(out, expected) < TOLERANCE[dtype]
        grad_out = torch.randn(out.shape, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad(out, inputs, grad_out)
        for grad, want in zip(grads, torch.autograd.grad(expected, exact, grad_out.double())):
            assert relative_error(grad, want) < TOLERANCE[dtype]
        assert (grads[0][padding_idx] == 0).all()


def many_tables(rows=(3, 70_000, 1000), B=3000, L=6):  # 36,000 lookups of the last: a sort on threads
    weights = [torch.randn(r, d, requires_grad=True) for r, d in zip(rows, (5, 16, 33))]
    tables, modes = [1, 0, 2, 1, 2], ["sum", "mean", "max", "none", "sum"]
    ids = [skewed_ids(rows[t], (B,) if m == "none" else (B, L)) for t, m in zip(tables, modes)]
    return (
        weights,
        ids,
        dict(modes=modes, tables=tables, padding_idx=[None, 1, None, 2, 3], frozen_rows=[None, 9, None]),
    )


@needs_kernels
def test_bits_do_not_depend_on_threads_or_chance():
    weights, ids, options = many_tables()
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        outs = table_batched_embedding_bag(weights, ids, **options)
        grads = torch.autograd.grad(outs, weights, [torch.ones_like(o).cumsum(0).sin() for o in outs])
        results.append([*outs, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@DTYPES
@pytest.mark.parametrize("D", [8, 17, 32, 80])
def test_many_rows_are_torchs(dtype, D, poisoned):
    """Beyond 16 MiB they are stored past the caches."""
    weight = torch.randn(1000, D).to(dtype)
    ids = torch.randint(0, 1000, (2**24 // (D * dtype.itemsize) + 7,))
    assert torch.equal(table_batched_embedding_bag([weight], [ids], modes=["none"])[0], F.embedding(ids, weight))


@DTYPES
def test_large_gradients_are_zero_where_nothing_was_looked_up(dtype, poisoned):
    """Beyond 16 MiB the zeros are stored past the caches."""
    weights = [torch.randn(rows, D).to(dtype).requires_grad_() for rows, D in ((3, 5), (300_001, 17), (70_003, 64))]
    ids = [torch.randint(0, len(w), (500,)) for w in weights]
    outs = table_batched_embedding_bag(weights, ids, modes=["none"] * 3)
    for w, i, grad in zip(weights, ids, torch.autograd.grad([o.sum() for o in outs], weights)):
        assert torch.equal(grad, torch.autograd.grad(F.embedding(i, w.double()).sum(), w)[0])


def test_features_that_share_tables():
    """Every gradient against that of the features one by one, in float64."""
    weights, ids, options = many_tables()
    outs = table_batched_embedding_bag(weights, ids, **options)
    grad_outs = [torch.randn_like(o) for o in outs]
    grads = torch.autograd.grad(outs, weights, grad_outs)
    exact = [w.detach().double().requires_grad_() for w in weights]
    total = 0
    for f, (i, mode, t) in enumerate(zip(ids, options["modes"], options["tables"])):
        if mode == "none":
            out = F.embedding(i, exact[t])
        else:
            out = F.embedding_bag(i, exact[t], mode=mode, padding_idx=options["padding_idx"][f])
        assert relative_error(outs[f], out) < 1e-6
        total = total + (out * grad_outs[f]).sum()
    expected = torch.autograd.grad(total, exact)
    expected[1][9] = 0
    for grad, want in zip(grads, expected):
        assert relative_error(grad, want) < 1e-5
        assert ((want != 0).any(1) | (grad == 0).all(1)).all(), "a row without lookups has a gradient"


@pytest.mark.parametrize("sparse", [True, False])
def test_a_result_that_nobody_uses_gives_no_gradient(sparse):
    """As in torch: a lazy optimizer would move its rows, and weight decay the table that only it looks up."""
    weights = [torch.randn(9, 3, requires_grad=True) for _ in range(2)]
    ids = [torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([0])]
    outs = rk.table_batched_embedding_bag(weights, ids, modes=["none"] * 3, tables=[0, 0, 1], sparse=sparse)
    outs[0].sum().backward()
    assert weights[1].grad is None
    grad = weights[0].grad
    assert torch.equal(grad.to_dense()[:, 0], torch.tensor([0.0, 1, 1, 0, 0, 0, 0, 0, 0]))
    assert not sparse or grad._indices().tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_concat_is_the_features_side_by_side(dtype):
    weights = [torch.randn(40, d).to(dtype).requires_grad_() for d in (5, 16)]
    ids = [torch.randint(0, 40, (30,)), torch.randint(0, 40, (30, 4)), torch.randint(0, 40, (30, 2))]
    options = dict(modes=["none", "mean", "sum"], tables=[0, 1, 0])
    outs = table_batched_embedding_bag(weights, ids, **options)
    (joined,) = table_batched_embedding_bag(weights, ids, **options, concat=True)
    assert torch.equal(joined, torch.cat(outs, 1))
    grad_out = torch.randn_like(joined)
    for a, b in zip(
        torch.autograd.grad(joined, weights, grad_out), torch.autograd.grad(torch.cat(outs, 1), weights, grad_out)
    ):
        assert torch.equal(a, b)
    arguments = ([w.detach() for w in weights], ids, [], [], [0, 1, 0], [0, 2, 1], [-1] * 3, [-1] * 2, [], "a\nb\nc")
    for weight in arguments[0]:
        weight.requires_grad_()
    torch.library.opcheck(torch.ops.rankkernels.embedding_bag.default, arguments, dict(concat=True))
    with pytest.raises(RuntimeError, match="with concat, .* indices\\[1\\] of shape \\[29, 4\\] differs"):
        table_batched_embedding_bag(weights, [ids[0], ids[1][:29], ids[2]], **options, concat=True)


def test_strided_tables_are_not_copied_wrongly():
    base = torch.randn(30, 40)
    ids = torch.randint(0, 30, (9, 3))
    for weight in (base[:, 3:20], base[::2], base.t(), base[:, ::2], base[:1].expand(30, 40)):
        i = ids % weight.size(0)
        expected = F.embedding_bag(i, weight.contiguous(), mode="sum")
        assert relative_error(embedding_bag(weight, i, mode="sum"), expected) < 1e-6


def test_empty_bags_and_batches():
    weight = torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        out = embedding_bag(weight, none, torch.zeros(4, dtype=torch.int64), mode=mode)
        assert out.shape == (4, 3) and (out == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert (grad == 0).all()
        assert embedding_bag(weight, none, none, mode=mode).shape == (0, 3)
        assert embedding_bag(weight, torch.zeros(0, 4, dtype=torch.int64), mode=mode).shape == (0, 3)
        padded = embedding_bag(weight, torch.full((2, 3), 1), mode=mode, padding_idx=1)
        assert (padded == 0).all()


@DTYPES
@pytest.mark.parametrize("bag", [embedding_bag, reference.embedding_bag], ids=["op", "reference"])
@pytest.mark.parametrize("D", [1, 10, 33])
def test_the_first_of_equal_maxima_gets_the_gradient(dtype, bag, D):
    """Rows of few values, minus infinity among them, so that most bags have ties; some bags are empty."""
    values = torch.tensor([-torch.inf, -1.0, 2.0], dtype=torch.float64)
    weight = values[torch.randint(3, (20, D))].to(dtype).requires_grad_()
    ids, offsets = torch.randint(20, (700,)), torch.randint(701, (200,)).sort().values
    offsets[0] = 0
    exact = weight.detach().double().requires_grad_()
    out = bag(weight, ids, offsets, mode="max", padding_idx=3)
    expected = F.embedding_bag(ids, exact, offsets, mode="max", padding_idx=3)
    assert torch.equal(out.double(), expected)
    grad_out = torch.randint(-3, 4, out.shape).to(dtype)
    (grad,), (want,) = (
        torch.autograd.grad(out, weight, grad_out),
        torch.autograd.grad(expected, exact, grad_out.double()),
    )
    assert torch.equal(grad.double(), want)


@pytest.mark.parametrize("bag", [embedding_bag, reference.embedding_bag], ids=["op", "reference"])
def test_the_first_nan_of_a_bag_gets_the_gradient(bag):
    weight = torch.tensor([[1.0], [torch.nan], [torch.nan]], requires_grad=True)
    bag(weight, torch.tensor([[0, 2, 1, 0]]), mode="max").sum().backward()
    assert weight.grad.flatten().tolist() == [0, 0, 1]


@needs_kernels
def test_infinities_and_nans():
    weight = torch.tensor([[1.0], [torch.inf], [-torch.inf], [torch.nan]])
    ids = torch.tensor([[0, 1], [0, 2], [2, 2], [0, 3], [3, 0]])
    for mode in ("sum", "mean", "max"):
        expected = F.embedding_bag(ids, weight, mode=mode)
        if mode == "max":  # torch's maximum may lose a NaN, the reference's does not
            expected[3:] = torch.nan
        torch.testing.assert_close(embedding_bag(weight, ids, mode=mode), expected, equal_nan=True)


@needs_kernels
@pytest.mark.parametrize(
    "ids, offsets, message",
    [
        ([1, 2, 3], [0, 2, 1], r"offsets of .* must not decrease .* offsets\[1\] = 2 is before 1"),
        ([1, 2, 3], [0, 4], r"not exceed 3, the number of ids: offsets\[1\] = 4"),
        ([1, 2, 3], [1, 2], "must start at 0, got 1"),
        ([1, 2, 30], [0, 2], r"\[2\] = 30 is out of range for a table with 30 rows"),
    ],
)
def test_bad_offsets_and_ids(ids, offsets, message):
    with pytest.raises((RuntimeError, IndexError), match=f"embedding_bag: .*{message}"):
        embedding_bag(torch.randn(30, 2), torch.tensor(ids), torch.tensor(offsets))


def test_an_id_out_of_range_is_named_by_feature_and_position():
    weights = [torch.randn(20, 4) for _ in range(3)]
    ids = [torch.randint(0, 20, (4000, 5)) for _ in range(3)]
    ids[1][2345, 3] = 20
    ids[2][0, 0] = -5
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with pytest.raises(
            IndexError, match=r"embedding_bag: b\[2345, 3\] = 20 is out of range for a table with 20 rows"
        ):
            table_batched_embedding_bag(weights, ids, modes=["sum"] * 3, names=["a", "b", "c"])


def test_layer_sees_tables_replaced_and_frozen():
    features = [rk.SparseFeature("a", 9, 4), rk.SparseFeature("b", 9, 4)]
    layer, x = rk.EmbeddingLayer(features), {"a": torch.arange(9), "b": torch.arange(9)}
    layer(x, features)
    layer.embed_dict["b"] = torch.nn.Embedding(20, 4, padding_idx=2)
    x["b"] = torch.arange(11, 20)
    out = layer(x, features)
    assert torch.equal(out[:, 1], layer.embed_dict["b"].weight[11:])
    layer.embed_dict["b"] = torch.nn.Embedding(20, 4, max_norm=0.1)
    assert layer(x, features)[:, 1].norm(dim=1).max() <= 0.1 + 1e-6
    other = copy.deepcopy(layer)
    assert torch.equal(other(x, other.features), layer(x, features))
    assert torch.equal(other(x, features), layer(x, features))


def test_layer_in_one_piece_is_the_features_apart():
    """``forward`` writes one tensor where it can: the numbers and gradients are those of ``lookup``."""
    features = [
        rk.SparseFeature("a", 9, 4, padding_idx=3),
        rk.SequenceFeature("s", 9, 4, pooling="mean", shared_with="a", padding_idx=0),
        rk.SparseFeature("b", 7, 4),
        rk.DenseFeature("d"),
    ]
    layer = rk.EmbeddingLayer(features)
    x = {"a": torch.randint(0, 9, (6,)), "s": torch.randint(0, 9, (6, 3)), "b": torch.randint(0, 7, (6,)).int()}
    x["d"] = torch.rand(6)
    parameters = list(layer.parameters())
    for squeeze_dim in (False, True):
        out = layer(x, features, squeeze_dim)
        apart = rk.nn.lookup_plan.arrange(features, layer.lookup(x, features), squeeze_dim)
        assert torch.equal(out, apart)
        grad_out = torch.randn_like(out)
        for a, b in zip(
            torch.autograd.grad(out, parameters, grad_out), torch.autograd.grad(apart, parameters, grad_out)
        ):
            assert torch.equal(a, b)


def test_layer_compiles():
    features = [rk.SparseFeature("a", 9, 4), rk.SparseFeature("b", 9, 4), rk.DenseFeature("d")]
    layer = rk.EmbeddingLayer(features)
    x = {"a": torch.randint(0, 9, (6,)), "b": torch.randint(0, 9, (6,)), "d": torch.rand(6)}
    for squeeze_dim in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, s=squeeze_dim: layer(x, features, s), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x, features, squeeze_dim))


@pytest.mark.skipif(rk.ops._library.no_cuda is None, reason="the CUDA part is built in")
def test_on_cuda_without_the_cuda_part(monkeypatch):
    """ATen's ops by way of the dispatcher's CUDA key, here on CPU tensors, for a GPU that Triton does not serve; and
    that is said once."""
    table = rk.ops._table
    monkeypatch.setattr(rk.ops._library, "_has_tensor_cores", lambda index: False)
    weight, ids = torch.randn(30, 8), torch.randint(0, 30, (9, 4))
    arguments = [weight], [ids], [], [], [0], [1], [2], [2], [], "ids"
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    (out,) = torch.ops.rankkernels.embedding_bag.default.redispatch(cuda, *arguments)
    torch.testing.assert_close(out, F.embedding_bag(ids, weight, mode="sum", padding_idx=2))
    grad_out = torch.randn(9, 8)
    (grad,), _ = torch.ops.rankkernels.embedding_bag_backward.default.redispatch(
        cuda, [grad_out], [], [30], *arguments[1:-1]
    )
    expected = weight.clone().requires_grad_()
    F.embedding_bag(ids, expected, mode="sum", padding_idx=2).backward(grad_out)
    torch.testing.assert_close(grad, expected.grad)

    monkeypatch.setattr(table, "reference_notices", {})
    on_cuda = types.SimpleNamespace(device=torch.device("cuda"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            table.notice_reference("embedding_bag", on_cuda)
    assert len(said) == 1 and "on 'cuda': rankkernels was built without RANKKERNELS_CUDA=1" in str(said[0].message)
    assert "without it this needs Triton 3.6" in str(said[0].message)


def test_tables_in_a_tuple_get_their_gradients():
    """What autograd records is found in lists only."""
    tables, ids = tuple(torch.randn(5, 3, requires_grad=True) for _ in range(2)), (torch.arange(4), torch.arange(4))
    for outs in (
        rk.table_batched_embedding_bag(tables, ids, modes=("none", "none")),
        rk.embedding_fm(tables, ids, torch.ones(1, 6))[:2],
    ):
        grads = torch.autograd.grad(sum(out.sum() for out in outs), tables)
        assert all((g[:4] != 0).all() and (g[4] == 0).all() for g in grads)
