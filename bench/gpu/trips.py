"""How often the loops of Triton kernels run, counted in Triton's interpreter on some programs of a launch.

To be imported in a process with TRITON_INTERPRET=1. The interpreter runs a kernel's own Python, whose loops are over
``range``; here they are counted, by where they are and from where their functions are called.
"""

from __future__ import annotations

import builtins
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from bench.gpu import interpreting
from bench.gpu.ahead_of_time import CUDAImplementations
from bench.gpu.sass import Counts, Line, Trips
from rankkernels import _triton
from rankkernels.testing import OpCase

interpreting.install()

FOLDER = str(Path(_triton.__file__).parent)
#: Programs of each dimension of a grid that are run: the others do the same with other data.
SAMPLED = 3


def sample(size: int) -> list[int]:
    """Indices from the middles of as many equal parts."""
    parts = min(size, SAMPLED)
    return [(2 * i + 1) * size // (2 * parts) for i in range(parts)]


@dataclass
class Launch:
    """The loops of one launch, each come to so often and run so often, in all of the ``programs`` that were run."""

    kernel: str
    programs: int
    loops: dict[tuple[Line, ...], list[int]] = field(default_factory=dict)

    def counts(self) -> Counts:
        n = max(self.programs, 1)
        return {chain: Trips(entries / n, turns / n, step) for chain, (entries, turns, step) in self.loops.items()}


def _chain(kernel: str) -> tuple[Line, ...]:
    """Where the caller of ``range`` is, and from where it was called, up to the kernel."""
    found, frame = [], sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(FOLDER):
            found.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if frame.f_code.co_name == kernel:
                break
        frame = frame.f_back
    return tuple(found)


class Counting:
    """Stands for ``range`` where kernels and the interpreter look it up, and knows their launches."""

    def __init__(self):
        self.launches: list[Launch] = []

    def range(self, *bounds) -> Iterator[int]:
        turns = builtins.range(*bounds)
        caller = sys._getframe(1).f_code
        if caller.co_name == "__call__" and caller.co_filename == interpreter.__file__:  # over the grid
            return iter(sample(len(turns)))
        if caller.co_name == "_new_range" or caller.co_filename.startswith(FOLDER):
            launch = self.launches[-1]
            entry = launch.loops.setdefault(_chain(launch.kernel), [0, 0, turns.step])
            entry[0] += 1
            entry[1] += len(turns)
        return iter(turns)

    def launched(self, run: Callable) -> Callable:
        """The interpreter's launch ``run``, after which its loops are known."""

        def launch(kernel, *args, grid, **kwargs):
            self.launches.append(Launch(kernel.__name__, math.prod(len(sample(n)) for n in grid)))
            return run(kernel, *args, grid=grid, **kwargs)

        return launch


#: One for all cases: a kernel keeps the ``range`` that it was first run with.
COUNTING = Counting()


def count(case: OpCase, dtype: torch.dtype) -> list[Counts]:
    """Of the launches of a forward and a backward of the case, in order.

    Not for kernels that go to addresses which other programs have written, as the embeddings' do.
    """
    COUNTING.launches = []
    inputs = [t.requires_grad_(t.is_floating_point()) for t in case.inputs(dtype)]
    with (
        mock.patch.object(interpreter, "range", COUNTING.range, create=True),
        mock.patch.object(InterpretedFunction, "run", COUNTING.launched(InterpretedFunction.run)),
        np.errstate(all="ignore"),  # what the other programs did not write is garbage
        warnings.catch_warnings(),
        CUDAImplementations([], cuda_cpp=False),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        out = case.function(*inputs)
        torch.autograd.grad(out, [t for t in inputs if t.requires_grad], torch.ones_like(out))
    return [launch.counts() for launch in COUNTING.launches]
