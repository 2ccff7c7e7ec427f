"""Time against one size at a time: B, F and D of FM, B, L and D of DIN attention, rows and pooled ids of a table's
training step, and threads. The report draws each as a curve on two logarithmic axes, with the floor beneath."""

from __future__ import annotations

import os

import pytest
import torch

import rankkernels as rk
from bench.bench_din_attention import Pass, Shape
from rankkernels.testing import fm_interaction_case

FM, DIN = dict(B=8192, F=39, D=16), dict(B=1024, L=50, D=32)
SWEEPS = {
    "FM": (FM, {"B": [512, 2048, 8192, 32768], "F": [5, 10, 20, 40, 80], "D": [4, 8, 16, 32, 64, 128]}),
    "DIN attention": (DIN, {"B": [128, 512, 1024, 2048], "L": [10, 25, 50, 100, 200], "D": [8, 16, 32, 64, 128]}),
}
POINTS = [
    pytest.param(op, axis, value, id=f"{op}-{axis}{value}".replace(" ", "_"))
    for op, (_, axes) in SWEEPS.items()
    for axis, values in axes.items()
    for value in values
]
TABLE = dict(rows=1_000_000, L=10)
TABLE_POINTS = [("rows", r) for r in (10_000, 100_000, 1_000_000, 10_000_000)] + [("L", n) for n in (1, 5, 10, 20, 50)]
CORES = os.cpu_count() or 1
THREADS = sorted({1, CORES, *(2**k for k in range(10) if 2**k < CORES)})


@pytest.fixture
def most_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield CORES
    torch.set_num_threads(before)


def text(at: dict) -> str:
    return " ".join(f"{name}{value}" for name, value in at.items())


def fm_step(at: dict):
    """A forward and a backward: ours, everyone else's, bytes, flops."""
    case = fm_interaction_case(at["B"], at["F"], at["D"])
    x, *_ = case.inputs(requires_grad=True)
    grad_out = torch.randn_like(case.function(x))

    def step(function):
        return lambda: torch.autograd.grad(function(x), x, grad_out)

    return step(case.function), {"eager": step(case.reference)}, 12 * case.elements, 3 * case.flops


def din_step(at: dict):
    case = Pass(Shape(at["B"], at["L"], at["D"], [36]), training=True)
    return case.steps["ours"], {"eager": case.steps["torch-rechub"]}, 3 * case.size, 3 * case.flops


STEPS = {"FM": fm_step, "DIN attention": din_step}


@pytest.mark.parametrize("op, axis, value", POINTS)
def test_size(op, axis, value, most_threads, race, benchmark):
    fixed, _ = SWEEPS[op]
    if op == "DIN attention":
        pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    at = {**fixed, axis: value}
    ours, others, size, flops = STEPS[op](at)
    race(ours, others, case=f"{op} {text(at)}", kind="forward + backward", size=size, flops=flops)
    benchmark.extra_info["curve"] = dict(op=op, axis=axis, value=value, fixed=text({**fixed, axis: "…"}))


@pytest.mark.parametrize("axis, value", TABLE_POINTS)
def test_table(axis, value, most_threads, race, benchmark):
    """Row-wise Adagrad on the rows that 4096 bags of L ids look up; torch's takes coalesced sparse gradients."""
    at = {**TABLE, axis: value}
    B, D, rows = 4096, 16, at["rows"]
    ids = torch.randint(0, rows, (B, at["L"]), generator=torch.Generator().manual_seed(0))
    grad_out = torch.randn(B, D)
    table = rk.TableBatchedEmbeddingBag([rows], D)
    rk.optim.fuse(table, rk.optim.RowWiseAdagrad(table.parameters(), lr=0.01))
    bag = torch.nn.EmbeddingBag(rows, D, mode="sum", sparse=True)
    adagrad = torch.optim.Adagrad(bag.parameters(), lr=0.01)

    def eager():
        adagrad.zero_grad()
        bag(ids).backward(grad_out)
        adagrad.step()

    lookups = B * at["L"]
    # The forward reads a row for each id; the update reads and writes each once, and reads the bags' gradients.
    race(
        lambda: table([ids]).backward(grad_out),
        {"eager": eager},
        case=f"table {text(at)}",
        kind="training step",
        size=4 * D * (3 * lookups + 2 * B) + 8 * lookups,
        flops=3 * lookups * D,
    )
    benchmark.extra_info["curve"] = dict(
        op="table, fused optimizer", axis=axis, value=value, fixed=f"B{B} D{D} " + text({**TABLE, axis: "…"})
    )


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("op", SWEEPS)
def test_threads(op, threads, race, benchmark):
    if op == "DIN attention":
        pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    fixed = SWEEPS[op][0]
    try:
        ours, others, size, flops = STEPS[op](fixed)
        race(ours, others, case=f"{op} {text(fixed)}", kind="forward + backward", size=size, flops=flops)
    finally:
        torch.set_num_threads(before)
    benchmark.extra_info["curve"] = dict(op=op, axis="threads", value=threads, fixed=text(fixed))
