"""The package with its CUDA C++ kernels, built for one GPU beside whatever else runs: nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "setup.py", "-q")


def cuda_home() -> str | None:
    """CUDA_HOME, or the toolkit of the nvcc on PATH, which may be a link or a script: nvcc is asked itself."""
    if home := os.environ.get("CUDA_HOME"):
        return home
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", said.stderr)
    return os.path.realpath(top[1]) if top else None


class Build:
    """``setup.py build`` into ``folder``, for the GPU of this compute capability alone; what it says is in its log."""

    def __init__(self, folder: Path, capability: tuple[int, int], home: str):
        self.folder, self.start, self.log = folder.resolve(), time.monotonic(), folder.resolve() / "build.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "RANKKERNELS_CUDA": "1",
            "CUDA_HOME": home,
            "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*capability),
            "MAX_JOBS": str(max(1, (os.cpu_count() or 1) - 2)),  # the rest is for what is timed meanwhile
        }
        folders = "build_ext", f"--build-temp={self.folder / 'temp'}", "build", f"--build-lib={self.folder / 'lib'}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *folders], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float) -> str:
        """What went wrong, or nothing, after at most so many seconds."""
        try:
            status = self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return f"not done in {time.monotonic() - self.start:.0f} s"
        if status:
            lines = self.log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
            return f"exit status {status}: {(errors or lines[-1:] or [''])[0]}"
        return ""

    def kill(self) -> None:
        """With the compilers that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def library(self) -> Path:
        """The folder to import the package from."""
        return self.folder / "lib"
