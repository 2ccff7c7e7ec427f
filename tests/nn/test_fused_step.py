"""When a fused optimizer steps, and with what: one step a table and backward, where its gradient is asked for."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from failing import Fails
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.utils.checkpoint import checkpoint

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
KINDS = pytest.mark.parametrize(
    "kind", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW", "FTRL", "RowWiseAdam", "RowWiseRMSprop"]
)
MODES = pytest.mark.parametrize("mode", ["sum", "mean", "max"])


def tables(mode: str = "sum", sparse: bool = False) -> rk.TableBatchedEmbeddingBag:
    torch.manual_seed(0)
    return rk.TableBatchedEmbeddingBag([20, 30], [4, 6], modes=mode, padding_idx=[3, None], sparse=sparse).double()


def batch(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(0, rows, (12, 3), generator=generator) for rows in (20, 30)]


def pair(kind: str = "Adam", make=tables, **options):
    """The same module fused and stepped, with their optimizers."""
    fused, stepped = make(), make(sparse=True)
    optimizers = [getattr(rk.optim, kind)(m.parameters(), lr=0.1, **options) for m in (fused, stepped)]
    rk.optim.fuse(fused, optimizers[0])
    return fused, stepped, *optimizers


def same(fused: nn.Module, stepped: nn.Module) -> None:
    for a, b in zip(fused.parameters(), stepped.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def snapshot(module: nn.Module, optimizer) -> list:
    states = [optimizer.state.get(p, {}) for p in module.parameters()]
    return [p.detach().clone() for p in module.parameters()] + [copy.deepcopy(state) for state in states]


def unchanged(module: nn.Module, optimizer, before: list) -> bool:
    def equal(a, b):
        if isinstance(a, dict):
            return set(a) == set(b) and all(equal(a[k], b[k]) for k in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return all(equal(a, b) for a, b in zip(snapshot(module, optimizer), before))


@KINDS
@MODES
def test_a_layer_called_twice_is_one_step(kind, mode):
    fused, stepped, one, other = pair(kind, lambda sparse=False: tables(mode, sparse))
    for step in range(3):
        for module in (fused, stepped):
            (module(batch(step)).sin() * module(batch(step + 9)).cos()).sum().backward()
        other.step()
        other.zero_grad()
        same(fused, stepped)
    assert all(one.state[p]["step"] == 3 for p in fused.parameters())


@KINDS
@pytest.mark.parametrize("fm", [False, True])
def test_one_table_given_twice_is_one_step(kind, fm):
    """The tables of a call are distinct objects or not, as features share them or not."""
    results = []
    for weights_of, places in ((lambda w, v: [w, v, w], None), (lambda w, v: [w, v], [0, 1, 0])):
        torch.manual_seed(0)
        w, v = (torch.randn(9, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        optimizer = getattr(rk.optim, kind)([w, v], lr=0.1)
        ids = [torch.randint(9, (300,)) for _ in range(3)]
        if fm:
            out = rk.embedding_fm(weights_of(w, v), ids, tables=places, optimizer=optimizer)[:2]
        else:
            out = rk.table_batched_embedding_bag(weights_of(w, v), ids, tables=places, modes=["none"] * 3,
                                                 optimizer=optimizer)  # fmt: skip
        sum(o.sin().sum() for o in out).backward()
        results.append([w, v])
        assert optimizer.state[w]["step"] == optimizer.state[v]["step"] == 1
    assert all(torch.equal(a, b) for a, b in zip(*results))
    with pytest.raises(ValueError, match="tables 0 and 1 are one, but their frozen rows differ, -1 and 2"):
        rk.table_batched_embedding_bag([w, w], ids[:2], modes=["none"] * 2, frozen_rows=[None, 2], optimizer=optimizer)


def models(sparse: bool = False):
    torch.manual_seed(0)
    features = [rk.SparseFeature("user", 50, 8), rk.SparseFeature("item", 50, 8)]
    return rk.DeepFM([*features, rk.DenseFeature("age")], features, {"dims": [16]}).double().eval()


def test_a_model_called_twice_is_one_step():
    """As of a pair of a liked and another item; the FM's and the linear term's gradients with it."""
    x = [{"user": torch.arange(8), "item": torch.arange(8) + i, "age": torch.rand(8)} for i in (0, 5)]
    fused, stepped = models(), models()
    rk.optim.fuse(fused, rk.optim.SGD(fused.embedding.parameters(), lr=0.1))
    for model in (fused, stepped):
        (model(x[0]) - model(x[1])).sigmoid().log().sum().backward()
    with torch.no_grad():
        for p in stepped.embedding.parameters():
            p -= 0.1 * p.grad
    same(fused, stepped)
    for (name, a), b in zip(fused.named_parameters(), stepped.parameters()):
        if not name.startswith("embedding."):
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("twice", [False, True])
def test_the_gradient_of_an_input_moves_no_table(twice):
    model = models()
    optimizer = rk.optim.Adam(model.embedding.parameters())
    rk.optim.fuse(model, optimizer)
    before = snapshot(model.embedding, optimizer)
    x = {"user": torch.arange(8), "item": torch.arange(8), "age": torch.rand(8, dtype=torch.float64).requires_grad_()}
    (grad,) = torch.autograd.grad(model(x).sum() + (model(x).sum() if twice else 0), x["age"])
    assert (grad != 0).any() and unchanged(model.embedding, optimizer, before)
    (model(x).sum() + (model(x).sum() if twice else 0)).backward(inputs=[x["age"], *model.mlp.parameters()])
    assert unchanged(model.embedding, optimizer, before)
    assert all(not gate.backwards for gate in optimizer.gates.values())


@MODES
def test_a_gradient_asked_for_by_name(mode):
    """``torch.autograd.grad`` gives it and takes no step; ``backward(inputs=)`` steps on the tables named."""
    fused, stepped, optimizer, other = pair("Adam", lambda sparse=False: tables(mode, sparse))
    before = snapshot(fused, optimizer)
    (grad,) = torch.autograd.grad(fused(batch(0)).sin().sum(), fused.weights[1])
    (expected,) = torch.autograd.grad(stepped(batch(0)).sin().sum(), stepped.weights[1])
    torch.testing.assert_close(grad, expected.to_dense())
    assert unchanged(fused, optimizer, before)
    fused(batch(0)).sin().sum().backward(inputs=[fused.weights[1]])
    stepped(batch(0)).sin().sum().backward(inputs=[stepped.weights[1]])
    other.step()
    same(fused, stepped)
    assert optimizer.state.get(fused.weights[0]) is None and fused.weights[1].grad is None


def test_a_graph_kept_for_a_second_backward():
    fused, stepped, optimizer, other = pair()
    losses = [m(batch(0)).sin().sum() for m in (fused, stepped)]
    for _ in range(2):
        for loss in losses:
            loss.backward(retain_graph=True)
        other.step()
        other.zero_grad()
    same(fused, stepped)
    assert optimizer.state[fused.weights[0]]["step"] == 2


def test_checkpointed_calls_are_one_step():
    fused, stepped, optimizer, other = pair("Adam", lambda sparse=False: tables("max", sparse))
    for module in (fused, stepped):
        halves = [checkpoint(module, batch(i), use_reentrant=False) for i in range(2)]
        (halves[0].sin() * halves[1]).sum().backward()
    other.step()
    same(fused, stepped)
    assert optimizer.state[fused.weights[0]]["step"] == 1


def test_per_sample_weights_get_their_gradient_in_each_of_two_calls():
    grads = []
    for calls in (1, 2):
        module = tables()
        rk.optim.fuse(module, rk.optim.SGD(module.parameters(), lr=0.1))
        factors = [torch.ones(12, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        sum(module(batch(0), per_sample_weights=factors).sin().sum() for _ in range(calls)).backward()
        grads.append([calls * f.grad for f in factors] if calls == 1 else [f.grad for f in factors])
    for a, b in zip(*grads):
        torch.testing.assert_close(2 * a, b)


def test_a_backward_that_fails_takes_no_step():
    """Of two lookups one has had its backward when the other's gradient fails to come."""
    module = tables()
    optimizer = rk.optim.Adam(module.parameters())
    rk.optim.fuse(module, optimizer)
    before = snapshot(module, optimizer)
    late = Fails.apply(module(batch(0)))
    with pytest.raises(ArithmeticError, match="on the way back"):
        (late.sum() + module(batch(1)).sum()).backward()
    assert unchanged(module, optimizer, before)
    module(batch(1)).sum().backward()
    assert optimizer.state[module.weights[0]]["step"] == 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_refused_step_changes_nothing(fused, monkeypatch):
    """Nor does an interrupt: it comes before the step and its count, or after both."""
    module = tables(sparse=not fused)
    optimizer = rk.optim.Adam(module.parameters())
    if fused:
        rk.optim.fuse(module, optimizer)

    def train():
        module(batch(0)).sum().backward()
        optimizer.step()

    before = snapshot(module, optimizer)
    optimizer.param_groups[0]["betas"] = (0.9,)  # found when the second table's step is made ready, or never
    with pytest.raises(ValueError):
        train()
    assert unchanged(module, optimizer, before)
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.zero_grad()
    train()
    before = snapshot(module, optimizer)
    optimizer.state[module.weights[1]]["exp_avg"] = torch.zeros(7, 6, dtype=torch.float64)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="exp_avg of shape|state 0 of a table of shape"):
        train()
    assert torch.equal(module.weights[0], before[0]) and torch.equal(module.weights[1], before[1])
    assert [optimizer.state[p]["step"] for p in module.parameters()] == [1, 1]


def test_hooks_on_a_tables_gradient_are_not_passed_over():
    module = tables()
    rk.optim.fuse(module, rk.optim.SGD(module.parameters()))
    hook = module.weights[1].register_hook(lambda grad: 0 * grad)
    with pytest.raises(ValueError, match=r"SGD: table 1 of shape \[30, 6\] has hooks on its gradient"):
        module(batch(0))
    hook.remove()
    module(batch(0)).sum().backward()
    module.weights[0].register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="table 0 .* has hooks"):
        module(batch(0))


def test_tables_that_change_their_dtype():
    """What is kept of the tables from call to call does not outlive them."""
    module = tables()
    optimizer = rk.optim.SGD(module.parameters(), lr=0.1)
    rk.optim.fuse(module, optimizer)
    module(batch(0)).sum().backward()
    module.float()
    (grad,) = torch.autograd.grad(module(batch(0)).sum(), module.weights[0])
    assert grad.dtype == torch.float32
    before = module.weights[0].detach().clone()
    module(batch(0)).sum().backward()
    torch.testing.assert_close(module.weights[0], before - 0.1 * grad)


def copies(module, optimizer, way: str):
    if way == "deepcopy":
        return copy.deepcopy((module, optimizer))
    file = io.BytesIO()
    (torch.save if way == "save" else pickle.dump)((module, optimizer), file)
    file.seek(0)
    return torch.load(file, weights_only=False) if way == "save" else pickle.load(file)


@KINDS
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_goes_on_as_the_original(kind, way):
    options = {"initial_accumulator_value": 3.0} if kind == "Adagrad" else {}
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    module = tables()
    optimizer = getattr(rk.optim, kind)(module.parameters(), lr=0.1, max_row_norm=2.0, **options)
    rk.optim.fuse(module, optimizer, grad_scaler=scaler)
    made = [(module, optimizer), copies(module, optimizer, way)]  # before any state is made
    scaler.scale(module(batch(0)).sin().sum()).backward()
    made.append(copies(module, optimizer, way))
    scaler.scale(made[1][0](batch(0)).sin().sum()).backward()
    for m, o in made:
        assert m.fused_optimizer is o and o.grad_scaler.get_scale() == 4.0
        scaler.scale(m(batch(1)).sin().sum()).backward()
        assert [o.state[p]["step"] for p in m.parameters()] == [2, 2]
    for m, _ in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), m.parameters()))


WRAPPED = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "delayed": {"delay_all_reduce_named_params": ["0.weights.0", "0.weights.1"]},
}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("way", [*WRAPPED, "no_sync", "replicate", "replicate, fused first"])
def test_distributed(tmp_path, way):
    """Refused inside DistributedDataParallel that waits for the tables' gradients, whatever it is told."""
    way, *fused_first = way.split(", ")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(tables(), nn.Linear(10, 1).double())
        optimizer = rk.optim.Adam(model[0].parameters(), lr=0.1)
        if fused_first:
            rk.optim.fuse(model, optimizer)
        options = dict(WRAPPED.get(way, {}))
        if way == "delayed":
            named = dict(model.named_parameters())
            options = {"delay_all_reduce_named_params": [(n, named[n]) for n in options.popitem()[1]],
                       "param_to_hook_all_reduce": model[1].weight}  # fmt: skip
        wrapped = replicate(model) if way == "replicate" else nn.parallel.DistributedDataParallel(model, **options)
        if not fused_first:
            rk.optim.fuse(model, optimizer)
        before = snapshot(model[0], optimizer)
        with (
            pytest.raises(RuntimeError, match="Adam: DistributedDataParallel waits .* fused step .* sparse=True"),
            wrapped.no_sync() if way == "no_sync" else nullcontext(),
        ):
            wrapped(batch(0)).sum().backward()
        assert unchanged(model[0], optimizer, before)
    finally:
        dist.destroy_process_group()
        nn.parallel.DistributedDataParallel._active_ddp_module = None  # replicate leaves it behind


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("fused_first", [True, False])
def test_distributed_without_the_tables(tmp_path, fused_first):
    """DistributedDataParallel that leaves the tables out, as ``fuse`` tells it to, and one whose pass steps on
    nothing."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fused, stepped, optimizer, other = pair()
        model = nn.Sequential(fused, nn.Linear(10, 1).double())
        if fused_first:
            rk.optim.fuse(model, optimizer)
        else:
            fused.__dict__.pop("_ddp_params_and_buffers_to_ignore")
            with torch.no_grad():
                nn.parallel.DistributedDataParallel(fused)(batch(0))  # an evaluation steps on nothing
            names = ["0.weights.0", "0.weights.1"]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        nn.parallel.DistributedDataParallel(model)(batch(0)).sum().backward()
        model[1](stepped(batch(0))).sum().backward()
        other.step()
        same(fused, stepped)
    finally:
        dist.destroy_process_group()


KERNELS = pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise")


@KERNELS
def test_tables_that_share_memory():
    """A step on one would be a step on the other, at the same time; columns of one matrix are tables apart."""
    whole = torch.zeros(9, 8)

    def train(*views):
        weights = [nn.Parameter(view) for view in views]
        optimizer = rk.optim.SGD(weights, lr=1.0)
        outs = rk.table_batched_embedding_bag(weights, [torch.arange(3)] * 2, modes=["none"] * 2, optimizer=optimizer)
        sum(out.sum() for out in outs).backward()

    for views in ((whole, whole), (whole[1:], whole[:-1]), (whole[:, :5], whole[:, 4:]), (whole[2:], whole[:3, :4]),
                  (whole[:, :2], whole.view(18, 4)[:, 2:])):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"weights\[0\] and weights\[1\] share memory"):
            train(*views)
    assert (whole == 0).all()
    train(whole[:, :4], whole[:, 4:])
    assert (whole[:3] == -1).all() and (whole[3:] == 0).all()


EDITS = {
    "scaled": lambda w: w.data.mul_(10),
    "written": lambda w: w.data.copy_(torch.rand_like(w.data)),
    "replaced": lambda w: setattr(w, "data", torch.rand_like(w.data)),
    "another storage": lambda w: w.data.set_(torch.rand_like(w.data)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("way", ["sparse", "fused", "dense"])
def test_a_table_edited_between_forward_and_backward(way, edit):
    """The FM's gradient is of what was looked up, though no version tells of an edit through ``data``."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(50, 4, dtype=torch.float64)) for _ in range(3)]
    ids = [torch.randint(50, (20,)) for _ in weights]
    rows = [w.detach()[i].requires_grad_() for w, i in zip(weights, ids)]
    rk.reference.fm_interaction(torch.stack(rows, 1)).sum().backward()
    optimizer = rk.optim.SGD(weights, lr=1.0) if way == "fused" else None
    _, fm, _ = rk.embedding_fm(weights, ids, sparse=way == "sparse", optimizer=optimizer)
    for w in weights[:2]:
        EDITS[edit](w)
    before = [w.detach().clone() for w in weights]
    fm.sum().backward()
    for w, old, i, row in zip(weights, before, ids, rows):
        expected = torch.zeros_like(old).index_add(0, i, row.grad)
        torch.testing.assert_close(old - w.detach() if way == "fused" else w.grad.to_dense(), expected)


@pytest.mark.parametrize("way", ["sparse", "fused", "dense"])
@pytest.mark.parametrize("fm", [True, False])
@pytest.mark.parametrize("shape", [(3, 16), (2000, 3), (2000, 40)])
def test_a_table_replaced_by_another_between_forward_and_backward(way, fm, shape):
    """A step is refused. A gradient may be given: that of the table that was looked up, as nn.Embedding's."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(2000, 16)) for _ in range(2)]
    ids = [torch.arange(2000).flip(0), torch.randint(2000, (2000,))]
    options = {"sparse": way == "sparse", "optimizer": rk.optim.SGD(weights) if way == "fused" else None}
    rows = [w.detach()[i].requires_grad_() for w, i in zip(weights, ids)]
    if fm:
        rk.reference.fm_interaction(torch.stack(rows, 1)).sum().backward()
        out = rk.embedding_fm(weights, ids, **options)[1]
    else:
        sum(rows).sum().backward()
        out = sum(rk.table_batched_embedding_bag(weights, ids, modes=["none"] * 2, **options))
    weights[0].data = torch.randn(shape)
    before = [w.detach().clone() for w in weights]
    try:
        out.sum().backward()
    except (RuntimeError, IndexError):
        assert all(torch.equal(a, b) for a, b in zip(before, weights)) and all(w.grad is None for w in weights)
        return
    assert way != "fused" and (way != "sparse" or not fm or shape[0] == 2000)
    for w, i, row in zip(weights, ids, rows):
        expected = torch.zeros(2000, 16).index_add(0, i, row.grad)
        torch.testing.assert_close(w.grad.to_dense(), expected, rtol=1e-4, atol=1e-4)


def test_two_lookups_of_empty_batches():
    """Offsets without an entry are still offsets."""
    weight = nn.Parameter(torch.randn(9, 3))
    optimizer, nothing = rk.optim.SGD([weight], lr=1.0), torch.empty(0, dtype=torch.int64)
    before = weight.detach().clone()
    outs = []
    for ids in (torch.tensor([1, 2]), torch.tensor([2])):
        outs += rk.table_batched_embedding_bag(
            [weight], [ids, nothing], modes=["none", "sum"], tables=[0, 0], offsets=[None, nothing], optimizer=optimizer
        )
    sum(out.sum() for out in outs).backward()
    steps = torch.zeros(9, 1)
    steps[1], steps[2] = 1, 2
    torch.testing.assert_close(weight.detach(), before - steps)
