"""What each chart shows, by its name: its kind and everything that is drawn."""

from __future__ import annotations

import re

from bench.report.records import FORWARD, Record, eager_of, library, most_threads, speed_up

#: How many cases of each record the README's charts show, the first ones, and of which kind where there are several.
HEADLINES = {
    "steps": (3, "training step"),
    "ops": (1, None),
    "din_attention": (2, None),
    "embedding_bag": (2, "fused step"),
    "lookup": (0, None),
    "linear": (0, None),
    "adoption": (0, None),
    "models": (0, None),
    "serving": (0, None),
}
CHART_TEXTS = {
    "speedup": (
        "Training: how many times faster than eager PyTorch",
        "Medians over interleaved rounds of the ratio within a round; whiskers are quartiles. torch.compile is the "
        "fastest of the compiled forms. Training steps: torch's dense Adam on both sides; \"fused optimizer\" and "
        "\"exact Adam\" are ours, against that.",
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


def memory_rows(records: list[Record], counts: dict[str, int]) -> list[dict]:
    """Of each record the first peaks, so many as ``counts`` says of it or all."""
    rows = []
    for record in records:
        for p in record.peaks[: counts.get(record.name)]:
            baseline = next(n for n in p["peak"] if n != "ours" and not library(n)[1])
            rows.append(
                {
                    "label": [p["case"], "training step"],
                    "baseline": p["peak"][baseline]["allocator_mib"],
                    "compiled": next((v["allocator_mib"] for n, v in p["peak"].items() if library(n)[1]), None),
                    "ours": p["peak"]["ours"]["allocator_mib"],
                }
            )
    return rows


def speed_charts(timed: list[Record]) -> dict[str, tuple[str, dict]]:
    found: dict[str, tuple[str, dict]] = {}
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
    return found


def memory_charts(timed: list[Record]) -> dict[str, tuple[str, dict]]:
    counts = {name: count for name, (count, _) in HEADLINES.items()}
    rows = {"memory": memory_rows(timed, counts), "memory_all": memory_rows(timed, {})}
    caption = f"float32, {timed[0].conditions}" if timed else ""
    return {name: ("memory", {"rows": found, "caption": caption}) for name, found in rows.items() if found}


def roofline(timed: list[Record]) -> dict[str, tuple[str, dict]]:
    races = [r for record in timed for r in most_threads(record.races) if r.get("flops") and r["size"] and eager_of(r)]
    if not races:
        return {}
    threads = races[0]["threads"]
    holder = next(r for r in timed if str(threads) in r.content["conditions"].get("ceilings", {}))
    points = []
    for race in races:
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
    ceiling = holder.content["conditions"]["ceilings"][str(threads)]
    caption = f"float32, {threads} threads, {holder.conditions}"
    return {"roofline": ("roofline", {"points": points, "ceiling": ceiling, "caption": caption})}


def scaling(records: dict[str, Record]) -> dict[str, tuple[str, dict]]:
    if "scaling" not in records:
        return {}
    record, curves = records["scaling"], {}
    for e in record.entries:
        if "curve" in e:
            c = e["curve"]
            curve = curves.setdefault((c["op"], c["axis"]), {**c, "points": []})
            baseline = e["contenders"][e["baseline"]]["median_s"]
            curve["points"].append([c["value"], e["contenders"]["ours"]["median_s"], baseline, e["floor_s"]])
    caption = f"float32, {record.conditions}, medians"
    return {"scaling": ("scaling", {"curves": list(curves.values()), "caption": caption})}


def end_to_end(records: dict[str, Record]) -> dict[str, tuple[str, dict]]:
    record = records.get("end_to_end")
    entries = [e for e in (record.entries if record else ()) if e.get("target_auc")]
    if not entries:
        return {}
    tasks = [
        {
            "task": e["case"],
            "target_auc": e["target_auc"],
            "curves": {name: run["auc_curve"] for name, run in e["learning"].items()},
        }
        for e in entries
    ]
    caption = f"{entries[0]['threads']} threads, {record.conditions}"
    return {"end_to_end": ("learning", {"tasks": tasks, "caption": caption})}


def compared(records: dict[str, Record]) -> list[Record]:
    """Those whose races the charts of speed and memory show."""
    return [records[name] for name in ("steps", "ops", "din_attention", "embedding_bag", "serving") if name in records]


def charts(records: dict[str, Record]) -> dict[str, tuple[str, dict]]:
    timed = compared(records)
    return {
        **speed_charts(timed),
        **memory_charts(timed),
        **roofline(timed),
        **scaling(records),
        **end_to_end(records),
    }


def picture(name: str, folder: str) -> list[str]:
    title, text = CHART_TEXTS[name]
    return [f"![{title}]({folder}{name}.svg)", "", f"<sub>{title}. {text}</sub>", ""]
