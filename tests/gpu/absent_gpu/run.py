"""pytest with the CUDA device of ``sys.argv[1]``, the library made of device.cpp, which torch must find when it loads.

python run.py LIBRARY [pytest's arguments]
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import pytest

assert "torch" not in sys.modules
for library in (Path(importlib.util.find_spec("torch").origin).with_name("lib") / "libtorch_cpu.so", sys.argv[1]):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
status = pytest.main(sys.argv[2:])
sys.stdout.flush()
os._exit(status)  # the autograd thread of that device may outlive what it uses, and abort
