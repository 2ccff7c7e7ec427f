"""Triton kernels compiled for GPUs that need not be here, by the calls that a user makes.

Inside ``compiling`` an op on meta tensors runs its CUDA implementation up to the launch: Triton's own front door
specializes the arguments and compiles, for the GPU that the driver below claims to be, and nothing is launched. A meta
tensor has no values, so an implementation that reads one, which would make a GPU wait, raises.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction

from bench.gpu.cases import CUDA_LAUNCHES
from bench.gpu.sass import Code, parse

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Kernel:
    """What the compiler made of one launch."""

    name: str
    grid: tuple[int, ...]
    warps: int
    registers: int  # a thread
    local: int  # bytes a thread keeps in memory, spilled registers among them
    shared: int  # bytes a block
    instructions: Counter[str]
    has_dot: bool
    code: Code | None = None  # NVIDIA's machine code
    arguments: int = 0
    direct: bool = False  # known again, and launched past Triton's look at its arguments

    def count(self, pattern: str) -> int:
        """How many of its instructions match."""
        return sum(n for instruction, n in self.instructions.items() if re.match(pattern, instruction))

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return self.count("LDL|STL|scratch")

    @property
    def wide_loads(self) -> int:
        """Global loads of 512 bytes an instruction: 16 a thread, or 8 where a warp has 64 threads."""
        return self.count(r"LDG\S*\.128|(global|buffer)_load_dwordx[24]")

    @property
    def matrix_instructions(self) -> int:
        return self.count(r"H\w*MMA|UTC\w*MMA|v_mfma")


@dataclass
class Call:
    """One call of an op: the bytes of its tensors, each once, and what it launches, PyTorch's kernels among them.

    The call of the op "" is all that is launched outside of rankkernels' ops.
    """

    op: str
    bytes: int = 0
    kernels: list[Kernel] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)
    ops: int = 0  # of PyTorch's, those without a launch among them


class AbsentGPU(DriverBase):
    """A driver that knows which GPU it is for and has none."""

    def __init__(self, target: str):
        self.target = target

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return TARGETS[self.target]

    def get_current_device(self):
        return self.target  # a launcher's kernels are kept by device

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_current_stream(self, device):
        return 0

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise NotImplementedError("nothing can be timed without a GPU")


def tensor_bytes(values) -> int:
    """Bytes of the tensors among ``values``, an expanded dimension once."""
    total = 0
    for t in tree_leaves(values):
        if isinstance(t, torch.Tensor):
            items = 1
            for size, stride in zip(t.shape, t.stride()):
                items *= size if stride or not size else 1
            total += items * t.element_size()
    return total


def launches_kernel(func: torch._ops.OpOverload) -> bool:
    """Whether a PyTorch op runs a kernel: not those that return views, nor those that only allocate."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return not (is_view or "empty" in func._schema.name)


class CUDAImplementations(TorchDispatchMode):
    """Runs rankkernels' ops as on a GPU, and lists their calls."""

    def __init__(self, calls: list[Call], cuda_cpp: bool):
        super().__init__()
        self.calls, self.current = calls, None
        self.in_cpp, self.cuda_cpp = CUDA_LAUNCHES if cuda_cpp else {}, cuda_cpp

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "rankkernels" and name not in self.in_cpp:  # another op may have called it
            outer, self.current = self.current, self.current or Call(name)
            if outer is None:
                self.calls.append(self.current)
            try:
                # Beside CUDA C++ the embeddings' other ops are defaults, as on a device without any kernel of ours.
                key = "XPU" if self.cuda_cpp and name.startswith("embedding") else "CUDA"
                with self:
                    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
                    result = func.redispatch(keys, *args, **kwargs)
                if outer is None:
                    self.current.bytes = tensor_bytes((args, kwargs, result))
            finally:
                self.current = outer
            return result
        if func.namespace == "rankkernels" and self.current is None:
            result = func(*args, **kwargs)
            self.calls.append(Call(name, tensor_bytes((args, kwargs, result)), launches=list(self.in_cpp[name])))
            return result
        if self.current is not None:
            self.current.ops += 1
        if launches_kernel(func):
            if self.current is None and (not self.calls or self.calls[-1].op):
                self.calls.append(Call(""))
            (self.current or self.calls[-1]).launches += self.in_cpp.get(name, [name])
        return func(*args, **kwargs)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _disassembled(cubin: bytes, file: Path) -> str:
    """What nvdisasm, which takes a quarter of a second to begin, prints of ``file`` with this ``cubin``: kept where
    Triton keeps what it compiles."""
    tool = triton.knobs.nvidia.nvdisasm
    options = "-c", "-gi", "-ndf"  # without the last one the same text, later
    key = hashlib.sha256(" ".join((tool.version, *options)).encode() + cubin).hexdigest()
    kept, name = get_cache_manager(key), "nvdisasm.z"
    path = kept.get_file(name)
    if path is None:
        path = kept.put(zlib.compress(_run(tool.path, *options, str(file)).encode()), name)
    return zlib.decompress(Path(path).read_bytes()).decode()


def _nvidia_code(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of a kernel's resources, and its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)), _disassembled(cubin, file)


def _inspected(compiled, grid: tuple[int, ...], target: str) -> Kernel:
    """From the machine code, its registers, local memory and instructions."""
    parsed = None
    if TARGETS[target].backend == "cuda":
        usage, code = _nvidia_code(compiled.asm["cubin"])
        parsed = parse(code)
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        local += stack
        pattern = r"\b((?:LDG|STG|LDL|STL|LDS|STS|HMMA|HGMMA|UTCHMMA|UTCQMMA|FFMA|MUFU)\b[\w.]*)"
    else:
        code = compiled.asm["amdgcn"]
        registers, local = (
            int(re.search(rf"\.{key}:\s+(\d+)", code)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        pattern = r"(?m)^\s+((?:global_load|global_store|buffer_load|buffer_store|scratch|v_mfma)_?\w*)"
    return Kernel(
        compiled.metadata.name, grid, compiled.metadata.num_warps, registers, local, compiled.metadata.shared,
        Counter(re.findall(pattern, code)), "tt.dot" in compiled.asm["ttir"], parsed,
    )  # fmt: skip


@contextmanager
def compiling(target: str, only_counting: bool = False, cuda_cpp: bool = False) -> Iterator[list[Call]]:
    """Lists the calls of rankkernels' ops on meta tensors, their kernels compiled for ``target``, one of TARGETS, or
    with ``only_counting`` in name alone. With ``cuda_cpp`` the library has the kernels in CUDA C++."""
    calls: list[Call] = []
    mode = CUDAImplementations(calls, cuda_cpp)

    def launch(kernel, grid):
        direct = sys._getframe(1).f_globals["__name__"].endswith("._launch")

        def compile_only(*args, **kwargs):
            if only_counting:
                found = Kernel(kernel.__name__, grid, 0, 0, 0, 0, Counter(), False)
            else:
                found = _inspected(kernel.warmup(*args, grid=grid, **kwargs), grid, target)
            found.arguments = len(args) + sum(name in kernel.arg_names for name in kwargs)
            found.direct = direct
            mode.current.kernels.append(found)
            mode.current.launches.append(found.name)

        return compile_only

    hip = "6" if TARGETS[target].backend == "hip" else None
    triton.runtime.driver.set_active(AbsentGPU(target))
    try:
        with mock.patch.object(JITFunction, "__getitem__", launch), mock.patch.object(torch.version, "hip", hip), mode:
            yield calls
    finally:
        triton.runtime.driver.set_active(None)


def meta_inputs(case, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inputs of an ``OpCase``, without values."""
    with torch.device("meta"):
        return [t.to("meta") for t in case.inputs(dtype)]


def serves(case) -> bool:
    """Whether the kernels serve an ``OpCase`` with the Triton that is installed, or the reference does."""
    if case.op != "din_attention":
        return True
    from rankkernels._triton.din_attention import supports
    from rankkernels.ops._schema import parsed
    from rankkernels.ops.attention_params import Flags, Inputs

    inputs, flags = parsed(case.arguments(*meta_inputs(case, case.dtypes[0])), Inputs, Flags)
    return supports(inputs.history, inputs.params, flags)


def compile_case(case, dtype: torch.dtype, target: str) -> list[Call]:
    """The calls of an ``OpCase``'s own op, forward and backward or step, compiled for ``target``: those of any step but
    the first, which describes the tables to the device."""
    inputs = [t.requires_grad_(t.is_floating_point()) for t in meta_inputs(case, dtype)]
    for only_counting in (True, False):
        with compiling(target, only_counting=only_counting) as calls:
            out = case.function(*inputs)
            torch.autograd.grad(out, [t for t in inputs if t.requires_grad], torch.empty_like(out))
    return [call for call in calls if call.op in (case.op, f"{case.op}_backward", f"{case.op}_update")]
