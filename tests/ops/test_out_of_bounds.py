"""No kernel touches a byte beyond its inputs: every input lies between two pages that must not be read.

A stray byte ends the process, so the cases run in a process of their own: this file as a program.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankkernels.ops._library import CPU_ISAS, cpu_isa, no_extension

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_keep = []


def guarded(t: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of ``t`` whose last byte (or its first) lies at a page that is neither readable nor writable."""
    t = t.contiguous()
    size = t.numel() * t.element_size()
    body = max(1, -(-size // PAGE)) * PAGE
    pages = mmap.mmap(-1, body + 2 * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    _keep.append(pages)
    for address in (base, base + PAGE + body):
        if _libc.mprotect(ctypes.c_void_p(address), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return t
    offset = PAGE + (body - size if at_end else 0)
    copy = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=offset).view(t.dtype).view(t.shape)
    return copy.copy_(t)


def run_cases() -> None:
    from rankkernels.testing import TEST_CASES, TOLERANCE, fm_interaction_case

    tails = [fm_interaction_case(3, 5, D, reduce_sum) for D in range(1, 70) for reduce_sum in (True, False)]
    for case in [*TEST_CASES, *tails]:
        for dtype in TOLERANCE:
            for at_end in (True, False):
                inputs = [guarded(t, at_end).requires_grad_(t.is_floating_point()) for t in case.inputs(dtype)]
                out = case.function(*inputs)
                out.backward(guarded(torch.randn(out.shape).to(dtype), at_end))
        _keep.clear()


def run_fault() -> None:
    t = guarded(torch.ones(3), at_end=True)
    ctypes.string_at(t.data_ptr(), 13)


def in_own_process(what: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", __file__, what]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def needs_kernels_of(capability: str) -> None:
    """Skips where ATEN_CPU_CAPABILITY asks for more than there is: what runs then is tried already."""
    isa = "baseline" if capability == "default" else capability
    if no_extension or CPU_ISAS.index(isa) > CPU_ISAS.index(cpu_isa):
        pytest.skip(f"no {isa} here")


def check_with_kernels_of(capability: str, file: str) -> None:
    """``file`` in a process of its own with ATEN_CPU_CAPABILITY, which says the kernels' name and that they are right.
    Without the variable the other tests try what runs."""
    needs_kernels_of(capability)
    isa = "baseline" if capability == "default" else capability
    done = subprocess.run(
        [sys.executable, "-W", "ignore", file], env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True, text=True, timeout=600, cwd=Path(file).parent,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == [isa, "right"], done.stderr


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_inputs_between_forbidden_pages(capability):
    needs_kernels_of(capability)
    done = in_own_process("cases", ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"


def test_a_stray_byte_is_noticed():
    assert in_own_process("fault").returncode < 0


if __name__ == "__main__":
    {"cases": run_cases, "fault": run_fault}[sys.argv[1]]()
    os._exit(0)  # the mapped pages are still in use by tensors: let the system unmap them
