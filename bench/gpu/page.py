"""The page of bench.gpu.report, from what it found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from bench.gpu import host
from bench.gpu.cases import CUDA_LAUNCHES
from bench.gpu.occupancy import GPUS, MULTIPROCESSORS, lower_bounds, occupancy
from bench.gpu.sass import Code, Counts, issued
from bench.report.tables import markdown
from rankkernels.testing import OpCase

CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
CUDA_THREADS = 256  # a block: csrc/cuda/common/device.cuh
#: Bytes a block at most, for the narrowest rows: csrc/cuda/embedding/backward.cu, fm.cu.
CUDA_DYNAMIC_SHARED = {
    "embedding_reduce<double>": 32 << 10, "embedding_reduce": 24 << 10,
    "embedding_linear<double>": 2 << 10, "embedding_linear": 1 << 10,
}  # fmt: skip
#: Batches for which the grids are shown.
BATCHES = (1, 128, 1024, 8192)
#: The releases of torch whose CUDA builds bring a Triton along.
TORCHES = {"3.6.0": "2.11", "3.7.1": "2.12, 2.13", "3.8.0": "2.14"}


class Compiled(NamedTuple):
    """What a Triton makes of all cases for NVIDIA's targets: how many cases it serves, and their kernels; bytes that a
    thread spills, by name, case and target of each kernel that does; the most registers of one."""

    triton: str
    cases: int
    kernels: int
    spills: dict[str, int]
    registers: int


def _cell(target: str, warps: int, registers: int, local: int, shared: int) -> str:
    share = occupancy(target, warps, registers, shared)
    return f"{registers} / {local} / {shared} / {100 * share:.0f} %"


def warp_instructions(kernels: Sequence, counts: Sequence[Counts]) -> list[float]:
    """What a warp of each kernel issues in one program."""
    return [issued(k.code, c) if k.code else 0.0 for k, c in zip(kernels, counts, strict=True)]


def floors(case: OpCase, dtype: torch.dtype, by_target: dict, counts: Sequence[Counts]) -> list[str]:
    """For each GPU the largest of a call's lower bounds, in microseconds, and what it is of."""
    cells = []
    for gpu in GPUS:
        call = by_target.get(gpu.target) or next(iter(by_target.values()))
        flops = case.backward_flops if call.op.endswith("_backward") else case.flops
        total = sum(
            n * k.warps * math.prod(k.grid) for k, n in zip(call.kernels, warp_instructions(call.kernels, counts))
        )
        matrix = any(k.has_dot for k in call.kernels)
        bounds = lower_bounds(gpu, dtype, call.bytes, flops, matrix, total if gpu.target in by_target else 0.0)
        what = max(bounds, key=lambda bound: bounds[bound])
        cells.append(f"{1e6 * bounds[what]:.1f} {what}")
    return cells


#: Of the columns of ``triton_table`` the last so many depend on the compiler.
COMPILED_COLUMNS = 1 + len(GPUS) + len(MULTIPROCESSORS)


def triton_table(records: Sequence, counts: Mapping[tuple[str, torch.dtype], Sequence[Counts]]) -> list[str]:
    """A row for each call, a column for each target and each GPU's lower bound. ``counts``: of a case in a dtype, the
    loops of its launches, forward and backward, in order; without them loops count once."""
    targets = list(dict.fromkeys(r.target for r in records))
    calls: dict[tuple, tuple[OpCase, dict]] = {}
    for r in records:
        for call in r.calls:
            calls.setdefault((r.case.id, r.dtype, call.op), (r.case, {}))[1][r.target] = call
    rows, launched = [], Counter()
    for (name, dtype, op), (case, by_target) in calls.items():
        call = by_target.get("sm_90") or next(iter(by_target.values()))
        first = launched[name, dtype]
        launched[name, dtype] += len(call.kernels)
        own = (
            counts[name, dtype][first : launched[name, dtype]] if (name, dtype) in counts else [{}] * len(call.kernels)
        )
        flops = case.flops if op == case.op else case.backward_flops
        rows.append(
            [
                case.id.removeprefix(f"{case.op}-").replace("-", " "),
                op,
                str(dtype).removeprefix("torch."),
                f"{call.bytes / 1e6:.2f}",
                f"{flops / 1e6:.1f}",
                f"{len(call.kernels)} + {len(call.launches) - len(call.kernels)}",
                f"{host.microseconds(call):.0f}: {' '.join(str(k.arguments) for k in call.kernels)} + {call.ops}",
                " ".join("×".join(map(str, k.grid)) for k in call.kernels),
                " ".join(f"{n:.0f}" for n in warp_instructions(call.kernels, own)),
                *floors(case, dtype, by_target, own),
                *(
                    " ".join(_cell(t, k.warps, k.registers, k.local, k.shared) for k in by_target[t].kernels)
                    for t in targets
                ),
            ]
        )
    header = ["case", "call", "dtype", "MB", "Mflop", "launches", "host, µs: arguments + ops", "grid",
              "issued, sm_90", *(f"{gpu.name}, µs" for gpu in GPUS), *targets]  # fmt: skip
    return markdown(header, rows)


def cuda_table(found: Mapping[tuple[str, str], tuple[int, int, int, Code]]) -> list[str]:
    rows = []
    for kernel in sorted({k for k, _ in found}):
        row = [kernel, str(found[kernel, "sm_90"][-1])]
        for target in CUDA_TARGETS:
            registers, local, shared, _ = found[kernel, target]
            shared += CUDA_DYNAMIC_SHARED.get(kernel, CUDA_DYNAMIC_SHARED.get(kernel.split("<")[0], 0))
            row.append(_cell(target, CUDA_THREADS // 32, registers, local, shared))
        rows.append(row)
    return markdown(["kernel", "instructions, sm_90", *CUDA_TARGETS], rows)


def versions_table(versions: Sequence[Compiled]) -> list[str]:
    """A row for each Triton that compiled all kernels."""
    rows = []
    for v in versions:
        names = Counter(what.split()[0] for what in v.spills)
        which = ", ".join(f"{count} {name}" for name, count in names.most_common())
        spilled = f"{which}: {max(v.spills.values())} bytes at most" if v.spills else "none"
        rows.append([v.triton, TORCHES.get(v.triton, ""), str(v.cases), str(v.kernels), str(v.registers), spilled])
    return markdown(["Triton", "torch", "cases", "kernels", "registers at most", "that spill"], rows)


#: What was weighed for an H100: 132 multiprocessors, 50 MB of L2, 3350 GB/s, 128 bytes a clock from each L1.
DESIGNS = """\
- **FM** moves its floor: each row is read once, by 128-bit loads, and nothing else has its size. 0.75 flops a byte in
  float32 where the card has 20 of vectors: bandwidth is the bound, but in 16 bits, where rows of 16 are half as long
  and take as many instructions. A multiprocessor needs some 15 KB under way for it; ten programs of 128 threads with
  two loads each have 40. Programs share nothing, so persistent ones would gain nothing.
- **DIN attention, forward**, moves its floor, too: history, target, out and scores, once. 36 units do 18 flops a byte
  of float32 where three tf32 products leave 49, [80, 40] do 65. Neither is the bound: instructions are, eight times
  the bytes' time and more, and products are few of them. Others bring operands into mma.sync's layouts, form M for
  each block of rows and fill widths up to powers of two. A program is a sample. What it asks of L1 are M's two
  weights for each block of 32 rows and c's once: with D 64 some 40 KB for 8 KB of history, six times its bytes where
  L1 has nine times memory's bandwidth. For 4 KB in 16 bits, and for D 16, which is padded to 32, L1 bounds it next: M
  kept in shared memory for all rows of a sample would be the next step. A batch of few samples is split over their
  rows, 64 and more a program, up to 256 programs.
- **DIN attention, backward**, is persistent: 256 programs sum the weights' gradients over their samples in order, so
  that there are 256 partial sums and the bits repeat. It computes z again, 2 D H flops a row, where keeping it is 8 H
  bytes.
- **Registers** come first when it runs on a card: above 128 a thread a multiprocessor holds one program of 256
  threads, and nothing hides its loads. Products over rows are mma.sync's, of 16 or 32 rows, where wgmma's 64 would be
  padding for histories of 50: the matrix rate above is not within their reach. The second weight's gradient is
  wgmma's.
- **DIN attention's own algebra**, weights folded with statistics, sums over programs, gradients of the parameters, is
  a few thousand numbers: one program a layer, or one for eight units, some 10 µs of latency, where as many launches
  of PyTorch's would be of the host's time first.
- **norm_activation** in training reads its input twice, and its backward both of its inputs twice; the second time
  from L2 up to some 30 MB, and 4096 x 256 in float32 are 4.
- **The embedding kernels** read each row looked up once, by 128-bit loads where it is aligned. Memory gives sectors
  of 32 bytes: rows of 10 floats, 40 bytes, cost up to 96. One launch for all tables; the sort of the backward is
  PyTorch's.
- **Those in Triton** take a launch for all tables of one dtype, width and alignment; addresses go there as arguments of
  another. A program holds whole rows, four loads of 16 bytes a thread. In the backward a lookup is 12 bytes, key and
  address of its gradient, and 12 more sorted. Sorted lookups are added up in tiles of 32, and a row whose sum is
  complete is finished there, stepped on or stored: sums that cross tiles alone are kept, two a tile. A row of many
  tiles is joined by one program, 64 of its tiles at a time if it is 16 wide: 60,000 lookups of it, 30 rounds."""


def grids_table(found: dict[str, dict[int, list]]) -> list[str]:
    rows = [
        [op, *(" ".join("×".join(map(str, k.grid)) for k in by_batch[B]) for B in BATCHES)]
        for op, by_batch in found.items()
    ]
    return markdown(["call", *(f"B = {B}" for B in BATCHES)], rows)


def launch_counts(calls: list) -> tuple[int, int, int, int]:
    """Triton's launches, CUDA C++'s, PyTorch's inside our ops and PyTorch's in the rest of a model's calls."""
    ours = [c for c in calls if c.op]
    kernels = sum(len(c.kernels) for c in ours)
    cpp = sum(len(c.launches) for c in ours if c.op in CUDA_LAUNCHES and not c.kernels)
    around = sum(len(c.launches) for c in ours) - kernels - cpp
    return kernels, cpp, around, sum(len(c.launches) for c in calls if not c.op)


def launches_table(models: dict[str, list]) -> list[str]:
    rows = []
    for model, calls in models.items():
        ops = [c.op for c in calls if c.op]
        counted = [f"{ops.count(op)} × {op}" if ops.count(op) > 1 else op for op in dict.fromkeys(ops)]
        rows.append([model, *map(str, launch_counts(calls)), ", ".join(counted)])
    return markdown(
        ["model", "Triton", "CUDA C++", "PyTorch's inside our ops", "PyTorch's in the rest of the model", "our calls"],
        rows,
    )


_TRITON = """\
A cell under a target is registers a thread / bytes a thread spills / bytes of shared memory a block / occupancy that
these allow, for each kernel that the call launches. MB are the call's inputs and outputs, each once; Mflop what it must
compute, a backward's recomputation included. Launches are ours + PyTorch's around them.

A time is a lower bound, the largest of three, marked with its letter: b, the bytes over the bandwidth; f, the flops
over the rate; i, the warp instructions over what the multiprocessors can issue, four a clock each. With the data
sheets' dense peaks: {gpus}.
Products of float32 matrices are three of tf32 on NVIDIA, torch's default, and float32 on AMD, whose instructions are
not counted. The launchers choose the blocks from the shape; there is no autotuning, so a case is one configuration.

Issued are the instructions that a warp of each kernel issues in one program, by the machine code's loops: each loop's
times how often it runs, counted in Triton's interpreter, and straight code once. Loops of the embeddings' kernels are
not counted there, and are in it once.

The host's time is {anchors}
An op's autograd, which is the same for all, is not in it. Arguments are each launch's, ops PyTorch's, views among
them."""


def report(
    records: Sequence,
    counts: Mapping[tuple[str, torch.dtype], Sequence[Counts]],
    cuda: Mapping | None,
    models: dict[str, list],
    small: dict[str, dict],
    versions: str,
    compiled: Sequence[Compiled] = (),
) -> str:
    """The page; ``cuda`` is None where there is no nvcc, ``compiled`` is of other Tritons, if they were tried."""
    gpus = "; ".join(
        f"{g.name} {g.bandwidth:g} GB/s, {g.float32:g} TFLOP/s float32, {g.float64:g} float64, {g.tf32:g} tf32"
        for g in GPUS
    )
    lines = [
        "# GPU kernels, by their compilers",
        "",
        "Made by `make gpu-report` with",
        f"{versions}. Nothing here ran on a GPU: these are the",
        "compilers' numbers, counts and the data sheets' rates, not measurements.",
        "",
        "## Triton",
        "",
        _TRITON.format(gpus=gpus, anchors=host.ANCHORS),
        "",
        *triton_table(records, counts),
        "",
    ]
    if compiled:
        lines += ["## The Tritons of torch's releases", "", _VERSIONS, "", *versions_table(compiled), ""]
    lines += ["## CUDA C++", ""]
    if cuda is None:
        lines.append("Not compiled: no nvcc (CUDA_HOME is not set and nvcc is not on PATH), or no source tree.")
    else:
        lines += [_CUDA, "", *cuda_table(cuda)]
    return "\n".join(
        [
            *lines,
            "",
            "## Designs, on paper, for Hopper",
            "",
            DESIGNS,
            "",
            "## Launches of a training step",
            "",
            "Forward, loss and backward, without the optimizer. PyTorch's are calls of ops, at least a launch each.",
            "",
            *launches_table(models),
            "",
            "## Grids",
            "",
            _GRIDS,
            "",
            *grids_table(small),
            "",
        ]
    )


_VERSIONS = """\
Every case of the table above that a Triton serves, in all its dtypes, compiled for sm_80, sm_90 and sm_100."""

_CUDA = """\
Cells as above, with the largest shared memory that a launch asks for. Instructions are those outside of loops and then
each loop's own, in the machine code's order."""

_GRIDS = """\
Programs of each launch, for FM with 39 fields of 16 and DIN attention with 50 rows of 64 and 36 units. With fewer
programs than multiprocessors, 132 on an H100, latency bounds a launch. The first dimension may reach 2³¹ - 1, others
65535, which the tests assert; CUDA C++ uses the first only. Offsets into tensors have 64 bits: tested with rows 2³⁰
elements apart, in the interpreter and under the CPU shim."""
