"""The example app under schemathesis, which makes right and wrong requests of what /openapi.json says."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
from app import create_app
from hypothesis import HealthCheck, assume, given, settings
from rank_request import NPY, Limits, packed
from running import din, running

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
#: Every request of the right form is right: unknown ids have rows, and there is one feature of candidates.
MODEL = din(oov="hash")


def floats_in(body: object) -> list:
    """3.0 is an integer for JSON Schema and not for the app."""
    found: list = []
    if isinstance(body, dict):
        json.loads(json.dumps(body), parse_float=found.append)
    return found


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("examples", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_every_request_is_answered_as_documented(mode, examples):
    def fuzz(operation) -> None:
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def run(case):
            assume(mode == "negative" or not floats_in(case.body))
            asked.add(case.path)
            case.call_and_validate()

        run()

    asked: set[str] = set()
    with running(create_app(lambda: MODEL, ["item"], Limits(candidates=20, history=10))) as (_, client):
        schema = schemathesis.openapi.from_url(str(client.base_url.join("/openapi.json")))
        for found in schema.get_all_operations():
            if mode == "positive" or found.ok().body:  # of the others nothing can be wrong
                fuzz(found.ok())
    assert "/rank" in asked


@pytest.mark.parametrize("examples", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_npy_files_are_refused_or_read(examples):
    """schemathesis makes none."""
    arrays = {"user.user": np.array(3), "user.clicks": np.arange(4), "candidates.item": np.arange(9)}
    right = packed(arrays)
    draw = random.Random(0)
    with running(create_app(lambda: MODEL, ["item"])) as (_, client):
        for _ in range(examples):
            body = bytearray(right)
            for _ in range(draw.choice([1, 1, 2, 8])):
                body[draw.randrange(len(body))] = draw.randrange(256)
            body = bytes(body[: draw.choice([len(body), draw.randrange(len(body))])])
            response = client.post("/rank", content=body, headers={"content-type": NPY})
            assert response.status_code in (200, 422), (response.text, body)
        response = client.post("/rank", content=right, headers={"content-type": NPY})
        assert np.load(io.BytesIO(response.content))["scores"].shape == (9,)
