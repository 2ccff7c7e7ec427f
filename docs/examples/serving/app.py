"""Serves a frozen model over HTTP: ``POST /rank`` scores one user's candidates. README.md beside this file says more.

python docs/examples/serving/app.py model.pt --candidates item category
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import prometheus_client as prometheus
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel
from pydantic_core import to_json
from rank_request import JSON, NPY, Limits, Refused, packed, parse, request_type
from starlette.requests import ClientDisconnect

from rankkernels import serve

log = logging.getLogger("uvicorn.error")


class Model:
    """A model and the type of requests to it: where it is loaded again, both change at once."""

    def __init__(self, load: Callable[[], Any], of_candidates: Collection[str], limits: Limits):
        self.frozen, self.loaded = load(), time.time()
        self.request = request_type(self.frozen.inputs, of_candidates, limits)

    def rank(self, request: dict[str, Any]) -> dict[str, np.ndarray]:
        try:
            ranked = self.frozen.rank(**request)
        except (IndexError, ValueError) as error:  # an id outside its table, numbers of another width: it names them
            raise Refused(422, {"loc": [], "msg": str(error)}) from None
        if "k" not in request:
            return {"scores": ranked.numpy()}
        return {"scores": ranked.values.numpy(), "indices": ranked.indices.numpy()}


class Ranker:
    """Ranks requests as they came, in threads beside the event loop: one queue, and the first that is free takes the
    next.

    Requests share nothing that could be computed once, so a batch saves wake-ups of the event loop and nothing else:
    answers are handed over together, when nobody waits any more and at the latest after ``HAND_OVER`` seconds.
    """

    HAND_OVER = 0.002

    def __init__(self, limits: Limits, rankers: int, observe: Callable[[float], None]):
        self.limits, self.observe, self.loop = limits, observe, asyncio.get_running_loop()
        self.waiting = 0
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._work, name=f"ranker {i}") for i in range(rankers)]
        for thread in self.threads:
            thread.start()

    def admit(self) -> None:
        if self.waiting >= self.limits.waiting:
            raise Refused(503, {"loc": [], "msg": f"{self.waiting} requests are waiting"})

    async def rank(self, model: Model, request: dict[str, Any]) -> dict[str, np.ndarray]:
        self.waiting += 1
        try:
            answer = self.loop.create_future()
            self.jobs.put((answer, time.perf_counter() + self.limits.seconds, partial(model.rank, request)))
            return await answer
        finally:
            self.waiting -= 1

    def stop(self) -> None:
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        done, began = [], 0.0
        while job := self.jobs.get():
            answer, latest, rank = job
            began = began if done else time.perf_counter()
            done.append((answer, self._result(rank, latest)))
            if self.jobs.empty() or time.perf_counter() - began > self.HAND_OVER:
                self.loop.call_soon_threadsafe(self._hand_over, done)
                done = []

    def _result(self, rank: Callable[[], Any], latest: float) -> Any:
        began = time.perf_counter()
        if began > latest:
            return Refused(503, {"loc": [], "msg": "the request has waited too long"})
        try:
            return rank()
        except Exception as error:
            return error
        finally:
            self.observe(time.perf_counter() - began)

    @staticmethod
    def _hand_over(done: list[tuple[asyncio.Future, Any]]) -> None:
        for answer, result in done:
            if answer.cancelled():
                continue
            if isinstance(result, Exception):
                answer.set_exception(result)
            else:
                answer.set_result(result)


class Metrics:
    def __init__(self):
        self.registry = prometheus.CollectorRegistry()
        to_it = {"registry": self.registry}
        milliseconds = [m / 1000 for m in (0.25, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500)]
        self.requests = prometheus.Counter("rank_requests", "Requests to /rank.", ["status"], **to_it)
        self.seconds = prometheus.Histogram("rank_seconds", "Request to answer.", buckets=milliseconds, **to_it)
        self.in_model = prometheus.Histogram("rank_model_seconds", "In the model.", buckets=milliseconds, **to_it)
        self.waiting = prometheus.Gauge("rank_waiting", "Requests accepted and not yet answered.", **to_it)
        self.reloads = prometheus.Counter("rank_reloads", "Models loaded since the start.", ["result"], **to_it)


class Service:
    def __init__(self, load: Callable[[], Any], of_candidates: Collection[str], limits: Limits, rankers: int):
        self.limits, self.rankers, self.metrics = limits, rankers, Metrics()
        self.make_model = partial(Model, load, of_candidates, limits)
        self.model = self.make_model()

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI):
        """Uvicorn ends this when all that was accepted has been answered."""
        self.ranker = Ranker(self.limits, self.rankers, self.metrics.in_model.observe)
        self.metrics.waiting.set_function(lambda: self.ranker.waiting)
        self.reload = asyncio.Event()
        reloading = asyncio.create_task(self._reload())
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload.set)
        yield
        reloading.cancel()
        self.ranker.stop()

    async def _reload(self) -> None:
        while await self.reload.wait():
            self.reload.clear()
            try:
                self.model = await asyncio.to_thread(self.make_model)
            except Exception:
                log.exception("the model cannot be loaded, the one before stays")
                self.metrics.reloads.labels("failed").inc()
            else:
                log.info("the model has been loaded again")
                self.metrics.reloads.labels("ok").inc()

    async def rank(self, request: Request) -> Response:
        began, status, headers = time.perf_counter(), 200, {}
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            answer = await self._ranked(content_type, request)
        except Refused as refused:
            status, content_type, answer = refused.status, JSON, detail(*refused.wrong)
            headers = {"Retry-After": "1"} if status == 503 else {}
        except Exception:
            log.exception("a request that is not refused cannot be ranked")
            status, content_type, answer = 500, JSON, detail({"loc": [], "msg": "internal error"})
        self.metrics.requests.labels(status).inc()
        self.metrics.seconds.observe(time.perf_counter() - began)
        return Response(answer, status, headers, content_type)

    async def _ranked(self, content_type: str, request: Request) -> bytes:
        body = await read(request, self.limits.body)
        self.ranker.admit()
        model = self.model  # this request's own, whatever is loaded meanwhile
        ranked = await self.ranker.rank(model, parse(content_type, body, model.request))
        if content_type == JSON:
            return to_json({name: array.tolist() for name, array in ranked.items()}, inf_nan_mode="null")
        return packed(ranked)

    def openapi(self, app: FastAPI) -> dict[str, Any]:
        """With the request's type, which is the loaded model's."""
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        request = self.model.request.json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"].update(request.pop("$defs"))
        body = {JSON: {"schema": request}, NPY: {"schema": {"type": "string", "format": "binary"}}}
        schema["paths"]["/rank"]["post"]["requestBody"] = {"required": True, "content": body}
        return schema


def detail(*wrong: dict[str, Any]) -> str:
    """The body of a refusal; ``json`` escapes what of a request UTF-8 does not have."""
    return json.dumps({"detail": wrong}, separators=(",", ":"))


async def read(request: Request, largest: int) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > largest:
                raise Refused(413, {"loc": [], "msg": f"the body must have at most {largest} bytes"})
    except ClientDisconnect:
        raise Refused(400, {"loc": [], "msg": "the body is incomplete"}) from None
    return bytes(body)


class Scores(BaseModel):
    scores: list[float]
    indices: list[int] | None = None


class Wrong(BaseModel):
    detail: list[dict[str, Any]]


def create_app(
    load: Callable[[], Any], of_candidates: Collection[str], limits: Limits | None = None, rankers: int = 1
) -> FastAPI:
    """An app for the model that ``load()`` gives now and whenever the process gets SIGHUP.

    ``of_candidates`` are the features that differ from candidate to candidate; the others are the user's. ``rankers``
    requests are ranked at a time, by a thread each.
    """
    service = Service(load, of_candidates, limits or Limits(), rankers)
    app = FastAPI(title="rank", lifespan=service.running)
    app.state.service, app.openapi = service, lambda: service.openapi(app)

    @app.post("/rank", response_model=Scores, responses={s: {"model": Wrong} for s in (400, 413, 415, 422, 500, 503)})
    async def rank(request: Request) -> Response:
        """One user's candidates -> their scores, or the scores and the indices of the best ``k``."""
        return await service.rank(request)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The model's inputs, and when it was loaded in seconds since 1970."""
        return {"loaded": service.model.loaded, "inputs": service.model.frozen.inputs}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(prometheus.generate_latest(service.metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file that FrozenModel.save wrote")
    parser.add_argument("--candidates", nargs="+", required=True, help="features of candidates; the others: a user's")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rankers", type=int, default=1, help="requests that are ranked at a time: as many as cores")
    parser.add_argument("--threads", type=int, default=1, help="for one request")
    parser.add_argument("--mmap", action="store_true", help="leave tables in the file: processes share them")
    for field in fields(Limits):
        parser.add_argument(f"--max-{field.name}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = Limits(**{field.name: getattr(options, f"max_{field.name}") for field in fields(Limits)})
    load = partial(serve.load, options.model, mmap=options.mmap)
    app = create_app(load, options.candidates, limits, options.rankers)
    uvicorn.run(
        app, host=options.host, port=options.port, access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=30
    )


if __name__ == "__main__":
    main()
