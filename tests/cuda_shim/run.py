"""The CUDA ops, their kernels under the shim, against the reference. Run by tests/test_cuda.py in a process of its own.

    python run.py LIBRARY accuracy | bad_ids | bad_arguments

The library has the ops' CUDA implementations compiled for the CPU; here they are called for CPU tensors. Uninitialised
memory is NaN. ``accuracy`` prints a digest of all results, which must not depend on the order of threads and blocks.
"""

from __future__ import annotations

import hashlib
import sys

import torch

from rankkernels import ops, reference
from rankkernels.testing import TEST_CASES, TOLERANCE, embedding_bag_case, relative_error

library = torch.library.Library("rankkernels", "IMPL")


def call_cuda(name: str) -> None:
    op = getattr(torch.ops.rankkernels, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    library.impl(name, lambda *args, **kwargs: op.redispatch(keys, *args, **kwargs), "CPU")


CASES = [
    *(case for case in TEST_CASES if case.op == "embedding_bag"),
    # One row of a warp's width and more, packed and not; groups of every number of lanes.
    *(embedding_bag_case([7], [d], [0], ["mean"], B=9, L=5, weighted=True) for d in (1, 2, 4, 12, 16, 40, 136, 300)),
    embedding_bag_case([7], [24], [0], ["none"], B=70, L=1),
    embedding_bag_case([13], [72], [0, 0], ["max", "sum"], B=9, L=6, padding_idx=2),
    # Hot rows, whose runs cross many tiles and groups of a warp.
    embedding_bag_case([3], [16], [0], ["sum"], B=40, L=40, jagged=True),
    embedding_bag_case([1], [10], [0], ["mean"], B=30, L=30, weighted=True),
    # Tables of several widths in one tile, and more features and tables than go with one launch.
    embedding_bag_case([2, 3, 2], [8, 10, 48], [0, 1, 2, 1], ["sum", "mean", "none", "max"], B=6, L=3),
    embedding_bag_case([5] * 130, [4] * 130, list(range(130)), ["sum", "none"] * 65, B=3, L=2, padding_idx=1),
]


def run(function, inputs) -> list[torch.Tensor]:
    """The result and the gradients of the floating-point inputs."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*inputs)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    used = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, used, weights, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, used))]


def accuracy() -> None:
    digest = hashlib.sha256()
    for case in CASES:
        for dtype, tolerance in TOLERANCE.items():
            inputs = case.inputs(dtype)
            if dtype is torch.float32:
                inputs = [t if t.is_floating_point() else t.int() for t in inputs]
            expected = run(case.reference, [t.double() if t.is_floating_point() else t.long() for t in inputs])
            for i, (a, e) in enumerate(zip(run(case.function, inputs), expected)):
                assert a.dtype == dtype, (case.id, a.dtype)
                error = relative_error(a, e)
                assert error <= tolerance, f"{case.id} {dtype}: output or gradient {i} is off by {error}"
                digest.update(a.contiguous().view(torch.uint8).numpy().tobytes())
    mixed_dtypes()
    layouts()
    print("digest", digest.hexdigest())


def mixed_dtypes() -> None:
    """Tables of different dtypes share a call, and a tile of sorted lookups."""
    tables = [torch.randn(3, 6, dtype=dtype, requires_grad=True) for dtype in TOLERANCE]
    ids = [torch.tensor([[0, 1, 1], [2, 2, 0]]) for _ in tables]
    outs = ops.table_batched_embedding_bag(tables, ids, modes=["mean"] * len(tables))
    grads = torch.autograd.grad([out.double().sum() for out in outs], tables)
    for table, out, grad in zip(tables, outs, grads):
        assert relative_error(out, reference.embedding_bag(table, ids[0])) <= TOLERANCE[table.dtype]
        expected = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)[:, None].expand(3, 6) / 3
        assert relative_error(grad, expected) <= TOLERANCE[table.dtype]


def layouts() -> None:
    """Tables and gradients that start anywhere or have gaps, ids with strides, features side by side in one output."""
    ids, grad_out = torch.tensor([[0, 3], [1, 1], [2, 6]]).t(), torch.randn(2, 20)
    for weight in (
        torch.randn(57)[1:].view(7, 8),
        torch.randn(7, 16)[:, 8:],
        torch.randn(8, 7).t(),
        torch.randn(7, 9)[:, 1:],
    ):
        tables = [weight.detach().requires_grad_(), torch.randn(7, 12, requires_grad=True)]
        expected = torch.cat([reference.embedding_bag(w, ids, mode="mean") for w in tables], 1)
        (out,) = ops.table_batched_embedding_bag(tables, [ids, ids], modes=["mean", "mean"], concat=True)
        assert torch.allclose(out, expected)
        for given in (grad_out, torch.randn(2, 21)[:, 1:], grad_out[:1].expand(2, 20)):
            for a, e in zip(
                torch.autograd.grad(out, tables, given, True), torch.autograd.grad(expected, tables, given, True)
            ):
                assert torch.allclose(a, e, atol=1e-6)


def bad_ids() -> None:
    """Ids outside the table and offsets outside the ids are not followed, forward or backward."""
    weight = torch.randn(5, 4, requires_grad=True)
    ids = torch.tensor([[0, 5, 1], [-1, 2, 2**40], [4, 4, -(2**62)]])
    out = ops.embedding_bag(weight, ids, mode="sum")
    out.sum().backward()
    assert torch.allclose(out, torch.stack([weight[0] + weight[1], weight[2], 2 * weight[4]]))
    assert torch.equal(weight.grad, torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0])[:, None].expand(5, 4))
    for mode in ("mean", "max"):
        ops.embedding_bag(weight, ids, mode=mode).sum().backward()
    for starts in ([3, 1], [0, 9], [0, -4, 2, 1], [2**40]):
        offsets, flat = torch.tensor(starts), torch.tensor([0, 1, 2, 3, 4])
        ops.embedding_bag(weight, flat, offsets, mode="sum").sum().backward()
    assert torch.isfinite(weight.grad).all()
    print("ids not followed")


def bad_arguments() -> None:
    weight, ids = torch.randn(5, 4), torch.tensor([[0, 1], [2, 3]])
    for arguments, expected in (
        ({"indices": ids.float()}, "embedding_bag: indices must be int32 or int64, got"),
        ({"indices": ids[0]}, r"embedding_bag: indices must be [B, L], or [N] beside offsets [B], got shape [2]"),
        ({"weight": weight[0]}, "embedding_bag: weights[0] must be [R, D], got shape [4]"),
        ({"weight": weight.long()}, "embedding_bag: weights[0] must be float32, float64, float16 or bfloat16"),
        ({"per_sample_weights": torch.ones(2, 1)}, "per_sample_weights of indices must have its shape [2, 2]"),
        ({"per_sample_weights": torch.ones(2, 2).double()}, "per_sample_weights of indices must be like its table"),
        ({"per_sample_weights": torch.ones(2, 2), "mode": "max"}, "mode sum or mean, got [2, 2] and max"),
    ):
        try:
            ops.embedding_bag(**{"weight": weight, "indices": ids, **arguments})
        except RuntimeError as error:
            assert expected in str(error), error
        else:
            raise AssertionError(f"{arguments} raised nothing")
    print("arguments refused")


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in ("embedding_bag", "embedding_bag_backward"):
        call_cuda(name)
    {"accuracy": accuracy, "bad_ids": bad_ids, "bad_arguments": bad_arguments}[sys.argv[2]]()
