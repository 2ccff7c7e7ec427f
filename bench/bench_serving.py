"""Serving: one user's request, 100 or 700 candidates scored by DeepFM and by DIN under torch.inference_mode.

torch-rechub's model, the same compiled, and ours with its state. Both repeat the user's history for every candidate, as
torch-rechub's interface has it.
"""

from __future__ import annotations

import peers
import pytest
import torch
from datasets import Field
from train import build_model, classes

ROWS, L = 100_000, 50
FIELDS = {
    "deepfm": [Field(f"C{i}", "sparse", ROWS) for i in range(26)],
    "din": [
        *(Field(f"user_{i}", "sparse", ROWS) for i in range(4)),
        Field("item", "target", ROWS, padded=True),
        Field("category", "target", ROWS, padded=True),
        Field("history_item", "history", ROWS, "item", padded=True),
        Field("history_category", "history", ROWS, "category", padded=True),
    ],
}
TITLES = {"deepfm": "DeepFM 26 fields [256,128]", "din": f"DIN two histories L{L} D16 [36]"}


@pytest.mark.parametrize("candidates", [100, 700])
@pytest.mark.parametrize("model", FIELDS)
def test_request(model, candidates, threads, race):
    pytest.importorskip("torch_rechub", reason="torch-rechub is not installed")
    torch.manual_seed(0)
    theirs, ours = (build_model(classes(name), model, FIELDS[model]).eval() for name in ("torch-rechub", "rankkernels"))
    ours.load_state_dict(theirs.state_dict())

    def ids(field: Field):
        one_user = field.name.startswith(("user", "history")) or field.name in ("C0", "C1", "C2", "C3", "C4", "C5")
        shape = (1 if one_user else candidates, *([L] if field.kind == "history" else []))
        drawn = torch.randint(1, ROWS, shape)
        return drawn.expand(candidates, *shape[1:]).contiguous()

    x = {field.name: ids(field) for field in FIELDS[model]}
    contenders = peers.compiled({"torch-rechub": theirs})
    with torch.inference_mode():
        race(
            lambda: ours(x),
            {name: lambda f=f: f(x) for name, f in contenders.items()},
            case=f"{TITLES[model]}, 1 user x {candidates} candidates",
            kind="forward",
        )
