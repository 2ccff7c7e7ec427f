"""What the compilers make of the GPU kernels, on a machine without a GPU: ``python -m bench.gpu.report``.

Compiles every Triton kernel for the shapes, dtypes and targets of ``bench.gpu.cases``, forward and backward, and,
beside nvcc, the CUDA C++ kernels of csrc/cuda. Prints Markdown: registers, spilled bytes, shared memory and the
occupancy they allow; bytes, flops, instructions and launches a call; the time below which the device cannot do it, and
about what the host needs. ``--out FILE`` saves it, ``--triton DIR`` tries another Triton, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from bench import workloads
from bench.gpu.cases import COMPILED
from bench.gpu.occupancy import MULTIPROCESSORS
from bench.gpu.page import BATCHES, CUDA_TARGETS, Compiled, report
from bench.gpu.sass import Code, Counts, parse
from bench.gpu.steps import name_of
from rankkernels import optim
from rankkernels._version import __version__
from rankkernels.testing import OpCase, din_attention_case, fm_interaction_case

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc/cuda"


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

    place = {case.id: i for i, case in enumerate(COMPILED)}
    served = [(place[case.id], dtype) for case in cases if serves(case) for dtype in case.dtypes]
    jobs = [(i, COMPILED[i].dtypes.index(dtype), t) for t in targets for i, dtype in served]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for (i, j, target), calls in zip(jobs, pool.map(_compile, jobs)):
            yield Record(COMPILED[i], COMPILED[i].dtypes[j], target, calls)


def _count(job: tuple[int, int]) -> list[Counts]:
    from bench.gpu.trips import count

    case, dtype = job
    return count(COMPILED[case], COMPILED[case].dtypes[dtype])


def loop_counts(cases: Sequence[OpCase] = COMPILED) -> dict[tuple[str, torch.dtype], list[Counts]]:
    """How often the loops of the cases' launches run, in all dtypes: counted in Triton's interpreter by two processes,
    each of which has a case's tensors. Not of the embeddings': see ``count``."""
    from bench.gpu.ahead_of_time import serves

    place = {case.id: i for i, case in enumerate(COMPILED)}
    counted = [case for case in cases if serves(case) and not case.op.startswith("embedding")]
    jobs = [(place[c.id], COMPILED[place[c.id]].dtypes.index(dtype)) for c in counted for dtype in c.dtypes]
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), ProcessPoolExecutor(2, get_context("spawn")) as pool:
        counts = list(pool.map(_count, jobs))
    return {(COMPILED[i].id, COMPILED[i].dtypes[j]): c for (i, j), c in zip(jobs, counts)}


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


def cuda_code(fatbin: Path, target: str = "sm_90") -> dict[str, Code]:
    """The machine code of each kernel, by its mangled name."""
    import triton

    said = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-sass", "-arch", target, fatbin],
        capture_output=True,
        text=True,
        check=True,
    )
    _, *functions = re.split(r"Function : (\w+)\n", said.stdout)
    return {name: parse(text) for name, text in zip(functions[::2], functions[1::2])}


def cuda_resources() -> dict[tuple[str, str], tuple[int, int, int, Code | None]]:
    """(kernel, target) -> registers, bytes spilled and of stack, bytes of static shared memory; on sm_90 its code."""
    flags = [f"-gencode=arch=compute_{sm[3:]},code={sm}" for sm in CUDA_TARGETS]
    include = Path(torch.__file__).parent / "include"
    found = {}
    for source in sorted(CSRC.rglob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            fatbin = Path(folder, "out")
            done = subprocess.run(
                [nvcc(), "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-I", CSRC.parent,
                 "-isystem", include, *flags, "-Xptxas=-v", "-fatbin", "-o", fatbin, source],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            code = cuda_code(fatbin)
        for (name, target), text in ptxas_resources(done.stdout + done.stderr).items():
            registers = int(re.search(r"Used (\d+) registers", text)[1])
            local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores)", text)))
            shared = re.search(r"(\d+) bytes smem", text)
            found[_readable(name), target] = registers, local, int(shared[1]) if shared else 0, code.get(name)
    return found


def deepfm(B: int = 4096, rows: int = 100_000) -> workloads.Workload:
    """Criteo's shape."""
    return workloads.deepfm(rows, B)


def din(B: int = 4096, rows: int = 100_000) -> workloads.Workload:
    """A history of items and one of their categories, of the width that fills a GPU."""
    return workloads.din(rows, B, D=64)


MODELS = {"DeepFM": deepfm, "DIN": din}


def model_launches(fused: bool = False, cuda_cpp: bool = True, exact: bool = False) -> dict[str, list]:
    """The calls of a second training step of DeepFM and of DIN, from the implementations' own code: without an
    optimizer's, or with the tables' Adam ``fused``, which may be ``exact``; lookups in CUDA C++ or in Triton."""
    from bench.gpu.ahead_of_time import compiling

    found = {}
    for name, workload in MODELS.items():
        with torch.device("meta"):
            model, x, y = workload().ours()
        if fused:
            optim.fuse(model, optim.Adam(model.embedding.parameters(), exact=exact))
        for _ in range(2):
            model.zero_grad()
            with compiling("sm_90", only_counting=True, cuda_cpp=cuda_cpp) as calls:
                F.binary_cross_entropy(model(x), y).backward()
        found[name] = calls
    return found


def grids() -> dict[str, dict[int, list]]:
    """The kernels of some calls for batches from one user's to training's, on sm_90."""
    from bench.gpu.ahead_of_time import compile_case

    found: dict[str, dict[int, list]] = {}
    for B in BATCHES:
        for case in (fm_interaction_case(B, 39, 16), din_attention_case(B, 50, 64, [36], batch_norm=False)):
            for call in compile_case(case, torch.float32, "sm_90"):
                found.setdefault(call.op, {})[B] = call.kernels
    return found


def versions() -> str:
    import triton

    text = f"rankkernels {__version__}, torch {torch.__version__}, Triton {triton.__version__}"
    if nvcc() and CSRC.exists():
        done = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
        text += f", nvcc {re.search(r'release ([0-9.]+)', done.stdout)[1]}"
    return text


def compiled_by_this_triton(records: Sequence[Record]) -> Compiled:
    """What of the records is NVIDIA's, in one line."""
    import triton

    found = [
        (f"{k.name} of {r.case.id} {name_of(r.dtype)} {r.target}", k)
        for r in records
        if r.target in CUDA_TARGETS
        for call in r.calls
        for k in call.kernels
    ]
    cases = len({(r.case.id, r.dtype) for r in records})
    spills = {what: k.local for what, k in found if k.local or k.spills}
    return Compiled(triton.__version__, cases, len(found), spills, max(k.registers for _, k in found))


def compiled_by(folder: Path) -> Compiled:
    """The same of the Triton that was installed into ``folder``, by a process that finds it there first."""
    paths = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.report", "--summary"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Compiled(**json.loads(done.stdout))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.report", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="also save the page to this file")
    parser.add_argument(
        "--triton", type=Path, action="append", default=[], metavar="DIR",
        help="where `pip install --target DIR --no-deps triton==VERSION` has put another Triton, to be tried, too",
    )  # fmt: skip
    parser.add_argument(
        "--summary", action="store_true", help="only what --triton shows, of the Triton at hand, as JSON"
    )
    arguments = parser.parse_args(argv)
    try:
        import triton
    except ImportError:
        parser.exit(1, "bench.gpu.report compiles Triton kernels, and Triton is not installed\n")
    if triton.knobs.runtime.interpret:
        parser.exit(1, "bench.gpu.report compiles: unset TRITON_INTERPRET\n")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.summary:
        print(json.dumps(compiled_by_this_triton(list(triton_records(CUDA_TARGETS)))._asdict()))
        return
    records = list(triton_records())
    compiled = [compiled_by_this_triton(records), *map(compiled_by, arguments.triton)] if arguments.triton else []
    compiled.sort(key=lambda c: [int(n) for n in c.triton.split(".")])
    cuda = cuda_resources() if nvcc() and CSRC.exists() else None
    models = model_launches()
    models |= {f"{name}, built without CUDA C++": calls for name, calls in model_launches(cuda_cpp=False).items()}
    page = report(records, loop_counts(), cuda, models, grids(), versions(), compiled)
    print(page)
    if arguments.out:
        arguments.out.write_text(page)


if __name__ == "__main__":
    main()
