"""Triton's interpreter without what it does again and again: two thirds of its time are left.

To be imported in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction


def install() -> None:
    """For good, and once. A launch patches ``triton.language``: here it is patched again for each module whose
    functions a kernel calls, and not at each of their calls."""
    if interpreter._get_np_dtype.__module__ == __name__:
        return
    patched: set[int] = set()
    run = GridExecutor.__call__

    def launch(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise InterpreterError(repr(e)) from e

    GridExecutor.__call__, InterpretedFunction.__call__ = launch, call

    known, numpys = {}, interpreter._get_np_dtype

    def numpys_of(type):
        name = type.scalar.name
        if name not in known:
            known[name] = numpys(type)
        return known[name]

    interpreter._get_np_dtype = numpys_of
