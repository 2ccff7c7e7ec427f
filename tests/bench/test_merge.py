"""Records of parts of a benchmark become one."""

from __future__ import annotations

from bench.report.merge import merged


def part(races: dict[str, float], disturbed: tuple = (), others: float | None = 0.1, read=(9.0, 12.0)) -> dict:
    return {
        "benchmarks": [
            {"name": n, "fullname": f"file::{n}", "stats": {"median": t}, "extra_info": {"disturbed": n in disturbed}}
            for n, t in races.items()
        ],
        "conditions": {
            "isa": "avx2", "disturbed": list(disturbed), "others_cores": others,
            "ceilings": {"1": {"sgemm_gflop_s": others}}, "read_gb_s": {"1": read and list(read)},
        },
    }  # fmt: skip


def test_merged():
    whole = merged([
        part({"a": 1.0, "b": 2.0}, disturbed=("a",)), part({"a": 3.0, "c": 4.0}, ("c",), others=0.5, read=(8.0, 11.0)),
        part({"d": 5.0}, others=None, read=None),
    ])  # fmt: skip
    assert {b["name"]: b["stats"]["median"] for b in whole["benchmarks"]} == {"a": 3.0, "b": 2.0, "c": 4.0, "d": 5.0}
    assert whole["conditions"] == {
        "isa": "avx2", "disturbed": ["c"], "others_cores": 0.5, "ceilings": {"1": {"sgemm_gflop_s": 0.1}},
        "read_gb_s": {"1": [8.0, 12.0]},
    }  # fmt: skip
