"""TorchEasyRec's DINEncoder without the rest of TorchEasyRec, whose package imports all of its readers and models."""

from __future__ import annotations

import importlib.util
import sys
import types

if "tzrec" not in sys.modules:
    package = types.ModuleType("tzrec")
    package.__path__ = importlib.util.find_spec("tzrec").submodule_search_locations
    sys.modules["tzrec"] = package

from tzrec.modules.sequence import DINEncoder  # noqa: E402

__all__ = ["DINEncoder"]
