"""One record of parts: ``python -m bench.report.merge OUT PART...``, for a benchmark that is run in several calls.

A race that is in several parts is that of the last. What the machine was is that of the first part, but for what
disturbed the races.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def merged(parts: list[dict]) -> dict:
    """The content of the record."""
    whole = parts[0]
    races = {b["fullname"]: b for part in parts for b in part["benchmarks"]}
    conditions = [part["conditions"] for part in parts]
    others = [c["others_cores"] for c in conditions if c["others_cores"] is not None]
    ceilings, bandwidths = {}, {}
    for c in conditions:
        ceilings |= {threads: rates for threads, rates in c["ceilings"].items() if threads not in ceilings}
        for threads, rates in c["read_gb_s"].items():
            if rates is not None:
                low, high = bandwidths.get(threads, rates)
                bandwidths[threads] = [min(low, rates[0]), max(high, rates[1])]
    whole["benchmarks"] = list(races.values())
    whole["conditions"] |= {
        "disturbed": [b["name"] for b in races.values() if b["extra_info"].get("disturbed")],
        "others_cores": max(others, default=None),
        "ceilings": ceilings,
        "read_gb_s": bandwidths,
    }
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", type=Path, nargs="+")
    arguments = parser.parse_args()
    whole = merged([json.loads(path.read_text()) for path in arguments.parts])
    arguments.out.write_text(json.dumps(whole, indent=4) + "\n")


if __name__ == "__main__":
    main()
