"""Bytes that a training step sends over the network, by the way in which tables are spread over workers.

python -m bench.scale             the tables of docs/scale.md
python -m bench.scale --measure   two processes: what the formulas say beside what the processes wrote to their sockets
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import rankkernels as rk
from bench.harness.ranks import run

ID, NUMBER, VALUE = 4, 8, 4  # bytes of a row's id, of a count, of a value


class Shape(NamedTuple):
    """``rows`` of each table, one id a sample each; ``dim``: their width; ``batch``: of all workers together;
    ``dense``: parameters that are no tables'."""

    rows: Sequence[int]
    dim: int
    batch: int
    dense: int


#: Criteo's terabyte of clicks with vocabularies cut to 40 million, as in MLPerf; the MLPs are DLRM's.
CRITEO_1TB = Shape(
    (40_000_000, 39_060, 17_295, 7424, 20_265, 3, 7122, 1543, 63, 40_000_000, 3_067_956, 405_282, 10, 2209, 11_938, 155,
     4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
    dim=128, batch=65_536, dense=2_400_000,
)  # fmt: skip
WORKERS = (8, 64, 512)
MEASURED = Shape((1000, 5000, 50, 7), dim=16, batch=4096, dense=0)


def expected_rows(shape: Shape, workers: int) -> list[float]:
    """The distinct rows of each table in a worker's part of the batch, ids uniform; of real ids they are fewer."""
    return [rows * (1 - (1 - 1 / rows) ** (shape.batch / workers)) for rows in shape.rows]


def all_reduced(values: float, workers: int) -> float:
    """A ring: every value is sent once to be summed and once as the sum, but for the worker's own share."""
    return 2 * (workers - 1) / workers * values * VALUE


def replicated_dense(shape: Shape, workers: int) -> float:
    """Data-parallel, dense gradients of whole tables."""
    return all_reduced(sum(shape.rows) * shape.dim, workers)


def replicated_exchanged(shape: Shape, workers: int, rows: float | None = None) -> float:
    """Data-parallel, ``optim.fuse``: every worker sends to all others the ``rows`` of the busiest, ids and sums, and
    how many they are of each table."""
    rows = sum(expected_rows(shape, workers)) if rows is None else rows
    return (workers - 1) * (rows * (ID + shape.dim * VALUE) + NUMBER * (len(shape.rows) + 1))


def table_wise(shape: Shape, workers: int) -> float:
    """Of the busiest worker: ids go to the tables' owners, rows come back, gradients go there. It sends as a reader the
    ids and gradients of its samples, as the owner of one table in ``workers``, at least of one, that table's rows."""
    samples, tables = shape.batch / workers, len(shape.rows)
    elsewhere = (workers - 1) / workers
    reader = samples * tables * (NUMBER + shape.dim * VALUE) * elsewhere
    owned = max(1, tables / workers)
    return reader + owned * shape.batch * shape.dim * VALUE * elsewhere


def row_wise(shape: Shape, workers: int) -> float:
    """Every worker has a part of each table, and sends its part of every bag's sum; gradients of all bags come back."""
    samples, tables = shape.batch / workers, len(shape.rows)
    ids = samples * tables * NUMBER * (workers - 1) / workers
    return ids + 2 * (workers - 1) * samples * tables * shape.dim * VALUE


SCHEMES: dict[str, Callable[[Shape, int], float]] = {
    "data-parallel, dense gradients": replicated_dense,
    "data-parallel, `optim.fuse`": replicated_exchanged,
    "table-wise": table_wise,
    "row-wise": row_wise,
}


def in_words(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def page_table(shape: Shape = CRITEO_1TB) -> str:
    """What a worker sends in a step."""
    lines = ["| tables | " + " | ".join(f"{n} workers" for n in WORKERS) + " |", "| --- |" + " --- |" * len(WORKERS)]
    rows = {**SCHEMES, "the other parameters, beside each": lambda shape, n: all_reduced(shape.dense, n)}
    for name, scheme in rows.items():
        lines.append(f"| {name} | " + " | ".join(in_words(scheme(shape, n)) for n in WORKERS) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- measurement


def written() -> int:
    """Bytes that this process has written to files and sockets."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


def batch_of(shape: Shape, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    samples = shape.batch // dist.get_world_size()
    return [torch.randint(rows, (samples, 1), generator=generator) for rows in shape.rows]


def exchange_step(shape: Shape, rank: int) -> tuple[Callable[[], None], float]:
    """A step of fused tables, and the bytes that the formula has for it."""
    bags = rk.TableBatchedEmbeddingBag(shape.rows, shape.dim)
    rk.optim.fuse(bags, rk.optim.SGD(bags.parameters()))
    every = [batch_of(shape, r) for r in range(dist.get_world_size())]
    rows = max(sum(ids.unique().numel() for ids in part) for part in every)
    return lambda: bags(every[rank]).sum().backward(), replicated_exchanged(shape, len(every), rows)


def sharded_step(shape: Shape, partial_sums: bool) -> Callable[[], None]:
    """The messages of a step on sharded tables: ids, rows or parts of sums, gradients."""
    workers, tables = dist.get_world_size(), len(shape.rows)
    ids = torch.zeros(shape.batch // workers * tables, dtype=torch.int64)
    values = ids.numel() * shape.dim * (workers if partial_sums else 1)

    def step() -> None:
        for message in (ids, torch.zeros(values), torch.zeros(values)):
            dist.all_to_all_single(torch.empty_like(message), message)

    return step


def measured(rank: int, workers: int, shape: Shape) -> dict[str, tuple[float, int]]:
    step, predicted = exchange_step(shape, rank)
    cases = {"data-parallel, `optim.fuse`": (step, predicted)}
    for name, scheme in (("table-wise", table_wise), ("row-wise", row_wise)):
        cases[name] = sharded_step(shape, scheme is row_wise), scheme(shape, workers)
    found = {}
    for name, (step, predicted) in cases.items():
        step()
        before = written()
        step()
        found[name] = predicted, written() - before
    return found


def measure(workers: int = 2, shape: Shape = MEASURED) -> dict[str, tuple[float, int]]:
    """Of each way that a worker's formula has: the bytes by the formula and the bytes written, of the busiest."""
    of_ranks = run(workers, measured, shape)
    return {name: (found[0], max(of_rank[name][1] for of_rank in of_ranks)) for name, found in of_ranks[0].items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="in two processes")
    if not parser.parse_args(argv).measure:
        print(page_table())
        return 0
    for name, (predicted, counted) in measure().items():
        print(f"{name:30} by the formula {predicted:12,.0f} bytes, written {counted:12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
