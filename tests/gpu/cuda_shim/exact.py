"""Exact Adam's CUDA implementations under the shim, against the ops' defaults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from nn.exact_lists import OPS, ROWS, STEP, by_key, features, refusals, tables

from rankkernels.ops._idle_steps import new_history
from rankkernels.testing import TOLERANCE, relative_error

MODES = [1, 2, 3, 1]  # of a lookup; a step takes no maximum
HYPER = [0.01, 0.9, 0.999, 1e-8, 0.1, STEP + 1.0, 0.5]


def histories(key: str, *_) -> list[torch.Tensor]:
    """Of seventy steps; beta1 of 0 keeps nothing of them."""
    found = []
    for betas in ((0.9, 0.999), (0.0, 0.9)):
        found.append(new_history(80, *betas))
        for step in range(5, 75):
            decays = 0.99 ** (step - 5), 0.99 ** (step - 4)
            by_key(key, OPS.adam_history.default, found[-1], 4, step, *betas, 0.1 / step, *decays)
    return found


# Each of these runs an op on the lists of some tables -> what is to be compared.


def catch_up(key, weights, states, last_steps, histories, clocks):
    """Of rows that several lookups name, and ids outside the table."""
    looked_up = features(MODES)
    looked_up.indices[0][0, :2] = torch.tensor([-1, ROWS])
    by_key(key, OPS.embedding_catch_up.default, weights, states, last_steps, histories, *looked_up, "", clocks)
    return [*weights, *states, *last_steps]


def catch_up_all(key, weights, states, last_steps, histories, clocks):
    by_key(key, OPS.embedding_catch_up_all.default, weights, states, last_steps, histories, clocks)
    return [*weights, *states, *last_steps]


def mark_steps(key, weights, states, last_steps, histories, clocks):
    by_key(key, OPS.embedding_mark_steps.default, last_steps, *features(MODES), [50, 60])
    return last_steps


def look_up(key, weights, states, last_steps, histories, clocks, weighted=False, concat=False):
    lists, looked_up = (weights, states, last_steps, histories), features(MODES, weights[0].dtype if weighted else None)
    if concat:
        looked_up = looked_up.subset([0, 1])[1]
    before = [t.clone() for each in lists for t in each]
    outs = by_key(key, OPS.embedding_bag_exact.default, *lists, *looked_up, "", clocks, concat=concat)
    assert key != "CUDA" or all(map(torch.equal, before, (t for each in lists for t in each)))
    return outs


def step(key, weights, states, last_steps, histories, clocks, max_norm=0.0):
    looked_up, generator = features([1, 2, 1, 1]), torch.Generator().manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype)
             for o in OPS.embedding_bag.default(weights, *looked_up, "")]  # fmt: skip
    grads[1] = None
    of_rows = [*weights, *states, *last_steps]
    before = [t.clone() for t in of_rows]
    op = OPS.embedding_bag_exact_update.default
    lists = weights, states, last_steps, histories
    assert by_key(key, op, grads, *lists, *looked_up, [*HYPER, max_norm, 0.0] * 2, clocks) == []
    stepped = [last == STEP + 1 for last in last_steps]
    assert all(0 < int(rows.sum()) < ROWS for rows in stepped) and not stepped[0][2]  # the frozen row
    for t, old, rows in zip(of_rows, before, [*stepped, *(s for s in stepped for _ in range(2)), *stepped]):
        assert key != "CUDA" or torch.equal(t[~rows], old[~rows])
        t[~rows] = 0  # the default has caught up with rows that are looked up and get no gradient
    return of_rows


RUNS = (catch_up, catch_up_all, mark_steps, look_up, partial(look_up, weighted=True), partial(look_up, concat=True),
        step, partial(step, max_norm=0.5))  # fmt: skip


def compare(run: Callable, arguments: Callable[[], tuple], tolerance: float, digest) -> None:
    results = [run(key, *arguments()) for key in ("CUDA", "CompositeExplicitAutograd")]
    for i, (ours, expected) in enumerate(zip(*results, strict=True)):
        error = relative_error(ours, expected)
        assert error <= tolerance, f"{run}: result {i} is off by {error}"
        digest.update(ours.contiguous().view(torch.uint8).numpy().tobytes())


def exact_adam(digest, some: bool) -> None:
    """Every op in every dtype, on rows that are packs and rows that are not, with and without decay."""
    refusals(MODES)
    compare(histories, tuple, 1e-12, digest)
    cases = [(dtype, D, decay) for dtype in TOLERANCE for D in (1, 19, 64, 300) for decay in (0.0, 0.1)]
    for dtype, D, decay in cases[:: 3 if some else 1]:

        def arguments():
            lists, clocks = tables(dtype, D, decay)
            return *lists, clocks

        for run in RUNS:
            compare(run, arguments, TOLERANCE[dtype], digest)
