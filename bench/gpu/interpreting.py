"""Triton's interpreter without what it does again and again, in half the time.

To be imported in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction


def install() -> None:
    """``triton.language``, which a launch patches, is patched again for each module whose functions a kernel calls, and
    not at each of their calls; for good."""
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
