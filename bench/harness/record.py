"""A run's record: pytest-benchmark's JSON, less what is noise between two records, with what a reader needs."""

from __future__ import annotations

import os

from bench.harness import machine


def complete(output_json: dict, conditions: dict) -> None:
    """Edits the JSON in place."""
    output_json["commit_info"] = {k: output_json["commit_info"].get(k) for k in ("id", "dirty")}
    entries = output_json["benchmarks"]
    for entry in entries:
        for key in ("params", "param", "options", "group"):
            entry.pop(key, None)
        entry["stats"] = {k: entry["stats"][k] for k in ("min", "q1", "median", "q3", "max", "rounds")}
    counts = sorted({e["extra_info"]["threads"] for e in entries if "contenders" in e["extra_info"]})
    output_json["conditions"] = {
        **conditions,
        "ceilings": {str(threads): machine.ceilings(threads) for threads in counts},
        **business(entries, counts),
    }
    output_json["benchmarks"] = rounded(entries)
    output_json["conditions"] = rounded(output_json["conditions"])


def rounded(value):
    """Every float to five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def bandwidth(benchmarks: list[dict], threads: int) -> list[float] | None:
    """The least and the most that reading memory was seen to reach during the races of a run."""
    found = [e["extra_info"] for e in benchmarks if e["extra_info"].get("given_gb_s")]
    found = [e["given_gb_s"]["memory"] for e in found if e["threads"] == threads]
    return [min(low for low, *_ in found), max(high for *_, high in found)] if found else None


def business(benchmarks: list[dict], counts: list[int]) -> dict:
    """How busy others kept the machine over all races of a run."""
    others = [e["extra_info"]["others_cores"] for e in benchmarks if e["extra_info"].get("others_cores") is not None]
    return {
        "load_after": os.getloadavg()[0],
        "others_cores": max(others) if others else None,
        "disturbed": [e["name"] for e in benchmarks if e["extra_info"].get("disturbed")],
        "read_gb_s": {str(threads): bandwidth(benchmarks, threads) for threads in counts},
    }
