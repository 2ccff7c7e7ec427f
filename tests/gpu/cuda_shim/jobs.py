"""Jobs in forks of one process that has torch, whose import takes the sanitizers longer than most jobs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping

import torch


def run_job(commands: Mapping[str, Callable], path: str, command: str, environment: dict[str, str]) -> None:
    """In the fork; does not return."""
    status = 1
    try:
        os.environ.update(environment)
        torch.ops.load_library(path)
        torch.use_deterministic_algorithms(True)  # fills uninitialised memory
        torch.manual_seed(0)
        commands[command]()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(commands: Mapping[str, Callable]) -> None:
    """A line of stdin is a job: the path of a library, a command and an environment, as JSON. The answer is its exit
    status and what it printed, a line of stdout."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            child = os.fork()
            if child == 0:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                run_job(commands, *json.loads(line))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            printed.seek(0)
            print(json.dumps((status, printed.read())), flush=True)
