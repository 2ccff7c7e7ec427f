"""From the records in bench/results to tables and charts: ``python bench/report.py`` writes README.md's parts between
``<!-- claim -->``, ``<!-- bench -->``, ``<!-- demo -->`` and their ends, bench/RESULTS.md and the charts, and from the
records in bench/results/avx2, of a processor without AVX-512, the tables of bench/RESULTS-AVX2.md; ``--check`` writes
nothing and exits 1 if something there is not what the records say. A record is what ``pytest bench/bench_X.py
--benchmark-json X.json`` wrote, or train.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import demo_report

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
#: Folders of records, each with its page.
PAGES = {"results": ROOT / "bench/RESULTS.md", "results/avx2": ROOT / "bench/RESULTS-AVX2.md"}
RESULTS = ROOT / "bench/results"
#: The records, in the order of the page, and their titles. Others come after them, under their names.
TITLES = {
    "steps": "Whole training steps",
    "ops": "FM interaction and hidden layers",
    "din_attention": "DIN attention",
    "embedding_bag": "Embedding tables",
    "lookup": "Lookups by width",
    "linear": "Linear layers",
    "serving": "Serving one user",
    "import": "Import",
    "scaling": "Scaling",
    "end_to_end": "End to end",
}
#: How many cases of each record the README's charts show, the first ones, and of which kind where there are several.
HEADLINES = {
    "steps": (3, "training step"),
    "ops": (1, None),
    "din_attention": (2, None),
    "embedding_bag": (2, "fused step"),
    "lookup": (0, None),
    "linear": (0, None),
    "serving": (0, None),
}
#: Kinds of pass without a backward.
FORWARD = ("forward", "evaluation")
#: Contenders that are PyTorch as it comes, eager: the charts' measure.
EAGER = ("eager", "torch-rechub", "DeepCTR-Torch", "EmbeddingBag", "torch Adagrad", "one by one")
#: The record measured with glibc's defaults (see conftest): not itself on the page, only what it says about the others.
DEFAULT_MALLOC = "malloc_default"


HEAD = """\
# Measured{where}

`make results{option}` measures all of this again and writes this page{charts}, with `BENCH=ops` a part of it.
`make bench` measures into build/bench and leaves this page alone; what became slower is said by
`python bench/compare.py bench/{folder} build/bench`. Written by bench/report.py. {other}

Each contender's result was compared with ours before anything was timed. They take turns in every round, each timed
after calls of its own that bring its data back into the caches: these are times of a contender that has the machine to
itself. Times are medians. A column of another's name says how many times faster than its form ours is, as it stands and
after the stroke under torch.compile: the median over the rounds of the ratio within a round. GB/s and GFLOP/s count the
bytes and the flops that the mathematics needs. The floor is those bytes at the bandwidth of reading as many, or those
flops at sgemm's rate, whichever takes longer, both measured in the same run; what writes much past the caches can be
a little faster than reading. How it is done, and why so: [conftest.py](conftest.py).

On a virtual machine the ratios with two threads depend on where the host runs them, at one last-level cache or at two,
and on what its other guests leave of the memory. So each race records what was to be had of both (`given_gb_s`), and
`python bench/compare.py --agree OLD NEW` says of each ratio whether two runs agree, are apart, or met other conditions.
"""
PEAKS = """\
Peak memory of a training step beyond inputs, outputs and gradients, MiB: of torch's allocator / of the process. A
process each, with glibc's defaults.
"""


@dataclass
class Record:
    name: str
    content: dict

    @property
    def entries(self) -> list[dict]:
        return [b["extra_info"] for b in self.content["benchmarks"]]

    @property
    def races(self) -> list[dict]:
        return [e for e in self.entries if len(e.get("contenders", ())) > 1 and "curve" not in e]

    @property
    def peaks(self) -> list[dict]:
        return [e for e in self.entries if "peak" in e]

    @property
    def conditions(self) -> str:
        c, cpu = self.content["conditions"], self.content["machine_info"]["cpu"]
        return (
            f"{cpu.get('brand_raw', 'unknown processor')}, {c['cores']} cores, {c['isa']} kernels, "
            f"torch {c['versions']['torch']}, {c['malloc']}"
        )


def load(folder: Path) -> dict[str, Record]:
    records = {path.stem: Record(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}
    order = [*TITLES, *records]
    return {name: records[name] for name in sorted(records, key=order.index)}


# -------------------------------------------------------------------------------------------------------------- races


def library(contender: str) -> tuple[str, bool]:
    """Whose form of the computation a contender runs, and whether compiled."""
    if contender == "compile":
        return "eager", True
    return contender.removesuffix(" compiled"), contender.endswith(" compiled")


def most_threads(races: list[dict]) -> list[dict]:
    most = max((r["threads"] for r in races), default=0)
    return [r for r in races if r["threads"] == most]


def eager_of(race: dict) -> str | None:
    return next((name for name in EAGER if name in race["contenders"]), None)


def speed_up(race: dict, contender: str) -> list[float]:
    """How many times faster than eager PyTorch: the median and its quartiles."""
    baseline, found = race["contenders"][eager_of(race)], race["contenders"][contender]
    if contender == "ours":
        return [baseline["ratio"], baseline["ratio_q1"], baseline["ratio_q3"]]
    return [baseline["ratio"] / found["ratio"]] * 3


def bars(races: list[dict]) -> list[dict]:
    """For a chart: ours and the fastest compiled contender, over eager PyTorch."""
    rows = []
    for race in filter(eager_of, races):
        compiled = [name for name in race["contenders"] if library(name)[1]]
        fastest = min(compiled, key=lambda name: race["contenders"][name]["ratio"], default=None)
        rows.append(
            {
                "label": [race["case"], race["kind"]],
                "ours": speed_up(race, "ours"),
                "compiled": speed_up(race, fastest)[0] if fastest else None,
            }
        )
    return rows


def times(x: float) -> str:
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def samples(race: dict) -> int | None:
    """How many samples a call takes, of a case that names it: B, rows N, or a user's candidates."""
    found = re.search(r"\b[BN](\d+)|(\d+) candidates", race["case"])
    return int(found[1] or found[2]) if found else None


def race_table(races: list[dict]) -> list[str]:
    peers = list(dict.fromkeys(library(name)[0] for race in races for name in race["contenders"] if name != "ours"))
    shares = any("floor_s" in race for race in races)
    head = ["case", "pass", "threads", "ours, ms (quartiles)", "samples/s"]
    head += ["GB/s", "GFLOP/s", "of the floor"] if shares else []
    lines = ["| " + " | ".join(head + peers) + " |", "| --- " * len(head + peers) + "|"]
    for race in races:
        ours = race["contenders"]["ours"]
        cells = [race["case"], race["kind"], str(race["threads"])]
        cells.append("{} ({}–{})".format(*(milliseconds(ours[k]) for k in ("median_s", "q1_s", "q3_s"))))
        count, seconds = samples(race), ours["median_s"]
        cells.append(f"{float(f'{count / seconds:.3g}'):,.0f}" if count else "")
        if "floor_s" in race:
            cells += [f"{race[k] / seconds / 1e9:.1f}" for k in ("size", "flops")]
            cells.append(f"{100 * race['floor_s'] / seconds:.0f} %")
        elif shares:
            cells += [""] * 3
        if race.get("disturbed"):
            cells[0] += " **!**"
        for peer in peers:
            found = {library(n)[1]: c["ratio"] for n, c in race["contenders"].items() if library(n)[0] == peer}
            cells.append(" / ".join(times(found[c]) if c in found else "–" for c in (False, True)) if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def peak_table(peaks: list[dict]) -> list[str]:
    names = list(dict.fromkeys(name for p in peaks for name in p["peak"] if name != "ours"))
    head = ["case", "ours", *names]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for p in peaks:
        cells = [
            "{allocator_mib:.1f} / {resident_mib:.1f}".format(**p["peak"][n]) if n in p["peak"] else ""
            for n in ("ours", *names)
        ]
        lines.append("| " + " | ".join([p["case"], *cells]) + " |")
    return lines


# -------------------------------------------------------------------------------------------------------------- charts


def charts(records: dict[str, Record]) -> dict[str, tuple[str, dict]]:
    """What each chart shows, by its name: its kind and everything that is drawn."""
    found: dict[str, tuple[str, dict]] = {}
    timed = [records[name] for name in ("steps", "ops", "din_attention", "embedding_bag", "serving") if name in records]
    for name, chosen, kinds in (
        ("speedup", HEADLINES, lambda k: k not in FORWARD),
        ("speedup_training", {}, lambda k: k not in FORWARD),
        ("speedup_forward", {}, lambda k: k in FORWARD),
    ):
        races = []
        for record in timed:
            mine = [r for r in most_threads(record.races) if r["kind"] and kinds(r["kind"])]
            count, kind = chosen.get(record.name, (None, None))
            races += [r for r in mine if kind in (None, r["kind"])][:count]
        if races:
            caption = f"float32, {races[0]['threads']} threads, {timed[0].conditions}"
            found[name] = "bars", {"rows": bars(races), "caption": caption}
    for name, chosen in (("memory", HEADLINES), ("memory_all", {})):
        rows = []
        for record in timed:
            for p in record.peaks[: chosen.get(record.name, (None, None))[0]]:
                baseline = next(n for n in p["peak"] if n != "ours" and not library(n)[1])
                rows.append(
                    {
                        "label": [p["case"], "training step"],
                        "baseline": p["peak"][baseline]["allocator_mib"],
                        "compiled": next((v["allocator_mib"] for n, v in p["peak"].items() if library(n)[1]), None),
                        "ours": p["peak"]["ours"]["allocator_mib"],
                    }
                )
        if rows:
            found[name] = "memory", {"rows": rows, "caption": f"float32, {timed[0].conditions}"}
    with_floor = [
        r for record in timed for r in most_threads(record.races) if r.get("flops") and r["size"] and eager_of(r)
    ]
    if with_floor:
        threads = with_floor[0]["threads"]
        holder = next(r for r in timed if str(threads) in r.content["conditions"].get("ceilings", {}))
        points = []
        for race in with_floor:
            rate = {n: race["flops"] / race["contenders"][n]["median_s"] / 1e9 for n in ("ours", eager_of(race))}
            points.append(
                {
                    "op": re.split(r" [BN]\d", race["case"])[0],
                    "kind": race["kind"],
                    "intensity": race["flops"] / race["size"],
                    "ours": rate["ours"],
                    "baseline": rate[eager_of(race)],
                }
            )
        found["roofline"] = (
            "roofline",
            {
                "points": points,
                "ceiling": holder.content["conditions"]["ceilings"][str(threads)],
                "caption": f"float32, {threads} threads, {holder.conditions}",
            },
        )
    if "scaling" in records:
        record, curves = records["scaling"], {}
        for e in record.entries:
            if "curve" in e:
                c = e["curve"]
                curve = curves.setdefault((c["op"], c["axis"]), {**c, "points": []})
                baseline = e["contenders"][e["baseline"]]["median_s"]
                curve["points"].append([c["value"], e["contenders"]["ours"]["median_s"], baseline, e["floor_s"]])
        found["scaling"] = (
            "scaling",
            {"curves": list(curves.values()), "caption": f"float32, {record.conditions}, medians"},
        )
    if any(e.get("target_auc") for e in (records["end_to_end"].entries if "end_to_end" in records else ())):
        record = records["end_to_end"]
        tasks = [e for e in record.entries if e.get("target_auc")]
        found["end_to_end"] = (
            "learning",
            {
                "tasks": [
                    {
                        "task": e["case"],
                        "target_auc": e["target_auc"],
                        "curves": {name: run["auc_curve"] for name, run in e["learning"].items()},
                    }
                    for e in tasks
                ],
                "caption": f"{tasks[0]['threads']} threads, {record.conditions}",
            },
        )
    return found


CHART_TEXTS = {
    "speedup": (
        "Training: how many times faster than eager PyTorch",
        "Medians over interleaved rounds of the ratio within a round; whiskers are quartiles. torch.compile is the "
        "fastest of the compiled forms.",
    ),
    "memory": (
        "Training: peak memory beyond inputs, outputs and gradients, as a share of eager PyTorch's",
        "Of torch's allocator.",
    ),
    "speedup_training": ("All training passes: how many times faster than eager PyTorch", "As the first."),
    "memory_all": ("All peaks of memory, as a share of eager PyTorch's", "As the second."),
    "speedup_forward": ("Forward: how many times faster than eager PyTorch", "As the first."),
    "roofline": (
        "Roofline: ours and eager PyTorch against what the machine can do",
        "Flops and bytes are those that the mathematics needs, for both.",
    ),
    "scaling": ("Scaling: time against one size at a time", "The floor is the bytes at the bandwidth of reading as "
                "many, or the flops at sgemm's rate, whichever takes longer."),
    "end_to_end": ("End to end: AUC against seconds of training", "Compilation and evaluation are not counted."),
}  # fmt: skip


def picture(name: str, folder: str) -> list[str]:
    title, text = CHART_TEXTS[name]
    return [f"![{title}]({folder}{name}.svg)", "", f"<sub>{title}. {text}</sub>", ""]


# --------------------------------------------------------------------------------------------------------------- pages


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


def option_of(folder: str) -> str:
    """What `make results` is given to write the records of a folder."""
    return "" if folder == "results" else f" RESULTS=bench/{folder}"


def conditions_section(folder: str, records: dict[str, Record]) -> list[str]:
    lines = [
        "## Conditions",
        "",
        "| record | machine | of the day | load before | the machine was | command |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, record in records.items():
        c = record.content["conditions"]
        lines.append(
            f"| [{name}]({folder}/{name}.json) | {record.conditions} | {record.content['datetime'][:10]} "
            f"| {c['load_before']:.2f} | {business(record)} | `make results{option_of(folder)} BENCH={name}` |"
        )
    missing: dict[str, set] = {}
    for record in records.values():
        for peer, reason in record.content["conditions"]["not_measured"].items():
            missing.setdefault(f"{peer} ({reason})", set()).add(record.name)
        for e in record.entries:
            for peer, reason in e.get("not_measured", {}).items():
                if peer not in record.content["conditions"]["not_measured"]:
                    missing.setdefault(f"{peer} ({reason})", set()).add(f"{record.name}, {e['kind']}")
    versions = next(iter(records.values())).content["conditions"]["versions"]
    lines += ["", "Versions: " + ", ".join(f"{n} {v}" for n, v in versions.items() if v) + ".", ""]
    if missing:
        lines += ["Not measured: " + "; ".join(f"{m}: {', '.join(sorted(w))}" for m, w in missing.items()) + ".", ""]
    ceilings = {t: (c, r) for r in records.values() for t, c in r.content["conditions"].get("ceilings", {}).items()}
    for threads, (ceiling, record) in sorted(ceilings.items()):
        reading = ", ".join(f"{rate:.0f} GB/s of {mib} MiB" for mib, rate in ceiling["read_gb_s"].items())
        lines.append(
            f"Ceilings with {threads} thread{'s' * (threads != '1')} ({record.name}): sgemm "
            f"{ceiling['sgemm_gflop_s']:.0f} GFLOP/s; reading {reading}."
        )
        lines.append("")
    return lines


def learning_table(entries: list[dict]) -> list[str]:
    head = ["task", "who", "samples/s", "AUC at the end", "AUC aimed at", "seconds until then"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for e in entries:
        for name, run in e["learning"].items():
            until = "–" if run["seconds_to_target"] is None else f"{run['seconds_to_target']:.2f}"
            auc = f"{run['auc_curve'][-1][1]:.4f}" if run["auc_curve"] else "–"
            target = f"{e['target_auc']:.4f}" if e["target_auc"] else "–"
            cells = [e["case"], name, f"{run['samples_per_s']:,.0f}", auc, target, until]
            lines.append("| " + " | ".join(cells) + " |")
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
            rows.append(f"| {race['case']} | {race['kind']} | {times(keeping)} | {times(default)} |")
    low, middle, high = min(changes), sorted(changes)[len(changes) // 2], max(changes)
    return [
        "Freed memory was kept in the process. With glibc's defaults (BENCH_OPTIONS='--malloc default') "
        f"{len(changes)} of the speed-ups over eager were {low:.2f} to {high:.2f} times those shown here, in the "
        f"middle {middle:.2f}:",
        "",
        "| case | pass | freed memory kept | glibc's defaults |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]


GPU_KERNELS = (
    "Not measured: what the compilers say of them, and the time that the data sheets allow, is in "
    "[gpu_kernels.md](results/gpu_kernels.md)."
)


def page(folder: str, records: dict[str, Record], pictures: dict) -> str:
    first = folder == "results"
    head = HEAD.format(
        where="" if first else " without AVX-512",
        option=option_of(folder),
        charts=" and the charts" if first else "",
        folder=folder,
        other="Without AVX-512: [RESULTS-AVX2.md](RESULTS-AVX2.md)."
        if first
        else "With AVX-512, and with charts: [RESULTS.md](RESULTS.md).",
    )
    lines = [head, *conditions_section(folder, records), *default_malloc(records)]
    if pictures:
        lines += ["## Charts", ""]
        for name in CHART_TEXTS:
            lines += picture(name, f"{folder}/") if name in pictures else []
    for name, record in records.items():
        if name == DEFAULT_MALLOC:
            continue
        parts = []
        if record.races:
            parts += [*race_table(record.races), ""]
        if learning := [e for e in record.entries if "learning" in e]:
            parts += [*learning_table(learning), ""]
        if record.peaks:
            parts += [
                PEAKS,
                *peak_table(record.peaks),
                "",
            ]
        if parts:
            lines += [f"## {TITLES.get(name, name)}", "", *parts]
    if first:
        lines += ["## GPU kernels", "", GPU_KERNELS]
    return "\n".join(lines).rstrip() + "\n"


def excerpt(records: dict[str, Record], pictures: dict) -> str:
    """What the README shows: the first two charts."""
    lines = []
    for name in ("speedup", "memory"):
        lines += picture(name, "bench/results/") if name in pictures else []
    busy = [r.name for r in records.values() if r.content["conditions"]["disturbed"]]
    if busy:
        lines += [f"<sub>Other processes took part while these were measured: {', '.join(busy)}.</sub>", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if something differs")
    arguments = parser.parse_args()
    loaded = {folder: load(ROOT / "bench" / folder) for folder in PAGES}
    records = loaded["results"]
    pictures = charts(records)
    demos = [demo for folder in PAGES if (demo := demo_report.load(ROOT / "bench" / folder))]
    end_to_end = [found["end_to_end"].races if "end_to_end" in found else [] for found in loaded.values()]
    readme = README.read_text()
    for part, text in {
        "claim": demo_report.claim(demos, end_to_end),
        "bench": excerpt(records, pictures),
        "demo": demo_report.section(demos, end_to_end),
    }.items():
        begin, end = f"<!-- {part} -->\n", f"<!-- /{part} -->"
        if begin not in readme or end not in readme:
            parser.error(f"{README}: no part from {begin.strip()} to {end}")
        readme = re.sub(f"{begin}.*{end}", lambda _, new=begin + text + end: new, readme, flags=re.DOTALL)
    texts = {README: readme}
    for folder, path in PAGES.items():
        texts[path] = page(folder, loaded[folder], pictures if folder == "results" else {})
    from charts import draw, is_current

    if arguments.check:
        stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        stale += [
            RESULTS / f"{name}.svg" for name, (_, data) in pictures.items() if not is_current(RESULTS / name, data)
        ]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the records say")
        return int(bool(stale))
    for path, text in texts.items():
        path.write_text(text)
    for name, (kind, data) in pictures.items():
        draw(kind, data, RESULTS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
