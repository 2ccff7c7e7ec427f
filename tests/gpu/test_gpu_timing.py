"""bench/gpu's races on the CPU, with clocks that are told the time, and what is raced."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import workloads
from bench.gpu import check_report, contests, part, predictions, timed, timing
from rankkernels.ops._table import OPS
from rankkernels.testing import TEST_CASES

CPU = torch.device("cpu")
SMALL = contests.Place(CPU, small=True)
pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
EVERY = [item for items in timed.TIMED.values() for item in items]


class Clock(timing.HostClock):
    """Says that each turn took the next of ``said``, and a launch a second."""

    def __init__(self, *said: float):
        super().__init__(CPU, cache_bytes=24, memory_bytes=1 << 20)
        object.__setattr__(self, "said", said)
        object.__setattr__(self, "turns", [])

    def seconds(self, run) -> float:
        self.turns.append(run())
        return self.said[(len(self.turns) - 1) % len(self.said)]

    def host_seconds(self, run) -> float:
        run()
        return 1.0


def contest(**functions) -> timing.Contest:
    """Of sets of one number, the seed, of which a call reads 32 bytes."""
    return timing.Contest(functions, lambda seed: [torch.tensor([1.0 + seed])], size=4, touched=32, moved=8, flops=1)


def test_rotations_leave_the_cache_cold():
    size = 10 << 20
    assert timing.rotations(size, size, 50 << 20, 80 << 30) == 20
    assert timing.rotations(size, 100 * size, 50 << 20, 80 << 30) == 20  # rows of larger tables
    assert timing.rotations(1 << 30, 1 << 30, 50 << 20, 80 << 30) == 1
    assert timing.rotations(1 << 30, 1 << 30, 50 << 30, 8 << 30) == 2  # of the memory no more than a quarter
    assert timing.rotations(0, 0, 50 << 20, 80 << 30) == 64


def test_race_takes_turns_on_all_sets_and_medians():
    seen = []

    def contender(name):
        return lambda x: seen.append((name, x.item())) or [x]

    clock = Clock(3.0, 30.0, 6.0, 60.0, 27.0, 270.0)
    found = timing.race(
        contest(ours=contender("ours"), eager=contender("eager")), clock, 4.0, itertools.count(1).__next__
    )
    assert found["sets"] == 3 and found["no graph"] == ["ours", "eager"] and not found["raised"]
    assert found["seconds"] == {"ours": 2.0, "eager": 20.0}  # of a call; a turn has one for each set
    assert found["host"] == {"ours": 1.0, "eager": 1.0}
    timed_calls = seen[-6 * len(clock.turns) // 2 :]
    assert timed_calls[:6] == [(name, x) for name in ("ours", "eager") for x in (1.0, 2.0, 3.0)]
    assert len(clock.turns) == 2 * 8  # five rounds, and three more before the time is over


def test_what_differs_or_raises_is_not_timed():
    def raises(x):
        raise RuntimeError("out of memory\nand more")

    def nan(x):
        return [x * float("nan")]

    clock, same = Clock(1.0), lambda x: [x]
    assert "from eager" in timing.race(contest(ours=same, eager=lambda x: [1.01 * x]), clock, 0)["error"]
    assert "inf" in timing.race(contest(ours=same, eager=nan), clock, 0)["error"]
    assert clock.turns == []
    found = timing.race(contest(ours=same, FBGEMM=raises), clock, 0)
    assert found["raised"] == {"FBGEMM": "RuntimeError: out of memory"} and set(found["seconds"]) == {"ours"}
    items = [timed.Timed("x", "forward", torch.float32, "op", lambda place: contest(ours=raises))] * 2
    run = part.Run(clock, SMALL, 3.5)
    (kind, first), (late, second) = part.races("steps", items, run, now=itertools.count(1).__next__)
    assert (kind, first["error"]) == ("timing", "RuntimeError: out of memory")
    assert (late, second["ok"], second["detail"]) == ("finding", None, "the part's 4 s are over")
    records = [{"kind": kind, "part": "steps", **first}, {"kind": "timing", "part": "steps", **first, **found}]
    del records[1]["error"]
    assert check_report.failures(records) == [
        "steps: x, forward, float32: RuntimeError: out of memory",
        "steps: x, forward, float32: FBGEMM: RuntimeError: out of memory",
    ]


def test_ceilings():
    found = timing.ceilings(Clock(0.5), copied=1 << 10, n=8)
    assert found == {"copy": 4096.0, "float32": 2048.0, "float16": 2048.0, "bfloat16": 2048.0}


def test_a_turn_on_a_gpu_is_a_graph_unless_a_call_waits(monkeypatch):
    captured, modes, calls = [], [], []

    @contextlib.contextmanager
    def graph(graph, stream):
        calls.clear()
        yield
        captured.append((stream, list(calls)))

    for name, fake in {
        "synchronize": lambda: None, "set_sync_debug_mode": modes.append, "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)

    def waits(x):
        calls.append(x)
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    clock = object.__new__(timing.GPUClock)
    clock.stream, clock.device = "own", torch.device("cuda")
    assert timing.GPUClock.turn(clock, calls.append, [(1,), (2,)]) == ("replay", 2, True)
    assert captured == [("own", [1, 2])] and modes == ["error", "default"]
    run, count, is_graph = timing.GPUClock.turn(clock, waits, [(1,), (2,)])
    calls.clear()
    run()
    assert (calls, count, is_graph, len(captured)) == ([1, 2], 2, False, 1)


def test_calls_that_no_graph_may_hold_are_not_captured(monkeypatch):
    clock = Clock(1.0)
    monkeypatch.setattr(Clock, "turn", lambda *_: timing.Turn(lambda: [], 1, True))
    for graphs, outside in ((True, []), (False, ["ours"])):
        made = dataclasses.replace(contest(ours=lambda x: [x]), graphs=graphs)
        assert timing.race(made, clock, 0)["no graph"] == outside
    exact = next(item for item in timed.EMBEDDINGS if "exact" in item.kind)
    assert not exact.make(SMALL).graphs


@pytest.mark.parametrize("item", EVERY, ids=lambda item: f"{item.name}-{item.kind}-{part.name_of(item.dtype)}")
def test_ours_and_eager_compute_the_same(item):
    made = item.make(SMALL)
    assert timing.disagreement(made, made.make(0)) == ""
    assert min(made.size, made.touched, made.moved) > 0


def test_every_op_of_a_gpu_is_raced():
    ops = {case.op for case in TEST_CASES}
    assert {item.op for item in timed.others(contests.Place(CPU))} == {op for op in ops if OPS[op].cuda}
    assert set(timed.COMPILED) <= set(EVERY)


def test_predictions_are_of_what_is_raced_and_on_their_page():
    keys = [(item.name, item.kind, part.name_of(item.dtype)) for item in EVERY]
    assert sorted(keys) == sorted(predictions.PREDICTED)
    page = Path(__file__).parents[2] / "docs/performance/gpu.md"
    assert "\n".join(predictions.table()) in page.read_text()


@pytest.mark.parametrize("name", ["DeepFM", "DIN"])
def test_plain_models_are_torch_rechubs(name):
    if name == "DeepFM":
        workload, model = workloads.deepfm(16, 8), timed.plain_deepfm(16)
    else:
        workload, model = workloads.din(16, 8, L=4), timed.plain_din(16, 16, (36,))
    x, _ = workload.batch()
    models = workload.models() if importlib.util.find_spec("torch_rechub") else {"ours": workload.ours()[0]}
    for other in models.values():
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), other(x), atol=1e-6, rtol=1e-5)


def test_fbgemm_is_a_contender_where_it_is_installed(monkeypatch):
    steps = []

    class Module:
        def __init__(self, weights, device, **options):
            self.weights, self.options = [w.clone().requires_grad_() for w in weights], options

        def __call__(self, ids, offsets):
            steps.append((ids.shape, offsets.tolist(), self.options))
            T = len(self.weights)
            return contests.bags(self.weights, ids.view(T, len(offsets) // T, -1))

    tables = contests.Tables(T=2, R=9, D=4, B=3, L=2)
    monkeypatch.setattr(contests, "fbgemm_copy", Module)
    for made, options in (
        (contests.lookup(tables, SMALL), {}),
        (contests.lookup_and_step(tables, contests.ADAM, SMALL), {"optimizer": "ADAM", "learning_rate": 1e-3}),
    ):
        (out,) = made.functions["FBGEMM"](*made.make(0))
        assert out.shape == (3, 8) and steps.pop() == (torch.Size([12]), list(range(0, 13, 2)), options)
    monkeypatch.setattr(contests, "fbgemm_copy", lambda *_: 1 / 0)
    assert set(contests.lookup(tables, SMALL).functions) == {"ours", "eager"}
