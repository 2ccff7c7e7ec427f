"""The report's charts, SVG on a transparent ground: the greys and the colours (Okabe and Ito's, which the colour-blind
tell apart) show on white and on black. A chart carries the digest of what it shows."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path

OURS, COMPILED, EAGER, INK = "#0072b2", "#e69f00", "#d55e00", "#808080"
MORE = ["#cc79a7", "#009e73", "#56b4e9", "#f0e442"]
MARKERS = "osD^vP*X"


def digest(data: dict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def is_current(path: Path, data: dict) -> bool:
    """Whether a chart is there and shows ``data``."""
    return path.exists() and digest(data).encode() in path.read_bytes()


def draw(kind: str, data: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    settings |= {"svg.fonttype": "path", "svg.hashsalt": "rankkernels", "font.size": 10, "axes.titlesize": 10}
    with plt.rc_context(settings):
        kinds = {"bars": speed, "memory": memory, "roofline": roofline, "scaling": scaling, "learning": learning,
                 "load": load}  # fmt: skip
        figure = kinds[kind](plt, data)
        if is_clipped(figure):
            raise ValueError(f"{path.stem}: a label reaches beyond the chart's edge")
        metadata = {"Date": None, "Description": f"data {digest(data)}"}
        figure.savefig(path, format="svg", transparent=True, metadata=metadata)
        plt.close(figure)


def is_clipped(figure) -> bool:
    """Whether a label or a legend reaches beyond the figure's edge."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return min(box.x0, box.y0) < 0 or box.x1 > width or box.y1 > height


def caption(figure, text: str, width: int) -> None:
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    figure.suptitle(textwrap.fill(text, width), x=0.01, ha="left", fontsize=9, color=INK)


def faint_lines(axes) -> None:
    """A grid, open at the top and at the right."""
    axes.grid(color=INK, alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def plain(axis) -> None:
    """0.5, 1, 2, 5 on a logarithmic axis, and not powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def label(parts: list[str]) -> str:
    return "\n".join(part for part in parts if part)


def bar_figure(plt, data: dict, series: list[tuple[str, str]]):
    rows = data["rows"]
    figure, axes = plt.subplots(figsize=(10, 0.5 * len(rows) + 1.7), layout="constrained")
    axes.set_yticks(range(len(rows)), [label(row["label"]) for row in reversed(rows)], fontsize=8.5)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for _, colour in series]
    figure.legend(handles, [name for name, _ in series], loc="outside upper right", ncols=len(series), frameon=False)
    caption(figure, data["caption"], 100)
    return figure, axes, rows[::-1]


def speed(plt, data: dict):
    """How many times faster than eager."""
    figure, axes, rows = bar_figure(plt, data, [("rankkernels", OURS), ("torch.compile", COMPILED)])
    longest = max(max(row["ours"][2], row["compiled"] or 0) for row in rows)
    for y, row in enumerate(rows):
        ours, low, high = row["ours"]
        axes.barh(y + 0.2, ours, 0.36, color=OURS)
        axes.errorbar(ours, y + 0.2, xerr=[[max(0, ours - low)], [max(0, high - ours)]], color=INK, capsize=2, lw=1)
        axes.annotate(f"{ours:.1f}×", (high, y + 0.2), (5, 0), textcoords="offset points", va="center", fontsize=9)
        if row["compiled"] is not None:
            axes.barh(y - 0.2, row["compiled"], 0.36, color=COMPILED)
            place = (row["compiled"], y - 0.2)
            axes.annotate(f"{row['compiled']:.1f}×", place, (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("times faster than eager PyTorch (1 = eager)")
    return figure


def memory(plt, data: dict):
    """Peaks as a share of eager's."""
    figure, axes, rows = bar_figure(plt, data, [("rankkernels", OURS), ("torch.compile", COMPILED)])
    axes.axvline(100, color=INK, linewidth=1)
    widest = 100.0
    for y, row in enumerate(rows):
        for offset, name, colour in ((0.2, "ours", OURS), (-0.2, "compiled", COMPILED)):
            if row[name] is None:
                continue
            share = 100 * row[name] / max(row["baseline"], 1e-9)
            widest = max(widest, share)
            axes.barh(y + offset, share, 0.36, color=colour)
            text = f"{row[name]:,.1f} MiB"
            axes.annotate(text, (share, y + offset), (5, 0), textcoords="offset points", va="center", fontsize=9)
        place = (100, y + 0.2)
        text = f"eager {row['baseline']:,.0f} MiB"
        axes.annotate(text, place, (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.18 * widest)
    axes.set_xlabel("peak memory of a training step, % of eager PyTorch's")
    return figure


def roofline(plt, data: dict):
    """GFLOP/s against flops a byte, under the roofs that the machine showed."""
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    points, ceiling = data["points"], data["ceiling"]
    low, high = (f(p["intensity"] for p in points) for f in (min, max))
    xs = [low / 2 * (4 * high / low) ** (i / 99) for i in range(100)]
    sgemm = ceiling["sgemm_gflop_s"]
    sizes, roofs = list(ceiling["read_gb_s"]), {}
    for mib, style in ((sizes[-1], "-"), (min(sizes, key=lambda s: abs(int(s) - 4)), "--")):
        rate = ceiling["read_gb_s"][mib]
        (roof,) = axes.plot(xs, [min(sgemm, rate * x) for x in xs], style, color=INK, lw=1.2)
        roofs[f"reading {mib} MiB: {rate:.0f} GB/s"] = roof
    axes.annotate(
        f"sgemm: {sgemm:.0f} GFLOP/s", (xs[-1], sgemm), (0, 5), textcoords="offset points", ha="right", fontsize=8.5
    )
    for i, key in enumerate(dict.fromkeys((p["op"], p["kind"]) for p in points)):
        mine = [p for p in points if (p["op"], p["kind"]) == key]
        x = [p["intensity"] for p in mine]
        axes.plot(x, [p["ours"] for p in mine], MARKERS[i % 8], color=OURS, ms=8, ls="", label=f"{key[0]}, {key[1]}")
        axes.plot(x, [p["baseline"] for p in mine], MARKERS[i % 8], color=EAGER, ms=8, ls="", mfc="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.set_xlabel("flops that the mathematics needs for each byte that it must move")
    axes.set_ylabel("GFLOP/s")
    faint_lines(axes)
    names = axes.get_legend_handles_labels()[1]
    shapes = [plt.Line2D([], [], marker=MARKERS[i % 8], color=INK, ls="", ms=7) for i in range(len(names))]
    shapes += [
        plt.Line2D([], [], marker="o", color=OURS, ls=""),
        plt.Line2D([], [], marker="o", color=EAGER, ls="", mfc="none"),
        *roofs.values(),
    ]
    names += ["filled: rankkernels", "hollow: eager", *roofs]
    figure.legend(shapes, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    caption(figure, data["caption"], 130)
    return figure


def scaling(plt, data: dict):
    """Time against one size at a time."""
    ops = list(dict.fromkeys(curve["op"] for curve in data["curves"]))
    lines = [[curve for curve in data["curves"] if curve["op"] == op] for op in ops]
    columns = max(map(len, lines))
    figure, grid = plt.subplots(
        len(lines), columns, figsize=(12, 2.7 * len(lines) + 0.8), layout="constrained", squeeze=False
    )
    places = [(axes, curve) for row, line in zip(grid, lines) for axes, curve in zip(row, line)]
    names = {"rows": "rows of the table", "L": "history or bag length L", "B": "batch size B", "F": "fields F",
             "D": "embedding width D", "threads": "threads"}  # fmt: skip
    for axes, curve in places:
        x, ours, eager, floor = zip(*sorted(curve["points"]))
        axes.plot(x, [1e3 * t for t in eager], "s-", color=EAGER, ms=4, label="eager PyTorch")
        axes.plot(x, [1e3 * t for t in ours], "o-", color=OURS, ms=4, label="rankkernels")
        axes.plot(x, [1e3 * t for t in floor], ":", color=INK, lw=1.5, label="floor")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(x, [f"{v:,}" if v < 100_000 else f"{v:.0e}".replace("e+0", "e") for v in x])
        axes.minorticks_off()
        plain(axes.yaxis)
        axes.set_xlabel(names.get(curve["axis"], curve["axis"]))
        axes.set_ylabel("ms")
        axes.set_title(f"{curve['op']}\n{curve['fixed']}", fontsize=8.5)
        faint_lines(axes)
    for axes in set(grid.flat) - {axes for axes, _ in places}:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    caption(figure, data["caption"], 130)
    return figure


def learning(plt, data: dict):
    """AUC against seconds of training."""
    tasks = data["tasks"]
    figure, grid = plt.subplots(1, len(tasks), figsize=(11, 4.6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(name for task in tasks for name in task["curves"]))
    palette = dict(zip((n for n in names if n != "ours"), [EAGER, COMPILED, *MORE])) | {"ours": OURS}
    for axes, task in zip(grid.flat, tasks):
        for name, curve in task["curves"].items():
            seconds, auc = zip(*curve)
            axes.plot(seconds, auc, marker=MARKERS[names.index(name) % 8], ms=4, color=palette[name])
        axes.axhline(task["target_auc"], color=INK, lw=1, ls=":")
        axes.set_title(task["task"], fontsize=9)
        axes.set_xscale("log")
        plain(axes.xaxis)
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("AUC of the test part")
        faint_lines(axes)
    handles = [plt.Line2D([], [], marker=MARKERS[i % 8], ms=4, color=palette[name]) for i, name in enumerate(names)]
    handles.append(plt.Line2D([], [], color=INK, ls=":"))
    labels = [
        "rankkernels" if name == "ours" else f"rankkernels, {name}" if "fused" in name else name for name in names
    ]
    figure.legend(handles, [*labels, "AUC aimed at"], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    caption(figure, data["caption"], 130)
    return figure


def load(plt, data: dict):
    """Milliseconds until an answer against requests a second."""
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    known = {"ours": OURS, "torch-rechub": EAGER, "torch-rechub compiled": COMPILED}
    others = iter(MORE)
    for i, (name, points) in enumerate(data["curves"].items()):
        colour = known.get(name) or next(others)
        rates, p50, p99 = zip(*sorted(points))
        label = "rankkernels" if name == "ours" else name
        axes.plot(rates, p50, "-", marker=MARKERS[i], ms=4, color=colour, label=label)
        axes.plot(rates, p99, ":", marker=MARKERS[i], ms=4, color=colour, lw=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain(axes.xaxis)
    plain(axes.yaxis)
    axes.set_xlabel("requests that come in a second")
    axes.set_ylabel("ms until an answer: median, dotted p99")
    faint_lines(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    caption(figure, data["caption"], 130)
    return figure
