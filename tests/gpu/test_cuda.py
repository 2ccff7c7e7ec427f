"""The kernels in CUDA C++ without a GPU: nvcc compiles them, and they run on the CPU under the shim in cuda_shim/.

The shim tests compile csrc/cuda with g++ and sanitizers, common/launch.h replaced by the shim's, and run the ops in a
process of their own; see cuda_shim/shim.h for what they find. Planted faults show that they do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.gpu.build import cuda_home
from bench.gpu.cases import CUDA_LAUNCHES

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "cuda_shim"
TORCH = Path(torch.__file__).parent
DTYPES = ("float", "double", "__half", "__nv_bfloat16")
#: Every kernel of csrc/cuda, and whether it is a template over the dtypes.
KERNELS = {
    name: bool(template)
    for header in sorted((ROOT / "csrc/cuda").rglob("*.cuh"))
    for template, name in re.findall(
        r"(template <class T>\n)?__global__ void __launch_bounds__\(.+\)\s+(\w+)\(", header.read_text()
    )
}
HOME = cuda_home()
CUDA_HOME = Path(HOME) if HOME and Path(HOME, "bin/nvcc").exists() else None
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no nvcc: CUDA_HOME is not set and nvcc is not on PATH")


def run(*command: str | Path, check: bool = True, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, both streams."""
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0 if check else result.returncode != 0, result.stdout[-8000:]
    return result.stdout


@needs_nvcc
def test_kernels_need_no_torch_and_load_16_bytes(tmp_path):
    """The kernels' headers alone, as PTX: rows are loaded and stored by 128 bits."""
    source = tmp_path / "kernels.cu"
    source.write_text(
        "".join(f'#include "cuda/embedding/{part}.cuh"\n' for part in ("backward", "optimizer", "fm"))
        + "namespace rk::cuda {\n"
        + "".join(
            f"template __global__ void embedding_bag<{t}>(const Batch<Bags>, Report*);\n"
            f"template __global__ void embedding_reduce<{t}>(const Batch<TableGrad>, const Lookups,"
            f" Carries<accumulate_t<{t}>>, int);\n"
            f"template __global__ void embedding_update<{t}>(const Batch<Update>, const Gradients, Optimizer, int,"
            f" const Now*);\n"
            f"template __global__ void embedding_fm<{t}>(const Batch<Bags>, const FmTerms, Report*);\n"
            f"template __global__ void embedding_fm_backward<{t}>(const FmGrads);\n"
            for t in DTYPES
        )
        + "}\n"
    )
    ptx = run(CUDA_HOME / "bin/nvcc", "-std=c++17", "-arch=sm_80", "-ptx", "-I", ROOT / "csrc", source, "-o", "-")
    entries = [text for text in ptx.split(".visible .entry ")[1:] if text.startswith("_ZN2rk4cuda")]
    names = r"_ZN2rk4cuda\d+embedding_(?:bag|reduce|update|fm|fm_backward)I"
    wide = [re.match(names, text) is not None for text in entries]
    assert sum(wide) == 5 * len(DTYPES)
    for text in (text for text, w in zip(entries, wide) if w):
        name = text[:60]
        assert re.search(r"ld(\.global)?(\.nc)?\.(v4\.[bfu]32|v2\.[bfu]64)", text), name
        assert re.search(r"st\.global\.(v4\.[bfu]32|v2\.[bfu]64)", text), name


def test_one_header_spells_cudas_own_names():
    """HIP compiles the rest as it stands: what the two spell differently is in device.cuh."""
    own = re.compile(r"\bcuda[A-Z]\w*|\bcuda_\w+\.h|\b__nv_\w+|\b__half\w*|\b__\w+_sync\b|\bcu(?:b|blas|sparse)\b")
    sources = [path for path in (ROOT / "csrc/cuda").rglob("*.*") if path.name != "device.cuh"]
    assert own.search((ROOT / "csrc/cuda/common/device.cuh").read_text()) and len(sources) > 10
    assert {path.name: found for path in sources if (found := own.findall(path.read_text()))} == {}


def sanitizer(name: str) -> str | None:
    """The path of g++'s run-time library, or None where g++ does not have it."""
    if shutil.which("g++") is None:
        return None
    path = run("g++", f"-print-file-name={name}").strip()
    return path if os.path.isabs(path) else None


needs_sanitizers = pytest.mark.skipif(sanitizer("libasan.so") is None, reason="no g++ with the address sanitizer")
FLAGS = ("-x", "c++", "-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
         "-DTORCH_TARGET_VERSION=0x020a000000000000")  # fmt: skip
SANITIZE = ("-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def compile_shim(source: Path, optimize: str) -> Path:
    """One .cu of a copy of csrc, for the CPU."""
    target = source.with_suffix(".o")
    run("g++", *FLAGS, optimize, *SANITIZE, "-I", SHIM, "-I", source.parents[2], "-isystem", TORCH / "include",
        "-c", source, "-o", target)  # fmt: skip
    return target


def link_shim(objects: Sequence[Path], target: Path) -> Path:
    run("g++", "-shared", *SANITIZE, *objects, "-o", target, "-L", TORCH / "lib", "-ltorch", "-ltorch_cpu", "-lc10")
    return target


def copy_sources(target: Path) -> Path:
    shutil.copytree(ROOT / "csrc", target)
    shutil.copy(SHIM / "launch.h", target / "cuda/common/launch.h")
    return target / "cuda"


@pytest.fixture(scope="module")
def run_shim() -> Iterator[Callable[..., str]]:
    """A job of cuda_shim/run.py -> what it prints; RANKKERNELS_REFERENCE leaves the CPU's own kernels out."""
    preload = f"{sanitizer('libasan.so')} {sanitizer('libstdc++.so')}"
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "RANKKERNELS_REFERENCE": "1"}
    with subprocess.Popen(
        [sys.executable, SHIM / "run.py"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **options},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip

        def job(library: Path, what: str, check: bool = True, **environment: str) -> str:
            print(json.dumps((str(library), what, environment)), file=process.stdin, flush=True)
            status, printed = json.loads(process.stdout.readline())
            assert status == 0 if check else status != 0, printed[-8000:]
            return printed

        yield job
        process.stdin.close()


UNITS = tuple(sorted(path.relative_to(ROOT / "csrc/cuda").as_posix() for path in ROOT.glob("csrc/cuda/**/*.cu")))
# What is wrong: in which file, of which unit, the text and what it becomes, what to run, and what must be said.
FAULTS = {
    "no barrier": (
        "embedding/backward.cuh", "embedding/backward.cu", "__syncthreads();", "",
        "accuracy", r"(table or state|output or gradient|result) \d+ is off by",
    ),
    "shared memory too small": (
        "embedding/backward.cu", "embedding/backward.cu", "* sizeof(Staged<A>);", "* sizeof(Staged<A>) - 1;",
        "accuracy", r"ERROR: AddressSanitizer[\s\S]*rk::cuda::embedding_reduce<",
    ),
    "shuffle among too many lanes": (
        "common/device.cuh", "embedding/backward.cu", "return ones << (threadIdx.x & (kLanes - 1) & ~(lanes() - 1));",
        "return ones ? ~0u : 0;", "accuracy", "shim: deadlock",
    ),
    "misaligned vector load": (
        "embedding/lookup.cu", "embedding/lookup.cu", "&& rows_aligned(w) && out_aligned", "&& out_aligned",
        "accuracy", "runtime error: .* misaligned address",
    ),
    "tail not masked": (
        "embedding/lookup.cuh", "embedding/lookup.cu", "if (b >= bags.B) return;", "",
        "accuracy", r"ERROR: AddressSanitizer[\s\S]*rk::cuda::embedding_bag<",
    ),
    "id not checked": (
        "embedding/lookup.cuh", "embedding/lookup.cu", "return id >= 0 && id < R;", "return id >= 0 || id < R;",
        "bad_ids", r"ERROR: AddressSanitizer[\s\S]*rk::cuda::embedding_bag<",
    ),
    "samples not masked": (
        "embedding/fm.cuh", "embedding/fm.cu", "if (group.sample() >= batch.items[0].B) return;", "",
        "accuracy", r"ERROR: AddressSanitizer[\s\S]*rk::cuda::embedding_fm<",
    ),
    "groups joined twice": (
        "embedding/fm.cuh", "embedding/fm.cu", "if (counts) fm +=", "if (counts || offset) fm +=",
        "accuracy", "not close|is off by",
    ),
    "bits of the row before": (
        "embedding/optimizer.cuh", "embedding/optimizer.cu", "uint32_t(now.count), row, d);",
        "uint32_t(now.count), row - 1, d);", "accuracy", "not rounded as the reference does",
    ),
    "row caught up by each of its lookups": (
        "embedding/catch_up.cuh", "embedding/catch_up.cu", "rows.current(last)) == last;", "last) == last;",
        "accuracy", "is off by",
    ),
    "last step read after it is written": (
        "embedding/idle_steps.cuh", "embedding/bag_exact.cu",
        "group.sum(group.lane() == 0 ? last_steps[row] : 0)", "last_steps[row] + 0 * group.lane()",
        "accuracy", "is off by",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """Each unit compiled for the shim."""
    sources = copy_sources(tmp_path_factory.mktemp("shim") / "csrc")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(UNITS, pool.map(lambda unit: compile_shim(sources / unit, "-O0"), UNITS)))


@pytest.fixture(scope="module")
def shim(objects, tmp_path_factory) -> Path:
    """The library for the shim."""
    return link_shim(list(objects.values()), tmp_path_factory.mktemp("sound") / "shim.so")


@needs_sanitizers
@pytest.mark.parametrize(
    "orders, grid",
    [
        pytest.param(("forward", "1"), {"SHIM_SOME": "1"}, id="some"),
        pytest.param(("forward", "reverse"), {}, id="all", marks=pytest.mark.slow),
    ],
)
def test_kernels_under_the_shim(shim, run_shim, orders, grid):
    """Every kernel in each order: right in all dtypes, without a word of the sanitizers, and with the same bits."""
    outs = [run_shim(shim, "accuracy", SHIM_ORDER=order, SHIM_SAY_LAUNCHES="1", **grid) for order in orders]
    assert len({re.search(r"digest (\w+)", out)[1] for out in outs}) == 1
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").rglob("*.*"))
    assert len(KERNELS) == len(re.findall("^__global__", sources, re.M)) == sources.count("__global__") > 10
    for order, out in zip(orders, outs):
        assert set(re.findall(r"launch of rk::cuda::(\w+)", out)) == set(KERNELS), order


@needs_sanitizers
def test_launches_under_the_shim(shim, run_shim):
    """All tables go with one launch of each kernel: what ``bench.gpu.report`` counts."""
    out = run_shim(shim, "launches", SHIM_SAY_LAUNCHES="1")
    launched = [re.findall(r"launch of rk::cuda::(\w+)", part) for part in out.split("done\n")[:-1]]
    ways = ["embedding_bag"], ["embedding_bag_backward"], ["embedding_bag_update"]
    ways = *ways, ["embedding_fm"], ["embedding_fm_backward", "embedding_bag_backward"]
    counted = [[name for op in ops for name in CUDA_LAUNCHES[op] if name not in ("sort", "cumsum")] for ops in ways]
    assert [sorted(names) for names in launched] == [sorted(names) for names in counted]


@needs_sanitizers
def test_bad_arguments_under_the_shim(shim, run_shim):
    assert "bad inputs refused" in run_shim(shim, "bad_inputs")
    assert "arguments refused" in run_shim(shim, "bad_arguments")


def slow_but(mode: str, *modes: str) -> list:
    return [mode, *(pytest.param(other, marks=pytest.mark.slow) for other in modes)]


@needs_sanitizers
@pytest.mark.parametrize("mode", slow_but("warn", "ignore", "fatal", "never"))
def test_bad_ids_under_the_shim(shim, run_shim, mode):
    """Never followed; said as RANKKERNELS_CHECK_IDS asks."""
    message = "embedding_bag: indices[0, 1] = 5 is out of range for a table with 5 rows"
    out = run_shim(shim, "bad_ids", check=mode in ("ignore", "warn"), RANKKERNELS_CHECK_IDS=mode)
    assert ("ids not followed" in out) == (mode in ("ignore", "warn"))
    assert (message in out) == (mode in ("warn", "fatal"))
    assert ("offsets[0] = 3 is before 1" in out) == (mode == "warn")
    assert ("RANKKERNELS_CHECK_IDS must be ignore, warn or fatal, got never" in out) == (mode == "never")


@needs_sanitizers
@pytest.mark.parametrize("mode", slow_but("warn", "ignore", "fatal"))
def test_bad_ids_of_the_fm_under_the_shim(shim, run_shim, mode):
    message = "embedding_bag: item[1] = 5 is out of range for a table with 5 rows"
    out = run_shim(shim, "bad_ids_fm", check=mode != "fatal", RANKKERNELS_CHECK_IDS=mode)
    assert ("ids not followed" in out) == (mode != "fatal")
    assert (message in out) == (mode != "ignore")


@needs_sanitizers
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(objects, run_shim, tmp_path, fault):
    file, unit, text, replacement, what, expected = FAULTS[fault]
    sources = copy_sources(tmp_path / "csrc")
    original = (sources / file).read_text()
    assert original.count(text) == 1, f"{fault}: {text!r} must be in {file} once"
    (sources / file).write_text(original.replace(text, replacement))
    # Only the unit with the fault is compiled again, and fast rather than to be fast. It comes first: of an inline
    # function that several units have, the linker keeps the first one's.
    others = [o for other, o in objects.items() if other != unit]
    library = link_shim([compile_shim(sources / unit, "-O0"), *others], tmp_path / "shim.so")
    assert re.search(expected, run_shim(library, what, check=False, SHIM_SOME="1"))
