"""What the example app serves in the load test: one DIN as each contender has it. All but ours repeat the user for
every candidate, and are compiled or exported for the one number of candidates that they are asked for.

What takes minutes to make, ONNX and AOTInductor's package, is kept in build/serve.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.demo.models import build_model, classes
from bench.workloads import LENGTH, ROWS, SERVED
from rankkernels.serve import FrozenModel, freeze

KEPT = Path(__file__).parents[2] / "build/serve"
FIELDS = SERVED["din"]
CANDIDATES = ["item", "category"]
Batch = dict[str, Tensor]


def theirs() -> nn.Module:
    torch.manual_seed(0)
    return build_model(classes("torch-rechub"), "din", FIELDS).eval()


def request(candidates: int, generator: torch.Generator) -> dict:
    """What one user asks, as the app takes it."""

    def ids(n: int) -> list[int]:
        return torch.randint(1, ROWS, (n,), generator=generator).tolist()

    user = {f.name: ids(LENGTH) if f.kind == "history" else ids(1)[0] for f in FIELDS if f.name not in CANDIDATES}
    return {"user": user, "candidates": {name: ids(candidates) for name in CANDIDATES}}


class Expanded:
    """A function of a batch, as a model that ranks one user's candidates."""

    def __init__(self, score: Callable[[Batch], Tensor], inputs: dict[str, str]):
        self.score, self.inputs = score, inputs

    @torch.inference_mode()
    def rank(self, user: dict, candidates: dict, k: int | None = None):
        x = {name: torch.as_tensor(value) for name, value in candidates.items()}
        C = len(x[CANDIDATES[0]])
        for name, value in user.items():
            value = torch.as_tensor(value)
            x[name] = value.expand(C, *value.shape).contiguous()
        scores = self.score({name: x[name] for name in self.inputs})
        return scores if k is None else scores.topk(min(k, C))


def compiled(model: nn.Module, x: Batch) -> Callable[[Batch], Tensor]:
    return torch.compile(model)


def aot_inductor(model: nn.Module, x: Batch) -> Callable[[Batch], Tensor]:
    path = KEPT / f"din-{len(x['item'])}.pt2"
    if not path.exists():
        with torch.inference_mode():
            torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def onnxruntime(model: nn.Module, x: Batch) -> Callable[[Batch], Tensor]:
    import onnxruntime

    path = KEPT / f"din-{len(x['item'])}.onnx"
    if not path.exists():
        torch.onnx.export(model, kwargs={"x": x}, f=str(path), dynamo=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]  # in the batch's order
    return lambda x: torch.from_numpy(session.run(None, dict(zip(names, (v.numpy() for v in x.values()))))[0])


CONTENDERS = {
    "ours": None,
    "torch-rechub": lambda model, x: model,
    "torch-rechub compiled": compiled,
    "AOTInductor": aot_inductor,
    "onnxruntime": onnxruntime,
}


def load(contender: str, candidates: int) -> FrozenModel | Expanded:
    """A contender that has ranked, and whose scores are ours."""
    KEPT.mkdir(parents=True, exist_ok=True)
    model = theirs()
    frozen = freeze(model)
    if contender == "ours":
        return frozen
    asked = request(candidates, torch.Generator().manual_seed(1))
    seen: list[Batch] = []
    Expanded(lambda x: seen.append(x) or torch.zeros(candidates), frozen.inputs).rank(**asked)
    expanded = Expanded(CONTENDERS[contender](model, seen[0]), frozen.inputs)
    torch.testing.assert_close(expanded.rank(**asked), frozen.rank(**asked), rtol=1e-4, atol=1e-5)
    return expanded
