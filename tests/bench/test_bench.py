"""The benchmarks' tools: what a record becomes, and what counts as slower."""

from __future__ import annotations

import copy
import json
from time import perf_counter

import pytest

from bench.harness.race import Effort, Race
from bench.report import compare, draw
from bench.report.charts import charts
from bench.report.pages import FIRST
from bench.report.records import RECORDS, load


def race(ratio: float, spread: float = 0.02) -> dict:
    contender = dict(median_s=ratio, q1_s=ratio, q3_s=ratio)
    ratios = dict(ratio=ratio, ratio_q1=ratio * (1 - spread), ratio_q3=ratio * (1 + spread))
    ours = dict(median_s=1.0, q1_s=1.0, q3_s=1.0, ratio=1.0, ratio_q1=1.0, ratio_q3=1.0)
    return dict(
        case="FM",
        kind="forward",
        threads=2,
        baseline="eager",
        contenders={"eager": {**contender, **ratios}, "ours": ours},
    )


def record(**entries: dict) -> dict:
    return {
        "machine_info": {"cpu": {"brand_raw": "a processor"}},
        "conditions": {"versions": {"torch": "2.13.0"}, "malloc": "freed memory kept"},
        "datetime": "2026-11-28T06:00:00+00:00",
        "benchmarks": [{"fullname": name, "extra_info": entry} for name, entry in entries.items()],
    }


def given(memory: float) -> dict[str, list[float]]:
    return {"memory": [0.9 * memory, memory, 1.1 * memory], "exchange": [13.0, 13.5, 14.0]}


PEAK = {"case": "FM", "kind": "peak memory", "peak": {"ours": {"allocator_mib": 10.0, "resident_mib": 11.0}}}


@pytest.mark.parametrize(
    "change, code, said",
    [
        (lambda r: None, 0, "3 compared, 0 slower, 0 larger, 0 gone, 0 faster, 0 smaller, 0 new"),
        (lambda r: r["fm"].update(race(4.6)), 0, "0 slower"),  # 8 % is within the tolerance
        (lambda r: r["fm"].update(race(4.0)), 1, "slower: fm: 5.00 (4.90-5.10) -> 4.00 (3.92-4.08) times eager"),
        (lambda r: r["fm"].update(race(4.0, spread=0.3)), 0, "0 slower"),  # within the noise
        (lambda r: r["fm"].update(race(7.0)), 0, "faster: fm"),
        (lambda r: r["fm"].update(race(4.0), disturbed=True), 1, "times eager (disturbed)"),
        (lambda r: r["peak"]["peak"].update(ours={"allocator_mib": 12.0}), 1, "larger: peak: 10.0 -> 12.0 MiB"),
        (lambda r: r["peak"]["peak"].update(ours={"allocator_mib": 10.9}), 0, "0 larger"),
        (lambda r: r["peak"]["peak"].update(ours={"allocator_mib": 5.0}), 0, "smaller: peak"),
        (lambda r: r.pop("din"), 1, "gone: din"),
        (lambda r: r.update(more=race(2.0)), 0, "1 new"),
    ],
)
def test_compare(tmp_path, capsys, change, code, said):
    entries = {"fm": race(5.0), "din": race(3.0), "peak": copy.deepcopy(PEAK)}
    (tmp_path / "old.json").write_text(json.dumps(record(**entries)))
    change(entries)
    (tmp_path / "new.json").write_text(json.dumps(record(**entries)))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, code, said",
    [
        (lambda r: None, 0, "2 ratios in both: 2 agree within 15%, 0 are apart, 0 are apart under different"),
        (lambda r: r["fm"].update(race(4.4)), 0, "0 are apart"),  # 14 %
        # Noise is no excuse.
        (lambda r: r["fm"].update(race(4.3, spread=0.3)), 1, "apart: fm: 5.00 and 4.30 times eager\n"),
        (
            lambda r: r["fm"].update(race(6.0), disturbed=True),
            2,
            "conditions differ: fm: 5.00 and 6.00 times eager; oth",
        ),
        (lambda r: r["fm"].update(race(6.0), given_gb_s=given(60)), 2, "times eager; memory 46 and 60 GB/s\n"),
        (
            lambda r: r["fm"].update(race(6.0), given_gb_s=given(60)),
            2,
            "again: pytest --benchmark-json=NEW/again.json fm\n",
        ),
        # Neither is bandwidth as far apart as the ratios may be, nor extremes, nor what only one race was asked.
        (lambda r: r["fm"].update(race(6.0), given_gb_s=given(50)), 1, "1 are apart, 0 are"),
        (lambda r: r["fm"].update(race(6.0), given_gb_s={"memory": [1, 46, 99]}), 1, "1 are apart, 0 are"),
        (lambda r: r["fm"].update(race(6.0), given_gb_s={"cache": [9, 9, 9]}), 1, "1 are apart, 0 are"),
        (lambda r: r["fm"].pop("given_gb_s") and r["fm"].update(race(6.0)), 1, "1 are apart, 0 are"),
        # One ratio's conditions do not excuse another's.
        (lambda r: (r["fm"].update(race(6.0), given_gb_s=given(60)), r["din"].update(race(9.0))), 1, "apart: din"),
        (lambda r: r["fm"].update(given_gb_s=given(60)), 0, "2 agree"),
        (lambda r: r.pop("din"), 0, "1 ratios in both: 1 agree within 15%, 0 are apart, 0 are apart under different"),
        (lambda r: r.pop("din"), 0, "1 benchmarks are in one of the runs only"),
    ],
)
def test_do_two_runs_agree(tmp_path, capsys, change, code, said):
    entries = {"fm": race(5.0) | {"given_gb_s": given(46)}, "din": race(3.0), "peak": copy.deepcopy(PEAK)}
    (tmp_path / "old.json").write_text(json.dumps(record(**entries)))
    change(entries)
    (tmp_path / "new.json").write_text(json.dumps(record(**entries)))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--agree"]) == code
    assert said in capsys.readouterr().out


def test_a_race_is_run_again_in_the_environment_of_the_old_run(tmp_path, capsys):
    content = record(fm=race(5.0) | {"given_gb_s": given(46)})
    content["conditions"]["environment"] = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}
    (tmp_path / "old.json").write_text(json.dumps(content))
    (tmp_path / "new.json").write_text(json.dumps(record(fm=race(6.0) | {"given_gb_s": given(60)})))
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--agree"]) == 2
    said = capsys.readouterr().out
    assert "again: GLIBC_TUNABLES=glibc.malloc.tcache_count=0 pytest --benchmark-json=NEW/again.json fm\n" in said


def test_compare_takes_folders_and_names_other_conditions(tmp_path, capsys):
    for folder, torch in (("old", "2.13.0"), ("new", "2.14.0")):
        (tmp_path / folder).mkdir()
        content = record(fm=race(5.0))
        content["conditions"]["versions"]["torch"] = torch
        (tmp_path / folder / "ops.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "not the same conditions" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no record in"):
        compare.main([str(tmp_path), str(tmp_path / "new")])


def test_of_a_race_that_was_run_again_the_latest_counts(tmp_path, capsys):
    for folder, file, time, ratio in (("old", "ops", 6, 5.0), ("new", "ops", 7, 9.0), ("new", "again", 8, 5.0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        content = record(fm=race(ratio)) | {"datetime": f"2026-11-28T0{time}:00:00+00:00"}
        (tmp_path / folder / f"{file}.json").write_text(json.dumps(content))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new"), "--agree"]) == 0
    assert "1 agree" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_a_chart_whose_labels_do_not_fit_is_an_error(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    row = {"label": ["FM", "training step"], "baseline": 10.0, "compiled": 4.0, "ours": 1.0}
    draw.draw("memory", {"rows": [row], "caption": "float32"}, tmp_path / "fits.svg")
    with pytest.raises(ValueError, match="wide: a label reaches beyond"):
        draw.draw("memory", {"rows": [row | {"label": ["x" * 200]}], "caption": ""}, tmp_path / "wide.svg")


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_every_kind_of_chart_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pictures = dict(charts(load(RECORDS / FIRST)).values())
    assert len(pictures) >= 4
    for kind, data in pictures.items():
        draw.draw(kind, data, tmp_path / f"{kind}.svg")
        assert (tmp_path / f"{kind}.svg").stat().st_size > 1000


def test_a_contender_that_takes_more_cores_than_threads_are_given_is_refused(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.setattr("time.process_time", lambda: 2 * perf_counter())
    one = Race(None, "", Effort(), print)
    with pytest.raises(AssertionError, match=r"more cores than threads: \{'peer': 2.0, 'ours': 2.0\}"):
        one.measure(lambda: None, {"peer": lambda: None})
