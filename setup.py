"""Builds ``librankkernels.so``: one library on torch's stable ABI, without Python's, for every torch from 2.10.

Environment:
  RANKKERNELS_SKIP_EXT=1  no extension at all: the package runs its pure-PyTorch reference and says so once.
  RANKKERNELS_CUDA=1      also compiles csrc/cuda, with the nvcc of CUDA_HOME, for the architectures of
                          TORCH_CUDA_ARCH_LIST ("8.0;9.0;10.0+PTX"). Any build of torch will do, a CPU one too.
  RANKKERNELS_HIP=1       the same sources for AMD's GPUs, with the hipcc of ROCM_HOME (/opt/rocm), for the
                          architectures of PYTORCH_ROCM_ARCH ("gfx90a;gfx942"). Any build of torch will do.
  RANKKERNELS_SANITIZE=1  compiles with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.
  MAX_JOBS                parallel compilations.
"""

import json
import os
import re
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
SCHEMAS = os.path.abspath("build/include/rankkernels_schemas.inc")


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() not in ("", "0", "false", "off", "no")


def write_schemas() -> None:
    """Asks the package's sources, in a process of their own, for the schemas that csrc/library.cpp defines."""
    code = "import json, sys; from rankkernels.ops import _library; json.dump(_library.schemas, sys.stdout)"
    environment = {**os.environ, "RANKKERNELS_REFERENCE": "1"}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    listed = "".join(f"    {json.dumps(schema)},\n" for schema in json.loads(asked.stdout))
    text = f"namespace rk {{\nconstexpr const char* kSchemas[] = {{\n{listed}}};\n}}  // namespace rk\n"
    os.makedirs(os.path.dirname(SCHEMAS), exist_ok=True)
    if not os.path.exists(SCHEMAS) or open(SCHEMAS).read() != text:
        with open(SCHEMAS, "w") as file:
            file.write(text)


def add_cuda(module: Extension, defines: list[str]) -> None:
    """Adds csrc/cuda. CUDAExtension would link libraries that only a CUDA build of torch has."""
    from torch.utils import cpp_extension

    home = os.environ.get("CUDA_HOME", "")
    if not os.path.exists(os.path.join(home, "bin", "nvcc")):
        sys.exit(f"RANKKERNELS_CUDA=1 needs CUDA_HOME to be a CUDA toolkit with bin/nvcc, got CUDA_HOME={home!r}")
    cpp_extension.CUDA_HOME, cpp_extension.IS_HIP_EXTENSION = home, False  # whatever torch was built for
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    ptx = re.findall(r"(\d+)\.(\d)a?\+PTX", os.environ["TORCH_CUDA_ARCH_LIST"])
    defines = defines + [f"-DRK_CUDA_PTX={100 * int(major) + 10 * int(minor)}" for major, minor in ptx[-1:]]
    module.sources += sorted(glob("csrc/cuda/**/*.cu", recursive=True))
    module.extra_compile_args["nvcc"] = ["-O3", "-std=c++17", "-Xcompiler=-fvisibility=hidden", *defines]
    module.library_dirs += [os.path.join(home, lib) for lib in ("lib64", "lib")]
    module.libraries += ["cudart_static", "rt", "dl", "pthread"]


def add_hip(module: Extension, defines: list[str]) -> None:
    """Adds csrc/cuda as HIP, which it is as it stands: no hipify."""
    from torch.utils import cpp_extension

    home = os.environ.get("ROCM_HOME", "/opt/rocm")
    if not os.path.exists(os.path.join(home, "bin", "hipcc")):
        sys.exit(f"RANKKERNELS_HIP=1 needs ROCM_HOME to be a ROCm with bin/hipcc, got ROCM_HOME={home!r}")
    cpp_extension.ROCM_HOME, cpp_extension.IS_HIP_EXTENSION = home, True  # whatever torch was built for
    os.environ.setdefault("PYTORCH_ROCM_ARCH", "gfx90a;gfx942")
    hip, cpp_extension.COMMON_HIP_FLAGS = cpp_extension.COMMON_HIP_FLAGS, []  # not for the C++, which knows no GPU
    module.sources += sorted(glob("csrc/cuda/**/*.cu", recursive=True))
    module.extra_compile_args["nvcc"] = [*hip, "-O3", "-std=c++17", "-fvisibility=hidden", *defines]
    module.library_dirs.append(os.path.join(home, "lib"))
    module.libraries.append("amdhip64")


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
    link = []
    if enabled("RANKKERNELS_SANITIZE"):
        link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        cxx += ["-O1", "-g1", *link]  # the last -O counts
    link.append("-Wl,-soname,librankkernels.so")
    module = CppExtension(
        "rankkernels.librankkernels",
        sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True) + [SCHEMAS]),
        include_dirs=[os.path.abspath("csrc"), os.path.dirname(SCHEMAS)],  # absolute: ninja runs elsewhere
        libraries=["stdc++"],  # before torch's, which export some of its functions without their versions
        extra_compile_args={"cxx": cxx},
        extra_link_args=link,
        py_limited_api=True,  # torch's Python library is not linked
    )
    if enabled("RANKKERNELS_CUDA") and enabled("RANKKERNELS_HIP"):
        sys.exit("RANKKERNELS_CUDA=1 and RANKKERNELS_HIP=1 are two builds: a library has kernels for one kind of GPU")
    if enabled("RANKKERNELS_CUDA"):
        add_cuda(module, defines)
    if enabled("RANKKERNELS_HIP"):
        add_hip(module, defines)

    class Build(BuildExtension):
        def finalize_options(self):
            given = self.build_temp
            super().finalize_options()
            # Where ninja finds the objects of the build before; pip has a new folder for an editable installation.
            self.build_temp = given or "build/objects" + ("_sanitized" if enabled("RANKKERNELS_SANITIZE") else "")

        def run(self):
            write_schemas()
            super().run()

    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
