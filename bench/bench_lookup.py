"""Lookups of one table, forward, at widths that are pieces of a vector, whole vectors and neither.

In the cache: 2,000 rows. Beyond it: 300,000. 100,000 ids, each on its own ("none") or in bags, against what torch and
FBGEMM have for it. What bounds them: docs/performance/embedding.md.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rankkernels as rk
from bench.harness.peers import fbgemm_copy, missing

MANY = 100_000
ROWS = pytest.mark.parametrize("rows", [2_000, 300_000], ids=["cached", "large"])


def fbgemm(weight: torch.Tensor, ids: torch.Tensor, mode: str):
    """FBGEMM's operator on a copy of the table, or None where it is not installed or has no such width."""
    if missing("fbgemm-gpu-cpu") or weight.size(1) % 4:
        return None
    module = fbgemm_copy([weight], pooling_mode=mode.upper())
    values, offsets = ids.flatten(), torch.arange(0, ids.numel() + 1, ids.size(1))
    return lambda: module(values, offsets)


def race_lookup(race, mode: str, N: int, L: int, rows: int, D: int) -> None:
    weight, ids = torch.randn(rows, D), torch.randint(0, rows, (N // L, L))
    if mode == "none":
        ids = ids.flatten()
        contenders = {"EmbeddingBag": lambda: F.embedding(ids, weight)}
    else:
        contenders = {"EmbeddingBag": lambda: F.embedding_bag(ids, weight, mode=mode)}
        theirs = fbgemm(weight, ids, mode)
        if theirs is not None:
            contenders["FBGEMM"] = theirs
    bags = "each id" if mode == "none" else f"bags of {L}"
    with torch.no_grad():
        race(
            lambda: rk.table_batched_embedding_bag([weight], [ids], modes=[mode])[0], contenders,
            case=f"lookup {rows:,} x {D}, {bags}" + (f", {N:,} ids" if N != MANY else ""), kind="forward",
            size=4 * (N + N // L) * D + 8 * N, missing=missing("fbgemm-gpu-cpu"),
        )  # fmt: skip


@ROWS
@pytest.mark.parametrize("D", [4, 10, 16, 24, 40, 64, 128])
@pytest.mark.parametrize("mode, L", [("none", 1), ("sum", 1), ("sum", 5)], ids=["each", "bags_of_1", "bags_of_5"])
def test_lookup(mode, L, D, rows, threads, race):
    race_lookup(race, mode, MANY, L, rows, D)


@ROWS
@pytest.mark.parametrize("D", [10, 16, 64, 128])
def test_a_million(D, rows, threads, race):
    """Where a call's cost is nothing."""
    race_lookup(race, "sum", 1_000_000, 5, rows, D)


@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("mode", ["none", "sum"])
def test_call(mode, B, threads, race):
    """What a call costs beside its rows."""
    weight, ids = torch.randn(2_000, 16), torch.randint(0, 2_000, (B,) if mode == "none" else (B, 5))

    def torchs():
        return F.embedding(ids, weight) if mode == "none" else F.embedding_bag(ids, weight, mode="sum")

    case = f"lookup 2,000 x 16 B{B}, " + ("each id" if mode == "none" else "bags of 5")
    with torch.inference_mode():
        race(
            lambda: rk.table_batched_embedding_bag([weight], [ids], modes=[mode])[0], {"EmbeddingBag": torchs},
            case=case, kind="call",
        )  # fmt: skip
