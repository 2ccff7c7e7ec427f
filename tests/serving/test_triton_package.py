"""docs/examples/serving/package_model.py: the package has the inputs that config.pbtxt declares, and ranks in a process
that has no Python of ours, as in Triton's PyTorch backend. What that backend does is in its src/pt2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from package_model import config
from running import deepfm, din

import rankkernels as rk

PROGRAM = Path(__file__).parents[2] / "docs/examples/serving/package_model.py"
#: Triton preloads the library of ops: torch's libraries, which it needs, must be found.
PRELOADED = {"LD_PRELOAD": rk.library_path() or "", "LD_LIBRARY_PATH": str(Path(torch.__file__).with_name("lib"))}
RUN = """\
import json, sys, torch
loader = torch._C._aoti.AOTIModelPackageLoader(sys.argv[1], "model", False, 1, -1)
print(json.dumps(loader.get_call_spec()))
for line in sys.stdin:
    inputs = [torch.tensor(values, dtype=torch.int64) for values in json.loads(line)]
    try:
        (scores,) = loader.run(inputs)
        print(json.dumps(scores.tolist()))
    except RuntimeError as error:
        print(json.dumps(str(error)))
assert "rankkernels" not in sys.modules
"""


def declared(text: str, part: str) -> dict[str, tuple[str, list[int]]]:
    """Names of inputs or outputs, their types and dimensions."""
    body = text.partition(f"\n{part} [")[2].partition("} ]" if part == "output" else "\n]")[0]
    found = re.findall(r'name: "([^"]+)" data_type: (\w+) dims: \[ ([-\d, ]+) \]', body)
    return {name: (data_type, json.loads(f"[{dims}]")) for name, data_type, dims in found}


def names_in(spec: dict) -> list[str]:
    """The backend's names of what is in an argument: a key or a place in brackets, for each level."""
    keys = json.loads(spec["context"]) if spec["type"] == "builtins.dict" else range(len(spec["children_spec"]))
    parts = zip(keys, spec["children_spec"])
    return [f"[{key}]{rest}" for key, child in parts for rest in (names_in(child) if child["type"] else [""])]


def test_features_of_every_kind_are_declared():
    text = config("model", deepfm().inputs, ["item", "tags", "price"])
    inputs = declared(text, "input")
    assert inputs["ARGS[0][user]"] == ("TYPE_INT64", [1]) and inputs["ARGS[1][item]"] == ("TYPE_INT64", [-1])
    assert inputs["ARGS[0][liked]"] == ("TYPE_INT64", [-1]) and inputs["ARGS[1][tags]"] == ("TYPE_INT64", [-1, -1])
    assert inputs["ARGS[0][age]"] == ("TYPE_FP32", [1]) and inputs["ARGS[1][price]"] == ("TYPE_FP32", [-1])
    assert len(inputs) == len(deepfm().inputs) and declared(text, "output") == {"RESULT": ("TYPE_FP32", [-1])}


@pytest.mark.slow
@pytest.mark.skipif(not rk.library_path(), reason="built without the C++ extension")
def test_the_package_ranks_where_only_the_library_is_preloaded(tmp_path):
    frozen = din()
    frozen.save(tmp_path / "model.pt")
    folder = tmp_path / "models/din_package"
    command = [sys.executable, PROGRAM, tmp_path / "model.pt", folder, "--candidates", "item"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    text = (folder / "config.pbtxt").read_text()
    assert 'name: "din_package"' in text and 'platform: "torch_aoti"' in text

    requests = [(3, [1, 2, 3], list(range(7))), (4, [5], [9]), (4, [], list(range(40))), (4, [1, 50], [1])]
    script, alone = tmp_path / "run.py", {**os.environ, **PRELOADED}
    script.write_text(RUN)
    process = subprocess.Popen(
        [sys.executable, script, folder / "1/model.pt2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=alone, cwd=tmp_path,
    )  # fmt: skip
    given, returned = map(json.loads, json.loads(process.stdout.readline()))
    arguments = [f"ARGS{name}" for name in names_in(given[1]["children_spec"][0])]
    assert set(arguments) == set(declared(text, "input")) and not given[1]["children_spec"][1]["children_spec"]
    assert returned[1]["children_spec"] == []  # one tensor, which the backend calls RESULT

    def inputs(user: int, clicks: list, items: list) -> list:
        values = {"ARGS[0][user]": [user], "ARGS[0][clicks]": clicks, "ARGS[1][item]": items}
        return [values[name] for name in arguments]

    said, _ = process.communicate("\n".join(json.dumps(inputs(*r)) for r in requests))
    *answers, refused = map(json.loads, said.splitlines())
    assert process.returncode == 0 and len(answers) == len(requests) - 1
    for (user, clicks, items), answer in zip(requests, answers):
        expected = frozen.rank({"user": user, "clicks": torch.tensor(clicks, dtype=torch.int64)}, {"item": items})
        assert torch.equal(torch.tensor(answer), expected)
    assert "clicks[1] = 50 is out of range" in refused
