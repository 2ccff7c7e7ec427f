"""What each contest was expected to take before any ran on a GPU: docs/performance/gpu.md says from what."""

from __future__ import annotations

from typing import NamedTuple

from bench.report.tables import markdown

#: What the microseconds below are of.
DEVICE = "H100 SXM"


class Range(NamedTuple):
    """Microseconds, from the lower bound, or the best case, to what is likely."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g}–{self.high:g}"


def predicted(
    name: str, kind: str, dtype: str = "float32", **contenders: tuple[float, ...]
) -> tuple[tuple[str, str, str], dict[str, Range]]:
    """A contender's time on the device, and as NAME_host the host's."""
    return (name, kind, dtype), {who: Range(us[0], us[-1]) for who, us in contenders.items()}


_TRAINED = "forward + backward"
PREDICTED = dict([
    predicted("26 tables x 100k x 16, B65536", "forward", ours=(83, 120), eager=(240,), compile=(150,)),
    predicted("26 tables x 100k x 16, B65536", f"{_TRAINED} + Adam", ours=(510, 600), eager=(940,), FBGEMM=(460,)),
    predicted("26 tables x 100k x 16, B65536", f"{_TRAINED} + exact Adam", ours=(640, 910), eager=(940,)),
    predicted("26 tables x 100k x 16, B65536", f"{_TRAINED} + row-wise Adagrad", ours=(400, 470), FBGEMM=(300,)),
    predicted("8 tables x 1M x 64, B16384 L20", "forward", ours=(216, 280), eager=(320,), FBGEMM=(280,)),
    predicted("8 tables x 1M x 64, B16384 L20", f"{_TRAINED} + Adam", ours=(2140, 2280), eager=(6500,), FBGEMM=(1660,)),
    predicted("embedding_fm 26 x 16, B65536", "forward", ours=(98, 400), compile=(220,)),
    predicted("DIN B2048 L50 D64 [80, 40]", "forward", ours=(88, 180), eager=(850,), compile=(200,)),
    predicted("DIN B2048 L50 D64 [80, 40]", "forward", "bfloat16", ours=(54, 110), eager=(450,), compile=(85,)),
    predicted("DIN B2048 L50 D64 [80, 40]", _TRAINED, ours=(600,), eager=(2650,), compile=(650,)),
    predicted("DIN B4096 L100 D64 [36]", "forward", ours=(127, 260), eager=(1350,), compile=(440,)),
    predicted("DIN B4096 L100 D64 [36]", _TRAINED, ours=(943, 1900), eager=(4100,), compile=(1200, 1350)),
    predicted("DIN B1024 L50 D16 [36]", _TRAINED, ours=(77, 150), ours_host=(150, 500), eager_host=(650,),
              compile=(120,), compile_host=(170,)),
    predicted("DIN B4096 L50 D8 [256, 128]", _TRAINED, ours=(2750,), eager=(12000,), compile=(3000,)),
    predicted("DeepFM 26 x 100k x 16 [256, 128], B4096", "step", ours=(180, 250), ours_host=(250, 400),
              eager_host=(2500, 3000), compile_host=(1000, 1300)),
    predicted("DIN 2 x L50 D64 [36], B4096", "step", ours=(700, 1600), eager=(4500, 5000), compile=(1600, 1900)),
    predicted("DIN 2 x L50 D8 [256, 128], B4096", "step", ours=(3500, 5500), eager=(24000,), compile=(6000,)),
    predicted("FM B65536 F39 D16", "forward", ours=(49, 56), eager=(250,), compile=(55, 65)),
    predicted("FM B65536 F39 D16", _TRAINED, ours=(147, 174), eager=(700,), compile=(165, 190)),
    predicted("FM B8192 F39 D16", _TRAINED, ours_host=(90,), eager_host=(54, 70), compile_host=(40, 60)),
    predicted("BatchNorm + Dice N4096 H256", "forward", ours=(10,), ours_host=(95,), eager=(45,), eager_host=(80,),
              compile=(9,), compile_host=(25,)),
    predicted("BatchNorm + Dice N65536 H256", _TRAINED, ours=(173, 260), compile=(203,)),
])  # fmt: skip


def of(name: str, kind: str, dtype: str) -> dict[str, Range]:
    return PREDICTED.get((name, kind, dtype), {})


def table() -> list[str]:
    """All of them: the page of docs/performance has this."""
    contenders = list(dict.fromkeys(who for ranges in PREDICTED.values() for who in ranges))
    contenders.sort(key=lambda who: (who.endswith("_host"), who != "ours"))
    rows = [[*key, *(str(ranges.get(who, "")) for who in contenders)] for key, ranges in PREDICTED.items()]
    return markdown(["contest", "pass", "dtype", *(who.replace("_", ", ") for who in contenders)], rows)
