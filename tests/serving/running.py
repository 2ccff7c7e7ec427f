"""The example app of docs/examples/serving in this process, and models for it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import httpx
import torch
import uvicorn

from rankkernels import DIN, DeepFM, DenseFeature, SequenceFeature, SparseFeature
from rankkernels.serve import FrozenModel, freeze

ROWS = 50


def din(seed: int = 0, oov: str = "error") -> FrozenModel:
    torch.manual_seed(seed)
    item = SparseFeature("item", ROWS, 8, padding_idx=0, oov=oov)
    clicks = SequenceFeature("clicks", ROWS, 8, pooling="concat", shared_with="item", padding_idx=0, oov=oov)
    user = SparseFeature("user", ROWS, 8, oov=oov)
    return _frozen(DIN([user], [clicks], [item], {"dims": [16]}, {"dims": [8]}, mask_padding=True))


def deepfm() -> FrozenModel:
    """With features of every kind on either side."""
    torch.manual_seed(0)
    ids = [SparseFeature("user", ROWS, 8), SparseFeature("item", ROWS, 8)]
    lists = [SequenceFeature(name, ROWS, 8, pooling="mean", padding_idx=0) for name in ("liked", "tags")]
    numbers = [DenseFeature("age"), DenseFeature("price"), DenseFeature("pixels", 3)]
    return _frozen(DeepFM([*ids, *lists, *numbers], [*ids, *lists], {"dims": [16]}))


def _frozen(model: torch.nn.Module) -> FrozenModel:
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return freeze(model.eval())


class Held:
    """A model that ranks when it is told to: what waits, waits until then."""

    inputs = {"item": "ids"}

    def __init__(self):
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def rank(self, user, candidates, k=None):
        self.begun.release()
        assert self.go.wait(30)
        return torch.as_tensor(candidates["item"]).float()


@contextlib.contextmanager
def running(app) -> Iterator[tuple[uvicorn.Server, httpx.Client]]:
    """Uvicorn in a thread, and a client of it; afterwards it has stopped."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield server, client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
