"""Embedding bags: many tables in one call, against torch's one call a table and FBGEMM's table-batched operator.

A forward is raced with the tables that each library's own constructor allocates, because that is what its users get:
ours lie in large pages, torch's and FBGEMM's in what malloc gives, pages of 4 KiB where the system does not do better
by itself. What "our tables" is added to reads ours instead, and tells the kernel's part from the pages'. The forward of
8 x 1M x 64 is bound by memory: a loop that only gathers and sums takes 0.80 ms with one thread, 52 GB/s, from large
pages and 64 rows ahead, and 1.08 ms from pages of 4 KiB. (Dense gradients are raced on the same tables.)

Where a row-wise Adagrad step of 26 x 100k x 16 goes with one thread (Zen 5, Zipf ids, milliseconds): of 0.96, by a
profile's shares (the step took 1.20 under it), lookups 0.25; in the backward the rows' sums and steps 0.3, the sort
that sums in a fixed order 0.17, keys and where gradients lie 0.03; a step on a batch of one, which is Python, autograd
and the lists of 26 tensors, takes 0.15. Of 1.12 before: a pointer for each lookup and not each bag cost 0.08; that
batch of one 0.21, where each table read its group's hyper-parameters anew and the lists went through Python twice. Two
blocks sorted at once, key by key, wait less for the counters that Zipf ids hit again and again: in a sketch, beside
other work, 26 x 2048 keys 115 us and not 152 (uniform 92 and 117), 8 x 20,480 keys 352 and not 479 (258 and 331). Tried
without gain: 32-bit keys (3 % of the sort), the next pass's digits counted while keys move (as good as two blocks, but
not where threads share a table), three passes (a third slower), memory kept from step to step (malloc keeps it by
itself: no page faults after the first steps). Where a run of equal ids ends nothing can foresee: chunks of lookups and
a masked accumulator in place of branches took the backward from 0.90 to 0.71, with uniform ids from 0.98 to 0.74.

Adam on 8 x 1M x 64, uniform, one thread: 162 thousand rows of weights and two moments, 249 MB read and written. A loop
that does that and nothing else takes 6.2 ms (39 GB/s), with both moments of a row side by side 5.9. Row-wise Adagrad
reads and writes 104 MB. With the forward's 42 MB in both, what memory alone allows Adam is 1.99 times row-wise
Adagrad's time; what both do besides (ids, sort, Python) brings it nearer to that. Rows of 64 and 128 values are stepped
on as soon as they are summed, each lookup asking for what those some places on will touch, twice, for the second level
of the cache and for the first. Against chunks of lookups that are summed and then stepped on (tables of 600k rows, the
whole step, a process each in turns, ms): one thread uniform row-wise 7.5 to 5.2 and Adam 14.3 to 11.6 (another run,
12.9 to 8.8), Zipf 4.8 to 3.6 and 8.8 to 6.2; two threads 5.3 to 4.0, 8.3 to 6.2, 3.3 to 2.8, 5.3 to 3.6. In a sketch of
the update alone: one request 8.3, two 7.3, then moments side by side 7.0, but Zipf 5.0 and 5.6; stores past the cache
no gain. The same for every width and for gradients too, the width no constant: 26 x 100k x 16 1.1 to 1.7, from many
short loops a row, and 2 MB more code. Chunks that ask for Adam's moments twice: no gain. Square root and division are
not it: leaving both out gained 0.3 to 1.1. Tasks in the order of samples, a contiguous copy of the gradients: no gain.

How much longer Adam takes than row-wise Adagrad follows what the host gives: uniform 8 x 1M x 64 with two threads, two
runs of one commit, 2.05 times (3.4 and 7.0 ms; memory 49 GB/s) and 1.21 (4.1 and 5.0; 70 GB/s).

On Zen 3 (AVX2) what counts is how many misses a core has on their way: gathering and summing the rows of 8 x 1M x 64
takes one core 3.3 ms (13 GB/s), at any distance from 8 to 128 rows, with any hint, a line asked for or four. A lookup
misses 9 lines for row-wise Adagrad (4 of its row in each direction, its sum) and 16 for Adam: 1.78 times; 1.7 to 1.9
are measured. Both moments of a row side by side take Adam's step, one thread and two, from 27.6 and 14.5 ms to 25.5 and
13.9, Zipf 15.7 and 9.2 to 14.5 and 7.4, 26 x 100k x 16 with one 3.4 to 2.9 (two runs of the bench). Distances of 3 and
10 lookups in place of 4 and 16: 24.4 to 22.9; 12 and 48: 26.5.

Lookup + FM + linear, 39 x 100k x 16, B8192, fused Adam, one thread (Zen 5, uniform ids, milliseconds): of 14.9, forward
2.9, the gradient of the lookups 1.7, the update 8.7, Python and autograd about 1; sparse, of 12.6, the same and 5.8 for
the sums, with the pages of 20 MB that each step mapped afresh. Floors at 40 GB/s: forward 60 MB, 1.5; update 140 MB,
3.5. Features of a sample side by side and not block by block: forward 1.7. The FM's part added where rows are summed,
for which a pass reads the embeddings for their sum and nothing of their size is written: 13.0.
Lookups by 32 and not by 128 where sums read three lines: 11.3, sparse 11.5 to 10.6. With two threads fused Adam takes
6.5 and not 9.1, sparse 6.5 and not 8.2.
"""

from __future__ import annotations

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


def make_ids(shape: Shape, skew: float) -> list[torch.Tensor]:
    """Row r is drawn in proportion to (r + 1) ** -skew, and the rows are shuffled."""
    generator = torch.Generator().manual_seed(0)
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
    """Forward, backward and row-wise Adagrad; our Adam beside it, and torch's sparse Adagrad."""
    ids = make_ids(shape, skew)
    grad_out = torch.randn(shape.B, shape.tables * shape.D)

    def fused(optimizer):
        module = rk.TableBatchedEmbeddingBag([shape.rows] * shape.tables, shape.D)
        rk.optim.fuse(module, optimizer(module.parameters(), lr=0.01))
        return module, lambda: module(ids).backward(grad_out)

    module, ours = fused(rk.optim.RowWiseAdagrad)
    _, adam = fused(rk.optim.Adam)
    contenders = {"our Adam": adam}
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
