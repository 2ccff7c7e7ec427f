"""The load test's load (bench/serve/load.py): what it sends and what it says of the answers; and the chart kept."""

from __future__ import annotations

import asyncio
import json
import socket

from app import create_app
from rank_request import Limits
from running import Held, din, running

from bench.report import draw
from bench.serve import __main__ as load_test
from bench.serve import queueing
from bench.serve.load import BROKEN, Load, http, percentiles

RIGHT = http(json.dumps({"user": {"user": 3, "clicks": [1]}, "candidates": {"item": [1, 2]}}).encode())
WRONG = http(b"{}")


def test_a_closed_loop_asks_again_when_it_is_answered():
    with running(create_app(din, ["item"])) as (_, client):
        load = Load(client.base_url.port, [RIGHT, WRONG])
        asyncio.run(load.closed(clients=2, seconds=0.3))
    said = load.summary(0.3)
    assert said["statuses"].keys() == {"200", "422"} and sum(said["statuses"].values()) > 4
    assert len(load.latencies) == said["statuses"]["200"] and len(load.refusals) == said["statuses"]["422"]
    assert len(load.idle) == 2 and said["ms"]["p50"] > 0


def test_an_open_loop_does_not_wait_for_answers():
    model = Held()
    request = http(json.dumps({"user": {}, "candidates": {"item": [1]}}).encode())
    with running(create_app(lambda: model, ["item"], Limits(waiting=3, seconds=30))) as (_, client):
        load = Load(client.base_url.port, [request])

        async def opened_and_let_go():
            asking = asyncio.create_task(load.opened(rate=100, seconds=0.195, poisson=False))
            while load.statuses["503"] < 17:
                await asyncio.sleep(0.01)
            model.go.set()
            await asking

        asyncio.run(opened_and_let_go())
    assert load.statuses == {"200": 3, "503": 17}
    assert min(load.latencies) > 0.1  # from when it was due until it was let go


def test_requests_without_an_answer_are_counted_as_lost():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        load = Load(free.getsockname()[1], [RIGHT])
        asyncio.run(load.opened(rate=100, seconds=0.1, poisson=True))
    assert load.statuses.keys() == {BROKEN}


def test_percentiles():
    assert percentiles([i + 1 for i in range(100)]) == {"p50": 51e3, "p95": 96e3, "p99": 100e3, "max": 100e3}
    assert percentiles([]) == {}


def test_the_chart_draws(tmp_path):
    data = {
        "curves": {name: [[10, 1.0, 2.0], [100, 5.0, 9.0]] for name in ("ours", "torch-rechub", "x")},
        "caption": "c",
    }
    draw.draw("load", data, tmp_path / "load.svg")
    assert draw.is_current(tmp_path / "load.svg", data)


def test_the_queue_is_that_of_the_textbook():
    """One server: of those who come rho wait, on average rho / (2 (1 - rho)) (Pollaczek and Khinchine)."""
    for rho in (0.3, 0.7):
        found = queueing.latencies(1, rho)
        assert abs(sum(found) / len(found) - 1 - rho / (2 * (1 - rho))) < 0.02
        assert abs(sum(latency == 1.0 for latency in found) / len(found) - (1 - rho)) < 0.01
    assert queueing.latencies(30, 0.3)[-1] == 1.0


def test_the_chart_kept_shows_the_record_kept():
    record = json.loads(load_test.RECORD.read_text())
    assert draw.is_current(load_test.CHART, load_test.chart_data(record)), "run: python -m bench.serve --chart"


def test_the_record_kept_has_nobody_lost_and_nobody_late():
    record = json.loads(load_test.RECORD.read_text())
    evenly, at_random = (record["bars"]["1 at a time"][name] for name in ("evenly", "at random"))
    assert evenly["statuses"].keys() == at_random["statuses"].keys() == {"200"}
    assert evenly["seconds"] >= 120 and evenly["ms"]["p99"] <= 3 * evenly["ms"]["p50"]
    ratio, of_queue = (at_random[ms]["p99"] / at_random[ms]["p50"] for ms in ("ms", "queue_ms"))
    assert ratio <= of_queue
    for bars in record["bars"].values():
        overloaded = bars["overloaded"]
        assert overloaded["statuses"].keys() == {"200", "503"}
        assert overloaded["requests_s"] > 0.85 * overloaded["saturation_s"]
    assert record["restart"]["ready_s"] - record["restart"]["torch_s"] < 2
