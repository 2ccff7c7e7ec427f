"""Ids that need not be rows of their table: each op has the bits of the same op on the rows that the reference says."""

from __future__ import annotations

import pytest
import torch

import rankkernels as rk
from rankkernels.ops._features import MODES, UNKNOWN, Features
from rankkernels.ops._library import no_extension
from rankkernels.ops.embedding_bag import run_op
from rankkernels.ops.embedding_fm import run_op as run_fm

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
R, D, B = 11, 20, 50


def features(dtype=torch.int64, modes=("none", "sum", "mean", "max", "sum", "none"), bags=B) -> Features:
    """A hash, a row, a hash beside padding, a row of fewer, a jagged hash, and ids that have to be rows."""
    generator, limits = torch.Generator().manual_seed(0), torch.iinfo(dtype)
    known = [(2, R, -1), (1, R, -1), (2, R, 3), (1, 5, -1), (2, 7, 0), (0, 0, -1)]
    ids = []
    for (unknown, _, _), mode in zip(known, modes):
        i = torch.randint(-4 if unknown else 0, R + 4 if unknown else R, (bags, 5), generator=generator)
        if unknown:
            i[:2, 0] = torch.tensor([limits.min, limits.max])[:bags]
        ids.append((i[:, 0] if mode == "none" else i).to(dtype))
    absent, offsets = torch.empty(0, dtype=torch.int64), torch.arange(0, 5 * bags, 5)
    ids[4] = ids[4].flatten()
    return Features(
        ids, [*[absent] * 4, offsets, absent], [], [0, 0, 1, 1, 0, 1], [MODES.index(mode) for mode in modes],
        [-1, -1, 3, -1, 0, -1], [-1, 3], [v for of_feature in known for v in of_feature],
    )  # fmt: skip


def tables(dtype=torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(R, D, generator=generator).to(dtype)) for _ in range(2)]


def trained(given: Features, way: str, dtype) -> list[torch.Tensor]:
    """Results, and gradients or the tables after two steps."""
    weights = tables(dtype)
    optimizer = {"fused": rk.optim.Adagrad, "exact": rk.optim.Adam}.get(way)
    options = dict(exact=True) if way == "exact" else {}
    optimizer = optimizer and optimizer(weights, lr=0.1, **options)
    for _ in range(2):
        outs = run_op(weights, given, "", sparse=way == "sparse", optimizer=optimizer)
        sum((out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)).sum() for out in outs).backward()
    return [out.detach() for out in outs] + [w.detach() if optimizer else w.grad.to_dense() for w in weights]


@pytest.mark.parametrize("way", ["dense", "sparse", "fused", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
def test_the_bits_of_the_rows(way, dtype, ids):
    given = features(ids, ("none", "sum", "mean", "sum", "sum", "none")) if way == "exact" else features(ids)
    if way == "exact" and dtype == torch.bfloat16:
        pytest.skip("exact Adam is of float32 and float64")
    assert all(map(torch.equal, trained(given, way, dtype), trained(given.as_rows(), way, dtype)))
    assert given.as_rows().known == [] and not all(map(torch.equal, given.indices, given.as_rows().indices))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_bits_of_the_rows_in_fm(sparse):
    results = []
    given = features(modes=("none",) * 6)
    given = given._replace(indices=[*given.indices[:4], given.indices[4], given.indices[5]], offsets=[])
    for lookups in (given, given.as_rows()):
        weights = tables()
        outs = run_fm(weights, lookups, "", torch.linspace(-1, 1, 6 * D), sparse=sparse)
        sum(out.sin().sum() for out in outs).backward()
        results.append([out.detach() for out in outs] + [w.grad.to_dense() for w in weights])
    assert all(map(torch.equal, *results))


def test_weights_get_their_gradients():
    results = []
    for as_rows in (False, True):
        factors = torch.linspace(-1, 1, 5 * B).view(B, 5).requires_grad_()
        given = features()
        given = given._replace(per_sample_weights=[factors.new_empty(0), factors, *[factors.new_empty(0)] * 4])
        outs = run_op(tables(), given.as_rows() if as_rows else given, "")
        results.append(torch.autograd.grad(outs[1].sin().sum(), factors))
    assert torch.equal(*map(next, map(iter, results)))


@pytest.mark.skipif(no_extension is not None, reason="compares the kernel with the default")
def test_kernel_and_default():
    op, given = torch.ops.rankkernels.embedding_bag.default, features()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    weights = [w.detach() for w in tables()]
    for a, b in zip(op(weights, *given, ""), op.redispatch(keys, weights, *given, "")):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(op, (tables(), *given, ""))


def test_rows_beyond_the_table_are_named():
    given = Features([torch.tensor([1, 99])], [], [], [0], [0], [-1], [-1], [UNKNOWN.index("row"), 20, -1])
    with pytest.raises(IndexError, match=r"item\[1\] = 19 is out of range for a table with 11 rows"):
        run_op(tables()[:1], given, "item")


def test_no_ids_and_one():
    for bags in (0, 1):
        given = features(bags=bags)
        for a, b in zip(*(run_op(tables(), g, "") for g in (given, given.as_rows()))):
            assert torch.equal(a, b) and a.shape == (bags, D)


def test_lookups_of_several_calls_step_as_one():
    """One of them with such ids, the other without; and one whose features are no part of the backward."""
    results = []
    for as_rows in (False, True):
        weights = tables()
        optimizer = rk.optim.SGD(weights, lr=0.1)
        given, plain = features(), Features([torch.tensor([0, 3])], [], [], [0], [0], [-1], [-1])
        outs = run_op(weights, given.as_rows() if as_rows else given, "", optimizer=optimizer)
        outs += run_op(weights[:1], plain, "", optimizer=optimizer)
        sum(out.sum() for out in outs[1:]).backward()
        results.append([w.detach() for w in weights])
    assert all(map(torch.equal, *results))


def test_under_a_compiler():
    given, weights = features(), tables()
    compiled = torch.compile(lambda *w: run_op(w, given, ""), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*weights), run_op(weights, given, "")))
