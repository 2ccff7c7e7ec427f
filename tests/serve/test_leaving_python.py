"""Frozen models in onnxruntime, in AOTInductor's packages, and from C++ without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import deepfm, din, request
from torch.export import Dim, export

import rankkernels as rk
from rankkernels import serve
from rankkernels.ops import _library

EXAMPLE = Path(__file__).parents[2] / "docs/examples/cpp"
SLOW = pytest.mark.slow
needs_library = pytest.mark.skipif(bool(_library.no_extension), reason="built without the C++ extension")
MODELS = {
    "din": lambda: din(mask_padding=True, use_softmax=True),
    "din_plain": din,
    "deepfm": deepfm,
    "deepfm_dice": lambda: deepfm(activation="dice"),
    "row": lambda: deepfm(oov="row"),
    "hash": lambda: deepfm(oov="hash"),
}


def dynamic(given: dict, of_user: bool) -> dict:
    """The candidates, and the lengths of lists; one user stays one."""
    lists = {"items", "shops", "liked", "tags"}
    first = 0 if of_user else 1  # the candidates come first
    return {
        n: {i: Dim.DYNAMIC for i in range(t.dim()) if t.size(i) > 1 and (i < first or n in lists)}
        for n, t in given.items()
    }


def module_of(name: str, tables: str):
    frozen = serve.freeze(MODELS[name](), tables=tables)
    user, candidates = request(MODELS[name](), 5)
    user = {n: torch.as_tensor(v) for n, v in user.items()}
    return frozen, serve.RankModule(frozen), user, candidates


@pytest.mark.parametrize("name", MODELS)
def test_the_module_is_rank(name):
    frozen, module, user, candidates = module_of(name, "int8")
    assert torch.equal(module(user, candidates), frozen.rank(user, candidates))
    with pytest.raises(KeyError, match="candidates must have one"):
        module({**user, **candidates}, {})


@pytest.mark.parametrize(
    "name, tables",
    [
        ("din", "int8"),
        *(pytest.param(n, "float32", marks=SLOW) for n in MODELS),
        *(pytest.param("deepfm", t, marks=SLOW) for t in ("bfloat16", "int8", "int4")),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_onnx(name, tables, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    frozen, module, user, candidates = module_of(name, tables)
    path = str(tmp_path / "rank.onnx")
    torch.onnx.export(
        module, (), path, kwargs={"user": user, "candidates": candidates}, dynamo=True, verbose=False,
        dynamic_shapes={"user": dynamic(user, True), "candidates": dynamic(candidates, False)},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for C, L in ((5, 6), (100, 9), (1, 1)):
        user, candidates = request(MODELS[name](), C, L)
        values = [torch.as_tensor(v).numpy() for v in (*user.values(), *candidates.values())]
        given = {i.name: value for i, value in zip(session.get_inputs(), values, strict=True)}
        scores = torch.as_tensor(session.run(None, given)[0])
        torch.testing.assert_close(scores, frozen.rank(user, candidates), rtol=1e-6, atol=1e-6)


@needs_library
def test_program():
    """One op, dynamic in the candidates and the histories' lengths."""
    frozen, module, user, candidates = module_of("din", "int8")
    program = export(module, (user, candidates), dynamic_shapes=(dynamic(user, True), dynamic(candidates, False)))
    called = [node.target for node in program.graph.nodes if "rankkernels" in str(node.target)]
    assert called == [torch.ops.rankkernels.rank.default]
    for C, L in ((100, 9), (2, 1)):
        user, candidates = request(MODELS["din"](), C, L)
        user = {n: torch.as_tensor(v) for n, v in user.items()}
        assert torch.equal(program.module()(user, candidates), frozen.rank(user, candidates))


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True)


def build(folder: Path) -> Path:
    """The example's program, as docs/export.md builds it."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("cmake or a compiler is not installed")
    prefix = f"{torch.utils.cmake_prefix_path};{rk.cmake_prefix}"
    for command in (["-S", EXAMPLE, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}"], ["--build", folder]):
        result = run(cmake, *command)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "rank"


@pytest.mark.slow
@needs_library
def test_a_package_in_processes_of_torch_alone_and_of_cpp(tmp_path):
    item = rk.SparseFeature("item", 50, 8, padding_idx=0)
    history = rk.SequenceFeature("clicks", 50, 8, pooling="concat", shared_with="item", padding_idx=0)
    model = rk.DIN([rk.SparseFeature("user", 9, 8)], [history], [item], {"dims": [6]}, {"dims": [5]}, mask_padding=True)
    frozen = serve.freeze(model, tables="int8")
    user, candidates = {"user": torch.tensor(7), "clicks": torch.tensor([3, 1, 0])}, {"item": torch.arange(5)}
    shapes = {"user": {}, "clicks": {0: Dim.DYNAMIC}}, {"item": {0: Dim.DYNAMIC}}
    with torch.no_grad():
        program = export(serve.RankModule(frozen), (user, candidates), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "din.pt2"))
    clicks, items = [3, 1, 4, 1, 5, 9, 2, 6], list(range(20, 50))
    user, candidates = {"user": torch.tensor(7), "clicks": torch.tensor(clicks)}, {"item": torch.tensor(items)}
    expected = frozen.rank(user, candidates)

    alone = run(
        sys.executable, "-c",
        "import sys, torch\n"
        f"torch.ops.load_library({rk.library_path()!r})\n"
        f"rank = torch._inductor.aoti_load_package({package!r})\n"
        f"x = {{'user': torch.tensor(7), 'clicks': torch.tensor({clicks})}}, {{'item': torch.tensor({items})}}\n"
        "assert 'rankkernels' not in sys.modules\n"
        "print(rank(*x).tolist())",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert torch.equal(torch.tensor(eval(alone.stdout)), expected)

    program, ids = build(tmp_path / "build"), lambda values: ",".join(map(str, values))
    command = program, package, "user:7", f"clicks={ids(clicks)}"
    result = run(*command, f"item={ids(items)}", LD_DEBUG="files")
    assert result.returncode == 0, result.stderr
    torch.testing.assert_close(torch.tensor([float(s) for s in result.stdout.split()]), expected, rtol=0, atol=1e-6)
    assert "librankkernels" in result.stderr and "libtorch_cpu" in result.stderr and "libpython" not in result.stderr
    wrong = run(*command, "item=3,50")
    assert wrong.returncode == 1 and "item[1] = 50 is out of range for a table with 50 rows" in wrong.stderr
