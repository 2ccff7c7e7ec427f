"""bench/gpu/check.py as far as it goes without a GPU: its checks on the CPU, its timing with a clock that is told the
time, its report from a record."""

from __future__ import annotations

import dataclasses
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import check, check_report, report, timing
from rankkernels.ops._table import OPS
from rankkernels.testing import TEST_CASES, din_attention_case, embedding_bag_case, embedding_fm_case
from rankkernels.testing import fm_interaction_case as fm_case

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")


class Clock:
    """Says that each call took the next of ``seconds``."""

    def __init__(self, *seconds: float):
        self.seconds_said, self.calls = seconds, 0

    def seconds(self, function) -> float:
        function()
        self.calls += 1
        return self.seconds_said[(self.calls - 1) % len(self.seconds_said)]


class Time:
    """A monotonic clock that goes on by one second at each look."""

    def __init__(self):
        self.at = 0.0

    def __call__(self) -> float:
        self.at += 1
        return self.at


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.check", "--out", "never"], cwd=check.ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["gpu_check: no GPU: torch.cuda.is_available() is False"]


def test_arguments(capsys):
    arguments = check.parse(["--out", "here", "--part", "capture", "--part", "timings"])
    assert arguments.out == Path("here") and arguments.part == ["capture", "timings"] and not arguments.first_cases
    with pytest.raises(SystemExit):
        check.parse(["--part", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


def test_the_budgets_are_less_than_eight_minutes():
    assert check.HARD_LIMIT < 8 * 60
    assert set(check.BUDGET) == {*check.PARTS, "timings"}


def test_the_plan_has_every_op_case_and_dtype():
    plan = [what for what, _ in check.correctness(CPU)]
    assert len(plan) == len(set(plan)) == sum(len(case.dtypes) for case in TEST_CASES)
    ops = sorted({case.op for case in TEST_CASES})
    captured = [what for what, _ in check.capture(CPU)]
    assert sorted({what.split("-")[0] for what in captured if "-" in what}) == ops
    assert [what for what in captured if "-" not in what] == ["DeepFM training step", "DIN training step"]
    first = [what for what, _ in check.first_of_each_op(check.correctness(CPU))]
    assert sorted(what.split("-")[0] for what in first) == ops
    assert {case.op for case, _ in timing.TIMED} == {op for op in ops if OPS[op].cuda}


@pytest.mark.parametrize("op", sorted({case.op for case in TEST_CASES}))
def test_correctness_on_the_cpu(op):
    checks = [c for c in check.correctness(CPU) if c[0].startswith(f"{op}-")]
    findings = list(check.run_checks("correctness", iter(checks), 1e9))
    assert [f.what for f in findings if not f.ok] == []


@pytest.mark.parametrize("make", [report.deepfm, report.din])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_models_on_the_cpu(make, dtype):
    ok, detail = check.check_model(make, dtype, CPU)
    print(detail)
    assert ok, detail


@pytest.mark.parametrize("replays", [True, False], ids=["a graph", "a graph that does nothing"])
def test_capture_on_the_cpu(monkeypatch, replays):
    """With a graph that runs again, or does not, what it is of."""

    def in_graph(run):
        captured = run()
        return lambda: [c.copy_(again) for c, again in zip(captured, run())] if replays else None, captured

    monkeypatch.setattr(check, "in_graph", in_graph)
    monkeypatch.setattr(check, "has_kernels", lambda op: True)
    findings = list(check.run_checks("capture", check.capture(CPU), 1e9))
    assert [f.what for f in findings if f.ok is not replays] == []
    assert {f.detail for f in findings} == {"" if replays else "a replay differs from a run"}


def test_wrong_results_and_errors_are_found():
    case = fm_case(3, 4, 5)
    scaled = dataclasses.replace(case, function=lambda x: case.function(x) * 1.01)
    ok, detail = check.check_case(scaled, torch.float32, CPU)
    assert not ok and "error 1.0e-02" in detail
    nan = dataclasses.replace(case, function=lambda x: case.function(x) * float("nan"))
    assert not check.check_case(nan, torch.float32, CPU)[0]
    noisy = dataclasses.replace(case, function=lambda x: case.function(x) * (1 + 1e-6 * torch.rand(())))
    ok, detail = check.check_case(noisy, torch.float32, CPU)
    assert not ok and "other bits" in detail

    def raises():
        raise RuntimeError("an illegal memory access\nand more")

    (finding,) = check.run_checks("capture", iter([("x", raises)]), 9)
    assert finding == check.Finding("capture", "x", False, "RuntimeError: an illegal memory access")


def test_a_part_stops_when_its_time_is_over():
    checks = iter([(str(i), lambda: (True, "")) for i in range(4)])
    findings = list(check.run_checks("models", checks, 2.5, Time()))
    assert [f.ok for f in findings] == [True, True, None, None]
    assert findings[-1].detail == "not done: the part's 2 s are over"


@pytest.mark.parametrize(
    "script, expected",
    [("exit 0", (True, "")), ("echo Invalid __global__ read; exit 9", (False, "Invalid __global__ read\n")),
     ("exec sleep 60", (None, "not done in 1 s"))],
    ids=["clean", "dirty", "slow"],
)  # fmt: skip
def test_sanitizer(tmp_path, script, expected):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    assert check.sanitize(str(program), 0.9) == expected
    assert check.sanitize(None, 1) == (None, "compute-sanitizer is not on PATH")


def test_rotations_leave_the_cache_cold():
    assert timing.rotations(10 << 20, 50 << 20, 80 << 30) == 20
    assert timing.rotations(1 << 30, 50 << 20, 80 << 30) == 1
    assert timing.rotations(1 << 30, 50 << 30, 8 << 30) == 2  # of the memory no more than a quarter
    assert timing.rotations(0, 50 << 20, 80 << 30) == 64


def test_race_takes_turns_and_medians():
    seen = []
    functions = {name: lambda x, name=name: seen.append((name, x)) for name in ("ours", "eager")}
    medians = timing.race(functions, [(0,), (1,), (2,)], Clock(1.0, 10.0, 2.0, 20.0, 9.0, 90.0), 4.0, Time())
    assert medians == {"ours": 2.0, "eager": 20.0}
    timed = seen[4:]
    assert [name for name, _ in timed[:4]] == ["ours", "eager"] * 2
    assert {x for _, x in timed} == {0, 1, 2} and len(timed) == 16


def test_ceilings():
    found = timing.ceilings(CPU, Clock(0.5), copied=1 << 10, n=8)
    assert found == {"copy": 4096.0, "float32": 2048.0, "float16": 2048.0, "bfloat16": 2048.0}


@pytest.mark.parametrize(
    "case",
    [
        fm_case(4, 3, 8),
        din_attention_case(3, 4, 8, [4], "dice", False, False, False),
        embedding_bag_case([9, 7], [4, 4], [0, 1], ["sum", "sum"], B=5, L=2),
        embedding_fm_case([9, 7], 4, [0, 1], ["none", "none"], B=5),
    ],
    ids=lambda case: case.op,
)
def test_timings_on_the_cpu(monkeypatch, case):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    records = list(timing.timings(CPU, Clock(1e-3), 1 << 10, 1 << 20, 100, [(case, torch.float32)]))
    assert [r["kind"] for r in records] == ["forward", "forward + backward"]
    peers = {"EmbeddingBag"} if case.op == "embedding_bag" else set()
    assert set(records[0]["seconds"]) - {"FBGEMM"} == {"ours", "eager", "compile"} | peers
    assert records[0]["bytes_per_second"] == pytest.approx(4e3 * case.elements)
    assert records[1]["flops_per_second"] == pytest.approx(1e3 * (case.flops + case.backward_flops))


def test_nothing_wrong_is_timed():
    case = fm_case(3, 4, 5)
    wrong = dataclasses.replace(case, function=lambda x: case.function(x) + 1)
    late = [(wrong, torch.float32), (case, torch.float32)]
    clock = Clock(1.0)
    records = list(timing.timings(CPU, clock, 1, 1 << 20, 1.5, late, Time()))
    assert clock.calls == 0 and records[0]["wrong"] and "from eager" in records[0]["error"]
    assert records[1]["error"] == "not measured: the part's 2 s are over" and "wrong" not in records[1]
    assert len(check_report.failures({"findings": [], "timings": records})) == 1


DEVICE = {
    "name": "Card", "kind": "NVIDIA, CUDA 13.0, sm_90", "memory_gib": 80.0, "multiprocessors": 132, "torch": "2.13",
    "rankkernels": "0.1",
}  # fmt: skip


def test_report():
    record = {
        "device": DEVICE,
        "findings": [
            {"part": "correctness", "what": "a", "ok": True, "detail": ""},
            {"part": "capture", "what": "b", "ok": None, "detail": "no kernel"},
            {"part": "capture", "what": "c", "ok": None, "detail": "no kernel"},
        ],
        "ceilings": {"copy": 3e12, "float32": 4e14, "float16": 8e14, "bfloat16": 8e14},
        "timings": [
            {"case": "x", "dtype": "float32", "kind": "forward", "seconds": {"ours": 1e-5, "eager": 3e-5},
             "bytes_per_second": 2.7e12, "flops_per_second": 4e13},
            {"case": "y", "dtype": "float32", "error": "not measured: time"},
        ],
        "reference": ["embedding_bag: built without it"],
        "seconds": 12.5,
    }  # fmt: skip
    page = check_report.markdown(json.loads(json.dumps(record)))
    for line in (
        "Card (NVIDIA, CUDA 13.0, sm_90), 80.0 GiB, 132 multiprocessors; torch 2.13, rankkernels 0.1",
        "Nothing is wrong.",
        "| correctness | 1 | 0 | 0 |",
        "| capture | 0 | 0 | 2 |",
        "- capture: no kernel (2: b, ..)",
        "- embedding_bag: built without it",
        "| x | float32 | forward | 10.0 | 3.00 × |  |  |  | 90 % | 10.0 % |",
        "12.5 s in all.",
    ):
        assert line in page.splitlines(), line
    table = [line for line in page.splitlines() if line.startswith(("| x", "| y", "| case"))]
    assert len({line.count("|") for line in table}) == 1
    record["findings"].append({"part": "models", "what": "DIN", "ok": False, "detail": "error 1"})
    assert "**1 wrong:**" in check_report.markdown(record)


@pytest.mark.parametrize("ok, status", [(True, 0), (False, 1)])
def test_main_writes_the_record_and_says_how_it_went(monkeypatch, tmp_path, capsys, ok, status):
    def run(record, device, parts, first_cases):
        assert parts == ["capture"]
        record["findings"].append(vars(check.Finding("capture", "x", ok, "why")))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "describe", lambda device: DEVICE)
    monkeypatch.setattr(check, "run", run)
    assert check.main(["--out", str(tmp_path / "a/b"), "--part", "capture"]) == status
    record = json.loads((tmp_path / "a/b/gpu_check.json").read_text())
    assert record["findings"][0]["ok"] is ok and record["device"] == DEVICE
    assert (tmp_path / "a/b/gpu_check.md").read_text() in capsys.readouterr().out


def test_main_reports_that_it_ran_out_of_time(monkeypatch, capsys):
    def run(*_):
        check.out_of_time()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "describe", lambda device: DEVICE)
    monkeypatch.setattr(check, "run", run)
    assert check.main([]) == 1
    assert f"stopped after {check.HARD_LIMIT} s" in capsys.readouterr().out
