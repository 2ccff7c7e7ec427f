"""From a benchmark record to Markdown tables and a chart: ``python bench/report.py results/ops.json``.

The record is ``pytest bench --benchmark-json FILE``. Tables go to standard output, the chart to ``--chart FILE.svg``.
``--into FILE.md`` writes the tables between the markers ``<!-- bench -->`` and ``<!-- /bench -->`` of that file, and
``--check`` only says whether they already stand there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def load(path: Path) -> tuple[str, list[dict], list[dict]]:
    """The conditions in one line, the races against eager and torch.compile, and the peaks of memory."""
    record = json.loads(path.read_text())
    races, peaks = [], []
    for extra in (b["extra_info"] for b in record["benchmarks"]):
        medians = extra.get("medians_s", {})
        if "eager" in medians and "compile" in medians:
            ours = medians["ours"]
            reading = [medians[name] for name in ("read_sum", "read_dot") if name in medians]
            races.append(
                {
                    "case": extra["case"],
                    "pass": "forward + backward" if extra["training"] else "forward",
                    "threads": extra["threads"],
                    "ours": ours,
                    "eager": medians["eager"] / ours,
                    "compile": medians["compile"] / ours,
                    "read": min(reading) / ours if reading and not extra["training"] else None,
                }
            )
        elif "peak_mib" in extra:
            peaks.append({"case": extra["case"], **extra["peak_mib"]})
    info = next(b["extra_info"] for b in record["benchmarks"] if "isa" in b["extra_info"])
    cpu = record["machine_info"]["cpu"].get("brand_raw", record["machine_info"]["processor"])
    return f"{cpu}, {info['isa']} kernels, torch {info['torch']}", races, peaks


def tables(conditions: str, races: list[dict], peaks: list[dict]) -> str:
    lines = [
        f"float32, medians of interleaved rounds, results compared before timing. {conditions}.",
        "",
        "| case | pass | threads | ours, ms | faster than eager | than torch.compile | of read bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in races:
        share = "" if r["read"] is None else f"{100 * r['read']:.0f} %"
        lines.append(
            f"| {r['case']} | {r['pass']} | {r['threads']} | {r['ours'] * 1e3:.2f} | {r['eager']:.1f} × "
            f"| {r['compile']:.1f} × | {share} |"
        )
    if peaks:
        lines += [
            "",
            "Peak memory of a training step beyond inputs, outputs and gradients:",
            "",
            "| case | ours, MiB | eager, MiB | ours / eager |",
            "| --- | --- | --- | --- |",
            *(f"| {p['case']} | {p['ours']:.1f} | {p['eager']:.1f} | {p['ours'] / p['eager']:.3f} |" for p in peaks),
        ]
    return "\n".join(lines) + "\n"


def chart(conditions: str, races: list[dict], path: Path) -> None:
    """Speed-ups over eager at the most threads measured, torch.compile's beside ours."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    threads = max(r["threads"] for r in races)
    races = [r for r in races if r["threads"] == threads][::-1]
    ink, ours, compiled = "#808080", "#0072b2", "#e69f00"  # Okabe and Ito's palette; the grey shows on light and dark
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rankkernels", "font.size": 10})
    plt.rcParams.update({key: ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")})
    figure, axes = plt.subplots(figsize=(10, 0.56 * len(races) + 1.6), layout="constrained")
    for y, r in enumerate(races):
        for offset, value, colour in ((0.2, r["eager"], ours), (-0.2, r["eager"] / r["compile"], compiled)):
            axes.barh(y + offset, value, 0.36, color=colour)
            axes.annotate(f"{value:.1f}×", (value, y + offset), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(races)), [f"{r['case']}\n{r['pass']}" for r in races])
    axes.axvline(1, color=ink, linewidth=1)
    axes.set_xlabel("times faster than eager PyTorch (1 = eager)")
    axes.set_xlim(0, 1.12 * max(max(r["eager"], r["eager"] / r["compile"]) for r in races))
    axes.set_ylim(-0.6, len(races) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (ours, compiled)]
    figure.legend(handles, ["rankkernels", "torch.compile"], loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(f"float32, {threads} threads, {conditions}", x=0.01, ha="left", fontsize=9, color=ink)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--chart", type=Path, help="write the chart to this SVG file")
    parser.add_argument("--into", type=Path, help="write the tables between the markers of this file")
    parser.add_argument("--check", action="store_true", help="with --into: change nothing, exit 1 if they differ")
    arguments = parser.parse_args()
    conditions, races, peaks = load(arguments.record)
    text = tables(conditions, races, peaks)
    if arguments.chart:
        chart(conditions, races, arguments.chart)
    if not arguments.into:
        print(text)
        return 0
    old = arguments.into.read_text()
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}{END}", old, flags=re.DOTALL)
    if BEGIN not in old:
        parser.error(f"{arguments.into}: no line {BEGIN}")
    if arguments.check:
        return int(new != old)
    arguments.into.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
