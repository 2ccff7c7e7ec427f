"""What the compilers make of the GPU kernels, on a machine without a GPU: ``python -m bench.gpu.report``.

Compiles every Triton kernel for the shapes, dtypes and targets of ``bench.gpu.cases``, forward and backward, and,
beside nvcc, the CUDA C++ kernels of csrc/cuda. Prints Markdown: registers, spilled bytes, shared memory and the
occupancy they allow; bytes, flops and launches a call; and the time below which no kernel can do it on some GPUs.
``--out FILE`` saves it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import workloads
from bench.gpu.cases import COMPILED, CUDA_LAUNCHES
from bench.gpu.occupancy import GPUS, MULTIPROCESSORS, occupancy, roofline
from bench.report.tables import markdown
from rankkernels import optim
from rankkernels._version import __version__
from rankkernels.testing import OpCase, din_attention_case, fm_interaction_case

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc/cuda"
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")
CUDA_THREADS = 256  # a block: csrc/cuda/common/device.cuh
#: Bytes a block at most, for the narrowest rows: csrc/cuda/embedding/backward.cu, fm.cu.
CUDA_DYNAMIC_SHARED = {
    "embedding_reduce<double>": 32 << 10, "embedding_reduce": 24 << 10,
    "embedding_linear<double>": 2 << 10, "embedding_linear": 1 << 10,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A case's calls, forward and backward, compiled for one target."""

    case: OpCase
    dtype: torch.dtype
    target: str
    calls: list


def _compile(job: tuple[int, int, str]) -> list:
    from bench.gpu.ahead_of_time import compile_case

    case, dtype, target = job
    return compile_case(COMPILED[case], COMPILED[case].dtypes[dtype], target)


def triton_records(
    targets: Sequence[str] = tuple(MULTIPROCESSORS), cases: Sequence[OpCase] = COMPILED
) -> Iterator[Record]:
    """Triton's kernels of the cases, in all dtypes and for the targets: compiled by as many processes as there are
    cores."""
    from bench.gpu.ahead_of_time import serves

    served = [i for i, case in enumerate(COMPILED) if case in cases and serves(case)]
    jobs = [(i, j, t) for t in targets for i in served for j in range(len(COMPILED[i].dtypes))]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for (i, j, target), calls in zip(jobs, pool.map(_compile, jobs)):
            yield Record(COMPILED[i], COMPILED[i].dtypes[j], target, calls)


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, or the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def ptxas_resources(log: str) -> dict[tuple[str, str], str]:
    """What ``ptxas -v`` says of each (kernel's mangled name, architecture)."""
    entry = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)a?'(.*?)(?=Compiling entry|\Z)", re.DOTALL)
    return {(name, sm): text for name, sm, text in entry.findall(log)}


def _readable(mangled: str) -> str:
    """Kernel<dtype>."""
    length, rest = re.match(r"_ZN2rk4cuda(\d+)(\w+)", mangled).groups()
    dtype = re.match(r"I([fd]|\d+\w+?)E", rest[int(length) :])
    names = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}
    return rest[: int(length)] + (f"<{names[dtype[1]]}>" if dtype else "")


def cuda_resources() -> dict[tuple[str, str], tuple[int, int, int]]:
    """(kernel, target) -> registers, bytes spilled and of stack, bytes of static shared memory."""
    flags = [f"-gencode=arch=compute_{sm[3:]},code={sm}" for sm in CUDA_TARGETS]
    include = Path(torch.__file__).parent / "include"
    found = {}
    for source in sorted(CSRC.rglob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [nvcc(), "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", CSRC.parent,
                 "-isystem", include, *flags, "-Xptxas=-v", "-fatbin", "-o", Path(folder, "out"), source],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        for (name, target), text in ptxas_resources(done.stdout + done.stderr).items():
            registers = int(re.search(r"Used (\d+) registers", text)[1])
            local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores)", text)))
            shared = re.search(r"(\d+) bytes smem", text)
            found[_readable(name), target] = registers, local, int(shared[1]) if shared else 0
    return found


def deepfm(B: int = 4096, rows: int = 100_000) -> workloads.Workload:
    """Criteo's shape."""
    return workloads.deepfm(rows, B)


def din(B: int = 4096, rows: int = 100_000) -> workloads.Workload:
    """A history of items and one of their categories, of the width that fills a GPU."""
    return workloads.din(rows, B, D=64)


MODELS = {"DeepFM": deepfm, "DIN": din}


def model_launches(fused: bool = False, cuda_cpp: bool = True) -> dict[str, list]:
    """The calls of a second training step of DeepFM and of DIN, from the implementations' own code: without an
    optimizer's, or with the tables' Adam ``fused``; lookups in CUDA C++ or in Triton."""
    from bench.gpu.ahead_of_time import compiling

    found = {}
    for name, workload in MODELS.items():
        with torch.device("meta"):
            model, x, y = workload().ours()
        if fused:
            optim.fuse(model, optim.Adam(model.embedding.parameters()))
        for _ in range(2):
            model.zero_grad()
            with compiling("sm_90", only_counting=True, cuda_cpp=cuda_cpp) as calls:
                F.binary_cross_entropy(model(x), y).backward()
        found[name] = calls
    return found


def _cell(target: str, warps: int, registers: int, local: int, shared: int) -> str:
    share = occupancy(target, warps, registers, shared)
    return f"{registers} / {local} / {shared} / {100 * share:.0f} %"


def triton_table(records: Sequence[Record]) -> list[str]:
    """A row for each call, a column for each target and each GPU's roofline."""
    targets = list(dict.fromkeys(r.target for r in records))
    calls: dict[tuple, tuple[OpCase, dict]] = {}
    for r in records:
        for call in r.calls:
            calls.setdefault((r.case.id, r.dtype, call.op), (r.case, {}))[1][r.target] = call
    rows = []
    for (_, dtype, op), (case, by_target) in calls.items():
        call = next(iter(by_target.values()))
        flops = case.backward_flops if op.endswith("_backward") else case.flops
        matrix = any(k.has_dot for k in call.kernels)
        rows.append(
            [
                case.id.removeprefix(f"{case.op}-").replace("-", " "),
                op,
                str(dtype).removeprefix("torch."),
                f"{call.bytes / 1e6:.2f}",
                f"{flops / 1e6:.1f}",
                *(f"{1e6 * roofline(gpu, dtype, call.bytes, flops, matrix):.1f}" for gpu in GPUS),
                f"{len(call.kernels)} + {len(call.launches) - len(call.kernels)}",
                " ".join("×".join(map(str, k.grid)) for k in call.kernels),
                *(
                    " ".join(_cell(t, k.warps, k.registers, k.local, k.shared) for k in by_target[t].kernels)
                    for t in targets
                ),
            ]
        )
    header = [
        "case",
        "call",
        "dtype",
        "MB",
        "Mflop",
        *(f"{gpu.name}, µs" for gpu in GPUS),
        "launches",
        "grid",
        *targets,
    ]
    return markdown(header, rows)


def cuda_table(found: dict[tuple[str, str], tuple[int, int, int]]) -> list[str]:
    rows = []
    for kernel in sorted({k for k, _ in found}):
        row = [kernel]
        for target in CUDA_TARGETS:
            registers, local, shared = found[kernel, target]
            shared += CUDA_DYNAMIC_SHARED.get(kernel, CUDA_DYNAMIC_SHARED.get(kernel.split("<")[0], 0))
            row.append(_cell(target, CUDA_THREADS // 32, registers, local, shared))
        rows.append(row)
    return markdown(["kernel", *CUDA_TARGETS], rows)


#: What was weighed for an H100: 132 multiprocessors, 50 MB of L2, 3350 GB/s, 128 bytes a clock from each L1.
DESIGNS = """\
- **FM** moves its floor: each row is read once, by 128-bit loads, and nothing else has its size. 0.75 flops a byte in
  float32 where the card has 20 of vectors: bandwidth is the bound. A multiprocessor needs some 15 KB under way for
  it; ten programs of 128 threads with two loads each have 40. Programs share nothing, so persistent ones would gain
  nothing.
- **DIN attention, forward**, moves its floor, too: history, target, out and scores, once. 36 units do 18 flops a byte
  of float32 where three tf32 products leave 49, so bandwidth is the bound; [80, 40] do 65, and products are. A
  program is a sample. What it asks of L1 are M's two weights for each block of 32 rows and c's once: with D 64 some
  40 KB for 8 KB of history, six times its bytes where L1 has nine times memory's bandwidth. For 4 KB in 16 bits, and
  for D 16, which is padded to 32, L1 is the bound: M kept in shared memory for all rows of a sample would be the next
  step. A batch of few samples is split over their rows, 64 and more a program, up to 256 programs.
- **DIN attention, backward**, is persistent: 256 programs sum the weights' gradients over their samples in order, so
  that there are 256 partial sums and the bits repeat. It computes z again, 2 D H flops a row, where keeping it is 8 H
  bytes.
- **Registers** come first when it runs on a card: above 128 a thread a multiprocessor holds one program of 256
  threads, and nothing hides its loads. Products over rows are mma.sync's, of 16 or 32 rows, where wgmma's 64 would be
  padding for histories of 50: the matrix rate above is not within their reach. The second weight's gradient is
  wgmma's.
- **DIN attention's own algebra**, weights folded with statistics, sums over programs, gradients of the parameters, is a
  few thousand numbers: one program a layer, or one for eight units, some 10 µs of latency, where as many launches of
  PyTorch's would be of the host's time first.
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

BATCHES = (1, 128, 1024, 8192)


def grids() -> dict[str, dict[int, list]]:
    """The kernels of some calls for batches from one user's to training's, on sm_90."""
    from bench.gpu.ahead_of_time import compile_case

    found: dict[str, dict[int, list]] = {}
    for B in BATCHES:
        for case in (fm_interaction_case(B, 39, 16), din_attention_case(B, 50, 64, [36], batch_norm=False)):
            for call in compile_case(case, torch.float32, "sm_90"):
                found.setdefault(call.op, {})[B] = call.kernels
    return found


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


def report(
    records: Sequence[Record], cuda: dict | None, models: dict[str, list], small: dict[str, dict], versions: str
) -> str:
    """The page; ``cuda`` is None where there is no nvcc."""
    gpus = "; ".join(
        f"{g.name} {g.bandwidth:g} GB/s, {g.float32:g} TFLOP/s float32, {g.float64:g} float64, {g.tf32:g} tf32"
        for g in GPUS
    )
    lines = [
        "# GPU kernels, by their compilers",
        "",
        "Made by `python -m bench.gpu.report --out bench/gpu/gpu_kernels.md` with",
        f"{versions}. Nothing here ran on a GPU: these are the",
        "compilers' numbers, counts and the data sheets' rates, not measurements.",
        "",
        "## Triton",
        "",
        "A cell under a target is registers a thread / bytes a thread spills / bytes of shared memory a block /",
        "occupancy that these allow, for each kernel that the call launches. MB are the call's inputs and outputs,",
        "each once; Mflop what it must compute, a backward's recomputation included. Launches are ours + PyTorch's",
        "around them. A time is the larger of the bytes over the bandwidth and the flops over the rate, with the data",
        f"sheets' dense peaks: {gpus}.",
        "Products of float32 matrices are three of tf32 on NVIDIA, torch's default, and float32 on AMD. The",
        "launchers choose the blocks from the shape; there is no autotuning, so a case is one configuration.",
        "",
        *triton_table(records),
        "",
        "## CUDA C++",
        "",
    ]
    if cuda is None:
        lines.append("Not compiled: no nvcc (CUDA_HOME is not set and nvcc is not on PATH), or no source tree.")
    else:
        lines += ["Cells as above, with the largest shared memory that a launch asks for.", "", *cuda_table(cuda)]
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
            "Programs of each launch, for FM with 39 fields of 16 and DIN attention with 50 rows of 64 and 36 units.",
            "With fewer programs than multiprocessors, 132 on an H100, latency bounds a launch. The first dimension",
            "may reach 2³¹ - 1, others 65535, which the tests assert; CUDA C++ uses the first only.",
            "Offsets into tensors have 64 bits: tested with rows 2³⁰ elements apart, in the interpreter and under the",
            "CPU shim.",
            "",
            *grids_table(small),
            "",
        ]
    )


def versions() -> str:
    import triton

    text = f"rankkernels {__version__}, torch {torch.__version__}, Triton {triton.__version__}"
    if nvcc() and CSRC.exists():
        done = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
        text += f", nvcc {re.search(r'release ([0-9.]+)', done.stdout)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="also save the page to this file")
    out = parser.parse_args().out
    try:
        import triton
    except ImportError:
        parser.exit(1, "bench.gpu.report compiles Triton kernels, and Triton is not installed\n")
    if triton.knobs.runtime.interpret:
        parser.exit(1, "bench.gpu.report compiles: unset TRITON_INTERPRET\n")
    cuda = cuda_resources() if nvcc() and CSRC.exists() else None
    models = model_launches()
    models |= {f"{name}, built without CUDA C++": calls for name, calls in model_launches(cuda_cpp=False).items()}
    page = report(list(triton_records()), cuda, models, grids(), versions())
    print(page)
    if out:
        out.write_text(page)


if __name__ == "__main__":
    main()
