"""Any number of threads and processes on one frozen model: the same bits, no growth, nobody waits for Python."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rankkernels import serve
from tests.serve.models import deepfm, din, request


def requests_to(model, n: int, seed: int = 0) -> list:
    r = random.Random(seed)
    torch.manual_seed(seed)
    return [request(model, r.choice([1, 3, 8, 24, 25, r.randint(1, 300)]), r.randint(0, 40)) for _ in range(n)]


def ranked(model, n: int) -> tuple:
    """Frozen, so many requests to it, and what one thread answers to them."""
    frozen, requests = serve.freeze(model), requests_to(model, n)
    torch.set_num_threads(1)
    return frozen, requests, [frozen.rank(*r) for r in requests]


MODELS = pytest.mark.parametrize("make", [lambda: deepfm(D=16, dims=(64, 32)), lambda: din(D=16, attention=(36,))])


@MODELS
def test_many_threads_give_the_same_bits(make):
    frozen, requests, expected = ranked(make(), 60)
    torch.set_num_threads(2)
    assert all(torch.equal(frozen.rank(*r), e) for r, e in zip(requests, expected))

    def client(seed: int) -> int:
        torch.set_num_threads(1)
        order = random.Random(seed).choices(range(len(requests)), k=150)
        return sum(torch.equal(frozen.rank(*requests[i]), expected[i]) for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [150] * 8


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@MODELS
def test_ten_thousand_requests_of_each_of_eight_threads(make):
    """Bits of one thread's, and no more memory after them than after the first thousand."""
    frozen, requests, expected = ranked(make(), 200)

    def client(seed: int) -> list[int]:
        torch.set_num_threads(1)
        used = []
        for n, i in enumerate(random.Random(seed).choices(range(len(requests)), k=10_000)):
            assert torch.equal(frozen.rank(*requests[i]), expected[i])
            if n % 1000 == 999:
                used.append(resident())
        return used

    with ThreadPoolExecutor(8) as pool:
        used = list(pool.map(client, range(8)))
    assert max(u[-1] for u in used) - min(u[0] for u in used) < 2 << 20


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("make", [deepfm, din])
def test_a_candidates_score_does_not_depend_on_the_others(make, threads):
    """However they are divided: among threads, tiles, vectors and halves of vectors."""
    model = make()
    frozen = serve.freeze(model)
    user, candidates = request(model, 420)
    torch.set_num_threads(threads)
    whole = frozen.rank(user, candidates)
    parts = [(0, n) for n in (1, 7, 8, 9, 16, 17, 24, 25, 48, 56, 57, 100, 104, 105, 200, 400)]
    for begin, end in [*parts, (5, 29), (60, 130), (419, 420)]:
        assert torch.equal(frozen.rank(user, {n: v[begin:end] for n, v in candidates.items()}), whole[begin:end])


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_requests_leave_nothing_behind():
    model = din(D=16, attention=(36,))
    frozen, requests = serve.freeze(model), requests_to(model, 50)
    torch.set_num_threads(1)
    for _ in range(4):
        for r in requests:
            frozen.rank(*r)
    before = resident()
    for _ in range(20):
        for r in requests:
            frozen.rank(*r)
    assert resident() - before < 1 << 20


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_candidates_times_history():
    """400,000 pairs of 64 floats are 100 MB; ids and scores of 4,000 candidates are 100 KB."""
    from bench.harness import memory

    model = din(D=64, attention=(16,))
    frozen = serve.freeze(model)
    frozen.rank(*request(model, 50, 100))
    of_request = request(model, 4000, 100)
    assert memory.resident_peak(lambda: [frozen.rank(*of_request)]) < 4 << 20


def test_python_goes_on_meanwhile():
    """The op lets other threads run: one counts while a long request is computed."""
    model = din(D=64, attention=(80, 40))
    frozen, long = serve.freeze(model), request(model, 3000, 100)
    torch.set_num_threads(1)
    counted, done = [], threading.Event()

    def count():
        while not done.is_set():
            counted.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    begin = time.perf_counter()
    frozen.rank(*long)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(begin < at < end for at in counted) >= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_answers():
    model = din(D=16, attention=(36,))
    frozen, of_request = serve.freeze(model), request(model, 900, 50)
    torch.set_num_threads(2)
    expected = frozen.rank(*of_request)  # the parent's threads are running
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if torch.equal(frozen.rank(*of_request), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
