"""Every Triton kernel compiled for GPUs that this machine need not have. test_triton_compile.py runs this file in a
process of its own.

The launchers run on CPU tensors up to the launch itself: Triton's own front door specializes the arguments, and the
driver below says which GPU they are for. So what is compiled is what a user's launch compiles: ``report`` prints its
registers, shared memory and instructions.
"""

from __future__ import annotations

import collections
import importlib
import re
import subprocess

import pytest
import torch
import triton
from cases import OPS, described
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class AbsentGPU(DriverBase):
    """A driver that knows which GPU it is for and has none."""

    def __init__(self):
        self.name = "sm_80"

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return TARGETS[self.name]

    def get_current_device(self):
        return self.name  # a launcher's kernels are kept by device

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_stream(self, device):
        return 0

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise NotImplementedError("nothing can be timed without a GPU")


@pytest.fixture(scope="module")
def driver():
    active = AbsentGPU()
    triton.runtime.driver.set_active(active)
    return active


@pytest.fixture
def kernels(monkeypatch):
    """What the launchers compile, instead of launching it."""
    compiled = []

    def launch(kernel, grid):
        def compile_only(*args, **kwargs):
            compiled.append(kernel.warmup(*args, grid=grid, **kwargs))

        return compile_only

    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    return compiled


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def resources(kernel, target: GPUTarget, folder) -> tuple[dict[str, int], collections.Counter]:
    """Registers and bytes of local memory (spills among them) a thread, and how often each instruction occurs."""
    if target.backend == "cuda":
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, code = (
            run(triton.knobs.nvidia.cuobjdump.path, f"-{what}", str(cubin)) for what in ("res-usage", "sass")
        )
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        numbers = {"registers": registers, "local": stack + local}
        pattern = r"\b((?:LDG|STG|LDL|STL|LDS|STS|HMMA|HGMMA|UTCHMMA|UTCQMMA|FFMA|MUFU)\b[\w.]*)"
    else:
        code = kernel.asm["amdgcn"]
        names = {"registers": "vgpr_count", "local": "private_segment_fixed_size"}
        numbers = {name: int(re.search(rf"\.{key}:\s+(\d+)", code)[1]) for name, key in names.items()}
        pattern = r"(?m)^\s+((?:global_load|global_store|buffer_load|buffer_store|scratch|v_mfma)_?\w*)"
    return numbers, collections.Counter(re.findall(pattern, code))


def report(name: str, kernel, numbers: dict[str, int], instructions: collections.Counter) -> str:
    facts = ", ".join(f"{k} {v}" for k, v in numbers.items())
    most = ", ".join(f"{v} {k}" for k, v in instructions.most_common(8))
    meta = kernel.metadata
    return f"{name} {meta.name}: warps {meta.num_warps}, {facts}, shared {meta.shared}; {most}"


@pytest.mark.parametrize(
    "op, config, target",
    [(op, config, target) for op in OPS for config in op.compiled for target in config.get("targets", TARGETS)],
    ids=lambda v: getattr(v, "module", None) or described(v),
)
def test_compiles_without_spills(op, config, target, driver, kernels, tmp_path, monkeypatch):
    driver.name = target
    monkeypatch.setattr(torch.version, "hip", "6" if TARGETS[target].backend == "hip" else None)
    arguments = op.make(config, config["dtype"])
    op.launch(importlib.import_module(f"rankkernels._triton.{op.module}"), **arguments)
    assert kernels, "the launchers launched nothing"
    for kernel in kernels:
        numbers, instructions = resources(kernel, TARGETS[target], tmp_path)
        print(report(target, kernel, numbers, instructions))
        assert numbers["local"] <= config.get("local", 0)
        assert config.get("local") or not any(re.match("LDL|STL|scratch", i) for i in instructions)
        if config.get("aligned"):
            # 512 bytes an instruction: 16 a thread, or 8 where a warp has 64 threads
            assert any(re.match(r"LDG\S*\.128|(global|buffer)_load_dwordx[24]", i) for i in instructions)
        if config.get("tensor_cores"):
            assert any(re.match(r"H\w*MMA|UTC\w*MMA|v_mfma", i) for i in instructions)
