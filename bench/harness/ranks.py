"""Runs a function in several processes that talk over gloo, and leaves none of them behind: of tests and benchmarks."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: No collective waits for longer.
TIMEOUT = timedelta(seconds=60)


def _begin(rank: int, function: Callable, processes: int, folder: str, arguments: tuple) -> None:
    faulthandler.enable()  # says in which call a process died
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes, timeout=TIMEOUT
    )
    torch.save(function(rank, processes, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    sys.stdout.flush()
    os._exit(0)  # groups have threads that torch does not join: now and then they abort an ordinary end


def run(processes: int, function: Callable, *arguments, seconds: float = 5 * TIMEOUT.total_seconds()) -> list:
    """``function(rank, processes, *arguments)`` in each process -> what they return.

    Raises:
        TimeoutError: they need more than ``seconds``, by default what five collectives may. All are ended then, as when
            one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = function, processes, folder, arguments
        context = mp.spawn(_begin, given, nprocs=processes, join=False)
        end = time.monotonic() + seconds
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise TimeoutError(f"{function.__name__}: {processes} processes have not ended")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(processes)]
