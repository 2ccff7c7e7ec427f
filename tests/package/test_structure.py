"""The rules that keep the tree readable: which way imports go, what no module may name, how long and how alike."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from itertools import chain
from pathlib import Path

import pytest
import torch

import rankkernels
from rankkernels import info
from rankkernels.ops._table import OPS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rankkernels"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
#: The floors of the house, the lowest first. A module imports from its own floor and from lower ones.
FLOORS = [
    ["rankkernels._version", "rankkernels.reference", "rankkernels.vocabulary"],
    ["rankkernels.ops", "rankkernels._triton"],
    ["rankkernels.nn"],
    [
        "rankkernels._state_dict",
        "rankkernels._exact_adam",
        "rankkernels._live_steps",
        "rankkernels._settings",
        "rankkernels._row_optimizer",
        "rankkernels._fbgemm",
        "rankkernels._fuse",
    ],
    ["rankkernels.optim"],
    ["rankkernels.models", "rankkernels.info", "rankkernels.flops", "rankkernels.graphs"],
    ["rankkernels.adoption"],
    ["rankkernels.serve"],
    ["rankkernels.testing"],
]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(path: Path) -> set[str]:
    """The package's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


def floor_of(module: str) -> int:
    """Of the longest prefix; the package itself is the roof."""
    of_prefix = {prefix: number for number, prefixes in enumerate(FLOORS) for prefix in prefixes}
    found = [prefix for prefix in of_prefix if module == prefix or module.startswith(f"{prefix}.")]
    return of_prefix[max(found, key=len)] if found else len(FLOORS)


def test_imports_go_down():
    """Lazy ones, too: one in a function would hide a circle."""
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imports_of(path)
        if floor_of(other) > floor_of(module)
    ]
    assert not wrong


def test_imports_have_no_circle():
    graph = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    while free := {module for module, others in graph.items() if not others}:
        graph = {module: others - free for module, others in graph.items() if module not in free}
    assert not graph, f"these import each other in a circle, or from one: {graph}"


#: Names of arguments in a schema's order, and of tuples of gradients.
IN_SCHEMA_ORDER = {"arguments", "rest", "inputs", "features", "lists", "flags", "grads", "hyper", "output"}


def is_number(node: ast.expr | None) -> bool:
    return isinstance(node, (ast.Constant, ast.UnaryOp)) and isinstance(ast.literal_eval(node), int)


def numeric_indices(tree: ast.Module) -> list[int]:
    """Lines that take a tuple in a schema's order apart by number, or count the None's of a backward on fingers."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            name = getattr(node.value, "id", getattr(node.value, "attr", ""))
            index = node.slice
            bounds = (index.lower, index.upper) if isinstance(index, ast.Slice) else (index,)
            if name in IN_SCHEMA_ORDER and any(map(is_number, bounds)):
                lines.append(node.lineno)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = [ast.unparse(node.left), ast.unparse(node.right)]
            if "[None]" in sides and any(map(is_number, (node.left, node.right))):
                lines.append(node.lineno)
    return lines


def test_no_number_takes_a_schema_apart():
    found = {m: numeric_indices(tree_of(path)) for m, path in MODULES.items() if m.startswith("rankkernels.ops")}
    assert not {module: lines for module, lines in found.items() if lines}
    for text in ("arguments[13]", "features[3]", "lists[2]", "rest[-2:]", "ctx.flags[1:3]", "x = [None] * 5"):
        assert numeric_indices(ast.parse(text)) == [1], text


def code_of(path: Path) -> str:
    """A file without comments and docstrings."""
    strings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    with path.open("rb") as file:
        tokens = [
            t.string
            for t in tokenize.tokenize(file.readline)
            if t.type != tokenize.COMMENT and not (t.type == tokenize.STRING and t.start in strings)
        ]
    return " ".join(tokens)


def test_layers_and_models_name_no_device():
    """What runs where is decided in the ops or in C++."""
    device = re.compile(
        r"\b(cpu|cuda|is_cpu|is_cuda|cpu_isa|avx\w*|sse\w*|onednn\w*|mkldnn)\b|device \. type", re.IGNORECASE
    )
    paths = [*PACKAGE.glob("nn/*.py"), *PACKAGE.glob("models/*.py")]
    paths += [PACKAGE / f"{name}.py" for name in ("optim", "_row_optimizer", "_fbgemm")]
    assert not {path.name: device.findall(code_of(path)) for path in paths if device.search(code_of(path))}
    assert device.search(code_of(PACKAGE / "ops/linear.py"))


def test_the_table_of_the_ops_has_every_op():
    """All that the package registers, but backwards and what is a step's or a lookup's own part."""
    registered = {name.removeprefix("rankkernels::") for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("rankkernels::")}  # fmt: skip
    parts = {"adam_history", "embedding_bag_exact", "embedding_bag_exact_update", "embedding_bag_update",
             "embedding_catch_up_all", "embedding_fm_update", "embedding_mark_steps", "cpu_isa",
             "cuda_refusal", "gather_ranks", "is_hip", "use_huge_pages"}  # fmt: skip
    assert {name for name in registered if "_backward" not in name} - parts == OPS.keys()
    assert all(hasattr(rankkernels, layer) for op in OPS.values() for layer in op.layers)


def test_the_readme_has_the_table_of_the_ops():
    assert info.markdown() in (ROOT / "README.md").read_text(), "put there what rankkernels.info.markdown() returns"


# --------------------------------------------------------------------------------------------------- lengths and copies

MAX_LINES, MAX_FUNCTION = 400, 60
#: Python files that are longer, and why. Nothing may join them; what has become shorter leaves the list.
LONG_FILES = {
    "rankkernels/reference.py": "every formula stands in one file",
    "rankkernels/testing.py": "one case a family, read side by side",
    "tests/ops/bad_inputs.py": "one table",
    "tests/ops/test_din_attention.py": "one op",
    "tests/nn/test_fused_step.py": "one step, under every kind of backward",
    "tests/nn/test_layers.py": "all layers",
    "tests/nn/test_rechub_parity.py": "all of torch-rechub's classes",
    "tests/nn/test_transparency.py": "every kind of change to every module",
}
LONG_FUNCTIONS = {
    "din_attention": "its docstring says what each of 19 arguments is",
    "din_attention_backward_kernel": "one Triton kernel, whose helpers cannot return early",
    "din_attention_kernel": "one Triton kernel, whose helpers cannot return early",
    "din_attention_sums_kernel": "one Triton kernel, whose helpers cannot return early",
    "din_attention_case": "what a case is made of, function by function",
    "embedding_bag_case": "what a case is made of, function by function",
    "install": "a list of operators",
}


def python_files() -> list[Path]:
    return [p for folder in ("rankkernels", "bench", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]


def test_files_and_functions_are_short():
    long_files, long_functions = set(), set()
    for path in python_files():
        if path.read_text().count("\n") > MAX_LINES:
            long_files.add(path.relative_to(ROOT).as_posix())
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION:
                long_functions.add(node.name)
    assert long_files <= LONG_FILES.keys(), "split these, or say why not"
    assert long_functions <= LONG_FUNCTIONS.keys(), "split these, or say why not"
    short = (LONG_FILES.keys() - long_files) | (LONG_FUNCTIONS.keys() - long_functions)
    assert not short, "these are short now: strike them off"


WINDOW = 6
#: Pairs of modules that may share six lines and more, and why.
ALIKE = {
    frozenset({"rankkernels", "rankkernels.nn"}): "lists of the public names",
    frozenset({"rankkernels", "rankkernels.models"}): "lists of the public names",
    frozenset({"rankkernels.ops.embedding_bag", "rankkernels.reference"}): "the signature of torch's embedding_bag",
    frozenset({"rankkernels.ops.augru", "rankkernels.reference"}): "a signature, one argument a line",
    frozenset({"rankkernels.ops.target_attention", "rankkernels.reference"}): "a signature, one argument a line",
    frozenset({"rankkernels.models.bst", "rankkernels.models.din"}): "torch-rechub's signatures, one argument a line",
    frozenset(
        {"rankkernels._triton.din_attention_blocks", "rankkernels._triton.norm_activation"}
    ): "activations, each beside the derivative that its kernel needs",
}


def statements(path: Path) -> list[tuple[int, str]]:
    """A module's lines of code, without imports, docstrings, comments, blank lines and what only closes a bracket."""
    skipped = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = ((n, re.sub(r"\s+#.*", "", line).strip()) for n, line in enumerate(path.read_text().splitlines(), 1))
    return [(n, line) for n, line in lines if n not in skipped and re.search(r"\w", line) and line[0] != "#"]


def test_no_six_lines_stand_in_two_modules():
    places = defaultdict(set)
    for module, path in MODULES.items():
        lines = statements(path)
        for i in range(len(lines) - WINDOW + 1):
            window = tuple(line for _, line in lines[i : i + WINDOW])
            places[window].add((module, lines[i][0]))
    copies = {
        tuple(sorted(where)): window
        for window, where in places.items()
        if len({module for module, _ in where}) > 1 and frozenset(module for module, _ in where) not in ALIKE
    }
    assert not copies
    assert all(set(pair) <= MODULES.keys() for pair in ALIKE)
    assert len(set(chain.from_iterable(places.values()))) > 2000  # windows were compared at all


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("rankkernels.ops.") and "._" not in m])
def test_every_op_begins_with_what_it_is(module):
    assert ast.get_docstring(tree_of(MODULES[module]))
