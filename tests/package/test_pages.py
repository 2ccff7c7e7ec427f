"""The pages: their examples run as they stand, and the API reference has every public name."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Pages made by programs have no examples; the changelog is read, not run.
ELSEWHERE = {"bench/RESULTS.md", "bench/RESULTS-AVX2.md", "bench/gpu/gpu_kernels.md", "CHANGELOG.md"}
#: Examples that need a GPU, by page, so that none joins them unnoticed. They are compiled.
ON_GPU = 'python title="needs a GPU"'
NEED_GPU = {"docs/gpu.md": 2}
OTHER_LANGUAGES = {"sh", "text"}
#: Parts of files, as CONTRIBUTING.md shows them: put together by the tests below.
PART = re.compile(r'(python|cpp) title="([\w/.]+)"')


class Block(NamedTuple):
    info: str
    line: int
    code: str


def blocks_of(text: str) -> Iterator[Block]:
    fences = list(re.finditer(r"^```(.*)$", text, re.MULTILINE))
    assert len(fences) % 2 == 0, "a fence is not closed"
    for opening, closing in zip(fences[::2], fences[1::2]):
        assert not closing[1], f"```{closing[1]} within a block"
        code = text[opening.end() + 1 : closing.start()]
        yield Block(opening[1].strip(), text.count("\n", 0, opening.end()) + 1, code)


BLOCKS = {page.relative_to(ROOT).as_posix(): list(blocks_of(page.read_text())) for page in PAGES}
RUN = [page for page, blocks in BLOCKS.items() if any(b.info == "python" for b in blocks)]


def compiled(page: str, block: Block):
    return compile("\n" * block.line + block.code, page, "exec")  # errors name the page's line


#: Pages whose examples compile for a minute.
COMPILE = {"docs/export.md"}


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow if p in COMPILE else ()) for p in RUN])
@pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning")
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page are one session from top to bottom."""
    monkeypatch.chdir(tmp_path)
    session: dict = {"__name__": "example"}
    before = torch.are_deterministic_algorithms_enabled()
    for block in BLOCKS[page]:
        if block.info == "python":
            exec(compiled(page, block), session)
    torch.use_deterministic_algorithms(before)
    if page == "README.md":
        assert session["p"].shape == (2,) and session["y"].shape == (4096, 1)


def test_the_training_example_learns():
    """docs/examples/train_din.py: users like items of their history's parity, and the best of them have it."""
    assert [path.name for path in (ROOT / "docs/examples").glob("*.py")] == ["train_din.py"]
    program, environment = ROOT / "docs/examples/train_din.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, last = map(float, re.findall(r"0\.\d+", result.stdout))
    best = ast.literal_eval(result.stdout.partition("candidates: ")[2])
    assert last < 0.5 * first and len(best) == 10 and all(item % 2 for item in best), result.stdout


def test_no_example_is_skipped_unnoticed():
    assert {"README.md", "docs/index.md", "docs/from_torch_rechub.md", "docs/large_tables.md"} <= set(RUN)
    need_gpu = {page: [b for b in blocks if b.info == ON_GPU] for page, blocks in BLOCKS.items()}
    assert {page: len(blocks) for page, blocks in need_gpu.items() if blocks} == NEED_GPU
    for page, blocks in need_gpu.items():
        assert all(compiled(page, block) for block in blocks)
    for page, blocks in BLOCKS.items():
        for block in blocks:
            known = {"python", ON_GPU, *OTHER_LANGUAGES}
            is_part = page == "CONTRIBUTING.md" and PART.fullmatch(block.info)
            assert block.info in known or is_part, f"{page}:{block.line}: a block of {block.info!r}"


def parts(language: str) -> list[tuple[str, str]]:
    """The files that CONTRIBUTING.md adds or adds to, and what."""
    found = [(PART.fullmatch(block.info), block.code) for block in BLOCKS["CONTRIBUTING.md"]]
    return [(match[2], code) for match, code in found if match and match[1] == language]


def test_the_op_of_contributing_passes_the_tests_of_ops(tmp_path):
    """Its parts in Python, and then tests/ops/test_ops.py on its cases."""
    assert len(parts("python")) == 5
    program = tmp_path / "contributed.py"
    program.write_text(f"PARTS = {parts('python')!r}\n" + Path(__file__).with_name("contributed.py").read_text())
    chosen = "scaled_sum and not compile and not inductor and not bits"
    command = [sys.executable, program, "-q", "-p", "no:cacheprovider", "tests/ops/test_ops.py", "-k", chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 40


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_kernel_of_contributing_compiles(tmp_path):
    """Its parts in C++, in a copy of csrc."""
    from torch.utils.cpp_extension import include_paths

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert len(parts("cpp")) == 4
    for path, code in parts("cpp"):
        file = tmp_path / path
        text = file.read_text() if file.exists() else ""
        # What is added to a file of namespace rk goes to its end.
        file.write_text(f"{text}namespace rk {{\n{code}}}\n" if path.endswith("/params.h") else text + code)
    includes = [f"-I{path}" for path in (tmp_path / "csrc", sysconfig.get_path("include"), *include_paths())]
    for source in ("cpu/targets/baseline.cpp", "cpu/dense/scaled_sum.cpp"):
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wno-psabi", "-Wno-ignored-attributes", *includes]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", tmp_path / "csrc" / source]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-5000:]


def test_commands_exist():
    """Targets of make, modules of Python and files that the pages' commands name."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = "\n".join(b.code for blocks in BLOCKS.values() for b in blocks if b.info == "sh")
    text = commands + "\n".join(re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S) for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
    assert len(named) > 8 and named <= targets
    modules = set(re.findall(r"python -m ((?:bench|rankkernels)[\w.]*)", text))
    assert len(modules) > 2 and all(importlib.util.find_spec(name) for name in modules)
    files = set(re.findall(r"(?:pytest|python) ((?:bench|tests)/[\w/.]+)", text))
    assert len(files) > 3 and not {name for name in files if not (ROOT / name).exists()}


LINK = re.compile(r"\]\(([^)\s:]+)\)")


def test_links_lead_somewhere():
    """Where the repository is read; `make docs` checks the same of the site, anchors included."""
    links = [(page, link) for page in PAGES for link in LINK.findall(page.read_text()) if not link.startswith("#")]
    assert len(links) > 40
    assert not [(p.name, link) for p, link in links if not (p.parent / link.partition("#")[0]).exists()]


# ------------------------------------------------------------------------------------------------------- API reference

#: Modules whose public names are those of ``__all__``, or, without one, what is defined there without an underscore.
PUBLIC = [
    "rankkernels", "rankkernels.ops", "rankkernels.nn", "rankkernels.optim", "rankkernels.models",
    "rankkernels.adoption", "rankkernels.flops", "rankkernels.testing", "rankkernels.reference",
]  # fmt: skip


def public_names(module: ModuleType) -> dict[str, object]:
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__ if name != "__version__"}
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.getmodule(value) is module and name[0] != "_" and not isinstance(value, ModuleType)
    }


def resolved(path: str) -> list[object]:
    """What a directive ``::: path`` of an API page shows: an object, or a module with its public names."""
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not error.name.startswith("rankkernels"):
            return []  # it is for a library that is not installed
        owner, _, name = path.rpartition(".")
        return [getattr(importlib.import_module(owner), name)]
    return [module, *public_names(module).values()]


def missing_names(pages: str) -> set[str]:
    shown = [thing for path in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE) for thing in resolved(path)]
    return {
        f"{module}.{name}"
        for module in PUBLIC
        for name, value in public_names(importlib.import_module(module)).items()
        if not any(value is thing for thing in shown)
    }


API = "\n".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))


def test_the_api_reference_has_every_public_name():
    assert not missing_names(API), "add ::: directives to docs/api"
    assert missing_names(API.replace("::: rankkernels.nn.layers.FM\n", "")) == {"rankkernels.FM", "rankkernels.nn.FM"}
    assert "rankkernels.reference.dice" in missing_names(API.replace("::: rankkernels.reference\n", ""))


def test_every_public_name_has_a_docstring():
    names = {f"{m}.{n}": v for m in PUBLIC for n, v in public_names(importlib.import_module(m)).items()}
    assert len(names) > 60
    constants = {"rankkernels.cmake_prefix"}  # a string
    assert not [n for n, value in names.items() if n not in constants and not vars(value).get("__doc__", value.__doc__)]


def test_every_page_has_a_title():
    assert not [page.name for page in PAGES if not page.read_text().startswith("# ") or len(page.read_text()) < 80]


def test_the_site_has_every_page():
    """Pages that the navigation leaves out, or that are not there, fail `make docs`, too."""
    nav = re.findall(r":\s+([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    docs = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert set(nav) == docs | ELSEWHERE | {"CONTRIBUTING.md"}
    tree = ast.parse((ROOT / "docs/repository_links.py").read_text())
    (pages,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "PAGES"]
    assert set(ast.literal_eval(pages)) == ELSEWHERE | {"CONTRIBUTING.md"}
