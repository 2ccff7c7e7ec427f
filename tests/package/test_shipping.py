"""The library loads where its wheel says that it does: the symbols that it asks glibc, libstdc++ and torch for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rankkernels import __version__

ROOT = Path(__file__).parents[2]
EXTENSION = ROOT / "rankkernels/librankkernels.so"
needs_extension = pytest.mark.skipif(not EXTENSION.exists(), reason="built without the C++ extension")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils' readelf is not installed")

#: The newest versions that manylinux_2_28 has: those of AlmaLinux 8.
NEWEST = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "7.0.0"}


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def not_in_older_systems(library: Path) -> list[str]:
    """Symbols that ``library`` wants of another, in a version that is too new or in none, but for torch's C functions.

    Without a version are those of libstdc++ that the linker found in torch's libraries: not every torch has them.
    """
    command = ["readelf", "--dyn-syms", "--wide", library]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for bind, symbol in re.findall(r" (\w+) +\w+ +UND (\S+)", listing):
        name, _, version = symbol.partition("@")
        family, _, of = version.rpartition("_")
        if version:
            if family not in NEWEST or numbers(of) > numbers(NEWEST[family]):
                found.append(symbol)
        elif bind != "WEAK" and not re.match(r"(aoti_)?torch_", name):
            found.append(symbol)
    return found


def library_of(folder: Path, code: str) -> Path:
    (folder / "code.cpp").write_text(code)
    library = folder / "code.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", folder / "code.cpp", "-o", library], check=True)
    return library


@needs_extension
@needs_readelf
def test_older_systems_have_every_symbol():
    """csrc/glibc.cpp sees to it. Nothing of Python and no C++ function of torch is among them either."""
    assert not_in_older_systems(EXTENSION) == []


@needs_compiler
@needs_readelf
@pytest.mark.parametrize(
    "code, symbol",
    [
        ("#include <math.h>\ndouble f(double x) { return exp(x) + 1; }", r"exp@GLIBC_2\.29"),
        ("namespace at { void ones(); }\nvoid f() { at::ones(); }", "_ZN2at4onesEv"),
        ('extern "C" void PyErr_Print();\nvoid f() { PyErr_Print(); }', "PyErr_Print"),
    ],
)
def test_a_planted_symbol_is_found(tmp_path, code, symbol):
    (found,) = not_in_older_systems(library_of(tmp_path, code))
    if found.startswith("exp") and not re.fullmatch(symbol, found):
        pytest.skip("this system's exp is of an older glibc")
    assert re.fullmatch(symbol, found)


def audit(*arguments: object) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("torch-abi-audit"), "--check", "torch", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@needs_extension
def test_torchs_stable_abi_is_all_that_is_used():
    pytest.importorskip("torch_abi_audit")
    result = audit("--json", EXTENSION)
    assert result.returncode == 0, result.stdout + result.stderr
    (library,) = json.loads(result.stdout)["bundled_libs"]
    assert library["torch"]["min_torch_version"] == "2.10.0" and library["torch"]["stable_shim_count"] > 50


@needs_compiler
def test_an_unstable_symbol_fails_the_audit(tmp_path):
    pytest.importorskip("torch_abi_audit")
    assert audit(library_of(tmp_path, "namespace at { void ones(); }\nvoid f() { at::ones(); }")).returncode == 1


def test_the_release_runs_what_there_is():
    """Its commands are targets of the Makefile, and its jobs wait for each other as they should."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for line in re.findall(r"make ([a-z -]+)", commands) for target in line.split()}
    assert {"wheel", "sdist", "smoke", "test"} <= named <= targets
    assert set(jobs["publish"]["needs"]) == jobs.keys() - {"publish"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f'Repository = "{citation["repository-code"]}"' in (ROOT / "pyproject.toml").read_text()
