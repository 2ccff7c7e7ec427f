"""The records in bench/records, a folder for each processor: what ``pytest bench/bench_X.py --benchmark-json X.json``
wrote, with what its races say."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "bench/records"
#: The records, in the order of the page, and their titles. Others come after them, under their names.
TITLES = {
    "steps": "Whole training steps",
    "ops": "FM interaction and hidden layers",
    "din_attention": "DIN attention",
    "embedding_bag": "Embedding tables",
    "lookup": "Lookups by width",
    "interactions": "Cross networks and pairs of fields",
    "sequence": "Sequence models",
    "linear": "Linear layers",
    "adoption": "Models of FuxiCTR and DeepCTR-Torch, accelerated",
    "models": "Models of torch-rechub, accelerated",
    "serving": "Serving one user",
    "rank": "Frozen models: one user's candidates",
    "shared_history": "Users shared by samples",
    "import": "Import",
    "scaling": "Scaling",
    "end_to_end": "End to end",
}
#: Kinds of pass without a backward.
FORWARD = ("forward", "evaluation")
#: Contenders that are PyTorch as it comes, eager: the charts' measure.
EAGER = ("eager", "torch-rechub", "DeepCTR-Torch", "EmbeddingBag", "torch Adagrad", "one by one")
#: The record measured with glibc's defaults (see conftest): not itself on the page, only what it says about the others.
DEFAULT_MALLOC = "malloc_default"


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


def samples(race: dict) -> int | None:
    """How many samples a call takes, of a case that names it: B, rows N, or a user's candidates."""
    found = re.search(r"\b[BN](\d+)|(\d+) candidates", race["case"])
    return int(found[1] or found[2]) if found else None
