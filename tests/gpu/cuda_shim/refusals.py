"""The table of bad inputs, run against the CUDA implementations under the shim."""

from __future__ import annotations

import torch
from ops.bad_inputs import BAD_INPUTS, arguments

CUDA_OPS = (
    "embedding_bag", "embedding_bag_backward", "embedding_bag_backward_sparse", "embedding_bag_update", "sparse_update",
    "embedding_fm", "embedding_fm_backward",
)  # fmt: skip


def values_of(values: list) -> list[torch.Tensor]:
    return [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def bad_inputs() -> None:
    """The table of the tests on the CPU: in its words, and before anything is written."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in CUDA_OPS:
        overload = getattr(torch.ops.rankkernels, name).default
        for changes, expected in BAD_INPUTS[name]:
            values = arguments(name, changes)
            before = [t.clone() for t in values_of(values)]
            try:
                overload.redispatch(keys, *values)
                text = "nothing"
            except RuntimeError as error:
                text = str(error).splitlines()[0].partition(": ")[2]
            assert all(map(same_bits, before, values_of(values))), (name, expected)
            assert text == expected, (name, expected, text)
    print("bad inputs refused")
