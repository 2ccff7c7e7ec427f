"""What the pages of docs/ say of other libraries' models, from the records of ``bench_adoption.py`` and
``bench_models.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench.report.claims import paragraph
from bench.report.records import ROOT, Record
from bench.report.tables import markdown, milliseconds, times

#: The processor whose records the pages show.
PROCESSOR = "avx512"


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def _measured(record: Record, options: str) -> list[str]:
    busy = " Other processes took part." if record.content["conditions"]["disturbed"] else ""
    return paragraph(
        f"Medians of interleaved rounds, {record.conditions}, {record.content['datetime'][:10]}.{busy} Again with "
        f"`make bench BENCH={record.name}{options}`; all of it is in [the record](../bench/RESULTS.md)."
    )


def steps(record: Record, library: str) -> str:
    """The training steps of a library's models, by threads."""
    found: dict[str, dict[int, dict]] = {}
    for race in record.races:
        if race["case"].startswith(library):
            found.setdefault(race["case"].removeprefix(library).strip(), {})[race["threads"]] = race["contenders"]
    counts = sorted({n for of_threads in found.values() for n in of_threads}, reverse=True)
    rows = []
    for case, of_threads in found.items():
        cells = [case]
        for n in counts:
            race = of_threads.get(n)
            cells += [milliseconds(race[who]["median_s"]) if race else "–" for who in ("eager", "ours")]
            cells.append(times(race["eager"]["ratio"]) if race else "–")
        rows.append(cells)
    head = ["training step"]
    for n in counts:
        head += [f"eager, ms, {_threads(n)}", "accelerated, ms", "times"]
    return "\n".join([*_measured(record, f" BENCH_OPTIONS='-k {library}'"), *markdown(head, rows)]) + "\n"


def models(record: Record) -> str:
    """How many times torch-rechub's speed its models have accelerated, and how many of their layers are replaced."""
    found: dict[str, dict[str, str]] = {}
    for race in record.races:
        name, _, shape = race["case"].partition(", ")
        of_model = found.setdefault(name, {"layers replaced": str(race.get("replaced", "–"))})
        of_model[f"{race['kind']}, times"] = times(race["contenders"]["torch-rechub"]["ratio"])
    columns = list(dict.fromkeys(column for of_model in found.values() for column in of_model))
    rows = [[name, *(of_model.get(column, "–") for column in columns)] for name, of_model in found.items()]
    table = markdown([shape, *columns], rows)
    return "\n".join([*_measured(record, ""), *table]) + "\n"


#: By the page: the record that it shows, and what of it.
PAGES: dict[Path, tuple[str, Callable[[Record], str]]] = {
    ROOT / "docs/from_fuxictr.md": ("adoption", lambda record: steps(record, "FuxiCTR")),
    ROOT / "docs/from_deepctr_torch.md": ("adoption", lambda record: steps(record, "DeepCTR-Torch")),
    ROOT / "docs/from_torch_rechub.md": ("models", models),
}
