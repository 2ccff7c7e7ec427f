"""The CUDA ops, their kernels under the shim, against the reference. Run by test_cuda.py in a process of its own.

The library has the ops' CUDA implementations compiled for the CPU; here they are called for CPU tensors. Uninitialised
memory is NaN. ``accuracy`` prints a digest of all results, which must not depend on the order of threads and blocks.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
from pathlib import Path

import torch

from rankkernels import ops, optim, reference
from rankkernels.ops.embedding_bag_update import OPTIMIZERS, RULES, state_shapes
from rankkernels.testing import TEST_CASES, TOLERANCE, OpCase, embedding_bag_case, embedding_fm_case, relative_error

sys.path.insert(0, str(Path(__file__).parents[2]))
from gpu.cases import SHIM  # noqa: E402
from gpu.cuda_shim.exact import exact_adam  # noqa: E402
from gpu.cuda_shim.jobs import serve  # noqa: E402
from gpu.cuda_shim.live import launches_of, live_steps  # noqa: E402
from gpu.cuda_shim.refusals import CUDA_OPS, bad_inputs  # noqa: E402
from gpu.cuda_shim.rounding import rounding  # noqa: E402
from gpu.cuda_shim.unknown_ids import unknown_ids  # noqa: E402
from ops.random_lookups import random_lookups  # noqa: E402

library = torch.library.Library("rankkernels", "IMPL")


def call_cuda() -> None:
    """From here on the ops call their CUDA implementations for CPU tensors, and before their pure-PyTorch ones."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name in CUDA_OPS:
        op = getattr(torch.ops.rankkernels, name).default
        library.impl(name, lambda *args, op=op, **kwargs: op.redispatch(keys, *args, **kwargs), "CPU")


def cases_of(op: str) -> list[OpCase]:
    return [*(case for case in TEST_CASES if case.op == op), *SHIM[op]]


CASES = cases_of("embedding_bag")
ALL_CASES = [case for op in SHIM for case in cases_of(op)]


def run(function, inputs) -> list[torch.Tensor]:
    """The result and the gradients of the floating-point inputs."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*inputs)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    used = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(out, used, weights, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, used))]


def features_of(case, dtype, seed: int = 0):
    """The arguments of a case's op without its weights and names, the weights, and gradients of its results."""
    weights, *features = case.arguments(*case.inputs(dtype, seed=seed))[:-1]
    outs = torch.ops.rankkernels.embedding_bag.default(
        weights, *features, "\n".join(f"feature {f}" for f in range(len(features[0])))
    )
    generator = torch.Generator().manual_seed(seed)
    return (
        weights,
        features,
        [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(dtype) for out in outs],
    )


def sparse(case, dtype, digest) -> None:
    """The same bits as the dense gradient, in the rows that were looked up, ascending."""
    weights, features, grad_outs = features_of(case, dtype)
    arguments = grad_outs, weights, [w.size(0) for w in weights], *features
    dense, grad_psw = torch.ops.rankkernels.embedding_bag_backward.default(*arguments)
    rows, values, sparse_grad_psw = torch.ops.rankkernels.embedding_bag_backward_sparse.default(*arguments)
    ids, _, _, tables, modes, padding_idx, frozen_rows, _ = features
    for t in range(len(weights)):
        looked_up = [
            i for f in range(len(ids)) if tables[f] == t for i in ids[f].flatten().tolist()
            if i != frozen_rows[t] and (modes[f] == 0 or i != padding_idx[f])
        ]  # fmt: skip
        assert rows[t].tolist() == sorted(set(looked_up)), case.id
        assert torch.equal(torch.zeros_like(dense[t]).index_copy(0, rows[t], values[t]), dense[t]), case.id
        digest.update(values[t].view(torch.uint8).numpy().tobytes())
    assert all(torch.equal(a, b) for a, b in zip(grad_psw, sparse_grad_psw))


def updated(case, dtype, optimizer: str) -> list[torch.Tensor]:
    """Tables and state after two fused steps, after a step with a sparse gradient, and after ``live_steps``."""
    weights, _, _ = features_of(case, dtype)
    weights = [torch.cat([w, w], 1)[:, w.size(1) :] for w in weights]  # tables may have gaps between their rows
    kind, own = OPTIMIZERS.index(optimizer), [OWN[name] for name in RULES[optimizer].settings]
    states = []
    for w in weights:
        of_table = [w.new_full(shape, 0.1, dtype=torch.promote_types(dtype, torch.float32))
                    for shape in state_shapes(optimizer, w.shape)]  # fmt: skip
        states += torch.stack(of_table, 1).unbind(1) if RULES[optimizer].elementwise == 2 else of_table
    for step in (1.0, 2.0):
        _, features, grad_outs = features_of(case, dtype, seed=int(step))
        hyper = [
            v for t in range(len(weights)) for v in (0.1 / (t + 1), 0.9, 0.99, 1e-6, 0.01, step, 0.5, t % 2, 0.0, *own)
        ]
        torch.ops.rankkernels.embedding_bag_update.default(grad_outs, weights, states, *features, kind, hyper)
    rows = torch.arange(0, weights[0].size(0), 2)
    values = torch.linspace(-1, 1, rows.numel() * weights[0].size(1), dtype=torch.float64).view(rows.numel(), -1)
    hyper, of_first = [0.1, 0.9, 0.99, 1e-6, 0.01, 3.0, 2.0, 0.7, 0.0, *own], states[: len(states) // len(weights)]
    torch.ops.rankkernels.sparse_update.default(weights[0], of_first, rows, values.to(dtype), kind, hyper)
    return [*weights, *states, *live_steps(*features_of(case, dtype, seed=5)[1:], kind, weights, states, own)]


OWN = {"lr_power": -0.5, "beta": 0.3, "l1": 0.2, "l2": 0.1, "ar_alpha": 1.5, "min_shrinkage": 0.2}
# Every optimizer in every dtype on hot rows, and in float32 on all forms of features and widths.
UPDATES = [
    (case, dtype, optimizer)
    for case in CASES
    if "-B40-" in case.id or case.id.startswith(("embedding_bag-3x", "embedding_bag-2x11", "embedding_bag-1x7x300"))
    for dtype in (TOLERANCE if "-B40-" in case.id else (torch.float32,))
    for optimizer in OPTIMIZERS
] + [(CASES[-1], torch.float32, "rowwise_adagrad")]


def accuracy() -> None:
    """With SHIM_SOME a part of each grid, in steps that meet every case, dtype and optimizer."""
    some = "SHIM_SOME" in os.environ
    updates = UPDATES[:: 7 if some else 1]
    digest = hashlib.sha256()
    expected_updates = [updated(*update) for update in updates]
    exact_adam(digest, some)
    call_cuda()
    for update, expected in zip(updates, expected_updates):
        for i, (a, e) in enumerate(zip(updated(*update), expected)):
            error = relative_error(a, e)
            assert error <= TOLERANCE[update[1]], f"{update[0].id} {update[1:]}: table or state {i} is off by {error}"
            digest.update(a.contiguous().view(torch.uint8).numpy().tobytes())
    for table in rounding(some):
        digest.update(table.view(torch.uint8).numpy().tobytes())
    mixed_dtypes()
    widths(range(0, 12, 4 if some else 1))
    layouts()
    many_rows()
    far_rows()
    fm_ways()
    unknown_ids()
    for case, dtype in [(case, dtype) for case in ALL_CASES for dtype in TOLERANCE][:: 3 if some else 1]:
        inputs = case.inputs(dtype)
        if dtype is torch.float32:
            inputs = [t if t.is_floating_point() else t.int() for t in inputs]
        expected = run(case.reference, [t.double() if t.is_floating_point() else t.long() for t in inputs])
        for i, (a, e) in enumerate(zip(run(case.function, inputs), expected)):
            assert a.dtype == dtype, (case.id, a.dtype)
            error = relative_error(a, e)
            assert error <= TOLERANCE[dtype], f"{case.id} {dtype}: output or gradient {i} is off by {error}"
            digest.update(a.contiguous().view(torch.uint8).numpy().tobytes())
        if case.op == "embedding_bag":
            sparse(case, dtype, digest)
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


def widths(seeds: range) -> None:
    """Tables of different widths share a call, and a tile of sorted lookups."""
    for seed in seeds:
        lookups = random_lookups(seed, max_batch=60, max_width=40)
        for way in ("dense", "sparse", "fused"):
            lookups.check(way)


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


def many_rows() -> None:
    """More rows than 32 bits number."""
    rows, ids = [2**31, 2**33], [torch.tensor([[2**31 - 1, 0], [2**31 - 1, 7]]), torch.tensor([[2**33 - 1, 2**32]])]
    grad_outs = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])]
    grad_rows, values, _ = torch.ops.rankkernels.embedding_bag_backward_sparse.default(
        grad_outs, [], rows, ids, [], [], [0, 1], [1, 1], [-1, -1], [-1, -1], []
    )
    assert [r.tolist() for r in grad_rows] == [[0, 7, 2**31 - 1], [2**32, 2**33 - 1]]
    assert [v.tolist() for v in values] == [[[1, 2], [3, 4], [4, 6]], [[5, 6], [5, 6]]]


def far(rows: int, width: int) -> torch.Tensor:
    """Random rows, 2^30 elements apart: what lies between them is never touched, so it takes no memory."""
    stride = 2**30
    pages = mmap.mmap(-1, 4 * ((rows - 1) * stride + width), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(pages, dtype=torch.float32).as_strided((rows, width), (stride, 1)).copy_(
        torch.randn(rows, width)
    )  # fmt: skip


def far_rows() -> None:
    """Tables, gradients and updated rows at offsets beyond 32 bits."""
    weight, ids = far(4, 12), torch.tensor([[0, 3], [1, 1], [2, 3], [3, 3], [0, 2]])
    table, grad_out = weight.detach().requires_grad_(), far(5, 12)
    near = weight.clone().requires_grad_()
    for mode in ("sum", "max"):
        out, expected = ops.embedding_bag(table, ids, mode=mode), reference.embedding_bag(near, ids, mode=mode)
        assert torch.allclose(out, expected)
        (a,), (e,) = (torch.autograd.grad(o, w, grad_out) for o, w in ((out, table), (expected, near)))
        assert torch.allclose(a, e, atol=1e-6)
    before, values = weight.clone(), torch.randn(2, 12)
    torch.ops.rankkernels.sparse_update.default(
        weight, [], torch.tensor([0, 3]), values, 0, [0.5, 0, 0, 0, 0, 1.0, 1.0, 0, 0]
    )
    before[[0, 3]] -= 0.5 * values
    assert torch.allclose(weight, before)


def fm_ways() -> None:
    """Sparse gradients and an optimizer's step are those of the separate ops; terms without a gradient; layouts."""
    ids = [torch.tensor([0, 1, 1]), torch.tensor([[2, 2], [1, 6], [4, 0]]), torch.tensor([3, 6, 3])]
    given = [torch.randn(3, 25)[:, 1:], torch.randn(1, 1).expand(3, 1), torch.randn(3, 1)]
    for a in (torch.randn(24), torch.randn(25)[1:].view(3, 8), torch.randn(48)[::2]):
        for used in ((0, 1, 2), (1,), (2,), (0, 2)):
            results = []
            for way in ("apart", "dense", "sparse", "fused"):
                generator = torch.Generator().manual_seed(0)
                weights = [torch.randn(7, 8, generator=generator, requires_grad=True) for _ in range(2)]
                linear_weight = a.clone().requires_grad_()
                options = dict(modes=["none", "mean", "sum"], tables=[0, 1, 0], frozen_rows=[6, None])
                options["padding_idx"] = [None, 1, None]
                inputs = ids[:2] + [ids[2][:, None]]
                if way == "apart":
                    (e,) = ops.table_batched_embedding_bag(weights, inputs, **options, concat=True)
                    outs = e, *reference.fm_and_linear(e, 8, linear_weight.reshape(1, -1))
                else:
                    rows = optim.SGD(weights, lr=1.0) if way == "fused" else None
                    old = [w.detach().clone() for w in weights]
                    outs = ops.embedding_fm(
                        weights, inputs, linear_weight, **options, sparse=way == "sparse", optimizer=rows
                    )
                torch.autograd.backward([outs[i] for i in used], [given[i] for i in used])
                steps = [o - w.detach() for o, w in zip(old, weights)] if way == "fused" else [w.grad for w in weights]
                grad_a = torch.zeros_like(a) if linear_weight.grad is None else linear_weight.grad
                results.append([*(o.detach() for o in outs), *(g.to_dense() for g in steps), grad_a])
            for result in results[1:]:
                for x, y in zip(result, results[0], strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def launches() -> None:
    """Forwards and backwards of 26 tables; the shim says what they launch."""
    call_cuda()
    for make in (embedding_bag_case, embedding_fm_case):
        launches_of(
            make([5] * 26, 4 if make is embedding_fm_case else [4] * 26, list(range(26)), ["sum"] * 26, B=3, L=2)
        )


def bad_ids() -> None:
    """Ids outside the table and offsets outside the ids are not followed, forward or backward."""
    call_cuda()
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
    rows, before = optim.Adagrad([weight], lr=1.0), weight.detach().clone()
    options = dict(modes=["sum"], optimizer=rows)
    ops.table_batched_embedding_bag([weight], [ids], **options)[0].sum().backward()
    moved = (weight != before).any(1)
    assert moved.tolist() == [True, True, True, False, True]  # by the ids that are rows
    empty = ops.table_batched_embedding_bag([weight], [torch.zeros(3, 0, dtype=torch.int64)], **options)[0]
    empty.sum().backward()
    assert torch.equal(empty, torch.zeros(3, 4)) and torch.equal((weight != before).any(1), moved)
    print("ids not followed")


def bad_ids_fm() -> None:
    """The same for the FM op: such an id contributes nothing to the embeddings, to the terms and to any gradient."""
    call_cuda()
    weight, a = torch.randn(5, 4, requires_grad=True), torch.randn(8)
    ids = [torch.tensor([0, 5, -1]), torch.tensor([[4, 2**40], [1, 1], [3, -(2**62)]])]
    e, fm, linear = ops.embedding_fm([weight], ids, a, modes=["none", "sum"], tables=[0, 0], names=["item", "history"])
    (e.sum() + fm.sum() + linear.sum()).backward()
    zero = torch.zeros(4)
    rows = torch.stack(
        [torch.cat([weight[0], weight[4]]), torch.cat([zero, 2 * weight[1]]), torch.cat([zero, weight[3]])]
    )
    for x, y in zip((e, fm, linear), (rows, *reference.fm_and_linear(rows, 4, a[None]))):
        assert torch.allclose(x, y)
    found, weight.grad = weight.grad, None
    (rows.sum() + sum(t.sum() for t in reference.fm_and_linear(rows, 4, a[None]))).backward()
    assert torch.allclose(found, weight.grad)
    print("ids not followed")


def assert_refused(expected: str, function, *args, **kwargs) -> None:
    """A RuntimeError that says ``expected``."""
    try:
        function(*args, **kwargs)
    except RuntimeError as error:
        assert expected in str(error), error
    else:
        raise AssertionError(f"{expected!r} was not raised")


def bad_arguments() -> None:
    call_cuda()
    weight, ids = torch.randn(5, 4), torch.tensor([[0, 1], [2, 3]])
    for changes, expected in (
        ({"indices": ids.float()}, "embedding_bag: indices must be int32 or int64, got"),
        ({"indices": ids[0]}, r"embedding_bag: indices must be [B, L], or [N] beside offsets [B], got shape [2]"),
        ({"weight": weight[0]}, "embedding_bag: weights[0] must be [R, D], got shape [4]"),
        ({"weight": weight.long()}, "embedding_bag: weights[0] must be float32, float64, float16 or bfloat16"),
        ({"per_sample_weights": torch.ones(2, 1)}, "per_sample_weights of indices must have its shape [2, 2]"),
        (
            {"per_sample_weights": torch.ones(2, 2).double()},
            "per_sample_weights of indices must have the dtype of its",
        ),
        ({"per_sample_weights": torch.ones(2, 2), "mode": "max"}, "mode sum or mean, got [2, 2] and max"),
    ):
        assert_refused(expected, ops.embedding_bag, **{"weight": weight, "indices": ids, **changes})
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    fm, shop = torch.ops.rankkernels.embedding_fm.default, [torch.randn(5, 4), torch.randn(7, 4)]
    numbers = [0, 1], [0, 0], [-1, -1], [-1, -1], [], "item\nshop"
    a, elsewhere = torch.randn(8), {"device": "meta"}
    for weights, indices, linear_weight, expected in (
        ([shop[0], torch.randn(7, 3)], [ids[0], ids[1]], a, "features must have one width, but that of shop is 3 and"),
        (shop, [ids[0], ids[1]], a[1:], "linear_weight must have one value a column of the embeddings, 8, and their"),
        (shop, [ids[0], ids[1]], a.double(), "torch.float32 on cpu, got shape [8] and torch.float64 on cpu"),
        (shop, [ids[0], ids[1]], torch.empty(8, **elsewhere), "linear_weight must have one value a column"),
        (shop, [ids[0], ids[1][:1]], a, "features must give [B, D] of one B and one dtype, but shop of shape [1]"),
        (shop, [ids[0], ids[1].to("meta")], a, "embedding_bag: shop must be on the device of its table"),
        ([shop[0], torch.empty(7, 4, **elsewhere)], [ids[0], ids[1]], a, "weights[1] must be on a GPU like the others"),
    ):
        assert_refused(expected, fm.redispatch, keys, weights, indices, [], [], *numbers, linear_weight, None)
    for dense in (torch.ones(2), torch.ones(3, 1), torch.ones(2, 1).half(), torch.ones(2, 1, **elsewhere)):
        expected = "embedding_fm: dense must be [B, n] with B = "
        assert_refused(expected, fm.redispatch, keys, shop, [ids[0], ids[1]], [], [], *numbers, a, dense)
    backward, e = torch.ops.rankkernels.embedding_fm_backward.default, torch.randn(3, 8)
    for grads, linear_weight, D, expected in (
        ((torch.ones(3, 7), None, None), None, 4, "grad_embeddings must be [3, 8] like the embeddings, torch.float32"),
        ((None, torch.ones(2, 1), None), None, 4, "grad_fm must be [3, 1] like the embeddings, torch.float32"),
        ((None, None, torch.ones(3, 1).half()), a, 4, "grad_linear must be [3, 1] like the embeddings, torch.float32"),
        ((None, torch.ones(3, 1), None), None, 3, "embeddings must have a multiple of dim = 3 columns, got 8"),
    ):
        assert_refused(f"embedding_fm_backward: {expected}", backward, *grads, e, linear_weight, D)
    update = torch.ops.rankkernels.embedding_bag_update.default
    features = [ids], [], [], [0], [1], [-1], [-1], []
    state = "state 0 of a table of shape [5, 4] must be"
    for grad, states, kind, hyper, expected in (
        (torch.ones(2, 4), [], 9, [0.0] * 9, "embedding_bag_update: unknown optimizer 9"),
        (torch.ones(2, 4), [], 1, [0.0] * 9, "states must hold 1 tensors a table, got 0 for 1"),
        (torch.ones(2, 4), [], 0, [0.1] * 7, "hyper must hold 9 numbers a table, got 7 for 1"),
        (torch.ones(2, 4), [torch.ones(5, 3)], 1, [0.0] * 9, f"{state} torch.float32 of one value an element"),
        (torch.ones(2, 3), [], 0, [0.0] * 9, "weights[0] must have 5 rows of the gradient's width and dtype, 3 and"),
        (torch.ones(3, 4), [], 0, [0.0] * 9, "grad_outs[0] must be [2, D] like the result"),
        (torch.ones(3, 4), [torch.ones(5, 4)], 1, [0.0] * 9, "grad_outs[0] must be [2, D] like the result"),
        (torch.ones(2, 4), [torch.empty(5, 4, **elsewhere)], 1, [0.0] * 9, f"{state} on the table's device"),
    ):
        before, old_states = weight.clone(), [state.clone() for state in states]
        assert_refused(expected, update.redispatch, keys, [grad], [weight], states, *features, kind, hyper)
        assert torch.equal(weight, before)
        assert all(state.is_meta or torch.equal(state, old) for state, old in zip(states, old_states))
    print("arguments refused")


if __name__ == "__main__":
    serve({f.__name__: f for f in (accuracy, launches, bad_ids, bad_ids_fm, bad_inputs, bad_arguments)})
