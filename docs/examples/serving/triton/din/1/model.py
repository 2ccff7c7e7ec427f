"""A frozen model in NVIDIA Triton's Python backend: ``model.pt`` beside this file is what FrozenModel.save wrote.

A new version is a new folder with both files; Triton loads it beside the old one and then switches.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils

from rankkernels import serve

MODEL = Path(__file__).with_name("model.pt")


def candidate_features(config: dict) -> list[str]:
    return config["parameters"]["candidates"]["string_value"].split()


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        """Declares the model's features, ids as INT64 and numbers as FP32, ``k`` and what comes back."""
        config = auto_complete_model_config
        of_candidates = candidate_features(config.as_dict())
        for name, kind in serve.load(MODEL, mmap=True).inputs.items():
            lists = name in of_candidates and kind == "sequence"
            data_type = "TYPE_FP32" if kind == "numbers" else "TYPE_INT64"
            config.add_input({"name": name, "data_type": data_type, "dims": [-1, -1] if lists else [-1]})
        config.add_input({"name": "k", "data_type": "TYPE_INT64", "dims": [1], "optional": True})
        config.add_output({"name": "scores", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "indices", "data_type": "TYPE_INT64", "dims": [-1]})
        return config

    def initialize(self, args):
        torch.set_num_threads(1)  # of an instance: instance_group says how many there are
        self.frozen = serve.load(MODEL)
        self.of_candidates = candidate_features(json.loads(args["model_config"]))

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        def value(name):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        given = {name: array for name in self.frozen.inputs if (array := value(name)) is not None}
        candidates = {name: given.pop(name) for name in self.of_candidates if name in given}
        k = value("k")
        try:
            ranked = self.frozen.rank(given, candidates, None if k is None else int(k[0]))
        except (IndexError, KeyError, ValueError) as error:  # the text names the feature
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))
        named = {"scores": ranked} if k is None else {"scores": ranked.values, "indices": ranked.indices}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, tensor.numpy()) for name, tensor in named.items()])
