"""How many programs fill a GPU."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PROCESSORS = 128  # where there is no GPU, and kernels are compiled for one


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else PROCESSORS


def programs_of(t: Tensor) -> int:
    """Two for each multiprocessor of the device of ``t``: each program goes through its share in order, so that sums
    are the same bits run after run, and none waits for a second wave."""
    return 2 * _processors(t.device.index)
