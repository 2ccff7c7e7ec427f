"""The model of docs/examples/serving/triton, run with a stand-in for what Triton gives to its Python backend."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from running import ROWS, din

REPOSITORY = Path(__file__).parents[2] / "docs/examples/serving/triton"


class Config:
    """``ModelConfig`` of auto_complete_config, as much of it as there is in Triton's documentation."""

    def __init__(self, parameters: dict):
        self.parameters, self.inputs, self.outputs = parameters, [], []

    def as_dict(self) -> dict:
        return {"parameters": self.parameters}

    def add_input(self, properties: dict) -> None:
        self.inputs.append(properties)

    def add_output(self, properties: dict) -> None:
        self.outputs.append(properties)


class Tensor:
    def __init__(self, name: str, array: np.ndarray):
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


@pytest.fixture
def backend(tmp_path, monkeypatch):
    """The repository's model.py beside a saved model, and the parameters of its config.pbtxt."""
    shutil.copytree(REPOSITORY, tmp_path / "models")
    folder = tmp_path / "models/din"
    din().save(folder / "1/model.pt")
    utils = ModuleType("triton_python_backend_utils")
    utils.Tensor, utils.TritonError = Tensor, str
    utils.InferenceResponse = lambda tensors, error=None: SimpleNamespace(tensors=tensors, error=error)
    utils.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("model", folder / "1/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (folder / "config.pbtxt").read_text()
    pairs = re.findall(r'parameters \{ key: "(\w+)" value \{ string_value: "([^"]*)" \} \}', text)
    assert f'name: "{folder.name}"' in text and 'backend: "python"' in text and "max_batch_size: 0" in text
    return module.TritonPythonModel, {key: {"string_value": value} for key, value in pairs}


def request(**arrays) -> dict[str, Tensor]:
    return {name: Tensor(name, np.array(array)) for name, array in arrays.items()}


def test_triton_is_told_the_models_features(backend):
    model, parameters = backend
    config = model.auto_complete_config(Config(parameters))
    assert {i["name"]: (i["data_type"], i["dims"]) for i in config.inputs} == {
        "item": ("TYPE_INT64", [-1]),
        "user": ("TYPE_INT64", [-1]),
        "clicks": ("TYPE_INT64", [-1]),
        "k": ("TYPE_INT64", [1]),
    }
    assert [o["name"] for o in config.outputs] == ["scores", "indices"]


def test_triton_gets_the_models_scores_and_an_error_for_each_wrong_request(backend):
    model, parameters = backend
    instance = model()
    instance.initialize({"model_config": json.dumps({"parameters": parameters})})
    answers = instance.execute(
        [
            request(user=[3], clicks=[1, 2, 3], item=range(7)),
            request(user=[3], clicks=[1, ROWS], item=range(7)),
            request(user=[4], clicks=[5], item=range(5), k=[2]),
            request(user=[4], item=range(5)),
            request(user=[4], clicks=[1], item=np.empty(0, np.int64)),
        ]
    )
    frozen = din()
    (scores,) = answers[0].tensors
    expected = frozen.rank({"user": 3, "clicks": torch.tensor([1, 2, 3])}, {"item": torch.arange(7)})
    assert scores.name == "scores" and np.array_equal(scores.array, expected.numpy()) and answers[0].error is None
    assert f"clicks[1] = {ROWS} is out of range" in answers[1].error and not answers[1].tensors
    best = frozen.rank({"user": 4, "clicks": torch.tensor([5])}, {"item": torch.arange(5)}, k=2)
    found = {tensor.name: tensor.array.tolist() for tensor in answers[2].tensors}
    assert found == {"scores": best.values.tolist(), "indices": best.indices.tolist()}
    assert "clicks" in answers[3].error
    assert answers[4].error is None and answers[4].tensors[0].array.shape == (0,)
