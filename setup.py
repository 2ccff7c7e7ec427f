"""Builds ``rankkernels._C``: one abi3 extension on torch's stable ABI, for every torch from 2.10.

Environment:
  RANKKERNELS_SKIP_EXT=1  no extension at all: the package runs its pure-PyTorch reference and says so once.
  RANKKERNELS_CUDA=1      with CUDA_HOME set, also compiles csrc/cuda (architectures: TORCH_CUDA_ARCH_LIST).
  MAX_JOBS                parallel compilations.
"""

import os
from glob import glob

from setuptools import setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "off", "no")


def extension() -> dict:
    if enabled("RANKKERNELS_SKIP_EXT"):
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    cxx = [
        "-O3",
        "-g0",
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-ignored-attributes",
        "-Wno-psabi",
        *defines,
    ]
    module = CppExtension(
        "rankkernels._C",
        sources=sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        extra_compile_args={"cxx": cxx},
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
