"""``python -m rankkernels.info``: versions, what this machine's kernels are, and which op runs where."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from rankkernels.ops import _library

OPS = ("fm_interaction", "din_attention", "norm_activation", "embedding_bag", "embedding_fm", "deepfm")


def backend(op: str, device: str) -> str:
    """What runs ``op`` on tensors of a device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"rankkernels::{op}", key):
        return "separate ops" if op in ("embedding_fm", "deepfm") else "PyTorch reference"
    if device == "cuda":
        return "CUDA C++" if op.startswith("embedding") else "Triton"
    return f"C++ ({_library.cpu_isa})"


def main() -> None:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    print(f"rankkernels {installed('rankkernels')}, torch {torch.__version__}, triton {installed('triton')}, "
          f"Python {platform.python_version()}, {platform.machine()}")  # fmt: skip
    print(f"C++ extension: {_library.no_extension or 'loaded'}")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    print()
    print(f"{'op':<16} {'cpu':<20} cuda")
    for op in OPS:
        print(f"{op:<16} {backend(op, 'cpu'):<20} {backend(op, 'cuda')}")
    if not torch.cuda.is_available():
        print("\nThe GPU column is what would run: no GPU is visible here.")


if __name__ == "__main__":
    main()
