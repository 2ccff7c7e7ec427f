"""DeepFM's evaluation as one op: the same numbers as its parts, and where the parts run instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankkernels as rk
from rankkernels import info
from rankkernels.ops import _library, deepfm
from rankkernels.ops._table import OPS
from rankkernels.testing import relative_error

pytestmark = pytest.mark.skipif(bool(_library.no_extension), reason="what the C++ kernels promise")
OP = torch.ops.rankkernels.deepfm.default


def arguments(B: int, F: int = 5, D: int = 6, dense: int = 3, widths=(50, 17), ids=torch.int64):
    tables = [min(f, 2) for f in range(F)]  # one of them shared
    rows = [20, 300, 7]
    weights = [torch.randn(r, D) for r in rows[: max(tables) + 1]]
    indices = [torch.randint(0, rows[t], (B,), dtype=ids) for t in tables]
    mlp, n = [], F * D + dense
    for width in (*widths, 1):
        mlp += [torch.randn(width, n) * n**-0.5, torch.randn(width)]
        n = width
    names = "\n".join(f"feature_{f}" for f in range(F))
    columns = torch.randn(dense, B).t() if dense else None
    return weights, indices, tables, names, torch.randn(1, F * D), columns, mlp


def parts(weights, indices, tables, names, linear_weight, dense, mlp) -> Tensor:
    """In float64, by the separate ops."""
    embeddings = torch.cat([weights[t].double()[i] for t, i in zip(tables, indices)], 1)
    fm, linear = rk.reference.fm_and_linear(embeddings, weights[0].size(1), linear_weight.double())
    x = embeddings if dense is None else torch.cat([embeddings, dense.double()], 1)
    for i in range(0, len(mlp), 2):
        x = nn.functional.linear(x.relu() if i else x, mlp[i].double(), mlp[i + 1].double())
    return fm + linear + x


@pytest.mark.parametrize("widths", [(50, 17), (64,), (48, 130, 16), (1,), (256, 128)])
@pytest.mark.parametrize(
    "B, F, D, dense", [(0, 5, 6, 3), (1, 1, 1, 0), (67, 5, 16, 0), (200, 3, 19, 130), (64, 26, 16, 13)]
)
def test_is_its_parts(B, F, D, dense, widths):
    for ids in (torch.int32, torch.int64):
        a = arguments(B, F, D, dense, widths, ids)
        out = deepfm.run_op(*a)
        assert out.shape == (B, 1)
        assert relative_error(out, parts(*a)) < 1e-6
        if B:  # what runs where there is no kernel
            torch.testing.assert_close(out, deepfm._in_parts(*a), rtol=1e-4, atol=1e-4)


def test_opcheck():
    torch.library.opcheck(OP, arguments(9))


def test_bits_depend_neither_on_threads_nor_on_the_batch():
    a = arguments(300)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(deepfm.run_op(*a))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    weights, indices, tables, names, linear, dense, mlp = a
    alone = deepfm.run_op(weights, [i[130:141] for i in indices], tables, names, linear, dense[130:141], mlp)
    assert torch.equal(alone, found[0][130:141])


@pytest.mark.parametrize("place", [0, 70, 299])
def test_an_id_outside_its_table_is_named(place):
    a = arguments(300)
    a[1][3][place] = 7
    with pytest.raises(IndexError, match=rf"feature_3\[{place}\] = 7 is out of range .* with 7 rows"):
        deepfm.run_op(*a)


def test_what_does_not_fit_is_refused():
    weights, indices, tables, names, linear, dense, mlp = arguments(9)
    for wrong in (
        mlp[:2],
        mlp[:3],
        [mlp[0][:, 1:], *mlp[1:]],
        [*mlp[:-2], mlp[0], mlp[1]],
        [mlp[0].double(), *mlp[1:]],
    ):
        with pytest.raises(RuntimeError, match="deepfm: mlp"):
            OP(weights, indices, tables, names, linear, dense, wrong)
    with pytest.raises(RuntimeError, match=r"deepfm: weights\[1\] must be \[R, 6\] torch.float32, got"):
        OP([weights[0], weights[1].double(), weights[2]], indices, tables, names, linear, dense, mlp)
    with pytest.raises(RuntimeError, match=r"feature_0 must be \[9\], got shape \[9, 1\]|\[9\]"):
        OP(weights, [*indices[:-1], indices[0][1:]], tables, names, linear, dense, mlp)
    with pytest.raises(RuntimeError, match="linear_weight must have one value a column"):
        OP(weights, indices, tables, names, linear[:, 1:], dense, mlp)


def model(activation="relu"):
    sparse = [rk.SparseFeature(f"c{i}", 30, 8) for i in range(4)]
    m = rk.DeepFM([*sparse, rk.DenseFeature("n")], sparse, {"dims": [40, 24], "activation": activation, "dropout": 0.1})
    for t in m.state_dict().values():
        t.add_((torch.rand(t.shape) * 0.3).to(t.dtype))
    x = {f"c{i}": torch.randint(0, 30, (100,)) for i in range(4)} | {"n": torch.randn(100)}
    return m.eval(), x


def test_the_model_evaluates_by_it_where_it_is_the_same(monkeypatch):
    calls = []
    run_op = deepfm.run_op
    monkeypatch.setattr(deepfm, "MIN_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(deepfm, "_has_kernel", lambda: True)  # whatever this machine has
    monkeypatch.setattr(deepfm, "run_op", lambda *a: calls.append(1) or run_op(*a))
    m, x = model()

    def fused(m, x) -> bool:
        calls.clear()
        with torch.no_grad():
            out = m(x)
        with torch.enable_grad():
            torch.testing.assert_close(out, m(x).detach(), rtol=1e-5, atol=1e-6)
        return len(calls) == 1

    assert fused(m, x)
    m.mlp.mlp[0].weight.data.mul_(2), m.mlp.mlp[5].running_var.add_(1)
    assert fused(m, x)
    for module in (m.mlp, m.mlp.mlp, m.mlp.mlp[2], m.mlp.mlp[4], m.fm, m.linear.fc):
        handle = module.register_forward_hook(lambda *_: None)
        assert not fused(m, x)
        handle.remove()
    assert not fused(*model("prelu"))
    assert not fused(m.double(), x)
    m.float().mlp.mlp[1].train()
    with torch.no_grad():
        m(x)
    assert not calls


@pytest.mark.parametrize("has_kernel", [True, False, None])
def test_info_says_what_the_model_runs(has_kernel, monkeypatch):
    """On this machine, and on one with and one without the instruction set that the kernel needs."""
    calls, run_op, op = [], deepfm.run_op, OPS["deepfm"]
    if has_kernel is not None:
        monkeypatch.setitem(OPS, "deepfm", op._replace(is_served=lambda: has_kernel))
    deepfm._has_kernel.cache_clear()
    monkeypatch.setattr(deepfm, "MIN_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(deepfm, "run_op", lambda *a: calls.append(1) or run_op(*a))
    m, x = model()
    with torch.no_grad():
        m(x)
    deepfm._has_kernel.cache_clear()
    expected = op.is_served() if has_kernel is None else has_kernel
    assert len(calls) == expected and info.backend("deepfm", "cpu").startswith("C++") == expected
