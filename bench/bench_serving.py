"""Serving: one user's request, 100 or 700 candidates scored by DeepFM and by DIN under torch.inference_mode.

torch-rechub's model, the same compiled, and ours with its state. Both repeat the user's history for every candidate, as
torch-rechub's interface has it.
"""

from __future__ import annotations

import pytest
import torch

from bench.demo.models import Field, build_model, classes
from bench.harness import peers
from bench.workloads import LENGTH, ROWS, SERVED

TITLES = {"deepfm": "DeepFM 26 fields [256,128]", "din": f"DIN two histories L{LENGTH} D16 [36]"}


@pytest.mark.parametrize("candidates", [100, 700])
@pytest.mark.parametrize("model", SERVED)
def test_request(model, candidates, threads, race):
    pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    torch.manual_seed(0)
    theirs, ours = (build_model(classes(name), model, SERVED[model]).eval() for name in ("torch-rechub", "rankkernels"))
    ours.load_state_dict(theirs.state_dict())

    def ids(field: Field):
        one_user = field.name.startswith(("user", "history")) or field.name in ("C0", "C1", "C2", "C3", "C4", "C5")
        shape = (1 if one_user else candidates, *([LENGTH] if field.kind == "history" else []))
        drawn = torch.randint(1, ROWS, shape)
        return drawn.expand(candidates, *shape[1:]).contiguous()

    x = {field.name: ids(field) for field in SERVED[model]}
    contenders = peers.compiled({"torch-rechub": theirs})
    with torch.inference_mode():
        race(
            lambda: ours(x),
            {name: lambda f=f: f(x) for name, f in contenders.items()},
            case=f"{TITLES[model]}, 1 user x {candidates} candidates",
            kind="forward",
        )
