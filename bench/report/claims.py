"""What README.md says of real data, from the records of ``bench.demo.train`` (demo/train.json beside the other records)
and of ``bench_end_to_end.py``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from bench.report.tables import markdown

#: The models by their names in the record of train.py.
TITLES = {"din": "DIN", "deepfm": "DeepFM"}


def load(folder: Path) -> dict | None:
    """The record of ``bench.demo.train``, if there is one beside those of a folder."""
    path = folder / "demo" / "train.json"
    return json.loads(path.read_text()) if path.exists() else None


def paragraph(text: str) -> list[str]:
    return [fill(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def spread(values: Iterable[float], form: str) -> str:
    """From the least to the greatest."""
    texts = list(dict.fromkeys(form.format(v) for v in sorted(values)))
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}"


def raced(races: list[dict]) -> dict[str, float]:
    """How many times torch-rechub's speed that of each of our models was in the end-to-end races."""
    ratios = {r["case"]: r["contenders"]["torch-rechub"]["ratio"] for r in races}
    cases = {model: f"{title}, MovieLens-100k" for model, title in TITLES.items()}
    return {model: ratios[case] for model, case in cases.items() if case in ratios}


def claim(demos: list[dict], end_to_end: list[list[dict]]) -> str:
    """The README's first sentence: the least and the greatest of all records."""

    def compared(model: str, key: str) -> list[float]:
        return [demo["models"][model]["comparison"][key] for demo in demos]

    def speed(model: str) -> str:
        ratios = [found[model] for found in map(raced, end_to_end) if model in found]
        return spread(compared(model, "samples_per_second_ratio") + ratios, "{:.1f}")

    memory = spread([100 * ratio for ratio in compared("din", "peak_memory_ratio")], "{:.0f}")
    return "\n".join(
        paragraph(
            f"**DIN trains {speed('din')} times as fast as torch-rechub's, in {memory} % of the memory, from one "
            "changed import: the same numbers, the same `state_dict`, on the CPU you have.** "
            "([MovieLens-100k](#on-real-data), both with torch's dense Adam, two cores, without AVX-512 and with it. "
            f"DeepFM: {speed('deepfm')} times.)"
        )
    )


def section(demos: list[dict], end_to_end: list[list[dict]]) -> str:
    """What ``make demo`` printed, and what the end-to-end records, with AVX-512 and without, say of the same data."""
    lines = []
    for demo in demos:
        machine, settings, models = demo["machine"], demo["settings"], demo["models"]
        comparisons = [part["comparison"] for part in models.values()]
        worst = max(c["largest_relative_loss_difference"] for c in comparisons)
        lines += paragraph(
            f"What `make demo` printed on {machine['cores']} cores of an {machine['cpu']}, {machine['isa']} kernels, "
            f"torch {demo['versions']['torch']}, batch {settings['batch_size']}, {settings['epochs']} epochs, both "
            "libraries with torch's dense Adam, the same seed and the same batches; the first "
            f"{comparisons[0]['compared_steps']} losses differ by {worst:.1e} relative at most:"
        )
        rows = []
        for model, part in models.items():
            speed, memory = (part["comparison"][k] for k in ("samples_per_second_ratio", "peak_memory_ratio"))
            for r in part["results"]:
                ours = r["library"] == "rankkernels"
                rows.append(
                    [TITLES[model], r["library"], f"{r['auc']:.4f}", f"{r['logloss']:.4f}"]
                    + [f"{r['samples_per_second']:,.0f}{f' ({speed:.2f} ×)' * ours}"]
                    + [f"{r['peak_memory_mib']:.0f} MiB{f' ({memory:.2f} ×)' * ours}"]
                )
        lines += markdown(["model", "library", "AUC", "LogLoss", "samples/s", "peak memory"], rows)
        lines.append("")
    said = [
        f"{kind} DIN is {found['din']:.2f} and DeepFM {found['deepfm']:.2f} times as fast"
        for kind, found in zip(("with AVX-512", "without it"), map(raced, end_to_end))
        if len(found) == len(TITLES)
    ]
    if said:
        same = "on the same data, both with torch's dense Adam"
        lines += paragraph(f"In `make results BENCH=end_to_end`, {same}: {'; '.join(said)}.")
    return "\n".join(lines).rstrip() + "\n"
