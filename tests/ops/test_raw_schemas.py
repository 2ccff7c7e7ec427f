"""The embedding schemas called directly, with values that do not fit and with tables and ids of odd shapes."""

from __future__ import annotations

import re

import pytest
import torch
from bad_inputs import arguments

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
OPS = torch.ops.rankkernels


@pytest.mark.parametrize(
    "rows, message",
    [([1, 1], "rows[1] = 1 must ascend"), ([1, 3], "rows[1] = 3 must ascend"), ([-1, 0], "rows[0] = -1 must ascend")],
)
@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd"])
def test_rows_of_a_sparse_update_ascend(rows, message, key):
    if key == "CPU" and rk.ops._library.no_extension:
        pytest.skip("what the C++ kernels promise")
    values = arguments("sparse_update", {"rows": torch.tensor(rows)})
    weight, before = values[0], values[0].clone()
    with pytest.raises(RuntimeError, match=re.escape(f"sparse_update: {message} in a table with 3 rows")):
        OPS.sparse_update.default.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *values)
    assert torch.equal(weight, before)


def test_a_table_replaced_by_a_smaller_one_before_its_backward():
    weight = torch.nn.Parameter(torch.randn(20000, 4))
    fm = rk.embedding_fm([weight], [torch.randint(20000, (30,))], sparse=True)[1]
    weight.data = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be the table that was looked up, with 20000 rows, got"):
        fm.sum().backward()


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("mode", ["none", "sum", "mean", "max"])
def test_tables_without_columns(mode, way):
    weights = [torch.randn(5, 0, requires_grad=True), torch.randn(5, 3, requires_grad=True)]
    ids = [torch.tensor([1, 2]) if mode == "none" else torch.tensor([[1, 2], [2, 4]])] * 2
    outs = rk.table_batched_embedding_bag(weights, ids, modes=[mode] * 2, sparse=way == "sparse")
    torch.cat(outs, 1).sum().backward()
    assert [o.shape for o in outs] == [(2, 0), (2, 3)] and weights[0].grad.shape == (5, 0)
    embeddings, fm, _ = rk.embedding_fm(weights[:1] * 2, ids, modes=[mode] * 2, sparse=way == "sparse")
    (embeddings.sum() + fm.sum()).backward()
    assert embeddings.shape == (2, 0) and fm.tolist() == [[0], [0]]


def test_an_id_without_dimensions():
    for sparse in (False, True):
        weight = torch.randn(5, 4, requires_grad=True)
        (out,) = rk.table_batched_embedding_bag([weight], [torch.tensor(3)], modes=["none"], sparse=sparse)
        out.sum().backward()
        assert torch.equal(out, weight[3]) and weight.grad.to_dense().sum(1).tolist() == [0, 0, 0, 4, 0]


@pytest.mark.parametrize("op", ["embedding_bag_backward", "embedding_bag_backward_sparse"])
@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd"])
def test_per_sample_weights_of_no_ids_need_no_tables(op, key):
    ids, factors = [torch.tensor([1, 2]), torch.zeros(2, 0).long()], [torch.empty(0), torch.empty(2, 0)]
    values = arguments(op, dict(weights=[], indices=ids, per_sample_weights=factors))
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    assert [t.shape for t in getattr(OPS, op).default.redispatch(keys, *values)[-1]] == [(0,), (2, 0)]


@pytest.mark.parametrize("argument", ["modes", "tables", "padding_idx", "frozen_rows", "names"])
@pytest.mark.parametrize("more", [True, False])
def test_lists_longer_or_shorter_than_the_features(argument, more):
    good = {
        "modes": ["none"] * 2,
        "tables": [0, 0],
        "padding_idx": [None, 0],
        "frozen_rows": [None],
        "names": ["a", "b"],
    }
    wrong = {argument: [*good[argument], good[argument][-1]] if more else good[argument][:-1]}
    weights, ids = [torch.randn(5, 4)], [torch.tensor([1])] * 2
    for function in (rk.table_batched_embedding_bag, rk.embedding_fm):
        with pytest.raises(ValueError, match=f"embedding_bag: {argument} must have one entry a"):
            function(weights, ids, **{**good, **wrong})
