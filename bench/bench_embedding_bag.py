"""Embedding bags: many tables in one call, against torch's one call a table and FBGEMM's table-batched operator.

Each library reads the tables that its own constructor allocates, because that is what its users get: ours lie in huge
pages. Contenders named "our tables" read ours. Where the time goes: docs/performance/embedding.md.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankkernels as rk
from bench.harness.peers import fbgemm_copy, missing, zentorch


class Shape(NamedTuple):
    tables: int
    rows: int
    D: int
    B: int
    L: int


SHAPES = pytest.mark.parametrize(
    "shape", [Shape(26, 100_000, 16, 2048, 1), Shape(8, 1_000_000, 64, 1024, 20)], ids=["26x100k", "8x1M"]
)
SKEWS = pytest.mark.parametrize("skew", [0.0, 1.05], ids=["uniform", "zipf"])


def make_ids(shape: Shape, skew: float, seed: int = 0) -> list[torch.Tensor]:
    """Row r is drawn in proportion to (r + 1) ** -skew, and the rows are shuffled."""
    generator = torch.Generator().manual_seed(seed)
    cumulated = torch.arange(1, shape.rows + 1, dtype=torch.float64).pow(-skew).cumsum(0)
    shuffle = torch.randperm(shape.rows, generator=generator)

    def draw():
        u = torch.rand(shape.B * shape.L, dtype=torch.float64, generator=generator) * cumulated[-1]
        return shuffle[torch.searchsorted(cumulated, u).clamp(max=shape.rows - 1)].view(shape.B, shape.L)

    return [draw() for _ in range(shape.tables)]


def fbgemm(shape: Shape, weights, ids):
    """FBGEMM's operator on copies of the tables, with row-wise Adagrad, or None where it is not installed."""
    if missing("fbgemm-gpu-cpu"):
        return None
    module = fbgemm_copy(weights, optimizer="EXACT_ROWWISE_ADAGRAD", learning_rate=0.01, eps=1e-8)
    values = torch.cat([i.flatten() for i in ids])
    offsets = torch.arange(0, values.numel() + 1, shape.L)

    def forward():
        return module(values, offsets)

    forward.weights = module.split_embedding_weights()
    return forward


def make(shape: Shape, skew: float):
    weights = list(rk.TableBatchedEmbeddingBag([shape.rows] * shape.tables, shape.D).weights)
    ids, modes = make_ids(shape, skew), ["sum"] * shape.tables

    def ours():
        return rk.table_batched_embedding_bag(weights, ids, modes=modes, concat=True)[0]

    def torchs(tables):
        return lambda: torch.cat([F.embedding_bag(i, w, mode="sum") for i, w in zip(ids, tables)], 1)

    return weights, ids, ours, torchs


def case_of(shape: Shape, skew: float) -> str:
    ids = "uniform" if skew == 0 else f"Zipf {skew}"
    return f"embedding_bag {shape.tables} x {shape.rows:,} x {shape.D} B{shape.B} L{shape.L} {ids}"


@SHAPES
@SKEWS
def test_forward(shape, skew, threads, race):
    weights, ids, ours, torchs = make(shape, skew)
    # A copy lies in the memory that torch's allocator gives, as a table that nn.EmbeddingBag makes does.
    contenders = {
        "EmbeddingBag": torchs([w.detach().clone() for w in weights]),
        "EmbeddingBag, our tables": torchs(weights),
    }
    theirs = fbgemm(shape, weights, ids)
    if theirs is not None:
        contenders["FBGEMM"] = theirs
    for name in ("EmbeddingBag", "EmbeddingBag, our tables"):
        compiled = zentorch(contenders[name])
        contenders |= {name.replace("EmbeddingBag", peer): function for peer, function in compiled.items()}
    with torch.no_grad():
        race(
            ours, contenders, case=case_of(shape, skew), kind="forward",
            size=4 * shape.tables * shape.B * (shape.L + 1) * shape.D, missing=missing("fbgemm-gpu-cpu", "zentorch"),
        )  # fmt: skip


@SHAPES
@SKEWS
def test_dense_gradient(shape, skew, threads, race):
    """Forward and backward with dense gradients; FBGEMM has none."""
    weights, _, ours, torchs = make(shape, skew)
    grad_out = torch.randn_like(ours())

    def step(function):
        return torch.autograd.grad(function(), weights, grad_out)

    race(
        lambda: step(ours),
        {"EmbeddingBag": lambda: step(torchs(weights))},
        case=case_of(shape, skew),
        kind="forward + backward",
    )


@SHAPES
@SKEWS
def test_fused_step(shape, skew, threads, race):
    """Forward, backward and row-wise Adagrad; our Adam and FTRL beside it, and torch's sparse Adagrad."""
    ids = make_ids(shape, skew)
    grad_out = torch.randn(shape.B, shape.tables * shape.D)

    def fused(optimizer, **options):
        module = rk.TableBatchedEmbeddingBag([shape.rows] * shape.tables, shape.D)
        rk.optim.fuse(module, optimizer(module.parameters(), lr=0.01, **options))
        return module, lambda: module(ids).backward(grad_out)

    module, ours = fused(rk.optim.RowWiseAdagrad)
    contenders = {"our Adam": fused(rk.optim.Adam)[1], "our FTRL": fused(rk.optim.FTRL, l1=0.01)[1]}
    theirs = fbgemm(shape, module.weights, ids)
    if theirs is not None:
        contenders = {"FBGEMM": lambda: theirs().backward(grad_out), **contenders}
        contenders["FBGEMM"](), ours()
        for a, b in zip(module.weights, theirs.weights):
            torch.testing.assert_close(a.detach(), b)
    bags = nn.ModuleList(nn.EmbeddingBag(shape.rows, shape.D, mode="sum", sparse=True) for _ in ids)
    adagrad = torch.optim.Adagrad(bags.parameters(), lr=0.01)

    def torchs():
        adagrad.zero_grad()
        torch.cat([bag(i) for bag, i in zip(bags, ids)], 1).backward(grad_out)
        adagrad.step()

    contenders["torch Adagrad"] = torchs
    race(ours, contenders, case=case_of(shape, skew), kind="fused step", missing=missing("fbgemm-gpu-cpu"))


@SHAPES
def test_exact_adam(shape, threads, race):
    """A fused step of Adam with dense Adam's numbers beside the lazy one's, on another of eight batches each time. A
    thousand steps come before: rows stepped in the first hundred have more terms to catch up with than any later."""
    batches, grad_out = [make_ids(shape, 0.0, seed) for seed in range(8)], torch.randn(shape.B, shape.tables * shape.D)

    def fused(exact):
        module = rk.TableBatchedEmbeddingBag([shape.rows] * shape.tables, shape.D)
        rk.optim.fuse(module, rk.optim.Adam(module.parameters(), lr=0.01, exact=exact))
        one = [torch.zeros(1, 1, dtype=torch.int64)] * shape.tables
        for _ in range(1000):
            module(one).backward(grad_out[:1])
        ids = itertools.cycle(batches)
        return lambda: module(next(ids)).backward(grad_out)

    race(fused(True), {"our lazy Adam": fused(False)}, case=case_of(shape, 0.0), kind="fused step, exact Adam")


@pytest.mark.parametrize("gradients", ["sparse", "fused Adam"])
def test_lookup_fm_linear(gradients, threads, race):
    """What DeepFM needs of 39 features in one pass, against the lookup, the FM and the linear layer one by one."""
    F_, D, B = 39, 16, 8192
    ids, modes = make_ids(Shape(F_, 100_000, D, B, 1), 0.0), ["none"] * F_
    ids = [i.flatten() for i in ids]
    grads = torch.randn(B, F_ * D), torch.randn(B, 1)

    def contender(function):
        torch.manual_seed(0)
        module = rk.TableBatchedEmbeddingBag([100_000] * F_, D)
        weights, a = list(module.weights), nn.Parameter(torch.randn(1, F_ * D))
        options = {"sparse": True}
        if gradients != "sparse":
            options = {"optimizer": rk.optim.Adam(weights, lr=1e-3)}

        def step():
            embeddings, fm, linear = function(weights, a, options)
            for p in (*weights, a):
                p.grad = None
            torch.autograd.backward([embeddings, fm + linear], grads)

        return step

    def apart(weights, a, options):
        (e,) = rk.table_batched_embedding_bag(weights, ids, modes=modes, concat=True, **options)
        return e, rk.fm_interaction(e.view(B, F_, D)), F.linear(e, a)

    race(
        contender(lambda weights, a, options: rk.embedding_fm(weights, ids, a, **options)),
        {"separate ops": contender(apart)},
        case=f"embedding_fm {F_} x 100,000 x {D} B{B}",
        kind=f"forward + backward, {gradients}",
    )


@pytest.mark.parametrize("rows", [100_000, 1_000_000, 10_000_000])
def test_time_does_not_grow_with_rows(rows, threads, race, benchmark):
    """The same lookups in larger tables: fused Adam on one table of width 16, 65536 ids."""
    module = rk.TableBatchedEmbeddingBag([rows], 16)
    rk.optim.fuse(module, rk.optim.Adam(module.parameters(), lr=0.01))
    ids = [torch.randint(0, rows, (65536, 1))]
    grad_out = torch.randn(65536, 16)
    race(lambda: module(ids).backward(grad_out), {}, case="embedding_bag by rows", kind="fused Adam")
    benchmark.extra_info["rows"] = rows


@pytest.mark.parametrize("B", [16, 4096])
def test_layer(B, threads, race):
    """The whole EmbeddingLayer.forward of 26 features, against one nn.Embedding call a feature as torch-rechub does."""
    features = [rk.SparseFeature(f"c{i}", 100_000, 16) for i in range(26)]
    layer = rk.EmbeddingLayer(features)
    x = {f.name: torch.randint(0, f.vocab_size, (B,)) for f in features}
    tables: dict[str, nn.Module] = dict(layer.embed_dict.items())

    def one_by_one():
        return torch.cat([tables[f.name](x[f.name].long()).unsqueeze(1) for f in features], 1)

    with torch.inference_mode():
        race(lambda: layer(x, features), {"one by one": one_by_one}, case=f"EmbeddingLayer 26 x 100,000 x 16 B{B}",
             kind="forward")  # fmt: skip
