"""The torch.library namespace ``rankkernels`` and the library of the kernels, ``librankkernels.so``.

Schemas are written in Python, beside the public function of each op. setup.py asks this module for them and builds them
into the library, which wants nothing of Python: loaded in any process, it defines the ops and registers their CPU
implementations. CUDA implementations are registered beside the schema. A device without a kernel runs the op's default,
the reference, registered under CompositeExplicitAutograd. torch's dispatcher chooses, and nothing else does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

lib = torch.library.Library("rankkernels", "FRAGMENT")

CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
_FOLDER = os.path.dirname(os.path.dirname(__file__))
_LIBRARY = os.path.join(_FOLDER, "librankkernels.so")
cmake_prefix: str = os.path.join(_FOLDER, "share", "cmake")
"""Where CMake finds the library: ``-DCMAKE_PREFIX_PATH=`` this, then ``find_package(rankkernels)``."""


def _load_extension() -> str | None:
    """Loads the library; returns why it did not, or None."""
    if os.environ.get("RANKKERNELS_REFERENCE", "0") not in ("", "0"):
        return "RANKKERNELS_REFERENCE is set"
    if not os.path.exists(_LIBRARY):
        return "rankkernels was installed without its C++ extension"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    return None


def library_path() -> str:
    """Where the library of the kernels lies, for processes that load it themselves: ``torch.ops.load_library``, the
    linker, ``dlopen``.

    Raises:
        RuntimeError: the package was installed without it.
    """
    if not os.path.exists(_LIBRARY):
        raise RuntimeError("rankkernels was installed without its C++ extension")
    return _LIBRARY


#: Of every op, as ``define`` was given them.
schemas: list[str] = []


def define(schema: str) -> None:
    """Defines an op where the library has not, and holds the library to the schema where it has."""
    schemas.append(schema)
    built = torch._C._jit_get_schemas_for_operator(f"rankkernels::{schema.partition('(')[0]}")
    if not built:
        lib.define(schema)
    elif built != [torch._C.parse_schema(f"rankkernels::{schema}")]:
        raise ImportError(f"{_LIBRARY} was built from other sources, with {built[0]}, not {schema}: build it again")


no_extension: str | None = _load_extension()
define("cpu_isa() -> int")
define("cuda_refusal() -> int")
define("is_hip() -> bool")
define("use_huge_pages(Tensor t) -> ()")
torch.library.impl(lib, "use_huge_pages", "CompositeExplicitAutograd")(lambda t: None)
torch.library.register_fake("rankkernels::use_huge_pages", lambda t: None, lib=lib)


def has_cpu_kernel(t: Tensor) -> bool:
    """Whether the library's kernels serve ``t``: asked for ops whose default is slower than torch's own layers."""
    return t.is_cpu and no_extension is None


#: What the C++ kernels run with, or None without them. Queried once at import, so it never appears in a traced graph.
cpu_isa: str | None = None if no_extension else CPU_ISAS[torch.ops.rankkernels.cpu_isa()]
only_reference: bool = no_extension == "RANKKERNELS_REFERENCE is set"


def _built_for_gpus() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("rankkernels::is_hip", "CompositeExplicitAutograd")


def _find_no_cuda() -> str | None:
    """csrc/cuda/common/driver.h asks the driver, and registers no kernel in CUDA C++ where it says no."""
    if no_extension:
        return no_extension
    if not _built_for_gpus():
        return f"rankkernels was built without RANKKERNELS_{'HIP' if torch.version.hip else 'CUDA'}=1"
    return (
        None,
        "rankkernels was built without code for this machine's GPU",
        "rankkernels was built with a newer CUDA than this machine's driver runs",
        f"rankkernels was built for {'HIP, and this torch for CUDA' if is_hip else 'CUDA, and this torch for HIP'}",
    )[torch.ops.rankkernels.cuda_refusal()]


#: Whether the library's kernels in CUDA C++ were compiled as HIP.
is_hip: bool = _built_for_gpus() and torch.ops.rankkernels.is_hip()
#: Why the library's kernels in CUDA C++ do not run here, or None.
no_cuda: str | None = _find_no_cuda()
OLDEST_TRITON = (3, 6)


def _triton_version() -> tuple[int, int]:
    """By its source: importing Triton takes longer than importing rankkernels; (0, 0) where there is none."""
    spec = importlib.util.find_spec("triton")
    text = Path(spec.origin).read_text() if spec is not None and spec.origin else ""
    version = re.search(r"""^__version__ = ['"](\d+)\.(\d+)""", text, re.MULTILINE)
    return (int(version[1]), int(version[2])) if version else (0, 0)


has_triton: bool = not only_reference and _triton_version() >= OLDEST_TRITON


@functools.cache
def _has_tensor_cores(index: int | None) -> bool:
    hip = torch.version.hip or not torch.cuda.is_available()  # without a GPU, tensors are traced for one
    return bool(hip) or torch.cuda.get_device_capability(index) >= (8, 0)


def triton_serves(t: Tensor) -> bool:
    """Whether Triton is there, and new enough, and compiles for the GPU of ``t``: for NVIDIA's from Ampere on."""
    return has_triton and _has_tensor_cores(t.device.index)


def triton_serves_single(t: Tensor) -> bool:
    """``triton_serves``, of kernels that compute in float32: float64 is the reference's."""
    return t.dtype != torch.float64 and triton_serves(t)


#: Whether lookups on a GPU are Triton's: the library's, in CUDA C++, come before them.
triton_embeds: bool = has_triton and no_cuda is not None
WIDEST_EMBEDDING = 512
"""Columns of a table that Triton's kernels take: a program holds whole rows."""


def triton_serves_tables(tables: Sequence[Tensor | None]) -> bool:
    """Whether Triton's kernels serve lookups in ``tables``, or their results' gradients."""
    given = [t for t in tables if t is not None]
    return triton_serves(given[0]) and all(t.size(-1) <= WIDEST_EMBEDDING for t in given)


def use_huge_pages(t: Tensor) -> None:
    """Asks the system to back a large table on the CPU with huge pages; its values and its address stay the same."""
    if t.device.type == "cpu" and t.is_contiguous() and t.numel() * t.element_size() >= 4 << 20:
        torch.ops.rankkernels.use_huge_pages.default(t.detach())


#: Ops that ran on the reference in this process, by op and device type, and why: see ``_table.notice_reference``.
reference_notices: dict[tuple[str, str], str] = {}


_AUTOCAST = torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA
_EVERY_AUTOCAST = torch._C.DispatchKeySet(_AUTOCAST[0]) | torch._C.DispatchKeySet(_AUTOCAST[1])


def no_autocast() -> AbstractContextManager:
    """Within, ops stay in the precision of their inputs, which autocast would choose anew."""
    return torch._C._ExcludeDispatchKeyGuard(_EVERY_AUTOCAST)


def without_autocast(op: torch._ops.OpOverload) -> None:
    """What implementations of ``op`` call runs under ``no_autocast``."""

    def run(*arguments, **keywords):
        with no_autocast():
            return op(*arguments, **keywords)

    for key in _AUTOCAST:
        lib.impl(op.name().removeprefix("rankkernels::"), run, key.name)
