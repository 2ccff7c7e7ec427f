"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.report.records import library, samples


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def times(x: float) -> str:
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def race_table(races: list[dict]) -> list[str]:
    peers = list(dict.fromkeys(library(name)[0] for race in races for name in race["contenders"] if name != "ours"))
    shares = any("floor_s" in race for race in races)
    head = ["case", "pass", "threads", "ours, ms (quartiles)", "samples/s"]
    head += ["GB/s", "GFLOP/s", "of the floor"] if shares else []
    rows = []
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
        rows.append(cells)
    return markdown(head + peers, rows)


def peak_table(peaks: list[dict]) -> list[str]:
    names = ["ours", *dict.fromkeys(name for p in peaks for name in p["peak"] if name != "ours")]
    cell = "{allocator_mib:.1f} / {resident_mib:.1f}"
    rows = [[p["case"], *(cell.format(**p["peak"][n]) if n in p["peak"] else "" for n in names)] for p in peaks]
    return markdown(["case", *names], rows)


def learning_table(entries: list[dict]) -> list[str]:
    rows = []
    for e in entries:
        for name, run in e["learning"].items():
            until = "–" if run["seconds_to_target"] is None else f"{run['seconds_to_target']:.2f}"
            auc = f"{run['auc_curve'][-1][1]:.4f}" if run["auc_curve"] else "–"
            target = f"{e['target_auc']:.4f}" if e["target_auc"] else "–"
            rows.append([e["case"], name, f"{run['samples_per_s']:,.0f}", auc, target, until])
    head = ["task", "who", "samples/s", "AUC at the end", "AUC aimed at", "seconds until then"]
    return markdown(head, rows)
