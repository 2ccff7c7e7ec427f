"""What waiting alone does to latencies: the queue before servers that take one and the same time for each request.

Requests come independently of each other and are served in their order, so many at a time (M/D/c). Another order leaves
the sum of the waits as it is. Times are in units of what a request takes.
"""

from __future__ import annotations

import heapq
import random


def latencies(servers: int, utilization: float, requests: int = 400_000) -> list[float]:
    """Waiting and service of each request, in ascending order."""
    draw, now, found = random.Random(0), 0.0, []
    free = [0.0] * servers  # when each server is: a heap
    for _ in range(requests):
        now += draw.expovariate(utilization * servers)
        wait = max(free[0] - now, 0.0)
        heapq.heapreplace(free, now + wait + 1.0)
        found.append(wait + 1.0)
    return sorted(found)
