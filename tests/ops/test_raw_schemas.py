"""The embedding schemas called directly with what does not fit: an error before anything is read or written."""

from __future__ import annotations

import pytest
import torch

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")


def raw(**changes):
    """The arguments of the schemas: two features of two tables, the second one pooled."""
    weights = [torch.randn(5, 4), torch.randn(6, 4)]
    arguments = {
        "weights": weights, "rows": [5, 6], "indices": [torch.tensor([1, 2]), torch.tensor([[3], [4]])], "offsets": [],
        "per_sample_weights": [], "tables": [0, 1], "modes": [0, 1], "padding_idx": [-1, -1], "frozen_rows": [-1, -1],
        "names": "a\nb", "grad_outs": [torch.ones(2, 4), torch.ones(2, 4)], "states": [], "optimizer": 0,
        "hyper": [0.1, 0.9, 0.9, 1e-8, 0.0, 1.0, 1.0, 0.0] * 2, "embeddings": torch.ones(2, 8), "dim": 4,
        "grad_embeddings": torch.ones(2, 8), "grad_fm": None, "grad_linear": None, "linear_weight": None,
        "dense": None, "unchanged": False,
    }  # fmt: skip
    return {**arguments, **changes}


def refuses(op, message, arguments):
    """With the C++ kernels and with the default implementation: in the same words, and before anything is written."""
    overload = getattr(torch.ops.rankkernels, op).default
    wanted = {a.name for a in overload._schema.arguments}
    given = {k: v for k, v in arguments.items() if k in wanted}
    before = [t.clone() for t in arguments["weights"]]
    for key in ("CPU", "CompositeExplicitAutograd"):
        if key == "CPU" and rk.ops._library.no_extension:
            continue
        with pytest.raises((RuntimeError, IndexError), match=message):
            overload.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), **given)
    assert all(torch.equal(a, b) for a, b in zip(before, arguments["weights"]))


FEATURE_OPS = ["embedding_bag", "embedding_bag_backward", "embedding_bag_backward_sparse", "embedding_bag_update",
               "embedding_fm", "embedding_fm_backward_sparse", "embedding_fm_update"]  # fmt: skip


@pytest.mark.parametrize("op", FEATURE_OPS)
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tables": [0, 2]}, "embedding_bag: .* has table 2 of 2"),
        ({"tables": [-1, 1]}, "embedding_bag: .* has table -1 of 2"),
        ({"modes": [0, 4]}, "embedding_bag: .* has unknown mode 4"),
        ({"modes": [0, -1]}, "embedding_bag: .* has unknown mode -1"),
        ({"padding_idx": [-1, 6]}, "padding_idx of .* must be -1 or a row of its table with 6 rows, got 6"),
        ({"frozen_rows": [-2, -1]}, r"frozen_rows\[0\] must be -1 or a row of its table with 5 rows, got -2"),
        ({"padding_idx": [-1, -1, 0]}, "embedding_bag: padding_idx must have one entry a feature, 2, got 3"),
        ({"modes": [0]}, "embedding_bag: modes must have one entry a feature, 2, got 1"),
        ({"frozen_rows": [-1]}, "embedding_bag: frozen_rows must have one entry a table, 2, got 1"),
        ({"offsets": [torch.empty(0), torch.tensor([0, 1])]}, r"of shape \[2, 1\] and mode sum takes no offsets"),
        (
            {
                "indices": [torch.tensor([1, 2]), torch.tensor([3, 4])],
                "offsets": [torch.empty(0, dtype=torch.int64)] * 2,
            },
            r"must be \[B, L\], or \[N\] beside offsets \[B\], got shape \[2\] beside offsets \[0\]",
        ),
    ],
)
def test_features_that_do_not_fit(op, changes, message):
    refuses(op, message, raw(**changes))


@pytest.mark.parametrize("op", ["embedding_bag_backward", "embedding_bag_backward_sparse"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grad_outs": [None, None]}, "grad_outs has no gradient"),
        ({"grad_outs": [torch.ones(2, 4)]}, "grad_outs must have one entry a feature, 2, got 1"),
        ({"grad_outs": [torch.ones(8), torch.ones(2, 4)]}, r"grad_outs\[0\] must be \[2, D\] like the result, got"),
        (
            {"grad_outs": [torch.ones(1, 2, 4), None]},
            r"grad_outs\[0\] must be \[2, D\] like the result, got shape \[1, 2",
        ),
        (
            {"grad_outs": [torch.ones(3, 0), None]},
            r"grad_outs\[0\] must be \[2, D\] like the result, got shape \[3, 0\]",
        ),
        ({"grad_outs": [torch.ones(2, 4).cfloat(), None]}, r"grad_outs\[0\] must be float32, .* got torch.complex64"),
        ({"rows": [-1, 6]}, r"rows\[0\] must be a table's number of rows, got -1"),
        ({"rows": [5, 2**62]}, r"rows\[1\] must be a table's number of rows, got 4611686018427387904"),
        ({"weights": [torch.ones(3, 4), torch.ones(6, 4)]}, r"weights\[0\] must have 5 rows .* got shape \[3, 4\]"),
        ({"weights": [torch.ones(5, 3), torch.ones(6, 4)]}, r"weights\[0\] must have 5 rows .* got shape \[5, 3\]"),
        ({"weights": [torch.ones(5, 4)]}, "weights must have one entry a table, 2, got 1"),
        ({"weights": [], "modes": [0, 3]}, "weights must have one entry a table, 2, got 0"),
    ],
)
def test_raw_backwards(op, changes, message):
    refuses(op, f"embedding_bag_backward: {message}", raw(**changes))


@pytest.mark.parametrize("op", ["embedding_fm_backward", "embedding_fm_backward_sparse", "embedding_fm_update"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": -1}, r"embeddings must .* dim = -1\D"),
        ({"dim": 0}, r"embeddings must .* dim = 0\D"),
        ({"dim": 3}, r"embeddings must .* dim = 3\D"),
        ({"dim": 2**63 - 1}, "embeddings must .* dim = 9223372036854775807"),
        ({"grad_embeddings": torch.ones(2, 4)}, r"grad_embeddings must be \[2, 8\] .* on cpu, got shape \[2, 4\]"),
        ({"grad_fm": torch.ones(2)}, r"grad_fm must be \[2, 1\] .* got shape \[2\]"),
        ({"grad_fm": torch.ones(2, 1).double()}, r"grad_fm must be \[2, 1\] .* torch.float64 on cpu"),
        (
            {"linear_weight": torch.ones(7)},
            "linear_weight must have one value a column of the embeddings, 8, and their",
        ),
    ],
)
def test_raw_backwards_of_fm(op, changes, message):
    refuses(op, f"embedding_fm_backward: {message}", raw(**changes))


@pytest.mark.parametrize("op", ["embedding_bag_update", "embedding_fm_update"])
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"weights": [torch.ones(1, 4).expand(5, 4), torch.ones(6, 4)]},
            r"rows that do not overlap, .* strides \[0, 1\]",
        ),
        (
            {"weights": [torch.ones(9).as_strided((5, 4), (1, 1)), torch.ones(6, 4)]},
            r"do not overlap, .* strides \[1, 1\]",
        ),
        ({"weights": [torch.ones(4, 5).t(), torch.ones(6, 4)]}, "elements side by side"),
        ({"weights": [torch.ones(5, 4).cfloat(), torch.ones(6, 4)]}, "must be float32, .* got torch.complex64"),
        ({"optimizer": 5}, "unknown optimizer 5"),
        ({"hyper": [0.1] * 8}, "hyper must hold 8 numbers a table, got 8 for 2"),
        ({"states": [torch.ones(5, 4)]}, "states must hold 0 tensors a table, got 1 for 2"),
    ],
)
def test_raw_updates(op, changes, message):
    refuses(op, f"embedding_bag_update: .*{message}", raw(**changes))


@pytest.mark.parametrize(
    "weight, rows, values, message",
    [
        (torch.ones(1, 2).expand(3, 2), [0, 1], (2, 2), r"rows that do not overlap, .* strides \[0, 1\]"),
        (torch.ones(3, 2), [1, 1], (2, 2), r"rows\[1\] = 1 must ascend"),
        (torch.ones(3, 2), [1, 3], (2, 2), r"rows\[1\] = 3 must ascend in a table with 3 rows"),
        (torch.ones(3, 2), [[0, 1]], (2, 2), r"rows must be int64 \[n\] .* got shapes \[1, 2\]"),
        (torch.ones(3, 2), [0, 1], (2, 0), r"rows must be int64 \[n\] .* and \[2, 0\]"),
        (torch.ones(3), [0, 1], (2, 2), r"a table must be \[R, D\]"),
    ],
)
def test_raw_sparse_update(weight, rows, values, message):
    arguments = {"weight": weight, "rows": torch.tensor(rows), "values": torch.ones(values)}
    refuses("sparse_update", f"sparse_update: .*{message}", {**raw(), **arguments, "hyper": [0.1] * 8})


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
