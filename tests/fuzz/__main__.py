"""Random calls of every op, layer and model against the float64 reference, and wrong ones that must be refused.

    python tests/fuzz --count 50000          # or `make fuzz`
    python tests/fuzz --case 1234            # one case, in this process: what a finding says
    python tests/fuzz --only embedding --seed 7

Cases run in processes of their own, some hundreds in each: a crash or a hang is a finding like any other.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PER_PROCESS, PATIENCE = 400, 120  # cases; seconds for one of them


def run_here(cases: list[int], only: str, stop: bool) -> int:
    """Runs cases in this process; says which one it begins, and what it finds."""
    import families

    found = 0
    for case in cases:
        print(f"begin {case}", flush=True)
        try:
            families.run(case, only)
        except Exception as error:
            if stop:
                raise
            found += 1
            text = f"{families.name(case, only)}: {type(error).__name__}: {error}".replace("\n", " ")
            print(f"found {case} {text[:600]}", flush=True)
    print("end", flush=True)
    return found


class Workers:
    """Processes that run cases, each a part, and what they found."""

    def __init__(self, cases: list[int], only: str, workers: int):
        self.findings: dict[int, str] = {}
        self.only, self.done, self.parts = only, 0, queue.SimpleQueue()
        per_process = max(1, min(PER_PROCESS, -(-len(cases) // workers)))
        for i in range(0, len(cases), per_process):
            self.parts.put(cases[i : i + per_process])
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def work(self) -> None:
        while True:
            try:
                part = self.parts.get_nowait()
            except queue.Empty:
                return
            while part:
                part = self.process(part)

    def process(self, cases: list[int]) -> list[int]:
        """-> the cases that a process which died has left."""
        command = [sys.executable, "-W", "ignore", HERE, "--worker", ",".join(map(str, cases)), "--only", self.only]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            errors: list[str] = []
            reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
            reader.start()
            at = [-1, time.monotonic()]  # the case that has begun, and when
            watch = threading.Thread(target=self.watch, args=(process, at), daemon=True)
            watch.start()
            ended = False
            for line in process.stdout:
                word, _, rest = line.strip().partition(" ")
                if word == "begin":
                    at[:] = int(rest), time.monotonic()
                    self.done += 1
                elif word == "found":
                    case, _, text = rest.partition(" ")
                    self.report(int(case), text)
                ended = ended or word == "end"
            process.wait()
            reader.join()
        if ended:
            return []
        last = [line.strip() for line in errors if line.strip()]
        telling = [line for line in last if "Sanitizer" in line or "runtime error" in line] or last[-1:]
        self.report(at[0], f"the process ended with {process.returncode}: {' '.join(telling[:2])[:400]}")
        return cases[cases.index(at[0]) + 1 :] if at[0] in cases else []

    def watch(self, process: subprocess.Popen, at: list) -> None:
        while process.poll() is None:
            time.sleep(0.5)
            if time.monotonic() - at[1] > PATIENCE:
                process.kill()

    def report(self, case: int, text: str) -> None:
        self.findings[case] = text
        only = f" --only {self.only}" if self.only else ""
        print(f"case {case}: {text}\n    python tests/fuzz --case {case}{only}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", type=int, help="run this one here, with its traceback")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None or options.worker is not None:
        cases = [options.case] if options.worker is None else [int(c) for c in options.worker.split(",") if c]
        return run_here(cases, options.only, stop=options.worker is None)
    started = time.monotonic()
    cases = range(options.seed, options.seed + options.count)
    workers = Workers(list(cases), options.only, options.workers)
    seconds = time.monotonic() - started
    print(f"{workers.done} of {options.count} cases in {seconds:.0f} s: {len(workers.findings)} findings")
    return 1 if workers.findings or workers.done < options.count else 0


if __name__ == "__main__":
    sys.exit(main())
