"""Trains a table under exact Adam in processes that are killed at random moments: run by test_exact_steps.py.

Each goes on from the file that the one before it saved last, every seven steps. Prints how many were killed, and the
digests of what they come to and of what a process comes to that nobody disturbs.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from exact_adam import bag, make, train

STEPS, KILLS, SAVED_EVERY = 600, 30, 7


def train_to_the_end(file: Path, say: int, steps: int = STEPS) -> None:
    """Writes a byte to ``say`` before each step; ``file`` has the last state."""
    module, begin = bag(dtype=torch.float32), 0
    if file.exists():
        begin, weights, state = torch.load(file)
        module.load_state_dict(weights)
    module, optimizer = make("AdamW", True, module)
    if begin:
        optimizer.load_state_dict(state)
    for step in range(begin, steps + 1):
        os.write(say, b".")
        if step % SAVED_EVERY == 0 or step == steps:
            torch.save((step, module.state_dict(), optimizer.state_dict()), file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        if step < steps:
            train(module, optimizer, None, [step])


def run(file: Path, steps: int | None, seconds: float) -> bool:
    """A process that is killed so long after it began its ``steps``-th step -> whether it was."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        train_to_the_end(file, say)
        os._exit(0)
    os.close(say)
    for _ in range(steps or 0):
        os.read(hear, 1)
    if steps is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    while os.read(hear, 65536):
        pass
    os.close(hear)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def digest(file: Path) -> str:
    step, weights, state = torch.load(file)
    assert step == STEPS
    moments = state["state"][0]
    values = [weights["weight"], moments["exp_avg"], moments["exp_avg_sq"]]
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for _ in range(2):  # what torch imports and begins once
        train_to_the_end(folder / "warm.pt", os.open(os.devnull, os.O_WRONLY), 2)
    generator, killed, disturbed, undisturbed = random.Random(0), 0, folder / "disturbed.pt", folder / "undisturbed.pt"
    for _ in range(KILLS):
        killed += run(disturbed, generator.randrange(15), generator.uniform(0, 2e-3))
    assert not run(disturbed, None, 0) and not run(undisturbed, None, 0)
    print(killed, digest(disturbed), digest(undisturbed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
