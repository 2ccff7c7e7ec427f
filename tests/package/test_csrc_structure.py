"""csrc's rules: what kind of header a file is shows in its name, and includes go down.

A kernel's header is compiled once for each instruction set. An inline function of the STL or of torch that came in with
it would be compiled for AVX-512, and the linker could pick that copy for the whole library. test_package.py finds it in
the machine code; these tests say which include brought it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

#: What a folder may include beside itself: folders, and single headers of another family.
BELOW = {
    "": {},
    "stable": {},
    "embedding": {"stable"},
    "cpu": set(),
    "cpu/simd": {"cpu"},
    "cpu/runtime": {"cpu/simd", "cpu", "stable"},
    "cpu/dense": {"cpu/runtime", "cpu/simd", "cpu", "stable"},
    "cpu/embedding": {"cpu/dense", "cpu/runtime", "cpu/simd", "cpu", "stable", "embedding"},
    "cpu/din_attention": {"cpu/dense", "cpu/runtime", "cpu/simd", "cpu", "stable"},
    "cpu/recurrent": {"cpu/runtime", "cpu/simd", "cpu", "stable"},
    "cpu/target_attention": {"cpu/runtime", "cpu/simd", "cpu", "stable"},
    "cpu/deepfm": {
        "cpu/dense", "cpu/runtime", "cpu/simd", "cpu", "stable", "embedding",
        "cpu/embedding/params.h", "cpu/embedding/features.h",
    },
    "cpu/interaction": {"cpu/runtime", "cpu/simd", "cpu", "stable"},
    "cpu/serve": {"cpu/dense", "cpu/runtime", "cpu/simd", "cpu", "stable", "embedding"},
    "cpu/targets": {
        "cpu/serve", "cpu/deepfm", "cpu/din_attention", "cpu/embedding", "cpu/recurrent", "cpu/target_attention",
        "cpu/interaction", "cpu/dense", "cpu/runtime", "cpu/simd", "cpu",
    },
    "cuda/common": {"stable"},
    "cuda/embedding": {"cuda/common", "stable", "embedding"},
}  # fmt: skip
#: The headers of compilers that declare types, or functions which are always inlined.
COMPILERS = {"stdint.h", "cstdint", "immintrin.h"}
DEVICES = {"cuda_bf16.h", "cuda_fp16.h", "hip/hip_bf16.h", "hip/hip_fp16.h", "hip/hip_runtime.h"}


def kind(path: str) -> str:
    """Of a file of csrc, by its name alone."""
    name = path.rsplit("/", 1)[-1]
    if path.endswith((".cpp", ".cu")):
        return "target" if path.startswith("cpu/targets/") else "source"
    if name.endswith("_kernel.h") or path == "cpu/targets/all_kernels.h":
        return "kernel"
    if name in ("params.h", "tuning.h", "idle_steps.h") or path.startswith("cpu/simd/"):
        return "plain"
    return "device" if name.endswith(".cuh") else "host"


#: What each kind may include: kinds, and headers that are not csrc's (None: any).
INCLUDES = {
    "plain": ({"plain"}, COMPILERS),
    "kernel": ({"plain", "kernel"}, COMPILERS),
    "target": ({"kernel"}, COMPILERS),
    "device": ({"plain", "device"}, COMPILERS | DEVICES),
    "host": ({"plain", "host", "device"}, None),
    "source": ({"plain", "host", "device"}, None),
}


def planted_in(csrc: Path, file: str, line: str) -> Path:
    """A copy of csrc with a line at the head of a file, which may be new."""
    shutil.copytree(CSRC, csrc)
    planted = csrc / file
    planted.write_text(f"{line}\n{planted.read_text() if planted.exists() else ''}")
    return csrc


def violations(csrc: Path) -> list[str]:
    files = {path.relative_to(csrc).as_posix(): path.read_text() for path in sorted(csrc.rglob("*.*"))}
    included = {path: re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', text, re.M) for path, text in files.items()}
    compiled_per_isa = {path for path, text in files.items() if re.search(r"^namespace RK_ISA {", text, re.M)}
    found = []
    for path, includes in included.items():
        folder = path.rpartition("/")[0]
        own, others = INCLUDES[kind(path)]
        if folder not in BELOW:
            found.append(f"{path}: no such folder in BELOW")
            continue
        per_isa = path in compiled_per_isa or kind(path) in ("kernel", "target")
        if per_isa and kind(path) not in ("kernel", "target") and folder != "cpu/simd":
            found.append(f"{path}: is compiled for each instruction set, but not named so")
        for quote, header in includes:
            if quote == "<":
                if others is not None and header not in others:
                    found.append(f"{path}: a {kind(path)} header includes <{header}>")
            elif header not in files:
                found.append(f"{path}: {header} is no path from csrc")
            else:
                if kind(header) not in own and not (kind(path) == "target" and header == "cpu/runtime/isa.h"):
                    found.append(f"{path}: a {kind(path)} file includes {header}, a {kind(header)} one")
                if header in compiled_per_isa and not per_isa:
                    found.append(f"{path}: {header} is compiled for each instruction set")
                if header.rpartition("/")[0] not in {folder, *BELOW[folder]} and header not in BELOW[folder]:
                    found.append(f"{path}: includes go down, {header} does not lie below")
        if path == "cpu/runtime/isa.h" and any(header not in COMPILERS for _, header in includes):
            found.append(f"{path}: targets include it before their kernels")
    return found + [f"{' -> '.join(circle)}: a circle" for circle in circles(included)]


def circles(included: dict[str, list[tuple[str, str]]]) -> list[list[str]]:
    done: set[str] = set()
    found = []

    def visit(path: str, trail: list[str]) -> None:
        if path in trail:
            found.append([*trail[trail.index(path) :], path])
        elif path not in done and path in included:
            for _, header in included[path]:
                visit(header, [*trail, path])
            done.add(path)

    for path in included:
        visit(path, [])
    return found


def test_kinds_and_includes():
    assert violations(CSRC) == []


def test_folders_form_layers():
    """BELOW has no circle: a family in it twice would let two include each other."""
    assert (
        circles({folder: [("", name.removesuffix("/params.h")) for name in below] for folder, below in BELOW.items()})
        == []
    )


@pytest.mark.parametrize(
    "file, line, expected",
    [
        ("cpu/dense/linear_kernel.h", "#include <vector>", "a kernel header includes <vector>"),
        ("cpu/embedding/params.h", "#include <torch/csrc/stable/tensor.h>", "a plain header includes"),
        ("cpu/simd/operand.h", "#include <algorithm>", "a plain header includes <algorithm>"),
        ("cpu/simd/vec.h", '#include "cpu/runtime/arena.h"', "includes cpu/runtime/arena.h, a host one"),
        ("cpu/dense/linear_kernel.h", '#include "cpu/runtime/isa.h"', "includes cpu/runtime/isa.h, a host one"),
        ("cpu/embedding/lookup.cpp", '#include "cpu/embedding/fm_kernel.h"', "fm_kernel.h, a kernel one"),
        ("cpu/embedding/lookup.cpp", '#include "cpu/simd/vec.h"', "vec.h is compiled for each instruction set"),
        ("cpu/runtime/arena.h", "namespace RK_ISA {}", "is compiled for each instruction set, but not named so"),
        ("cpu/runtime/isa.h", "#include <string>", "targets include it before their kernels"),
        ("cpu/targets/avx2.cpp", "#include <cmath>", "a target header includes <cmath>"),
        ("cuda/embedding/lookup.cuh", "#include <vector>", "a device header includes <vector>"),
        ("cpu/simd/operand.h", '#include "cpu/dense/params.h"', "cpu/dense/params.h does not lie below"),
        ("cpu/dense/params.h", '#include "cpu/embedding/params.h"', "cpu/embedding/params.h does not lie below"),
        ("cpu/din_attention/params.h", '#include "embedding/params.h"', "embedding/params.h does not lie below"),
        ("cpu/deepfm/deepfm.cpp", '#include "cpu/embedding/lookup.h"', "cpu/embedding/lookup.h does not lie below"),
        ("cuda/common/launch.h", '#include "cuda/embedding/features.h"', "embedding/features.h does not lie below"),
        ("stable/check.h", '#include "embedding/features.h"', "embedding/features.h does not lie below"),
        ("cpu/simd/storage.h", '#include "cpu/simd/vec.h"', "a circle"),
        ("cpu/dense/params.h", '#include "params.h"', "params.h is no path from csrc"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(tmp_path, file, line, expected):
    found = violations(planted_in(tmp_path / "csrc", file, line))
    assert any(expected in text for text in found), found


MAX_FILE, MAX_FUNCTION = 400, 60
#: Longer functions, and why.
LONG = {
    ("cpu/din_attention/forward_kernel.h", "din_forward"): "one pass over a sample's rows; its steps are functions",
    ("cpu/embedding/segment_sum_wide_kernel.h", "reduce_wide"): "one loop, whose row stays in registers",
}


def functions(text: str) -> list[tuple[str, int]]:
    """Names and lengths in lines of the functions and member functions of a file that clang-format has been through."""
    found, lines = [], text.splitlines()
    starts = {"": True, "  ": False}  # where one may begin: at the margin, and in a class two columns in
    line = 0
    while line < len(lines):
        text = lines[line]
        if re.match(r"(template <.*> )?(struct|class) ", text) and text.endswith("{"):
            starts["  "] = True
        elif text == "};":
            starts["  "] = False
        indent = re.match(" *", text)[0]
        if (
            starts.get(indent)
            and re.match(r" *[\w~:]", text)
            and not re.match(r" *(namespace|struct|class|enum|using|union)\b", text)
        ):
            head, end = "", line
            while end < len(lines) and not re.search(r"[;{}]( *//.*)?$", lines[end]):
                head, end = head + lines[end].strip() + " ", end + 1
            if end < len(lines) and lines[end].endswith("{"):
                head += lines[end].strip()
                while end + 1 < len(lines) and lines[end] not in (indent + "}", indent + "};"):
                    end += 1
                if named := re.search(
                    r"([\w~:]+)\(",
                    re.sub(r"__attribute__\(\(\w+\)\)|__launch_bounds__\([^)]*\)|template <[^>]*> ", "", head),
                ):
                    found.append((named[1], end - line + 1))
            line = end
        line += 1
    return found


def test_files_and_functions_are_short():
    files = {path.relative_to(CSRC).as_posix(): path.read_text() for path in sorted(CSRC.rglob("*.*"))}
    assert {path: n for path, text in files.items() if (n := len(text.splitlines())) > MAX_FILE} == {}
    long = {(path, name): n for path, text in files.items() for name, n in functions(text) if n > MAX_FUNCTION}
    assert long.keys() == LONG.keys(), {
        key: n for key, n in long.items() if key not in LONG
    } or LONG.keys() - long.keys()


def test_functions_are_measured():
    text = """namespace rk {
int f(int a,
      int b) {
  return a;
}
struct S {
  S() : x(1) {
    x = 2;
  }
  int x;
};
}
"""
    assert functions(text) == [("f", 4), ("S", 3)]


def kernels_declared_wrongly(csrc: Path) -> list[str]:
    """A kernel is declared once, by RK_KERNEL beside its parameters, and defined in one header."""
    declared, found = {}, []
    for path in sorted(csrc.rglob("*.*")):
        for name in re.findall(
            r"^RK_KERNEL\((?:template <class T>\s+)?[\w*: <>]+?\s\*?(\w+)\(", path.read_text(), re.M
        ):
            if path.name != "params.h" or name in declared:
                found.append(f"{name}: declared in {path.name}, {'again' if name in declared else 'not in params.h'}")
            declared[name] = path
    for name in declared:
        definition = rf"^(?!  |.*RK_INSTANTIATE)[\w<>* ]*\b{name}\([^;]*?\) {{"
        headers = [path.name for path in csrc.rglob("cpu/**/*.h") if re.search(definition, path.read_text(), re.M)]
        if len(headers) != 1 or not headers[0].endswith("_kernel.h"):
            found.append(f"{name}: defined in {headers}")
    return found if declared else ["no kernel is declared"]


def test_kernels_are_declared_once():
    assert kernels_declared_wrongly(CSRC) == []


@pytest.mark.parametrize(
    "file, line, expected",
    [
        ("cpu/dense/params.h", "RK_KERNEL(void zero_lines(char* p, int64_t n))", "declared in params.h, again"),
        ("cpu/dense/linear.h", "RK_KERNEL(void add(Add))", "add: declared in linear.h, not in params.h"),
        ("cpu/dense/params.h", "RK_KERNEL(template <class T> void add(Add<T>))", "add: defined in []"),
        ("cpu/dense/add.h", "void zero_lines(char* p, int64_t bytes) {}", "zero_lines: defined in ["),
    ],
)  # fmt: skip
def test_a_planted_declaration_is_found(tmp_path, file, line, expected):
    found = kernels_declared_wrongly(planted_in(tmp_path / "csrc", file, line))
    assert any(expected in text for text in found), found
