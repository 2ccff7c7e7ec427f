"""What became slower: ``python -m bench.report.compare OLD NEW``, two records or two folders of records.

Of a race that more than one record of a folder has, the latest counts.

Compared are speed-ups over the baseline of the same run (eager PyTorch, mostly), because a second of one run is not a
second of another. A race is slower if its speed-up fell by more than ``--tolerance`` and by more than the noise: its
upper quartile is below the lower one of old. Peak memory grows beyond the same tolerance and a MiB, or not at all.
Exits 1 if something became slower, larger, or is not measured any more.

``--agree`` asks instead whether two runs of one code tell the same: of every ratio, to any contender, that is apart by
more than the tolerance, noise or not, it says so. Where the machine was another one during the two races, by the same
tolerance, that is "conditions differ" and no more than that, neither agreement nor its opposite: others took part in
one of them, or the median of what the machine gave (``machine.probe``: memory, cache, exchange between cores) is apart.
What was not probed is no excuse. Exits 1 if a ratio is apart under the same conditions, 2 if ratios are apart under
different conditions only: those races are to be run again, and it prints how.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path


def load(path: Path) -> tuple[dict[str, dict], list[str], dict[str, str]]:
    """The entries by name, the machines they were measured on, and the environment variables."""
    entries, machines, environment = {}, [], {}
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        sys.exit(f"compare: no record in {path}")
    records = [(file, json.loads(file.read_text())) for file in files]
    for file, record in sorted(records, key=lambda pair: pair[1]["datetime"]):
        cpu = record["machine_info"]["cpu"].get("brand_raw", "unknown processor")
        conditions = record["conditions"]
        environment |= conditions.get("environment", {})
        machines.append(f"{cpu}, torch {conditions['versions']['torch']}, {conditions['malloc']}")
        for threads, read in conditions.get("read_gb_s", {}).items():
            if read and read[0] < 0.75 * read[1]:
                print(f"{file}: reading memory with {threads} threads varied from {read[0]:.0f} to {read[1]:.0f} GB/s")
        for benchmark in record["benchmarks"]:
            entries[benchmark["fullname"]] = benchmark["extra_info"]
    return entries, list(dict.fromkeys(machines)), environment


def speed(entry: dict) -> tuple[float, float, float] | None:
    """The speed-up over the baseline: lower quartile, median, upper quartile."""
    if "contenders" in entry:
        if entry.get("baseline") in (None, "ours"):
            return None
        found = entry["contenders"][entry["baseline"]]
        return found["ratio_q1"], found["ratio"], found["ratio_q3"]
    if "speed_up" in entry:
        return tuple(entry["speed_up"])
    return None


def verdict(old: dict, new: dict, tolerance: float) -> tuple[str, str] | None:
    """What changed, slower, larger, faster or smaller, and by how much; None if nothing did beyond the noise."""
    if "peak" in old and "peak" in new:
        before, after = (e["peak"]["ours"]["allocator_mib"] for e in (old, new))
        if abs(after - before) <= max(1.0, tolerance * before):
            return None
        return "larger" if after > before else "smaller", f"{before:.1f} -> {after:.1f} MiB"
    was, now = speed(old), speed(new)
    if was is None or now is None:
        return None
    note = " (disturbed)" if old.get("disturbed") or new.get("disturbed") else ""
    text = (
        f"{was[1]:.2f} ({was[0]:.2f}-{was[2]:.2f}) -> {now[1]:.2f} ({now[0]:.2f}-{now[2]:.2f}) times {old['baseline']}"
        f"{note}"
    )
    if now[1] < was[1] * (1 - tolerance) and now[2] < was[0]:
        return "slower", text
    if was[1] < now[1] * (1 - tolerance) and was[2] < now[0]:
        return "faster", text
    return None


def changed_conditions(old: dict, new: dict, tolerance: float) -> list[str]:
    """In what the machine differed between two races."""
    found = ["others took part"] if old.get("disturbed") or new.get("disturbed") else []
    given = [entry.get("given_gb_s", {}) for entry in (old, new)]
    for name in given[0].keys() & given[1].keys():
        was, now = (g[name][1] for g in given)
        if differ(was, now, tolerance):
            found.append(f"{name} {was:.3g} and {now:.3g} GB/s")
    return sorted(found)


def differ(was: float, now: float, tolerance: float) -> bool:
    return max(was / now, now / was) > 1 + tolerance


def agree(old: dict[str, dict], new: dict[str, dict], tolerance: float, environment: dict[str, str]) -> int:
    count, apart, undecided = 0, [], []
    for name in sorted(old.keys() & new.keys()):
        before, after = (entries[name].get("contenders", {}) for entries in (old, new))
        conditions = changed_conditions(old[name], new[name], tolerance)
        for contender in before.keys() & after.keys() - {"ours"}:
            count += 1
            was, now = before[contender]["ratio"], after[contender]["ratio"]
            if differ(was, now, tolerance):
                text = "; ".join([f"{was:.2f} and {now:.2f} times {contender}", *conditions])
                (undecided if conditions else apart).append((name, text))
    for kind, lines in (("apart", apart), ("conditions differ", undecided)):
        for name, text in sorted(lines):
            print(f"{kind}: {name}: {text}")
    if undecided:
        variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        names = [shlex.quote(name) for name in dict.fromkeys(name for name, _ in undecided)]
        print("again:", *variables, "pytest --benchmark-json=NEW/again.json", *names)
    print(
        f"{count} ratios in both: {count - len(apart) - len(undecided)} agree within {tolerance:.0%}, {len(apart)} are "
        f"apart, {len(undecided)} are apart under different conditions; {len(old.keys() ^ new.keys())} benchmarks are "
        "in one of the runs only"
    )
    return 1 if apart else 2 if undecided else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.15, help="relative change that counts (%(default)s)")
    parser.add_argument("--agree", action="store_true", help="do two runs of one code agree?")
    arguments = parser.parse_args(argv)
    (old, old_machines, environment), (new, new_machines, _) = load(arguments.old), load(arguments.new)
    if old_machines != new_machines:
        print(f"not the same conditions: {'; '.join(old_machines)} and {'; '.join(new_machines)}")
    if arguments.agree:
        return agree(old, new, arguments.tolerance, environment)
    changes = {"slower": [], "larger": [], "gone": sorted(old.keys() - new.keys()), "faster": [], "smaller": []}
    compared = sorted(old.keys() & new.keys())
    for name in compared:
        change = verdict(old[name], new[name], arguments.tolerance)
        if change:
            changes[change[0]].append(f"{name}: {change[1]}")
    for kind, lines in changes.items():
        for line in lines:
            print(f"{kind}: {line}")
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in changes.items())
    print(f"{len(compared)} compared, {counts}, {len(new.keys() - old.keys())} new")
    return int(bool(changes["slower"] or changes["larger"] or changes["gone"]))


if __name__ == "__main__":
    sys.exit(main())
