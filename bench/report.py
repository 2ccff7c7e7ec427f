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


def load(path: Path) -> tuple[str, list[dict]]:
    """The conditions in one line, and a row for each benchmark that raced against eager."""
    record = json.loads(path.read_text())
    rows = []
    for b in record["benchmarks"]:
        extra, medians = b["extra_info"], b["extra_info"].get("medians_s", {})
        if "eager" not in medians:
            continue
        case = b["name"].split("[")[1].rstrip("]").split("-", 1)[1]
        rows.append(
            {
                "case": case,
                "pass": "forward + backward" if "forward_backward" in b["name"] else "forward",
                "threads": extra["threads"],
                "ours": medians["ours"],
                "eager": medians["eager"] / medians["ours"],
                "compile": medians["compile"] / medians["ours"],
                "read": min(medians["read_sum"], medians["read_dot"]) / medians["ours"],
            }
        )
    info = record["benchmarks"][0]["extra_info"]
    cpu = record["machine_info"]["cpu"].get("brand_raw", record["machine_info"]["processor"])
    conditions = (
        f"{cpu}, {info['isa']} kernels, torch {info['torch']}, Python {record['machine_info']['python_version']}"
    )
    return conditions, rows


def tables(conditions: str, rows: list[dict]) -> str:
    lines = [
        f"float32, medians of interleaved rounds, results checked before timing. {conditions}.",
        "",
        "| case | pass | threads | ours, ms | eager / ours | torch.compile / ours | of read bandwidth |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        share = f"{100 * r['read']:.0f} %" if r["pass"] == "forward" else ""
        lines.append(
            f"| {r['case'].replace('-', ' ')} | {r['pass']} | {r['threads']} | {r['ours'] * 1e3:.2f} "
            f"| {r['eager']:.1f} × | {r['compile']:.1f} × | {share} |"
        )
    return "\n".join(lines) + "\n"


def chart(conditions: str, rows: list[dict], path: Path) -> None:
    """Speed-ups over eager at the most threads measured, torch.compile's beside ours."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    threads = max(r["threads"] for r in rows)
    rows = [r for r in rows if r["threads"] == threads][::-1]
    ink, ours, compiled = "#808080", "#0072b2", "#e69f00"  # Okabe and Ito's palette; the grey shows on light and dark
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    plt.rcParams.update({key: ink for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")})
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.6), layout="constrained")
    for y, r in enumerate(rows):
        for offset, value, colour in ((0.2, r["eager"], ours), (-0.2, r["eager"] / r["compile"], compiled)):
            axes.barh(y + offset, value, 0.36, color=colour)
            axes.annotate(f"{value:.1f}×", (value, y + offset), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [f"{r['case'].replace('-', ' ')}\n{r['pass']}" for r in rows])
    axes.axvline(1, color=ink, linewidth=1)
    axes.set_xlabel("times faster than eager PyTorch (1 = eager)")
    axes.set_xlim(0, 1.12 * max(max(r["eager"], r["eager"] / r["compile"]) for r in rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(ink)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (ours, compiled)]
    axes.legend(handles, ["rankkernels", "torch.compile"], loc="lower right", frameon=False)
    figure.suptitle(f"float32, {threads} threads, {conditions}", fontsize=9, color=ink)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--chart", type=Path, help="write the chart to this SVG file")
    parser.add_argument("--into", type=Path, help="write the tables between the markers of this file")
    parser.add_argument("--check", action="store_true", help="with --into: change nothing, exit 1 if they differ")
    arguments = parser.parse_args()
    conditions, rows = load(arguments.record)
    text = tables(conditions, rows)
    if arguments.chart:
        chart(conditions, rows, arguments.chart)
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
