"""Launches of Triton's kernels that cost the host less than Triton's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.runtime.jit import JITFunction

_compiled: dict[tuple, object] = {}
_WIDE = 1 << 31


def launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    pointers: Sequence[Tensor | None],
    numbers: tuple[int | float, ...],
    constants: tuple,
    **options: int,
) -> None:
    """``kernel[grid](*pointers, *numbers, *constants, **options)``, which after the first time goes past Triton's
    look at each argument: what it was compiled for is known again by the constants, by the dtypes and the alignment of
    the pointers and by the width of the numbers, which the kernel has to have unspecialized. The first pointer, a
    tensor, says on which device, and ``options`` follow from the rest."""
    first, *_ = pointers
    kinds = [None if p is None else (p.dtype, p.data_ptr() & 15) for p in pointers]
    wide = max(numbers) >= _WIDE and tuple(n >= _WIDE for n in numbers)
    key = kernel, first.get_device(), constants, *kinds, wide
    if (compiled := _compiled.get(key)) is not None:
        compiled[(*grid, 1, 1)](*pointers, *numbers, *constants)
    elif (compiled := kernel[grid](*pointers, *numbers, *constants, **options)) is not None:
        _compiled[key] = compiled
