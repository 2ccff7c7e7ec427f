"""The example app (docs/examples/serving): its answers, what it refuses, and what it does with those who wait."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from app import create_app
from rank_request import JSON, NPY, Limits, packed
from running import ROWS, Held, deepfm, din, running

LIMITS = Limits(candidates=30, history=20, body=4096)
ITEMS = {"item": [1, 2, 3]}


@pytest.fixture(scope="module")
def client():
    with running(create_app(din, ["item"], LIMITS)) as (_, client):
        yield client


def post(client: httpx.Client, body: bytes | str, content_type: str = JSON) -> httpx.Response:
    return client.post("/rank", content=body, headers={"content-type": content_type})


def post_npy(client: httpx.Client, user: dict, candidates: dict, k: int | None = None) -> httpx.Response:
    arrays = {f"user.{n}": v for n, v in user.items()} | {f"candidates.{n}": v for n, v in candidates.items()}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return post(client, packed(arrays if k is None else arrays | {"k": np.array(k)}), NPY)


def answer_of(response: httpx.Response) -> dict[str, np.ndarray]:
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == NPY:
        record = np.load(io.BytesIO(response.content))
        return {name: record[name] for name in record.dtype.names}
    return {name: np.array(values) for name, values in response.json().items()}


def check_answers(client: httpx.Client, frozen, user: dict, candidates: dict) -> None:
    """Both ways, all scores and the best."""
    lists = {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in user.items()}
    request = {"user": lists, "candidates": {n: v.tolist() for n, v in candidates.items()}}
    for k in (None, 2):
        ranked = frozen.rank(user, candidates, k)
        expected = {"scores": ranked} if k is None else {"scores": ranked.values, "indices": ranked.indices}
        in_json = post(client, json.dumps(request if k is None else {**request, "k": k}))
        for response in (in_json, post_npy(client, user, candidates, k)):
            found = answer_of(response)
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_array_equal(found[name], values.numpy())


@pytest.mark.parametrize("C, L", [(1, 1), (7, 3), (30, 20), (5, 0), (0, 3)])
def test_answers_of_din(client, C, L):
    user = {"user": 3, "clicks": torch.randint(0, ROWS, (L,)).numpy()}
    check_answers(client, din(), user, {"item": torch.randint(0, ROWS, (C,)).numpy()})


def test_answers_of_features_of_every_kind():
    user = {"user": 3, "liked": np.array([4, 5, 0]), "age": 0.25}
    tags = torch.randint(0, ROWS, (6, 4)).numpy()
    candidates = {"item": np.arange(6), "tags": tags, "price": np.linspace(0, 1, 6, dtype=np.float32)}
    candidates["pixels"] = np.ones((6, 3), np.float32)
    with running(create_app(deepfm, list(candidates), LIMITS)) as (_, client):
        check_answers(client, deepfm(), user, candidates)
        ragged = {n: v.tolist() for n, v in candidates.items()}
        ragged["tags"][2] = [1]
        refused = post(client, json.dumps({"user": {"user": 3, "liked": [], "age": 1}, "candidates": ragged}))
        assert refused.status_code == 422 and "one length" in refused.text
        assert [wrong["loc"] for wrong in refused.json()["detail"]] == [["candidates", "tags"]]


def request_with(user: dict | None = None, candidates: dict | None = None, **more) -> str:
    user = {"user": 3, "clicks": [1, 2]} if user is None else user
    return json.dumps({"user": user, "candidates": ITEMS if candidates is None else candidates, **more})


@pytest.mark.parametrize(
    "body, status, said",
    [
        (request_with({"user": 3}), 422, '["user","clicks"]'),
        (request_with({"user": 3, "clicks": [1], "age": 3}), 422, '["user","age"]'),
        (request_with({"user": "3", "clicks": [1]}), 422, '["user","user"]'),
        (request_with({"user": None, "clicks": [1]}), 422, '["user","user"]'),
        (request_with({"user": [3], "clicks": [1]}), 422, '["user","user"]'),
        (request_with({"user": 3, "clicks": 1}), 422, '["user","clicks"]'),
        (request_with({"user": 3, "clicks": [1, 2.5]}), 422, '["user","clicks",1]'),
        (request_with({"user": 3, "clicks": [True]}), 422, '["user","clicks",0]'),
        (request_with({"user": 3, "clicks": [[1]]}), 422, '["user","clicks",0]'),
        (request_with({"user": 3, "clicks": [2**63]}), 422, '["user","clicks",0]'),
        (request_with({"user": 3, "clicks": [1] * 21}), 422, '["user","clicks"]'),
        (request_with({"user": 3, "clicks": [1, ROWS]}), 422, f"clicks[1] = {ROWS} is out of range"),
        (request_with({"user": -1, "clicks": [1]}), 422, "user[0] = -1 is out of range"),
        (request_with(candidates={"item": [1, -7]}), 422, "item[1] = -7 is out of range"),
        (request_with(candidates={}), 422, '["candidates","item"]'),
        (request_with(candidates={"item": list(range(31))}), 422, '["candidates","item"]'),
        (request_with(candidates=[1, 2]), 422, '["candidates"]'),
        (request_with(k=0), 422, '["k"]'),
        (request_with(k=31), 422, '["k"]'),
        (request_with(kk=3), 422, '["kk"]'),
        ('{"user": {"user": 3, "clicks": [1]}}', 422, '["candidates"]'),
        ("[]", 422, "Input should be"),
        ("", 422, "Invalid JSON"),
        ('{"user": ', 422, "Invalid JSON"),
        ("[" * 4000, 422, "Invalid JSON"),
        (b"\xff\xfe", 422, "Invalid JSON"),
        (" " * 5000, 413, "at most 4096 bytes"),
    ],
)  # fmt: skip
def test_wrong_json_is_refused_by_the_field(client, body, status, said):
    response = post(client, body)
    assert response.status_code == status and said in response.text, response.text
    assert len(response.json()["detail"]) <= 10
    assert post(client, request_with()).status_code == 200


USER = {"user": 3, "clicks": np.array([1, 2])}


@pytest.mark.parametrize(
    "user, candidates, said",
    [
        ({"user": 3}, ITEMS, '["user","clicks"]'),
        ({**USER, "age": 1}, ITEMS, '["user","age"]'),
        ({**USER, "clicks": np.array([1.0])}, ITEMS, '["user","clicks",0]'),
        ({**USER, "clicks": np.array(["1"])}, ITEMS, '["user","clicks",0]'),
        ({**USER, "clicks": np.array([[1]])}, ITEMS, '["user","clicks",0]'),
        ({**USER, "clicks": np.array([2**63], np.uint64)}, ITEMS, '["user","clicks",0]'),
        (USER, {"item": np.array([1j])}, '["candidates","item",0]'),
        (USER, {"item": np.arange(31)}, '["candidates","item"]'),
        (USER, {"item": np.array([ROWS])}, f"item[0] = {ROWS} is out of range"),
        (USER, {"item": np.array([None, 1])}, "Object arrays cannot be loaded"),
        (USER, {}, '["candidates","item"]'),
        ({**USER, "\ud800": np.array(1)}, ITEMS, '["user"]'),
    ],
)
def test_a_wrong_npy_is_refused_by_the_field(client, user, candidates, said):
    response = post_npy(client, user, candidates)
    assert response.status_code == 422 and said in response.text, response.text
    assert post_npy(client, USER, {"item": np.arange(3, dtype=np.uint8)}).status_code == 200


def test_what_is_no_npy_and_other_types_of_content(client):
    right = packed({"user.user": np.array(3), "user.clicks": np.arange(2), "candidates.item": np.arange(3)})
    assert len(answer_of(post(client, right, NPY))["scores"]) == 3
    array, several = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(3))
    np.save(several, np.zeros(2, [("user.user", np.int64)]))
    huge = right.replace(b"'<i8', (3,)", b"'<i8', (9**9,)")
    for body in (
        b"",
        b"PK",
        right[:-9],
        right[:50],
        b"\x93NUMPY" + bytes(90),
        array.getvalue(),
        several.getvalue(),
        huge,
    ):
        response = post(client, body, NPY)
        assert response.status_code == 422 and response.json()["detail"], response.text
    assert post(client, bytes(5000), NPY).status_code == 413
    assert post(client, request_with(), "text/plain").status_code == 415
    assert post(client, request_with(), "application/json; charset=utf-8").status_code == 200


def test_candidates_of_unequal_lengths_are_refused():
    with running(create_app(deepfm, ["item", "price"], LIMITS)) as (_, client):
        user = {"user": 3, "liked": [1], "tags": [1], "age": 1, "pixels": [1, 2, 3]}
        candidates = {"item": [1, 2], "price": [0.5, 1]}
        assert len(answer_of(post(client, request_with(user, candidates)))["scores"]) == 2
        response = post(client, request_with(user, {**candidates, "price": [1.0]}))
        assert response.status_code == 422 and "item has 2 candidates, price 1" in response.text
        response = post(client, request_with({**user, "pixels": [1, 2]}, candidates))
        assert response.status_code == 422 and "pixels" in response.text
        response = post(client, request_with(user, {**candidates, "price": [1, 1e39]}))
        assert response.status_code == 422 and "price" in response.text


def test_health_and_metrics_say_what_happened(client):
    health = client.get("/health").json()
    assert health["inputs"] == {"item": "ids", "user": "ids", "clicks": "history"}
    before = client.get("/metrics").text
    assert post(client, request_with()).status_code == 200

    def count(text: str) -> float:
        return float(text.partition('rank_requests_total{status="200"} ')[2].split()[0])

    assert count(client.get("/metrics").text) == count(before) + 1


# ------------------------------------------------------------------------------------------------ waiting, and stopping


def test_those_beyond_the_limit_are_refused_and_the_others_answered():
    model = Held()
    app = create_app(lambda: model, ["item"], Limits(waiting=3, seconds=30))
    with running(app) as (_, client), ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(post, client, json.dumps({"user": {}, "candidates": {"item": [i]}})) for i in range(3)]
        while app.state.service.ranker.waiting < 3:
            threading.Event().wait(0.005)
        refused = post(client, json.dumps({"user": {}, "candidates": ITEMS}))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        model.go.set()
        assert [response.result().json() for response in accepted] == [{"scores": [float(i)]} for i in range(3)]
        assert post(client, json.dumps({"user": {}, "candidates": ITEMS})).status_code == 200
        assert app.state.service.ranker.waiting == 0


def test_those_who_waited_too_long_are_refused_before_they_are_ranked():
    model = Held()
    app = create_app(lambda: model, ["item"], Limits(seconds=0.05))
    with running(app) as (_, client), ThreadPoolExecutor(2) as pool:
        responses = []
        for i in range(2):
            responses.append(pool.submit(post, client, json.dumps({"user": {}, "candidates": {"item": [i]}})))
            while app.state.service.ranker.waiting < i + 1:
                threading.Event().wait(0.005)
        threading.Event().wait(0.1)
        model.go.set()
        assert [response.result().status_code for response in responses] == [200, 503]
        assert model.begun.acquire(blocking=False) and not model.begun.acquire(blocking=False)


def test_so_many_are_ranked_at_a_time_and_each_gets_its_own_answer():
    model = Held()
    app = create_app(lambda: model, ["item"], Limits(seconds=30), rankers=2)
    with running(app) as (_, client), ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(post, client, json.dumps({"user": {}, "candidates": {"item": [i]}})) for i in range(5)]
        assert all(model.begun.acquire(timeout=30) for _ in range(2))
        while app.state.service.ranker.waiting < 5:
            threading.Event().wait(0.005)
        assert not model.begun.acquire(blocking=False)
        model.go.set()
        assert [response.result().json() for response in asked] == [{"scores": [float(i)]} for i in range(5)]


def test_a_model_that_fails_is_an_error_of_ours_and_the_app_lives():
    class Failing(Held):
        def rank(self, user, candidates, k=None):
            if candidates["item"][0] == 7:
                raise RuntimeError("out of memory")
            return torch.ones(1)

    with running(create_app(Failing, ["item"])) as (_, client):
        for item, status in ((1, 200), (7, 500), (1, 200)):
            body = json.dumps({"user": {}, "candidates": {"item": [item]}})
            assert post(client, body).status_code == status


def test_stopping_answers_what_was_accepted():
    model = Held()
    app = create_app(lambda: model, ["item"], Limits(seconds=30))
    with running(app) as (server, client), ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(post, client, json.dumps({"user": {}, "candidates": {"item": [i]}})) for i in range(4)]
        while app.state.service.ranker.waiting < 4:
            threading.Event().wait(0.005)
        server.should_exit = True
        while server.servers[0].is_serving():
            threading.Event().wait(0.005)
        with pytest.raises(httpx.ConnectError):
            httpx.get(client.base_url.join("/health"))
        model.go.set()
        assert [response.result().json() for response in accepted] == [{"scores": [float(i)]} for i in range(4)]


def test_candidates_features_must_be_the_models():
    for wrong in (["items"], ["clicks"]):
        with pytest.raises(ValueError, match=f"candidates cannot have .*{wrong[0]}"):
            create_app(din, wrong)
