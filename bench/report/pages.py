"""The pages in bench/, one for the records of each processor, and the README's charts."""

from __future__ import annotations

from bench.report import optimizers
from bench.report.charts import CHART_TEXTS, compared, picture
from bench.report.records import DEFAULT_MALLOC, ROOT, TITLES, Record, speed_up
from bench.report.tables import learning_table, markdown, peak_table, race_table, times

#: By the folder of the records. The first has charts, and is what `make results` writes unless told otherwise.
PAGES = {"avx512": ROOT / "bench/RESULTS.md", "avx2": ROOT / "bench/RESULTS-AVX2.md"}
FIRST = next(iter(PAGES))
HEAD = """\
# Measured{where}

`make results{option}` measures all of this again and writes this page{charts}, with `BENCH=ops` a part of it.
`make bench` measures into build/bench and leaves this page alone; what became slower is said by
`python -m bench.report.compare bench/records/{processor} build/bench`. Written by `python -m bench.report`. {other}

Each contender's result was compared with ours before anything was timed. They take turns in every round, each timed
after calls of its own that bring its data back into the caches: these are times of a contender that has the machine to
itself. Times are medians. A column of another's name says how many times faster than its form ours is, as it stands and
after the stroke under torch.compile: the median over the rounds of the ratio within a round. GB/s and GFLOP/s count the
bytes and the flops that the mathematics needs. The floor is those bytes at the bandwidth of reading as many, or those
flops at sgemm's rate, whichever takes longer, both measured in the same run; what writes much past the caches can be
a little faster than reading. How it is done, and why so: [measuring.md](../docs/performance/measuring.md).

On a virtual machine the ratios with two threads depend on where the host runs them, at one last-level cache or at two,
and on what its other guests leave of the memory. So each race records what was to be had of both (`given_gb_s`), and
`python -m bench.report.compare --agree OLD NEW` says of each ratio whether two runs agree, are apart, or met other
conditions.
"""
PEAKS = """\
Peak memory of a training step beyond inputs, outputs and gradients, MiB: of torch's allocator / of the process. A
process each, with glibc's defaults.
"""


def business(record: Record) -> str:
    c = record.content["conditions"]
    disturbed, races = c["disturbed"], sum("contenders" in e for e in record.entries)
    if c["quick"]:
        return "**measured with --quick: no numbers to quote**"
    if c["others_cores"] is None:
        return "unknown"
    varied = [r for r in c["read_gb_s"].values() if r and r[0] < 0.75 * r[1]]
    steadiness = "".join(f", reading memory varied from {low:.0f} to {high:.0f} GB/s" for low, high in varied)
    if disturbed:
        return f"**busy: other processes took part in {len(disturbed)} of {races} races (marked !)**{steadiness}"
    return "quiet" + steadiness


def option_of(processor: str) -> str:
    """What `make results` is given to write the records of a processor."""
    return "" if processor == FIRST else f" RESULTS=bench/records/{processor}"


def not_measured(records: dict[str, Record]) -> str:
    """Which peers, why and where."""
    missing: dict[str, set] = {}
    for record in records.values():
        nowhere = record.content["conditions"]["not_measured"]
        for peer, reason in nowhere.items():
            missing.setdefault(f"{peer} ({reason})", set()).add(record.name)
        for e in record.entries:
            for peer, reason in e.get("not_measured", {}).items():
                if peer not in nowhere:
                    missing.setdefault(f"{peer} ({reason})", set()).add(f"{record.name}, {e['kind']}")
    return "; ".join(f"{m}: {', '.join(sorted(w))}" for m, w in missing.items())


def conditions_section(processor: str, records: dict[str, Record]) -> list[str]:
    rows = []
    for name, record in records.items():
        c = record.content["conditions"]
        link = f"[{name}](records/{processor}/{name}.json)"
        command = f"`make results{option_of(processor)} BENCH={name}`"
        day, load = record.content["datetime"][:10], f"{c['load_before']:.2f}"
        rows.append([link, record.conditions, day, load, business(record), command])
    head = ["record", "machine", "of the day", "load before", "the machine was", "command"]
    lines = ["## Conditions", "", *markdown(head, rows)]
    versions = next(iter(records.values())).content["conditions"]["versions"]
    lines += ["", "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items() if v) + ".", ""]
    if missing := not_measured(records):
        lines += [f"Not measured: {missing}.", ""]
    ceilings = {t: (c, r) for r in records.values() for t, c in r.content["conditions"].get("ceilings", {}).items()}
    for threads, (ceiling, record) in sorted(ceilings.items()):
        reading = ", ".join(f"{rate:.0f} GB/s of {mib} MiB" for mib, rate in ceiling["read_gb_s"].items())
        lines.append(
            f"Ceilings with {threads} thread{'s' * (threads != '1')} ({record.name}): sgemm "
            f"{ceiling['sgemm_gflop_s']:.0f} GFLOP/s; reading {reading}."
        )
        lines.append("")
    return lines


def default_malloc(records: dict[str, Record]) -> list[str]:
    """What glibc's defaults do to the speed-ups over the baseline."""
    if DEFAULT_MALLOC not in records:
        return []
    kept = {b["fullname"]: b["extra_info"] for r in records.values() if r.name != DEFAULT_MALLOC
            for b in r.content["benchmarks"]}  # fmt: skip
    changes, rows = [], []
    for b in records[DEFAULT_MALLOC].content["benchmarks"]:
        race = b["extra_info"]
        if b["fullname"] in kept and "contenders" in race:
            default, keeping = (speed_up(r, "ours")[0] for r in (race, kept[b["fullname"]]))
            changes.append(default / keeping)
            rows.append([race["case"], race["kind"], times(keeping), times(default)])
    low, middle, high = min(changes), sorted(changes)[len(changes) // 2], max(changes)
    return [
        "Freed memory was kept in the process. With glibc's defaults (BENCH_OPTIONS='--malloc default') "
        f"{len(changes)} of the speed-ups over eager were {low:.2f} to {high:.2f} times those shown here, in the "
        f"middle {middle:.2f}:",
        "",
        *markdown(["case", "pass", "freed memory kept", "glibc's defaults"], rows),
        "",
    ]


GPU_KERNELS = (
    "Not measured: what the compilers say of them, and the time that the data sheets allow, is in "
    "[gpu_kernels.md](gpu/gpu_kernels.md)."
)


def page(processor: str, records: dict[str, Record], pictures: dict) -> str:
    first = processor == FIRST
    head = HEAD.format(
        where="" if first else " without AVX-512",
        option=option_of(processor),
        charts=" and the charts" if first else "",
        processor=processor,
        other="Without AVX-512: [RESULTS-AVX2.md](RESULTS-AVX2.md)."
        if first
        else "With AVX-512, and with charts: [RESULTS.md](RESULTS.md).",
    )
    lines = [head, *conditions_section(processor, records), *default_malloc(records)]
    if pictures:
        lines += ["## Charts", ""]
        for name in CHART_TEXTS:
            lines += picture(name, f"records/{processor}/") if name in pictures else []
    for name, record in records.items():
        if name == DEFAULT_MALLOC:
            continue
        parts = []
        if record.races:
            parts += [*race_table(record.races), ""]
        if learning := [e for e in record.entries if "learning" in e]:
            parts += [*learning_table(learning), ""]
        if record.peaks:
            parts += [PEAKS, *peak_table(record.peaks), ""]
        if parts:
            lines += [f"## {TITLES.get(name, name)}", "", *parts]
    lines += optimizers.section(processor)
    if first:
        lines += ["## GPU kernels", "", GPU_KERNELS]
    return "\n".join(lines).rstrip() + "\n"


def excerpt(records: dict[str, Record], pictures: dict) -> str:
    """What the README shows: the first two charts."""
    lines = []
    for name in ("speedup", "memory"):
        lines += picture(name, f"bench/records/{FIRST}/") if name in pictures else []
    busy = [r.name for r in compared(records) if r.content["conditions"]["disturbed"]]
    if busy:
        lines += [f"<sub>Other processes took part while these were measured: {', '.join(busy)}.</sub>", ""]
    return "\n".join(lines).rstrip() + "\n"
