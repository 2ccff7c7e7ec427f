"""How many warps a multiprocessor holds, and the time that the data sheets' rates allow."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share, and how registers are given out: to a warp in units of ``register_unit`` a thread."""

    threads_of_warp: int
    registers: int
    register_unit: int
    warps: int
    warp_unit: int  # warps' registers come from partitions, so that many at a time
    blocks: int
    shared: int
    shared_of_block: int
    reserved: int  # of shared memory, a block


_NVIDIA = dict(threads_of_warp=32, registers=65536, register_unit=8, warps=64, warp_unit=4, blocks=32, reserved=1024)
_AMD = dict(threads_of_warp=64, registers=4 * 512 * 64, register_unit=8, warps=32, warp_unit=4, blocks=32, reserved=0)
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(**_NVIDIA, shared=164 << 10, shared_of_block=163 << 10),
    "sm_90": Multiprocessor(**_NVIDIA, shared=228 << 10, shared_of_block=227 << 10),
    "sm_100": Multiprocessor(**_NVIDIA, shared=228 << 10, shared_of_block=227 << 10),
    "gfx90a": Multiprocessor(**_AMD, shared=64 << 10, shared_of_block=64 << 10),
    "gfx942": Multiprocessor(**_AMD, shared=64 << 10, shared_of_block=64 << 10),
}


@dataclass(frozen=True)
class GPU:
    """Rates of the data sheet, dense: GB/s; TFLOP/s of vector float32 and float64, and of matrices' factors in tf32.
    Warp instructions, 10^12 a second, are four a clock of each multiprocessor, at the clock that float32's rate is of;
    0: not counted."""

    name: str
    target: str
    bandwidth: float
    float32: float
    float64: float
    tf32: float  # per product as the kernels take float32: see ``matrix_rate``
    issue: float
    amd: bool = False

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """Of the kernels' products: 16 bits as they are, float32 as three of tf32 on NVIDIA and as it is on AMD."""
        if dtype != torch.float32:
            return 2 * self.tf32
        return self.float32 if self.amd else self.tf32 / 3


GPUS = (
    GPU("A100 SXM 80 GB", "sm_80", 2039, 19.5, 9.7, 156, 108 * 4 * 1.41e-3),
    GPU("H100 SXM", "sm_90", 3350, 67, 34, 494.7, 132 * 4 * 1.98e-3),
    GPU("H200 SXM", "sm_90", 4800, 67, 34, 494.7, 132 * 4 * 1.98e-3),
    GPU("MI300X", "gfx942", 5300, 163.4, 81.7, 653.7, 0, amd=True),
)


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Warps that a multiprocessor holds at once of what it can, for blocks of ``warps``."""
    m = MULTIPROCESSORS[target]
    of_thread = max(-(-registers // m.register_unit) * m.register_unit, m.register_unit)
    by_registers = m.registers // (of_thread * m.threads_of_warp) // m.warp_unit * m.warp_unit
    blocks = min(by_registers // warps, m.warps // warps, m.blocks)
    if shared:
        blocks = min(blocks, m.shared // (shared + m.reserved))
    return blocks * warps / m.warps


def lower_bounds(
    gpu: GPU, dtype: torch.dtype, bytes_moved: int, flops: int, matrix: bool, issued: float
) -> dict[str, float]:
    """Seconds that moving the bytes, doing the flops and issuing the warp instructions take at least."""
    rate = gpu.matrix_rate(dtype) if matrix else gpu.float64 if dtype == torch.float64 else gpu.float32
    return {
        "b": bytes_moved / gpu.bandwidth / 1e9,
        "f": flops / rate / 1e12,
        "i": issued / gpu.issue / 1e12 if gpu.issue else 0.0,
    }
