"""The table of bad inputs, run against the CUDA implementations under the shim."""

from __future__ import annotations

import torch
from ops.bad_inputs import BAD_INPUTS, FLOATING, LIKE, SPARSE, arguments

CUDA_OPS = (
    "embedding_bag", "embedding_bag_backward", "embedding_bag_backward_sparse", "embedding_bag_update", "sparse_update",
    "embedding_fm", "embedding_fm_backward",
)  # fmt: skip

#: What the CUDA implementations say otherwise, or do not refuse: to be struck off as they learn the common words.
OF_BACKWARDS = {
    "grad_outs[0] must be [2, D] like the result, got shape [8]": "grad_outs[0] has shape [8] for 2 bags",
    "grad_outs[0] must be [2, D] like the result, got shape [1, 2, 4]": "nothing",
    "grad_outs[0] must be [2, D] like the result, got shape [3, 0]": "nothing",
    f"grad_outs[0] {FLOATING}torch.complex64": f"grad_outs[0] {FLOATING}ComplexFloat",
    f"weights[0] must have 5 rows of {LIKE} [3, 4] and torch.float32": "nothing",
    f"weights[0] must have 5 rows of {LIKE} [5, 3] and torch.float32": "nothing",
    "weights must have one entry a table, 2, got 1": "nothing",
}
OF_ROWS = "rows must be int64 [n] and values [n, D] like the table of shape [3, 2] and dtype Float, got"
OTHERWISE = {
    **{("embedding_bag_backward", expected): text for expected, text in OF_BACKWARDS.items()},
    **{("embedding_bag_backward_sparse", expected): text for expected, text in OF_BACKWARDS.items()},
    ("embedding_bag_update", f"weights[0] {FLOATING}torch.complex64"): f"a table {FLOATING}torch.complex64",
    (
        "sparse_update",
        f"{SPARSE} [1, 2] and [2, 2], torch.int64 and torch.float32",
    ): f"{OF_ROWS} [1, 2] and [2, 2] of Float",
    (
        "sparse_update",
        f"{SPARSE} [2] and [2, 0], torch.int64 and torch.float32",
    ): f"{OF_ROWS} [2] and [2, 0] of Float",
}


def values_of(values: list) -> list[torch.Tensor]:
    return [t for v in values for t in (v if isinstance(v, list) else [v]) if isinstance(t, torch.Tensor)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def bad_inputs() -> None:
    """The table of the tests on the CPU: in its words, and before anything is written."""
    keys, differ = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), {}
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
            if text != expected:
                differ[name, expected] = text
    assert differ == OTHERWISE, differ
    print("bad inputs refused")
