"""One user's request by a frozen model: ``rankkernels.serve.freeze(model).rank(user, candidates)``.

torch-rechub's model on the batch that repeats the user for every candidate, as its interface has it, eager and
compiled; our model on the same batch; and ours frozen. The floor is that of the frozen model's own flops: the user's
part once, and of a history's row and a candidate D H and not 4 D H. What the others would have at best is more.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench import workloads
from bench.demo.models import build_model, classes
from bench.harness import peers
from rankkernels import serve

CANDIDATES = [100, 700, 2000]
DIMS = [256, 128]


class Request(NamedTuple):
    """A model of both libraries with one state, one user's features, the candidates', and multiply-adds of each."""

    title: str
    theirs: torch.nn.Module
    ours: torch.nn.Module
    user: dict[str, Tensor]
    candidates: dict[str, Tensor]
    multiply_adds: int

    def batch(self) -> dict[str, Tensor]:
        C = len(next(iter(self.candidates.values())))
        return {n: v.expand(C, *v.shape[1:]).contiguous() for n, v in self.user.items()} | self.candidates


def mlp(inputs: int) -> int:
    widths = [inputs, *DIMS, 1]
    return sum(a * b for a, b in zip(widths, widths[1:]))


def deepfm(C: int, of_user: int) -> Request:
    """26 fields, as many of them the user's."""
    fields = workloads.SERVED["deepfm"]
    theirs, ours = (build_model(classes(name), "deepfm", fields).eval() for name in ("torch-rechub", "rankkernels"))
    ours.load_state_dict(theirs.state_dict())
    ids = {f.name: torch.randint(1, workloads.ROWS, (1 if i < of_user else C,)) for i, f in enumerate(fields)}
    user, candidates = ({f.name: ids[f.name] for f in part} for part in (fields[:of_user], fields[of_user:]))
    title = f"DeepFM 26 fields {DIMS}, {of_user} of the user".replace(", 1", ",1", 1)
    return Request(title, theirs, ours, user, candidates, mlp((26 - of_user) * 16))


def din(C: int, D: int, L: int, attention: tuple[int, ...], length: int) -> Request:
    """User, item and category, two histories of ``length`` items and zeros up to L."""
    workload = workloads.din(L=L, D=D, attention=attention)
    theirs, ours = (model.eval() for model in workload.models().values())
    x, _ = workload.batch()
    names = ["user", "history_item", "history_category"]
    user = {name: x[name][:1] for name in names}
    for name in names[1:]:
        user[name] = torch.where(torch.arange(L) < length, user[name], 0)
    candidates = {name: torch.randint(1, 100_000, (C,)) for name in ("target_item", "target_category")}
    widths = [D, *attention, 1]
    row = sum(a * b for a, b in zip(widths, widths[1:])) + D
    rows = min(L, length + (length < L))  # zeros are one row, however many there are
    title = f"DIN two histories L{L} D{D} {list(attention)}".replace(", ", ",")
    title += f", {length} items" if length < L else ""
    return Request(title, theirs, ours, user, candidates, 2 * rows * row + mlp(4 * D))


REQUESTS = {
    "deepfm": lambda C: deepfm(C, 6),
    "deepfm20": lambda C: deepfm(C, 20),
    "din16": lambda C: din(C, 16, 50, (36,), 50),
    "din16half": lambda C: din(C, 16, 50, (36,), 25),
    "din64": lambda C: din(C, 64, 100, (80, 40), 100),
    "din64half": lambda C: din(C, 64, 100, (80, 40), 50),
}


@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("request_of", REQUESTS)
def test_rank(request_of, candidates, threads, race):
    pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    torch.manual_seed(0)
    case = REQUESTS[request_of](candidates)
    frozen, x = serve.freeze(case.ours), case.batch()
    contenders = peers.compiled({"torch-rechub": case.theirs})
    with torch.inference_mode():
        race(
            lambda: frozen.rank(case.user, case.candidates),
            {name: lambda f=f: f(x) for name, f in contenders.items()} | {"ours, repeated": lambda: case.ours(x)},
            case=f"{case.title}, {candidates} candidates",
            kind="forward",
            flops=2 * candidates * case.multiply_adds,
        )
