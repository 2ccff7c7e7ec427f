"""Puts together the op that CONTRIBUTING.md adds and runs pytest with it. PARTS, of files by path, are written before
this by test_pages.py."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path.cwd()))
for path, code in PARTS:  # noqa: F821
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if name == "rankkernels.ops._table":
        table = importlib.import_module(name)
        table.OPS.update({op.name: op for op in eval(f"({code.strip()},)", vars(table))})
    else:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
        exec(compile(code, path, "exec"), vars(importlib.import_module(name)))
sys.exit(pytest.main(sys.argv[1:]))
