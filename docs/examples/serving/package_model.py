"""A frozen model as NVIDIA Triton's PyTorch backend runs it, without Python: ``1/model.pt2``, AOTInductor's package,
and the ``config.pbtxt`` with the names that the backend gives to what the package takes.

python docs/examples/serving/package_model.py model.pt triton/din_package --candidates item
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

import torch
from torch.export import Dim

from rankkernels import serve

CONFIG = """\
name: "{name}"
backend: "pytorch"
platform: "torch_aoti"
max_batch_size: 0  # a request is one user; the candidates' dimension is the model's own
input [
  {inputs}
]
output [ {{ name: "RESULT" data_type: TYPE_FP32 dims: [ -1 ] }} ]
parameters {{ key: "INTRA_OP_THREAD_COUNT" value {{ string_value: "1" }} }}
parameters {{ key: "ENABLE_WEIGHT_SHARING" value {{ string_value: "true" }} }}
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
"""


def shape_of(kind: str, of_candidates: bool) -> list[int]:
    """Of a feature of this kind, -1 where requests differ."""
    if of_candidates:
        return [-1, -1] if kind == "sequence" else [-1]
    return [-1] if kind in ("sequence", "history") else [1]


def config(name: str, inputs: dict[str, str], of_candidates: Collection[str]) -> str:
    """The backend calls an argument by its place, and what a dictionary has by its key: forward(user, candidates)."""
    lines = []
    for feature, kind in inputs.items():
        side = int(feature in of_candidates)
        data_type = "TYPE_FP32" if kind == "numbers" else "TYPE_INT64"
        dims = ", ".join(map(str, shape_of(kind, bool(side))))
        lines.append(f'{{ name: "ARGS[{side}][{feature}]" data_type: {data_type} dims: [ {dims} ] }}')
    return CONFIG.format(name=name, inputs=",\n  ".join(lines))


def package(frozen: serve.FrozenModel, of_candidates: Collection[str], path: Path) -> None:
    """Of the model's ``rank``, for any number of candidates and any length of a list; numbers have one value each."""
    given: tuple[dict, dict] = {}, {}
    shapes: tuple[dict, dict] = {}, {}
    for feature, kind in frozen.inputs.items():
        side = int(feature in of_candidates)
        shape = shape_of(kind, bool(side))
        dtype = torch.float32 if kind == "numbers" else torch.int64
        given[side][feature] = torch.zeros([5 if n < 0 else n for n in shape], dtype=dtype)
        shapes[side][feature] = {i: Dim.DYNAMIC for i, n in enumerate(shape) if n < 0}
    with torch.no_grad():
        program = torch.export.export(serve.RankModule(frozen), given, dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a file that FrozenModel.save wrote")
    parser.add_argument("folder", type=Path, help="of the model, in the model repository")
    parser.add_argument("--candidates", nargs="+", required=True, help="features of candidates; the others: a user's")
    options = parser.parse_args()
    frozen = serve.load(options.model)
    (options.folder / "1").mkdir(parents=True, exist_ok=True)
    package(frozen, options.candidates, options.folder / "1/model.pt2")
    (options.folder / "config.pbtxt").write_text(config(options.folder.name, frozen.inputs, options.candidates))


if __name__ == "__main__":
    main()
