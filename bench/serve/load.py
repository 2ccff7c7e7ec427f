"""Load on a server, from a process of its own: ``closed`` by so many who ask again when they are answered, ``opened``
at a rate that does not wait for answers. Of the second, a latency counts from when a request was due.

python -m bench.serve.load PORT BODIES --rate 200 --seconds 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from pathlib import Path

import uvloop

#: Statuses of requests that were lost: no answer, or none in time.
BROKEN, TIMEOUT = "connection broken", "no answer"
LONGEST = 10.0


class Connection:
    """HTTP/1.1, a request at a time, with as little work as can be: the load must not be slower than the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    @staticmethod
    async def open(port: int) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", port))

    async def status(self, request: bytes) -> str:
        """Sends a request and reads its answer."""
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        await self.reader.readexactly(length)
        return head[9:12].decode()


class Load:
    def __init__(self, port: int, requests: list[bytes]):
        self.port, self.requests = port, requests
        self.idle: list[Connection] = []
        self.latencies: list[float] = []  # of the answered with 200
        self.refusals: list[float] = []  # of the answered with another status
        self.statuses: Counter[str] = Counter()

    async def ask(self, i: int, due: float) -> None:
        request = self.requests[i % len(self.requests)]
        try:
            connection = self.idle.pop() if self.idle else await Connection.open(self.port)
            status = await asyncio.wait_for(connection.status(request), LONGEST)
            self.idle.append(connection)
        except (OSError, EOFError):
            status = BROKEN
        except asyncio.TimeoutError:
            status = TIMEOUT
        self.statuses[status] += 1
        (self.latencies if status == "200" else self.refusals).append(time.perf_counter() - due)

    async def closed(self, clients: int, seconds: float) -> None:
        end = time.perf_counter() + seconds

        async def client(i: int) -> None:
            while (now := time.perf_counter()) < end:
                await self.ask(i, now)
                i += clients

        await asyncio.gather(*(client(i) for i in range(clients)))

    async def opened(self, rate: float, seconds: float, poisson: bool) -> None:
        """Requests ``1 / rate`` apart, or at random as independent users come."""
        draw = random.Random(0)
        due, end, tasks, i = time.perf_counter(), time.perf_counter() + seconds, set(), 0
        while due < end:
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            task = asyncio.create_task(self.ask(i, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += draw.expovariate(rate) if poisson else 1 / rate
            i += 1
        await asyncio.gather(*tasks)

    def summary(self, seconds: float) -> dict:
        return {
            "requests_s": len(self.latencies) / seconds,
            "statuses": dict(self.statuses),
            "ms": percentiles(self.latencies),
            "refused_ms": percentiles(self.refusals),
        }


def percentiles(latencies: list[float]) -> dict[str, float]:
    ordered = sorted(latencies)
    if not ordered:
        return {}
    places = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: 1e3 * ordered[min(int(p * len(ordered)), len(ordered) - 1)] for name, p in places.items()}


def http(body: bytes, content_type: str = "application/json") -> bytes:
    head = f"POST /rank HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("bodies", type=Path, help="a file of requests' bodies in JSON, one a line")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8, help="closed loop: so many")
    parser.add_argument("--rate", type=float, help="open loop: requests a second")
    parser.add_argument("--poisson", action="store_true", help="open loop: at random times and not evenly")
    options = parser.parse_args()
    load = Load(options.port, [http(line) for line in options.bodies.read_bytes().splitlines()])
    began = time.perf_counter()
    if options.rate is None:
        uvloop.run(load.closed(options.clients, options.seconds))
    else:
        uvloop.run(load.opened(options.rate, options.seconds, options.poisson))
    print(json.dumps(load.summary(time.perf_counter() - began)))


if __name__ == "__main__":
    main()
