"""The records of ``bench.gpu.check`` as Markdown, of a run that was killed, too:
``python -m bench.gpu.check_report results/gpu_check.jsonl``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import predictions
from bench.report import tables

#: Who races, in the order of the columns.
CONTENDERS = ("ours", "eager", "FBGEMM", "compile")


#: Of a part that did not end by itself. torch.compile, which takes as long as it takes, is not wrong by it.
LATE = "ended, because its time was over"


def read(path: Path) -> list[dict]:
    """The records of a log, whose last line may be cut off."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def of_kind(records: Sequence[dict], kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


def verdict(ok: bool | None) -> str:
    return {True: "ok", False: "WRONG", None: "not done"}[ok]


def device_line(device: dict) -> str:
    size = f"{device['memory_gib']} GiB, {device['multiprocessors']} multiprocessors"
    versions = ", ".join(f"{name} {device[name]}" for name in ("torch", "triton", "rankkernels"))
    return f"{device['name']} ({device['target']}), {size}; {versions}"


def failures(records: Sequence[dict]) -> list[str]:
    """What is wrong, a line each."""
    found = [f"{f['part']}: {f['what']}: {f['detail']}" for f in of_kind(records, "finding") if f["ok"] is False]
    for t in of_kind(records, "timing"):
        what = f"{t['part']}: {t['case']}, {t['pass']}, {t['dtype']}"
        found += [f"{what}: {t['error']}"] if "error" in t else []
        found += [f"{what}: {name}: {why}" for name, why in t.get("raised", {}).items()]
    ended = [(p["part"], p["error"]) for p in of_kind(records, "part") if p["error"]]
    return found + [f"{part}: {error}" for part, error in ended if (part, error) != ("compile", LATE)]


def contenders(timing: dict) -> list[str]:
    """Each one's microseconds on the device and, where they are more, of the host, with what was expected."""
    expected = predictions.of(timing["case"], timing["pass"], timing["dtype"])
    cells = []
    for name in CONTENDERS:
        if name not in timing.get("seconds", {}):
            cells.append("")
            continue
        device, host = (1e6 * timing[clock][name] for clock in ("seconds", "host"))
        cell = f"{device:.1f}" + "*" * (name in timing["no graph"])
        cell += f" ({expected[name]})" if name in expected else ""
        who = f"{name}_host"
        if host > device or who in expected:
            cell += f", host {host:.0f}" + (f" ({expected[who]})" if who in expected else "")
        cells.append(cell)
    return cells


def line(record: dict) -> str:
    """What is printed of a record as soon as it is there."""
    if record["kind"] == "timing":
        what = f"{record['part']}: {record['case']}, {record['pass']}, {record['dtype']}: "
        found = [f"{name} {cell}" for name, cell in zip(CONTENDERS, contenders(record)) if cell]
        return what + ("; ".join(found) if "seconds" in record else record["error"])
    if record["kind"] == "finding" and record["ok"] is False:
        return f"{record['part']}: {record['what']}: {verdict(False)}: {record['detail']}"
    return ""


def summary(records: Sequence[dict]) -> list[str]:
    """A row for each part that checks: how many checks passed, failed and were not done."""
    findings = of_kind(records, "finding")
    parts = list(dict.fromkeys(f["part"] for f in findings))
    counts = {p: [sum(f["part"] == p and f["ok"] is ok for f in findings) for ok in (True, False, None)]
              for p in parts}  # fmt: skip
    return tables.markdown(["part", "ok", "wrong", "not done"], [[p, *map(str, counts[p])] for p in parts])


def not_done(records: Sequence[dict]) -> list[str]:
    """The reasons, each with what it kept from being done."""
    reasons: dict[str, list[str]] = {}
    for f in of_kind(records, "finding"):
        if f["ok"] is None:
            reasons.setdefault(f"{f['part']}: {f['detail']}", []).append(f["what"])
    if any((p["part"], p["error"]) == ("compile", LATE) for p in of_kind(records, "part")):
        reasons[f"compile: {LATE}"] = ["what is not in the table"]
    return [f"- {reason} ({len(what)}: {what[0]}{', ..' if len(what) > 1 else ''})" for reason, what in reasons.items()]


def merged(records: Sequence[dict]) -> list[dict]:
    """The timings; torch.compile's, which come last and in a process of their own, in the row of the others."""
    rows: list[dict] = []
    for t in of_kind(records, "timing"):
        same = [r for r in rows if all(r[k] == t[k] for k in ("case", "pass", "dtype")) and "seconds" in r]
        if t["part"] != "compile":
            rows.append(dict(t))
        elif "seconds" in t and same:
            same[-1]["seconds"] = {**t["seconds"], **same[-1]["seconds"]}
            same[-1]["host"] = {**same[-1]["host"], **t["host"]}  # the first were measured beside the build
            same[-1]["no graph"] = same[-1]["no graph"] + [n for n in t["no graph"] if n == "compile"]
        else:
            rows.append(t)
    return rows


def timing_rows(timings: Sequence[dict], ceilings: dict) -> list[list[str]]:
    rows = []
    for t in timings:
        head = [t["part"], t["case"], t["pass"], t["dtype"]]
        if "seconds" not in t:
            rows.append([*head, t["error"], *[""] * (len(CONTENDERS) + 1)])
            continue
        ours = t["seconds"]["ours"]
        shares = ["", ""]
        if ceilings:
            copied, computed = t["bytes"] / ours / ceilings["copy"], t["flops"] / ours / ceilings[t["dtype"]]
            shares = [f"{100 * copied:.0f} %", f"{100 * computed:.1f} %"]
        rows.append([*head, *contenders(t), *shares])
    return rows


def timing_section(records: Sequence[dict]) -> list[str]:
    ceilings = next(iter(of_kind(records, "ceilings")), {})
    lines = []
    if ceilings:
        rates = ", ".join(f"{ceilings[d] / 1e12:.1f} TFLOP/s in {d}" for d in ("float32", "float16", "bfloat16"))
        copy = f"copy {ceilings['copy'] / 1e9:.0f} GB/s"
        lines += ["", f"Measured ceilings: {copy}, matrix product {rates} (float32 with tf32)."]
    return [
        *lines,
        "",
        "Median microseconds of a call on the device, by replay of a CUDA graph of calls on inputs in turns that leave",
        "nothing in the cache, contenders in turns, results compared first. With *: the calls wait for the device, or",
        "no graph may hold them, and the time has the host's part. Host: until a call without a graph has launched",
        "everything, where that is more or was predicted. In brackets what was expected of an "
        f"{predictions.DEVICE}: docs/performance/gpu.md.",
        "Eager and compiled float32 without tf32, PyTorch's default. Shares are of what must be moved and done.",
        "",
        *tables.markdown(
            ["part", "case", "pass", "dtype", *CONTENDERS, "of copy", "of matrix rate"],
            timing_rows(merged(records), ceilings),
        ),
    ]


def markdown(records: Sequence[dict]) -> str:
    wrong, device = failures(records), next(iter(of_kind(records, "device")), None)
    lines = ["# GPU check", "", device_line(device) if device else "No device was recorded.", ""]
    lines += [f"**{len(wrong)} wrong:**", "", *(f"- {w}" for w in wrong)] if wrong else ["Nothing is wrong."]
    if of_kind(records, "timing"):
        lines += timing_section(records)
    if of_kind(records, "finding"):
        lines += ["", *summary(records)]
    if reasons := not_done(records):
        lines += ["", "Not done:", "", *reasons]
    if references := {f"- {r['op']}: {r['why']}" for r in of_kind(records, "reference")}:
        lines += ["", "On PyTorch's own kernels, for want of ours:", "", *sorted(references)]
    parts = [f"{p['part']} {p['seconds']:.0f} s" for p in of_kind(records, "part")]
    total = next((f"{e['seconds']} s in all." for e in of_kind(records, "end")), "The run was not finished.")
    return "\n".join([*lines, "", f"{total} {', '.join(parts)}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check_report", description=__doc__.split(",")[0])
    parser.add_argument("log", type=Path)
    print(markdown(read(parser.parse_args().log)))


if __name__ == "__main__":
    main()
