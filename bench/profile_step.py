"""Where a training step of DeepFM or DIN spends its time, ours and torch-rechub's: ``python -m bench.profile_step``.

torch.profiler records every operator of a few steps (``bench.workloads.Step``). An operator belongs to the group of the
module that called it, one of the backward to that of the operator it is the backward of, one of the optimizer to the
tables or to the rest by the shape of its parameter. What remains of a step, the time in which no operator runs, is
Python's, autograd's and the dispatcher's. Recording lengthens a step; the table shares out its time without a profiler.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from bench.harness import machine
from bench.workloads import LIBRARIES, Step, Workload, deepfm, din

LOOKUP, ATTENTION, LINEAR = "embedding lookup", "FM / attention", "Linear"
NORM, LOSS, OTHER = "BatchNorm and activation", "loss", "concatenation, sums and the rest"
DENSE_OPTIMIZER, TABLE_OPTIMIZER = "optimizer of the dense part", "optimizer of the tables"
TABLE_GRADIENT, ZERO, OVERHEAD = "gradients of the tables", "zero_grad", "no operator: Python, autograd, dispatch"
GROUPS = [
    LOOKUP,
    ATTENTION,
    LINEAR,
    NORM,
    LOSS,
    OTHER,
    TABLE_GRADIENT,
    DENSE_OPTIMIZER,
    TABLE_OPTIMIZER,
    ZERO,
    OVERHEAD,
]

MODULES = {
    "EmbeddingLayer": LOOKUP, "FM": ATTENTION, "LR": LINEAR, "ActivationUnit": ATTENTION, "Linear": LINEAR,
    "BatchNorm1d": NORM, "Dice": NORM, "ReLU": NORM, "BCELoss": LOSS,
}  # fmt: skip
#: By the operator's own name, before the module that called it; our ops serve the modules without calling them.
OPERATORS = [
    (r"embedding_bag_update|embedding_fm_update", TABLE_OPTIMIZER),
    (r"embedding\w*backward", TABLE_GRADIENT),
    (r"rankkernels::embedding", LOOKUP),
    (r"rankkernels::(fm_interaction|din_attention)", ATTENTION),
    (r"rankkernels::norm_activation", NORM),
    (r"_Linear|aten::(linear|addmm)", LINEAR),
]


def labelled(model: nn.Module) -> list:
    """Hooks by which the profiler sees which module calls an operator. Not inside what our ops compute: a module that
    has hooks is called."""
    handles = []
    fused = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.PReLU) if type(model).__module__.startswith("rankkernels") else ()
    for module in model.modules():
        name = type(module).__name__
        if name not in MODULES or isinstance(module, fused) or (fused and name in ("Dice", "FM", "LR")):
            continue
        ranges: list[record_function] = []

        def enter(*_, name=name, ranges=ranges):
            ranges.append(record_function(f"module {name}"))
            ranges[-1].__enter__()

        def leave(*_, ranges=ranges):
            ranges.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    return handles


def ancestors(event: FunctionEvent) -> list[FunctionEvent]:
    """The event and what called it, innermost first."""
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found


def is_operator(event: FunctionEvent) -> bool:
    return re.match(r"(aten|rankkernels|torchrec|mkldnn)::", event.name) is not None


def group_of(event: FunctionEvent, forward_groups: dict[int, str], tables: set[tuple]) -> str | None:
    """The group of an operator; None for what is no operator."""
    path = ancestors(event)
    if not is_operator(event) and not any(is_operator(e) for e in path):
        return None
    for pattern, group in OPERATORS:
        if any(re.search(pattern, e.name) for e in path):
            return group
    for e in path:
        if e.name.startswith("Optimizer.step"):
            shapes = [tuple(s) for operator in path if is_operator(operator) for s in operator.input_shapes or () if s]
            return TABLE_OPTIMIZER if any(s in tables for s in shapes) else DENSE_OPTIMIZER
        if e.name == "zero_grad":
            return ZERO
        if e.name.startswith("module "):
            return MODULES[e.name.removeprefix("module ")]
        if e.name.startswith("autograd::engine::evaluate_function"):
            if "AccumulateGrad" in e.name:
                shapes = [tuple(s) for operator in path for s in operator.input_shapes or () if s]
                return TABLE_GRADIENT if any(s in tables for s in shapes) else LINEAR
            return forward_groups.get(e.sequence_nr, OTHER)
    return OTHER


def shares(step: Step, count: int) -> dict[str, float]:
    """Seconds of a step by group, with the profiler at work."""
    tables = {tuple(m.weight.shape) for m in step.model.modules() if isinstance(m, nn.Embedding)}
    handles = [*labelled(step.model), *labelled(nn.Sequential(step.criterion))]
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(count):
            with record_function("step"):
                step()
    for handle in handles:
        handle.remove()
    events = [(e, ancestors(e)) for e in recorded.events()]
    events = [(e, path) for e, path in events if path[-1].name == "step"]
    forward_groups: dict[int, str] = {}
    for e, path in events:
        if e.sequence_nr >= 0 and is_operator(e) and not any("evaluate_function" in a.name for a in path):
            forward_groups.setdefault(e.sequence_nr, group_of(e, {}, tables) or OTHER)
    total: Counter[str] = Counter()
    for e, _ in events:
        total[group_of(e, forward_groups, tables) or OVERHEAD] += e.self_cpu_time_total / 1e6 / count
    return total


def undisturbed(step: Step, seconds: float = 3.0) -> float:
    """Median seconds of a step without a profiler."""
    step(), step()
    times: list[float] = []
    while sum(times) < seconds and len(times) < 200:
        times.append(machine.Clock().seconds(step))
    return statistics.median(times)


def table(workload: Workload, libraries: Sequence[str], fused: bool, count: int) -> str:
    models, batch = workload.models(), workload.batch()
    columns = {}
    for library in libraries:
        step = Step(models.pop(library), *batch, fused=fused and library == "ours")
        wall, seen = undisturbed(step), shares(step, count)
        columns[library] = {group: wall * t / sum(seen.values()) for group, t in seen.items()} | {"step": wall}
    lines = [f"{workload.name}, {torch.get_num_threads()} threads" + (", fused Adam" if fused else ""), ""]
    lines.append(f"{'':<42}" + "".join(f"{library:>16} ms  share" for library in columns))
    for group in [*GROUPS, "step"]:
        times = [column.get(group, 0.0) for column in columns.values()]
        if any(times):
            cells = (f"{1e3 * t:>19.3f} {100 * t / c['step']:>5.1f}%" for t, c in zip(times, columns.values()))
            lines.append(f"{group:<42}" + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("deepfm", "din"), action="append", help="default: both")
    parser.add_argument("--rows", type=int, default=100_000, help="rows a table (default: %(default)s)")
    parser.add_argument("--library", choices=LIBRARIES, action="append", help="default: both")
    parser.add_argument("--fused", action="store_true", help="ours steps the rows looked up, in the backward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=10, help="steps recorded (default: %(default)s)")
    options = parser.parse_args()
    machine.keep_freed_memory()
    torch.set_num_threads(options.threads)
    for model in options.model or ("deepfm", "din"):
        workload = {"deepfm": deepfm, "din": din}[model](options.rows)
        print(table(workload, options.library or LIBRARIES, options.fused, options.steps), end="\n\n")


if __name__ == "__main__":
    main()
