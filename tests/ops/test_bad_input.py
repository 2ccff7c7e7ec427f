"""Bad input to the embedding ops: an error that names table, position and value, and not a bit is written before it."""

from __future__ import annotations

import pytest
import torch

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
needs_kernels = pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise")
NAMES, ROWS, B = ["item", "shop", "history"], [9, 7, 9], 5
WAYS = pytest.mark.parametrize("way", ["dense", "sparse", "fused"])
LOOKUPS = pytest.mark.parametrize("lookup", ["one", "batched", "concat", "sequence", "fm"])


class Lookup:
    """A lookup of three features, its tables after one good step, and whether they and the optimizer's state change."""

    def __init__(self, lookup: str, way: str):
        self.kind, self.way = lookup, way
        self.weights = [torch.randn(r, 4, requires_grad=True) for r in ROWS]
        self.optimizer = rk.optim.Adam(self.weights, lr=0.1)
        self.ids = [torch.randint(0, r, self.shape(f)) for f, r in enumerate(ROWS)]
        self.step()
        self.before = [t.clone() for t in self.tensors()]

    def shape(self, f: int) -> tuple[int, ...]:
        return {"sequence": (B, 3, 2), "fm": (B,)}.get(self.kind, (B, 3))

    def tensors(self) -> list[torch.Tensor]:
        states = [self.optimizer.state[w] for w in self.weights]
        return [w.detach() for w in self.weights] + [torch.as_tensor(v) for s in states for v in s.values()]

    def step(self, **changes) -> None:
        arguments = {"weights": self.weights, "indices": self.ids, "names": NAMES, "sparse": self.way == "sparse"}
        if self.way == "fused":
            arguments["optimizer"] = self.optimizer
        arguments.update(changes)
        if self.kind == "fm":
            outs = rk.embedding_fm(**arguments)[:2]
        else:
            modes = ["none"] * 3 if self.kind == "sequence" else ["sum", "mean", "sum"]
            arguments = {"modes": modes, "concat": self.kind == "concat", **arguments}
            if self.kind == "one":  # table after table
                lists = ("weights", "indices", "names", "modes", "offsets", "per_sample_weights")
                each = [{k: [v[f]] if k in lists else v for k, v in arguments.items()} for f in range(3)]
                outs = [rk.table_batched_embedding_bag(**one)[0] for one in each]
            else:
                outs = rk.table_batched_embedding_bag(**arguments)
        sum(out.sin().sum() for out in outs).backward()
        if self.way == "sparse":
            self.optimizer.step()
        for w in self.weights:
            w.grad = None

    def refuses(self, error, message: str, **changes) -> None:
        with pytest.raises(error, match=message):
            self.step(**changes)
        after = self.tensors()
        assert len(after) == len(self.before) and all(torch.equal(a, b) for a, b in zip(after, self.before))
        assert all(w.grad is None for w in self.weights)


@WAYS
@LOOKUPS
@pytest.mark.parametrize("value", [-1, 7, 2**40, -(2**63)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_id_outside_its_table(lookup, way, value, dtype):
    case = Lookup(lookup, way)
    if dtype == torch.int32 and abs(value) > 2**31:
        value = 2**31 - 1
    ids = [i.to(dtype) for i in case.ids]
    position = tuple(n - 1 for n in case.shape(1))
    ids[1][position] = value
    place = ", ".join(map(str, position))
    message = rf"embedding_bag: shop\[{place}\] = {value} is out of range for a table with 7 rows"
    case.refuses(IndexError, message, indices=ids)


@needs_kernels
@WAYS
@pytest.mark.parametrize("lookup", ["one", "batched", "concat"])
@pytest.mark.parametrize(
    "offsets, message",
    [
        ([0, 4, 3, 9, 9], r"must not decrease and not exceed 15, the number of ids: offsets\[1\] = 4 is before 3"),
        ([0, 4, 16, 16, 16], r"must not decrease and not exceed 15, the number of ids: offsets\[4\] = 16 is before 15"),
        ([0, -1, 3, 9, 9], r"must not decrease and not exceed 15, the number of ids: offsets\[0\] = 0 is before -1"),
        ([2, 4, 5, 9, 9], "must start at 0, got 2"),
    ],
)
def test_offsets_that_decrease_or_end_beyond_the_ids(lookup, way, offsets, message):
    case = Lookup(lookup, way)
    ids, good = [i.flatten() for i in case.ids], torch.arange(0, 15, 3)
    for dtype in (torch.int64, torch.int32):
        wrong = torch.tensor(offsets, dtype=dtype)
        case.refuses(
            RuntimeError, f"embedding_bag: offsets of shop {message}", indices=ids, offsets=[good, wrong, good]
        )


@WAYS
@pytest.mark.parametrize("lookup", ["one", "batched", "concat"])
def test_weights_that_do_not_fit(lookup, way):
    case, good = Lookup(lookup, way), torch.rand(B, 3)
    of_another_shape = r"per_sample_weights of shop must have its shape \[5, 3\] and mode sum or mean, got \[3, 5\]"
    for factors, message in (
        (good.t(), of_another_shape),
        (good.double(), "per_sample_weights of shop must have the dtype"),
    ):
        case.refuses(RuntimeError, f"embedding_bag: {message}", per_sample_weights=[good, factors, good])
    message = r"embedding_bag: per_sample_weights of shop must .* mode sum or mean, got \[5, 3\] and max"
    case.refuses(RuntimeError, message, per_sample_weights=[good] * 3, modes=["sum", "max", "sum"])
    case.refuses(RuntimeError, "got .* and none", per_sample_weights=[good] * 3, modes=["sum", "none", "sum"])


@WAYS
@LOOKUPS
def test_mixed_devices(lookup, way):
    """The meta device stands for another one; of the FM, the linear weights too."""
    case = Lookup(lookup, way)
    elsewhere = case.ids[1].to("meta")
    case.refuses(
        RuntimeError, "shop must be on cpu like its table, got meta", indices=[case.ids[0], elsewhere, case.ids[2]]
    )
    weights = [case.weights[0], case.weights[1].detach().to("meta").requires_grad_(), case.weights[2]]
    message = r"(weights\[1\] must be on cpu|shop must be on meta like its table, got cpu)"
    if way == "fused":
        case.refuses(ValueError, "Adam: table . of shape .* is not among its params", weights=weights)
    else:
        case.refuses(RuntimeError, message, weights=weights)
    if lookup == "fm":
        message = "linear_weight must .* on cpu, got shape .* on meta"
        case.refuses(RuntimeError, message, linear_weight=torch.empty(12, device="meta"))
    elif lookup != "sequence":
        good = torch.rand(B, 3)
        message = "per_sample_weights of shop must have the dtype and device of its table, .* on meta"
        case.refuses(RuntimeError, message, per_sample_weights=[good, good.to("meta"), good])
        ids, offsets = [i.flatten() for i in case.ids], torch.arange(0, 15, 3)
        message = "offsets of shop must be on cpu like its table, got meta"
        case.refuses(RuntimeError, message, indices=ids, offsets=[offsets, offsets.to("meta"), offsets])


@LOOKUPS
def test_a_fused_optimizer_on_a_frozen_table(lookup):
    case = Lookup(lookup, "fused")
    for frozen in ([1], [0, 1, 2]):
        for t in range(3):
            case.weights[t].requires_grad_(t not in frozen)
        if lookup == "one" and frozen == [1]:
            continue  # three lookups: the one before is fine, and its own step
        table = 0 if lookup == "one" else frozen[0]
        case.refuses(ValueError, rf"Adam: table {table} of shape \[{ROWS[table]}, 4\] is frozen")


def test_a_dense_gradient_among_sparse_ones():
    """No table has taken its step when the optimizer finds the one that it cannot step on."""
    case = Lookup("batched", "dense")
    case.weights[0].grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (9, 4))
    case.weights[1].grad = torch.ones(7, 4)
    with pytest.raises(RuntimeError, match=r"Adam: the gradient of a table of shape \[7, 4\] is dense"):
        case.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), case.before))


@pytest.mark.parametrize(
    "ids, offsets, error, message",
    [
        ([0, 1, 9], [0, 1], IndexError, r"input\[2\] = 9 is out of range for a table with 9 rows"),
        ([0, 1, -1], [0, 1], IndexError, r"input\[2\] = -1 is out of range"),
        pytest.param([0, 1, 2], [0, 2, 1], RuntimeError, r"offsets\[1\] = 2 is before 1", marks=needs_kernels),
    ],
)
def test_max_norm_writes_nothing_where_the_input_is_bad(ids, offsets, error, message):
    """Rows are renormalized in place, those before the bad id too if it were found only then."""
    module = rk.EmbeddingBag(9, 4, max_norm=0.1)
    before = module.weight.detach().clone()
    with pytest.raises(error, match=message):
        module(torch.tensor(ids), torch.tensor(offsets))
    assert torch.equal(module.weight, before)


@WAYS
def test_batches_of_only_empty_bags(way):
    """Zeros; and no row moves."""
    for lookup, shape in (("batched", (B, 0)), ("concat", (B, 0)), ("sequence", (B, 0, 2)), ("fm", (0,))):
        case = Lookup(lookup, way)
        weights = [w.detach().clone() for w in case.weights]
        ids = [torch.zeros(shape, dtype=torch.int64)] * 3
        case.step(indices=ids)
        assert all(torch.equal(a, b) for a, b in zip(weights, case.weights))
    case = Lookup("fm", way)
    options = dict(modes=["sum", "none", "mean"], padding_idx=[2, None, 3], optimizer=None)
    ids = [torch.full((B, 3), 2), torch.arange(B), torch.full((B, 0), 3)]
    e, fm, linear = rk.embedding_fm(case.weights, ids, torch.ones(12), **options)
    assert torch.equal(e, torch.cat([torch.zeros(B, 4), case.weights[1][:B], torch.zeros(B, 4)], 1))
    assert torch.equal(fm, torch.zeros(B, 1)) and torch.allclose(linear, case.weights[1][:B].sum(1, keepdim=True))
