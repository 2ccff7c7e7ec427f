"""The record of ``bench.gpu.check`` as Markdown."""

from __future__ import annotations

from bench.report import tables


def verdict(ok: bool | None) -> str:
    return {True: "ok", False: "WRONG", None: "not done"}[ok]


def device_line(device: dict) -> str:
    size = f"{device['memory_gib']} GiB, {device['multiprocessors']} multiprocessors"
    return f"{device['name']} ({device['kind']}), {size}; torch {device['torch']}, rankkernels {device['rankkernels']}"


def failures(record: dict) -> list[str]:
    """What is wrong, a line each."""
    found = [f"{f['part']}: {f['what']}: {f['detail']}" for f in record["findings"] if f["ok"] is False]
    return found + [f"timings: {t['case']} {t['dtype']}: {t['error']}" for t in record["timings"] if "wrong" in t]


def summary(record: dict) -> list[str]:
    """A row for each part: how many checks passed, failed and were not done."""
    parts = list(dict.fromkeys(f["part"] for f in record["findings"]))
    counts = {p: [sum(f["part"] == p and f["ok"] is ok for f in record["findings"]) for ok in (True, False, None)]
              for p in parts}  # fmt: skip
    return tables.markdown(["part", "ok", "wrong", "not done"], [[p, *map(str, counts[p])] for p in parts])


def not_done(record: dict) -> list[str]:
    """The reasons, each with what it kept from being done."""
    reasons: dict[str, list[str]] = {}
    for f in record["findings"]:
        if f["ok"] is None:
            reasons.setdefault(f"{f['part']}: {f['detail']}", []).append(f["what"])
    return [f"- {reason} ({len(what)}: {what[0]}{', ..' if len(what) > 1 else ''})" for reason, what in reasons.items()]


def timing_rows(record: dict) -> list[list[str]]:
    rows, ceilings = [], record["ceilings"]
    for t in record["timings"]:
        if "error" in t:
            rows.append([t["case"], t["dtype"], t["error"], *[""] * 7])
            continue
        ours = t["seconds"]["ours"]
        rows.append(
            [t["case"], t["dtype"], t["kind"], f"{1e6 * ours:.1f}"]
            + [f"{s / ours:.2f} ×" if (s := t["seconds"].get(p)) else "" for p in PEERS]
            + [
                f"{100 * t['bytes_per_second'] / ceilings['copy']:.0f} %",
                f"{100 * t['flops_per_second'] / ceilings[t['dtype']]:.1f} %",
            ]
        )
    return rows


PEERS = ("eager", "compile", "EmbeddingBag", "FBGEMM")


def markdown(record: dict) -> str:
    wrong = failures(record)
    lines = ["# GPU check", "", device_line(record["device"]), ""]
    lines += [f"**{len(wrong)} wrong:**", "", *(f"- {w}" for w in wrong)] if wrong else ["Nothing is wrong."]
    if record["findings"]:
        lines += ["", *summary(record)]
        if reasons := not_done(record):
            lines += ["", "Not done:", "", *reasons]
    if record["reference"]:
        lines += ["", "On PyTorch's own kernels, for want of ours:", "", *(f"- {r}" for r in record["reference"])]
    if record["timings"]:
        c = record["ceilings"]
        rates = ", ".join(f"{c[d] / 1e12:.1f} TFLOP/s in {d}" for d in ("float32", "float16", "bfloat16"))
        lines += [
            "",
            f"Measured ceilings: copy {c['copy'] / 1e9:.0f} GB/s, matrix product {rates} (float32 with tf32).",
            "",
            "Medians on the device's clock, contenders in turns, inputs not in the cache, results compared first;",
            "eager and compiled float32 without tf32, PyTorch's default. Shares are of what must be moved and done.",
            "",
            *tables.markdown(
                [
                    "case",
                    "dtype",
                    "pass",
                    "ours, µs",
                    *(f"faster than {p}" for p in PEERS),
                    "of copy",
                    "of matrix rate",
                ],
                timing_rows(record),
            ),
        ]
    return "\n".join([*lines, "", f"{record['seconds']} s in all.", ""])
