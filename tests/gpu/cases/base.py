"""What the interpreter's tests know of a kernel, and how they make and compare its tensors."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankkernels.testing import OpCase, relative_error

MAP_NORESERVE = 0x4000  # Linux: pages exist when they are touched

HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

#: Relative error, norm over norm, of a result that is accumulated in float32 (float64) and rounded once.
ROUNDED_ONCE = {HALF: 2**-11, BF16: 2**-8, SINGLE: 1e-6, DOUBLE: 1e-14}


@dataclass
class Interpreted:
    """The kernels of one module of ``rankkernels._triton``, through its public launchers.

    ``make(config, dtype)`` gives the arguments, ``launch(module, **arguments)`` runs the launchers on them, ``forward``
    that of the forward alone, and ``expected(**arguments)`` says what they must return; float tensors among the
    arguments reach it in float64.
    """

    module: str
    make: Callable[[dict, torch.dtype], dict]
    launch: Callable[..., Sequence[Tensor]]
    expected: Callable[..., Sequence[Tensor]]
    configs: Sequence[dict]
    dtypes: Sequence[torch.dtype]
    #: Source edits (what, old, new) of the module or one it is split into (its name and an ending), each of which must
    #: make a config of ``configs`` fail. First come those in which the word that ``what`` begins with is on or a value.
    mutations: Sequence[tuple[str, str, str]]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: ROUNDED_ONCE)
    #: The argument that the first launch reads once, with ``streamed_configs`` in which it reads all of it.
    streamed: str = ""
    streamed_configs: Sequence[dict] = ()
    #: Where the bytes that the forward moves are counted, with the ``passes`` over the streamed argument if not one.
    counted_configs: Sequence[dict] = ()
    forward: Callable[..., Sequence[Tensor]] | None = None
    #: The dtype whose tolerance a config has: of its products, where they have another.
    rounded_to: Callable[[dict, torch.dtype], torch.dtype] = lambda config, dtype: dtype
    #: Cases with tensors of more than 2^31 elements, which are compiled on the meta device.
    huge: Sequence[OpCase] = ()


def strided(shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Random values in a memory layout: "sliced" leaves gaps in every dimension, "stepped" within rows, "reversed" puts
    the first dimension innermost, "far samples" and "far rows" need 64-bit offsets."""
    if layout == "contiguous":
        return torch.randn(shape).to(dtype)
    if layout == "sliced":
        return torch.randn([n + 1 for n in shape]).to(dtype)[tuple(slice(1, None) for _ in shape)]
    if layout == "stepped":
        return torch.randn([*shape[:-1], 2 * shape[-1]]).to(dtype)[..., ::2]
    if layout in ("far samples", "far rows"):  # 2^31 items and more from the first to the last
        dim = layout == "far rows"
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        stride[dim] = 2**30
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride))
        pages = mmap.mmap(-1, extent * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        far = torch.frombuffer(pages, dtype=dtype).as_strided(shape, stride)
        return far.copy_(torch.randn(shape))
    assert layout == "reversed"
    return torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1])


def described(value) -> str:
    """A config or a dtype as part of a test's name."""
    if isinstance(value, dict):
        return "-".join(f"{k}={v}" if isinstance(v, bool) else described(v) for k, v in value.items())
    return str(value).removeprefix("torch.").replace(" ", "")


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinite where anything is NaN."""
    result = relative_error(actual, expected)
    return math.inf if math.isnan(result) else result
