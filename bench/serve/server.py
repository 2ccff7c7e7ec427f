"""The example app with a contender of the load test: ``python -m bench.serve.server CONTENDER PORT``."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import torch
import uvicorn

from bench.serve import contenders

sys.path.append(str(Path(__file__).parents[2] / "docs/examples/serving"))
from app import create_app  # noqa: E402
from rank_request import Limits  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=contenders.CONTENDERS)
    parser.add_argument("port", type=int)
    parser.add_argument("--candidates", type=int, default=700)
    parser.add_argument("--rankers", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", help="to run on these alone")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    torch.set_num_threads(1)
    limits = Limits(seconds=1.0)  # for those who take 30 ms a request
    load = partial(contenders.load, options.contender, options.candidates)
    app = create_app(load, contenders.CANDIDATES, limits, options.rankers)
    uvicorn.run(app, port=options.port, access_log=False, log_level="warning", timeout_keep_alive=75)


if __name__ == "__main__":
    main()
