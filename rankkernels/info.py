"""``python -m rankkernels.info``: versions, what this machine's kernels are, and which op runs where; with
``--library`` where the library of the kernels lies."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from rankkernels.ops import _library
from rankkernels.ops._table import OPS, Op


def backend(op: str, device: str) -> str:
    """What runs ``op`` on tensors of a device type, "cpu" or "cuda", in this process."""
    kernel = OPS[op].kernel(device)
    if kernel is None:
        return _otherwise(OPS[op])
    return f"{kernel} ({_library.cpu_isa})" if device == "cpu" else kernel


def _otherwise(op: Op) -> str:
    return "PyTorch reference" if op.otherwise == "reference" else op.otherwise


def markdown() -> str:
    """The README's table: what runs each op where there is everything. Ops that run alike share a row."""
    alike: dict[tuple[str, str], list[Op]] = {}
    for op in OPS.values():
        cpu = f"C++ ({op.cpu_needs}), else {op.otherwise}" if op.cpu_needs else "C++"
        rest = "the reference" if op.otherwise == "reference" else op.otherwise
        otherwise = f"Triton, {rest} beyond {_library.WIDEST_EMBEDDING} wide" if op.else_triton else op.otherwise
        gpu = {"": op.otherwise, "CUDA C++": f"CUDA C++ if built in, else {otherwise}"}.get(op.cuda, op.cuda)
        gpu += f"; {op.cuda_limits}" if op.cuda_limits else ""
        alike.setdefault((cpu, gpu), []).append(op)
    rows = [["op", "CPU", "GPU", "layers"], ["---"] * 4]
    for (cpu, gpu), ops in alike.items():
        names = "; ".join(f"`{op.name}`" + (f": {op.title}" if op.title else "") for op in ops)
        layers = dict.fromkeys(f"`{layer}`" for op in ops for layer in op.layers)
        rows.append([names, cpu, gpu, ", ".join(layers)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    print(f"rankkernels {installed('rankkernels')}, torch {torch.__version__}, triton {installed('triton')}, "
          f"Python {platform.python_version()}, {platform.machine()}")  # fmt: skip
    print(f"C++ extension: {_library.no_extension or 'loaded'}")
    print(f"CUDA C++: {_library.no_cuda or ('loaded, compiled as HIP' if _library.is_hip else 'loaded')}")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print()
    print(f"{'op':<20} {'cpu':<20} cuda")
    for name in OPS:
        print(f"{name:<20} {backend(name, 'cpu'):<20} {backend(name, 'cuda')}")
    if not torch.cuda.is_available():
        print("\nThe GPU column is what would run: no GPU is visible here.")


if __name__ == "__main__":
    print(_library.library_path()) if sys.argv[1:] == ["--library"] else main()
