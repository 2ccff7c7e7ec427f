"""What must hold on a GPU, check by check: every op and model against float64 on the CPU, in all dtypes and with the
same bits twice; exact Adam against dense Adam; captures in CUDA graphs; compute-sanitizer."""

from __future__ import annotations

import copy
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import exact_adam, report
from bench.gpu.steps import name_of, on, same_bits, step, worst_error
from rankkernels import optim
from rankkernels.ops._attention_library import attend
from rankkernels.ops._schema import parsed
from rankkernels.ops.attention_params import Flags, Inputs
from rankkernels.ops.din_attention import _has_kernel
from rankkernels.testing import TEST_CASES, TOLERANCE, OpCase

#: A model's layers round one after the other: its results and gradients may be off by so many times TOLERANCE, or by
#: twice what they are off by on the CPU in the same dtype.
MODEL_ROUNDINGS = 8


@dataclass
class Finding:
    """What one check says: ``ok`` is None where it could not be done."""

    part: str
    what: str
    ok: bool | None
    detail: str = ""


Check = tuple[str, Callable[[], tuple[bool | None, str]]]


# Correctness.


def tolerance(case: OpCase, dtype: torch.dtype, expected: Sequence[Tensor], grad_out: Tensor) -> float:
    """TOLERANCE; for attention out of a library's products, which are rounded to 16 bits behind each layer, twice what
    the same is off by on the CPU."""
    if case.op != "din_attention" or dtype not in (torch.float16, torch.bfloat16):
        return TOLERANCE[dtype]
    inputs = on(torch.device("cpu"), case.inputs(dtype))
    if _has_kernel(*parsed(case.arguments(*inputs), Inputs, Flags)):
        return TOLERANCE[dtype]
    composed = step(lambda *t: attend(*parsed(case.arguments(*t), Inputs, Flags))[0], inputs, grad_out)
    return max(TOLERANCE[dtype], 2 * worst_error(composed, expected))


def check_case(case: OpCase, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Forward and backward on the device against the reference in float64 on the CPU; twice, with the same bits."""
    inputs = case.inputs(dtype)
    exact = on(torch.device("cpu"), [t.double() if t.is_floating_point() else t for t in inputs])
    shape = case.reference(*exact).shape
    grad_out = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = step(case.reference, exact, grad_out.double())
    actual, again = (step(case.function, on(device, inputs), grad_out.to(device)) for _ in range(2))
    error = worst_error(actual, expected)
    same, allowed = same_bits(actual, again), tolerance(case, dtype, expected, grad_out)
    detail = f"error {error:.1e} of {allowed:.0e}" + ("" if same else ", other bits the second time")
    return error <= allowed and same, detail


def check_model(make: Callable, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Probabilities and gradients of a training step on the device, in 16 bits under autocast, against the same model
    in float64 on the CPU."""
    torch.manual_seed(0)
    model, x, y = make(B=64, rows=200).ours()

    def trained(device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
        ours = copy.deepcopy(model).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        batch = {k: v.to(device) for k, v in x.items()}
        sixteen = dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(torch.device(device).type, dtype if sixteen else torch.bfloat16, enabled=sixteen):
            p = ours(batch)
        loss = F.binary_cross_entropy(p.double(), y.to(device).double())
        return [p.detach(), *torch.autograd.grad(loss, list(ours.parameters()))]

    expected = trained("cpu", torch.float64)
    error, on_cpu = (worst_error(trained(place, dtype), expected) for place in (device, "cpu"))
    allowed = max(MODEL_ROUNDINGS * TOLERANCE[dtype], 2 * on_cpu)
    return error <= allowed, f"error {error:.1e} of {allowed:.0e}"


def in_graph(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """A CUDA graph's replay of ``run``, and the results that it writes; without a GPU what a replay would do."""
    if not torch.cuda.is_available():
        captured = run()
        return lambda: [c.copy_(again) for c, again in zip(captured, run())], captured
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph.replay, captured


def check_replay(
    run: Callable[[], list[Tensor]], static: Sequence[Tensor], other: Sequence[Tensor]
) -> tuple[bool, str]:
    """``run`` on ``static`` in a CUDA graph, replayed on the values of ``other``, against the same without a graph."""
    replay, captured = in_graph(run)
    with torch.no_grad():
        for t, o in zip(static, other, strict=True):
            t.copy_(o)
    replay()
    same = same_bits(captured, run())
    return same, "" if same else "a replay differs from a run"


def capture_case(case: OpCase, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """A forward and a backward."""
    static, other = (on(device, case.inputs(dtype, seed=seed)) for seed in (0, 1))
    grad_out = torch.ones_like(case.function(*static))
    return check_replay(lambda: step(case.function, static, grad_out), static, other)


def capture_model(make: Callable, device: torch.device) -> tuple[bool, str]:
    """Training steps in a graph, optimizers included, against the same steps of a copy: losses and all parameters. The
    tables' steps are fused, and their learning rate changes between replays."""
    torch.manual_seed(0)
    workload = make(B=64, rows=200)
    (model, *batch), other = workload.ours(), workload.batch(seed=2)
    twin = copy.deepcopy(model)
    (x, y), (other_x, other_y) = (on_device(device, *b) for b in (batch, other))
    static, capturable, steps = [*x.values(), y], device.type == "cuda", []
    trained, expected = (training_step(m.to(device), capturable) for m in (model, twin))
    replay, captured = in_graph(lambda: steps.append(0) or trained.step(x, y))
    for _ in range(len(steps) - capturable):  # the run that is captured is none
        wanted = expected.step(x, y)
    with torch.no_grad():
        for t, o in zip(static, [*other_x.values(), other_y], strict=True):
            t.copy_(o)
    for rate in (0.5, 0.25):
        for tables in (trained.tables, expected.tables):
            set_rate(tables, rate * 1e-2)
        replay()
        wanted = expected.step(other_x, other_y)
    same = same_bits([*captured, *model.parameters()], [*wanted, *twin.parameters()])
    return same, "" if same else "a replay differs from a run"


class Training(NamedTuple):
    step: Callable[[dict, Tensor], list[Tensor]]
    tables: optim.RowOptimizer


def training_step(model: torch.nn.Module, capturable: bool) -> Training:
    """A whole step: its tables' is fused, the other parameters' is torch's Adam."""
    tables = optim.Adam(model.embedding.parameters(), lr=1e-2, capturable=capturable)
    optim.fuse(model, tables)
    embedded = set(model.embedding.parameters())
    others = torch.optim.Adam([p for p in model.parameters() if p not in embedded], lr=1e-3, capturable=capturable)

    def step(x: dict[str, Tensor], y: Tensor) -> list[Tensor]:
        others.zero_grad()
        loss = F.binary_cross_entropy(model(x), y)
        loss.backward()
        others.step()
        return [loss.detach()]

    return Training(step, tables)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """As torch's schedulers do."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def on_device(device: torch.device, x: dict[str, Tensor], y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: t.to(device) for name, t in x.items()}, y.to(device)


def has_kernels(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"rankkernels::{op}", "CUDA")


def correctness(device: torch.device) -> Iterator[Check]:
    """All cases in float32 first: should time run out, every op has had its turn."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for case in TEST_CASES:
            if dtype in case.dtypes:
                yield f"{case.id} {name_of(dtype)}", lambda case=case, dtype=dtype: check_case(case, dtype, device)


#: Each with the embedding op that it calls.
MODELS = {"DeepFM": (report.deepfm, "embedding_fm"), "DIN": (report.din, "embedding_bag")}


def models(device: torch.device) -> Iterator[Check]:
    for name, (make, _) in MODELS.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            yield f"{name} {name_of(dtype)}", lambda make=make, dtype=dtype: check_model(make, dtype, device)
    for op in exact_adam.LOOKUPS:
        yield f"exact Adam, {op}", lambda op=op: exact_adam.check(op, device)
        yield f"exact Adam, {op}, launches", lambda op=op: exact_adam.check_launches(op, device)


def capture(device: torch.device) -> Iterator[Check]:
    """Every op's first test case that is not empty, in the dtypes of training, and training steps of the models."""
    no_kernel = None, "no kernel in this build: the reference is not made for capture"
    for op in sorted({case.op for case in TEST_CASES}):
        case = next(c for c in TEST_CASES if c.op == op and c.elements)
        for dtype in (torch.float32, torch.bfloat16):

            def captured(case=case, dtype=dtype):
                return capture_case(case, dtype, device) if has_kernels(case.op) else no_kernel

            yield f"{case.id} {name_of(dtype)}", captured
    for name, (make, op) in MODELS.items():

        def captured_step(make=make, op=op):
            return capture_model(make, device) if has_kernels(op) else no_kernel

        yield f"{name} training step", captured_step


def sanitizer(command: Sequence[str], seconds: float) -> Iterator[Check]:
    """compute-sanitizer on a command, which runs the correctness part, a case an op."""
    yield "compute-sanitizer memcheck", lambda: sanitize(shutil.which("compute-sanitizer"), command, seconds)


def sanitize(program: str | None, command: Sequence[str], seconds: float) -> tuple[bool | None, str]:
    if program is None:
        return None, "compute-sanitizer is not on PATH"
    try:
        done = subprocess.run(
            [program, "--error-exitcode=9", *command], capture_output=True, text=True, timeout=0.9 * seconds
        )
    except subprocess.TimeoutExpired:
        return None, f"not done in {0.9 * seconds:.0f} s"
    return done.returncode == 0, "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def first_of_each_op(checks: Iterator[Check]) -> Iterator[Check]:
    seen = set()
    for what, check in checks:
        op = what.split("-")[0]
        if what.endswith("float32") and op not in seen:
            seen.add(op)
            yield what, check


def run_checks(part: str, checks: Iterator[Check], seconds: float, now=time.monotonic) -> Iterator[Finding]:
    """The findings of a part; after ``seconds`` the checks that are left are said to be left."""
    end = now() + seconds
    for what, check in checks:
        if now() >= end:
            yield Finding(part, what, None, f"not done: the part's {seconds:.0f} s are over")
            continue
        try:
            yield Finding(part, what, *check())
        except Exception as error:  # whatever it is, the check failed, and the others are still of interest
            yield Finding(part, what, False, f"{type(error).__name__}: {error}".splitlines()[0])
