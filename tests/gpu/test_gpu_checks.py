"""bench/gpu/checks.py on the CPU: what a GPU must hold to holds there, and what does not is noticed."""

from __future__ import annotations

import dataclasses
import itertools
import stat

import pytest
import torch

from bench.gpu import checks, exact_adam, report
from rankkernels import optim
from rankkernels.testing import TEST_CASES
from rankkernels.testing import fm_interaction_case as fm_case

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")


def test_the_plan_has_every_op_case_and_dtype():
    plan = [what for what, _ in checks.correctness(CPU)]
    assert len(plan) == len(set(plan)) == sum(len(case.dtypes) for case in TEST_CASES)
    ops = sorted({case.op for case in TEST_CASES})
    captured = [what for what, _ in checks.capture(CPU)]
    assert sorted({what.split("-")[0] for what in captured if "-" in what}) == ops
    assert [what for what in captured if "-" not in what] == ["DeepFM training step", "DIN training step"]
    first = [what for what, _ in checks.first_of_each_op(checks.correctness(CPU))]
    assert sorted(what.split("-")[0] for what in first) == ops


@pytest.mark.parametrize("op", sorted({case.op for case in TEST_CASES}))
def test_correctness_on_the_cpu(op):
    of_op = (c for c in checks.correctness(CPU) if c[0].startswith(f"{op}-"))
    findings = list(checks.run_checks("correctness", of_op, 1e9))
    assert [f.what for f in findings if not f.ok] == []


@pytest.mark.parametrize("make", [report.deepfm, report.din])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_models_on_the_cpu(make, dtype):
    ok, detail = checks.check_model(make, dtype, CPU)
    print(detail)
    assert ok, detail


def exact_findings() -> dict[str, checks.Finding]:
    of_exact = (c for c in checks.models(CPU) if c[0].startswith("exact Adam"))
    return {f.what: f for f in checks.run_checks("models", of_exact, 1e9)}


def test_exact_adam_on_the_cpu():
    findings = exact_findings()
    ops = "embedding_bag", "embedding_fm"
    assert list(findings) == [f"exact Adam, {op}{what}" for op in ops for what in ("", ", launches")]
    assert all(f.ok for f in findings.values()), findings


def test_a_lazy_adam_and_steps_that_launch_more_are_found(monkeypatch):
    monkeypatch.setattr(exact_adam, "exact_adam", optim.Adam)
    assert [f.ok for f in exact_findings().values()] == [False, True, False, True]
    monkeypatch.undo()
    of_step = exact_adam.Training.step

    def now_and_then_more(training, number):
        if number == exact_adam.STEPS - 2:
            training.batches[number] = [i + 0 for i in training.batches[number]]
        return of_step(training, number)

    monkeypatch.setattr(exact_adam.Training, "step", now_and_then_more)
    assert [f.ok for f in exact_findings().values()] == [True, False, True, False]
    monkeypatch.undo()
    monkeypatch.setitem(exact_adam.LAUNCH, "cpu", exact_adam.LAUNCH["cuda"])
    assert [f.ok for f in exact_findings().values()] == [True, None, True, None]


@pytest.mark.parametrize("replays", [True, False], ids=["a graph", "a graph that does nothing"])
def test_capture_on_the_cpu(monkeypatch, replays):
    if not replays:
        monkeypatch.setattr(checks, "in_graph", lambda run: (lambda: None, run()))
    monkeypatch.setattr(checks, "has_kernels", lambda op: True)
    findings = list(checks.run_checks("capture", checks.capture(CPU), 1e9))
    assert [f.what for f in findings if f.ok is not replays] == []
    assert {f.detail for f in findings} == {"" if replays else "a replay differs from a run"}


def test_wrong_results_and_errors_are_found():
    case = fm_case(3, 4, 5)
    scaled = dataclasses.replace(case, function=lambda x: case.function(x) * 1.01)
    ok, detail = checks.check_case(scaled, torch.float32, CPU)
    assert not ok and "error 1.0e-02" in detail
    nan = dataclasses.replace(case, function=lambda x: case.function(x) * float("nan"))
    assert not checks.check_case(nan, torch.float32, CPU)[0]
    noisy = dataclasses.replace(case, function=lambda x: case.function(x) * (1 + 1e-6 * torch.rand(())))
    ok, detail = checks.check_case(noisy, torch.float32, CPU)
    assert not ok and "other bits" in detail

    def raises():
        raise RuntimeError("an illegal memory access\nand more")

    (finding,) = checks.run_checks("capture", iter([("x", raises)]), 9)
    assert finding == checks.Finding("capture", "x", False, "RuntimeError: an illegal memory access")


def test_a_part_stops_when_its_time_is_over():
    four = iter([(str(i), lambda: (True, "")) for i in range(4)])
    findings = list(checks.run_checks("models", four, 2.5, itertools.count(1).__next__))
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
    assert checks.sanitize(str(program), ["a", "part"], 0.9) == expected
    assert checks.sanitize(None, [], 1) == (None, "compute-sanitizer is not on PATH")
