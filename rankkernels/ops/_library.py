"""The torch.library namespace ``rankkernels`` and the C++ extension.

Schemas are defined in Python, beside the public function of each op. The extension registers the CPU implementations
when it is loaded; CUDA implementations are registered beside the schema. A device without a kernel runs the op's
default, the reference, registered under CompositeExplicitAutograd. torch's dispatcher chooses, and nothing else does.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os

import torch
from torch import Tensor

lib = torch.library.Library("rankkernels", "DEF")

CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")


def _load_extension() -> str | None:
    """Loads ``rankkernels._C``; returns why it did not, or None."""
    if os.environ.get("RANKKERNELS_REFERENCE", "0") not in ("", "0"):
        return "RANKKERNELS_REFERENCE is set"
    # Searched beside this package's files only: an editable installation of another copy may be on the path.
    folder = os.path.dirname(os.path.dirname(__file__))
    if importlib.machinery.PathFinder.find_spec("rankkernels._C", [folder]) is None:
        return "rankkernels was installed without its C++ extension"
    try:
        importlib.import_module("rankkernels._C")
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


lib.define("cpu_isa() -> int")
lib.define("use_huge_pages(Tensor t) -> ()")
torch.library.impl(lib, "use_huge_pages", "CompositeExplicitAutograd")(lambda t: None)
torch.library.register_fake("rankkernels::use_huge_pages", lambda t: None, lib=lib)
no_extension: str | None = _load_extension()
#: What the C++ kernels run with, or None without them. Queried once at import, so it never appears in a traced graph.
cpu_isa: str | None = None if no_extension else CPU_ISAS[torch.ops.rankkernels.cpu_isa()]
has_triton: bool = importlib.util.find_spec("triton") is not None and no_extension != "RANKKERNELS_REFERENCE is set"


def use_huge_pages(t: Tensor) -> None:
    """Asks the system to back a large table on the CPU with huge pages; its values and its address stay the same."""
    if t.device.type == "cpu" and t.is_contiguous() and t.numel() * t.element_size() >= 4 << 20:
        torch.ops.rankkernels.use_huge_pages.default(t.detach())


#: Ops that ran on the reference in this process, by op and device type, and why: see ``_table.notice_reference``.
reference_notices: dict[tuple[str, str], str] = {}
