"""The package as it is built, installed and imported. Each test that needs a fresh process starts its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rankkernels.ops import _library

ROOT = Path(__file__).parents[2]
EXTENSION = next(iter(ROOT.glob("rankkernels/librankkernels.so")), None)
needs_extension = pytest.mark.skipif(EXTENSION is None, reason="built without the C++ extension")


def run(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """What a fresh interpreter prints, both streams."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@needs_extension
def test_the_extension_is_what_the_tests_test():
    assert _library.no_extension is None


@needs_extension
def test_the_library_defines_the_ops_without_the_package():
    """Every op has its schema and its kernels where torch alone is imported."""
    names = [schema.partition("(")[0] for schema in _library.schemas]
    out = run(
        "import sys, torch\n"
        f"torch.ops.load_library({str(EXTENSION)!r})\n"
        f"print(all(hasattr(torch.ops.rankkernels, name) for name in {names}), 'rankkernels' in sys.modules)\n"
        "print(torch.ops.rankkernels.fm_interaction(torch.ones(1, 2, 3), True).item())"
    )
    assert out.split() == ["True", "False", "3.0"]


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils' nm is not installed")
def test_the_library_wants_nothing_of_python():
    symbols = subprocess.run(["nm", "-D", EXTENSION], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_library_def" in symbols and not re.search(r" U _?Py", symbols)


@needs_extension
def test_a_library_of_other_sources_is_refused():
    with pytest.raises(ImportError, match=r"built from other sources.*fm_interaction\(Tensor x, bool reduce_sum\)"):
        _library.define("fm_interaction(Tensor x, int reduce_sum) -> Tensor")
    _library.schemas.pop()


def functions_by_instruction(library: Path, *patterns: str) -> list[set[str]]:
    """Mangled names of the functions of ``library`` with an instruction that each of ``patterns`` is found in."""
    found, function, any_of = [set() for _ in patterns], "", re.compile("|".join(patterns)).search
    command = ["objdump", "--disassemble", "--no-show-raw-insn", library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        for line in listing.stdout:
            if line.endswith(">:\n"):
                function = re.match(r"[0-9a-f]+ <(.+)>:$", line)[1]
            elif any_of(line):
                for names, pattern in zip(found, patterns):
                    if function not in names and re.search(pattern, line):
                        names.add(function)
    assert listing.returncode == 0
    return found


@needs_extension
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils' objdump is not installed")
def test_wide_instructions_stay_in_their_variant():
    """An inline function of a header compiled for AVX-512 and merged by the linker would crash on other processors."""
    wide = r"%zmm|\{%k[1-7]\}|%[xy]mm(1[6-9]|2\d|3[01])\b"
    avx512, avx2, bf16 = functions_by_instruction(EXTENSION, wide, "%ymm", "vdpbf16ps|vcvtne2?ps2bf16")
    if not (avx512 or avx2):
        pytest.skip("not an x86-64 build")
    assert all("2rk11avx512_bf16" in name for name in bf16), bf16
    assert avx512 and all(re.search("2rk(6avx512|11avx512_bf16)", name) for name in avx512), avx512
    assert avx2 and all(re.search("2rk(4avx2|6avx512|11avx512_bf16)", name) for name in avx2), avx2


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """The op tests again with lesser kernels. Inductor is left out: it is torch's own code that would be tested."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_ops.py",
         "-k", "(equals_reference or non_contiguous or fm_) and not inductor"],
        cwd=ROOT, env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    isa = run("import torch, rankkernels; print(torch.ops.rankkernels.cpu_isa())", ATEN_CPU_CAPABILITY=capability)
    assert int(isa) <= {"default": 0, "avx2": 1}[capability]


@needs_extension
def test_avx512_is_without_bfloat16():
    isa = run("import torch, rankkernels; print(torch.ops.rankkernels.cpu_isa())", ATEN_CPU_CAPABILITY="avx512")
    assert int(isa) <= _library.CPU_ISAS.index("avx512")


def test_import_is_light():
    """Importing the package imports torch and little else: Triton comes with the first GPU kernel."""
    code = "import sys, torch; before = set(sys.modules); import rankkernels; print(*set(sys.modules) - before)"
    modules = {name.split(".")[0] for name in run(code).split()}
    assert not modules & {"triton", "sklearn", "pandas", "scipy", "matplotlib", "torch_rechub", "tqdm"}


def test_import_without_triton():
    out = run(
        "import sys; sys.modules['triton'] = None; import torch, rankkernels, rankkernels.info as info;"
        "print(rankkernels.fm_interaction(torch.ones(1, 2, 3))); print(info.backend('fm_interaction', 'cuda'))"
    )
    assert "3." in out and "PyTorch reference" in out


def test_reference_instead_of_kernels():
    """RANKKERNELS_REFERENCE=1: says so once, with the reason, and gives the same numbers."""
    out = run(
        "import torch, rankkernels as rk\n"
        "x = torch.arange(24.).view(2, 3, 4).requires_grad_()\n"
        "for _ in range(2): rk.fm_interaction(x).sum().backward()\n"
        "print(x.grad.sum().item())\n"
        "from rankkernels.info import main; main()",
        RANKKERNELS_REFERENCE="1",
    )
    assert out.count("ReferenceWarning") == 1 and "RANKKERNELS_REFERENCE is set" in out
    assert "1104.0" in out and "PyTorch reference" in out


def test_info():
    out = run("from rankkernels.info import main; main()")
    assert "fm_interaction" in out and ("C++" in out or EXTENSION is None) and "torch" in out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git tracks, so that building leaves nothing in the working tree."""
    target = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def pip(*arguments, **environment):
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def sdist(source):
    """The sdist of a tree without git, unpacked."""
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", source / "dist", source]
    environment = {**os.environ, "RANKKERNELS_SKIP_EXT": "1"}  # what it has does not depend on what is built
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, source / "unpacked", filter="data")
    (unpacked,) = (source / "unpacked").iterdir()
    return unpacked


def test_the_sdist_has_what_builds(source, sdist):
    def files(root: Path, folder: str) -> set[str]:
        return {p.relative_to(root).as_posix() for p in (root / folder).rglob("*") if p.is_file()}

    for folder in ("csrc", "rankkernels"):
        assert files(sdist, folder) == files(source, folder)
    assert files(sdist, "tests") == {"tests/package/smoke.py"}
    assert not (sdist / "build").exists() and (sdist / "SECURITY.md").exists()


@needs_extension
@pytest.mark.slow
def test_wheel(sdist, tmp_path):
    """What `make wheel` made of this library, or one that is built here, which takes minutes."""
    made = [p for p in ROOT.glob("dist/*.whl") if p.stat().st_mtime >= EXTENSION.stat().st_mtime]
    if not made:
        pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, sdist)
        made = tmp_path.glob("*.whl")
    (wheel,) = made
    assert re.search("-cp310-abi3-(many)?linux_", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    packages = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("rankkernels/**/*.py")}
    assert packages == {str(Path(n).parent) for n in names if n.endswith(".py")}
    assert {"rankkernels/share/cmake/rankkernels/rankkernelsConfig.cmake", "rankkernels/py.typed"} <= set(names)
    assert "rankkernels/librankkernels.so" in names and any(n.endswith("LICENSE") for n in names)
    assert all(n.startswith(("rankkernels/", "rankkernels-")) for n in names)
    # What serves tests, benchmarks and reports stays in their folders; public test support is one file.
    tools = re.compile(r"tests?/|testing/|bench|/report|ahead_of_time|occupancy|mutation")
    assert "rankkernels/testing.py" in names and not [n for n in names if tools.search(n)]
    pip("install", "--no-deps", "--target", tmp_path / "site", wheel)
    smoke = run(f"import runpy; runpy.run_path({str(ROOT / 'tests/package/smoke.py')!r}, run_name='__main__')",
                cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))  # fmt: skip
    assert "works beside torch" in smoke


def test_install_without_a_compiler(sdist, tmp_path):
    pip("install", "--no-build-isolation", "--no-deps", "--target", tmp_path / "site", sdist,
        RANKKERNELS_SKIP_EXT="1", CC="/bin/false", CXX="/bin/false")  # fmt: skip
    out = run(
        "import torch, rankkernels as rk; print(rk.__file__)\n"
        "for _ in range(2): print(rk.fm_interaction(torch.ones(1, 2, 3)).item())",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert str(tmp_path) in out and out.count("3.0") == 2
    assert out.count("ReferenceWarning") == 1 and "installed without its C++ extension" in out
