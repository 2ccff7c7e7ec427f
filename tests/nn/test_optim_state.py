"""Optimizers of tables: mixed precision, clipping by row, state to and from torch's, a restart in a new process."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rankkernels as rk

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
ROOT = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize(
    "kind", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW", "FTRL", "RowWiseAdam", "RowWiseRMSprop"]
)


def bag(seed: int = 0, **options) -> rk.EmbeddingBag:
    torch.manual_seed(seed)
    return rk.EmbeddingBag(30, 9, mode="sum", **options)


def ids(step: int) -> torch.Tensor:
    return torch.randint(0, 25, (16, 3), generator=torch.Generator().manual_seed(step))


def make(kind: str, fused: bool, grad_scaler=None, **options):
    module = bag(sparse=not fused)
    optimizer = getattr(rk.optim, kind)(module.parameters(), lr=0.05, **options)
    if fused:
        rk.optim.fuse(module, optimizer, grad_scaler=grad_scaler)
    return module, optimizer


def train(module, optimizer, steps, scaler=None):
    for step in steps:
        module.weight.grad = None
        loss = module(ids(step)).sin().sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        step_with(module, optimizer, scaler)


def step_with(module, optimizer, scaler) -> None:
    if module.fused_optimizer is None and scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif module.fused_optimizer is None:
        optimizer.step()


@KINDS
@pytest.mark.parametrize("fused", [True, False])
def test_scaled_loss(kind, fused):
    """A power of two as the scale changes no bit; an overflow changes nothing at all."""
    plain, optimizer = make(kind, fused)
    train(plain, optimizer, range(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled, optimizer = make(kind, fused, scaler)
    train(scaled, optimizer, range(2), scaler)
    before = [t.clone() for t in (scaled.weight, *filter(torch.is_tensor, optimizer.state[scaled.weight].values()))]
    scaled.weight.grad = None
    scaler.scale(scaled(ids(9)).sum() * torch.inf).backward()
    step_with(scaled, optimizer, scaler)
    after = [scaled.weight, *filter(torch.is_tensor, optimizer.state[scaled.weight].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after)) and optimizer.state[scaled.weight]["step"] == 2
    train(scaled, optimizer, range(2, 4), scaler)
    assert torch.equal(plain.weight, scaled.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_clipped_by_row(fused):
    limit = 3.0
    module, optimizer = make("SGD", fused, max_row_norm=limit)
    before = module.weight.detach().clone().requires_grad_()
    out = nn.functional.embedding_bag(ids(0), before, mode="sum").sin().sum()
    (grad,) = torch.autograd.grad(out, before)
    norms = grad.norm(dim=1, keepdim=True)
    assert (norms > limit).any() and ((norms < limit) & (norms > 0)).any()
    train(module, optimizer, [0])
    torch.testing.assert_close(module.weight, before - 0.05 * grad * (limit / norms.clamp(min=limit)))


@pytest.mark.parametrize(
    "kind, theirs",
    [("SGD", "SGD"), ("Adagrad", "Adagrad"), ("Adam", "SparseAdam"), ("Adam", "Adam"), ("AdamW", "AdamW")],
)
def test_state_to_torch_and_back(kind, theirs):
    """Ours, then torch's, then ours: the same as ours all along (a dense optimizer takes no step between)."""
    straight, optimizer = make(kind, False)
    train(straight, optimizer, range(6))
    module, first = make(kind, False)
    train(module, first, range(2))
    other = getattr(torch.optim, theirs)(module.parameters(), lr=1.0)
    rk.optim.to_torch(first, other)
    assert other.param_groups[0]["lr"] == 0.05
    if theirs in ("SGD", "Adagrad", "SparseAdam"):
        train(module, other, range(2, 4))
    else:
        train(module, first, range(2, 4))
        rk.optim.to_torch(first, other)
    second = getattr(rk.optim, kind)(module.parameters(), lr=1.0)
    second.load_state_dict(other.state_dict())
    assert set(second.param_groups[0]) == set(first.param_groups[0])
    train(module, second, range(4, 6))
    torch.testing.assert_close(module.weight, straight.weight)


def test_state_that_does_not_fit():
    module, optimizer = make("RowWiseAdagrad", False)
    train(module, optimizer, range(1))
    with pytest.raises(ValueError, match="to_torch: Adagrad has no place for the state of RowWiseAdagrad"):
        rk.optim.to_torch(optimizer, torch.optim.Adagrad(module.parameters()))
    for kind, message in (
        ("Adagrad", r"must have sum of shape \[30, 9\], got"),
        ("Adam", "must have exp_avg of shape"),
    ):
        with pytest.raises(ValueError, match=f"{kind}: the state of table 0 {message}"):
            getattr(rk.optim, kind)(module.parameters()).load_state_dict(optimizer.state_dict())
    theirs = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="SGD: there is no momentum here"):
        rk.optim.SGD(module.parameters()).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="SGD: max_row_norm must be positive or None"):
        rk.optim.SGD(module.parameters(), max_row_norm=-1.0)


@KINDS
def test_what_is_no_state_dict_is_refused(kind):
    module, optimizer = make(kind, False)
    train(module, optimizer, range(1))
    good = optimizer.state_dict()
    group = good["param_groups"][0]
    no_params = {name: value for name, value in group.items() if name != "params"}
    for bad in (
        None, {}, {"state": good["state"]}, {"param_groups": [group]}, {**good, "state": {0: 3}},
        {**good, "state": [1]}, {**good, "param_groups": [None]}, {**good, "param_groups": torch.ones(2)},
        {**good, "param_groups": [no_params]}, {**good, "param_groups": [{**group, "params": 0}]},
        {**good, "param_groups": [{**group, "params": [torch.zeros(3).to_sparse()]}]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{kind}: the state to load must be what state_dict"):
            optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["param_groups"] == good["param_groups"]


NAN, INF, BAD = float("nan"), float("inf"), (-1.0, float("nan"), float("inf"), None, "x", torch.ones(2))


@KINDS
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "betas", "lr_decay", "initial_accumulator_value",
                                  "max_row_norm", "lr_power", "beta", "l1", "l2", "ar_alpha", "min_shrinkage",
                                  "ema_beta"])  # fmt: skip
def test_hyperparameters_are_checked_however_they_come(kind, name):
    """By the constructor, for each group, and for one added or loaded; what is refused changes nothing."""
    cls, first, second = getattr(rk.optim, kind), bag().weight, bag().weight
    good = cls([first]).param_groups[0]
    if name not in good:
        return
    values = [(0.9,), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9, 0.9, 0.9), 0.9] if name == "betas" else list(BAD)
    if name == "max_row_norm":
        values = [-1.0, 0.0, NAN, 1e-46, "x", torch.ones(2)]
    if name == "lr_power":
        values[0] = 0.1
    if name == "lr" and kind == "FTRL":
        values += [0.0, 1e-46]
    if name == "eps" and kind != "SGD":
        values += [0.0, 1e-46, 1e-40]
    for value in values:
        for make in (
            lambda value=value: cls([{"params": [first], name: value}]),
            lambda value=value: optimizer.add_param_group({"params": [second], name: value}),
            lambda value=value: optimizer.load_state_dict(state_dict(value)),
        ):
            optimizer = cls([first])
            before = optimizer.state_dict()

            def state_dict(value, before=before):
                return before | {"param_groups": [before["param_groups"][0] | {name: value}]}

            with pytest.raises(ValueError, match=f"{kind}: {name} must"):
                make()
            assert optimizer.state_dict() == before and len(optimizer.param_groups) == 1


def test_what_torch_accepts():
    """No epsilon where no row's sum is zero; a tensor as the learning rate; one less than float32's in float64."""
    weight, wide = bag().weight, bag().double().weight
    rk.optim.Adagrad([weight], eps=0.0, initial_accumulator_value=0.1)
    rk.optim.Adam([wide], lr=torch.tensor(0.1), eps=1e-100, betas=(0, 0.5), max_row_norm=INF)
    with pytest.raises(ValueError, match="Adam: eps must be at least 1.17"):
        rk.optim.Adam([wide, weight], eps=1e-100)


@KINDS
def test_a_gradient_of_zero_gives_numbers(kind):
    module, optimizer = make(kind, False, **({"SGD": {}, "FTRL": {"beta": 0.0}}.get(kind, {"eps": 2e-38})))
    (module(ids(0)) * 0).sum().backward()
    optimizer.step()
    assert module.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("largest", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_rows_are_clipped_in_the_whole_range(dtype, reference, largest):
    """Where the squares of the gradient have no place in the table's dtype, too."""
    torch.manual_seed(0)
    values = (torch.rand(4, 9, dtype=torch.float64) * largest).to(dtype)
    values[3] = 0
    norms = values.double().norm(dim=1, keepdim=True)
    for limit in (0.1 * largest, 100 * largest):
        weight = torch.zeros(4, 9, dtype=dtype)
        key = "CompositeExplicitAutograd" if reference else "CPU"
        torch.ops.rankkernels.sparse_update.default.redispatch(
            torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), weight, [], torch.arange(4), values, 0,
            [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, limit, 0.0],
        )  # fmt: skip
        expected = -values.double() * (limit / norms.clamp(min=1e-300)).clamp(max=1)
        assert ((weight.double() - expected).abs() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * largest).all()


@pytest.mark.parametrize("reference", [False, True])
def test_a_row_that_is_no_number_is_clipped_as_torch_clips(reference):
    values = torch.ones(3, 5)
    values[0, 1], values[1, 1] = INF, NAN
    weight = torch.zeros(3, 5)
    key = "CompositeExplicitAutograd" if reference else "CPU"
    torch.ops.rankkernels.sparse_update.default.redispatch(
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), weight, [], torch.arange(3), values, 0,
        [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0],
    )  # fmt: skip
    for row, value in zip(weight, values):
        p = nn.Parameter(torch.zeros(5))
        p.grad = value.clone()
        nn.utils.clip_grad_norm_([p], 0.5)
        torch.testing.assert_close(row, -p.grad, equal_nan=True, rtol=1e-5, atol=1e-5)


OTHERS = ["SGD", "Adagrad", "SparseAdam", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "ASGD",
          "Rprop", "Adafactor"]  # fmt: skip
TAKES = {"SGD": ["SGD"], "Adagrad": ["Adagrad"], "Adam": ["SparseAdam", "Adam"], "AdamW": ["AdamW"],
         "RowWiseAdagrad": [], "FTRL": [], "RowWiseAdam": [], "RowWiseRMSprop": []}  # fmt: skip


@KINDS
@pytest.mark.parametrize("theirs", OTHERS)
@pytest.mark.parametrize("stepped", [True, False])
def test_states_of_torchs_optimizers(kind, theirs, stepped):
    """Those of the same kind are taken, the others refused, whether they have been made or not."""
    module = bag()
    other = getattr(torch.optim, theirs)(module.parameters())
    if stepped:
        module.weight.grad = torch.ones(30, 9).to_sparse(1) if theirs == "SparseAdam" else torch.ones(30, 9)
        other.step()
    optimizer = getattr(rk.optim, kind)(module.parameters(), lr=0.5)
    before = optimizer.state_dict()
    if theirs in TAKES[kind]:
        optimizer.load_state_dict(other.state_dict())
        assert set(optimizer.param_groups[0]) == {"params", *before["param_groups"][0]}
    else:
        with pytest.raises(ValueError, match=f"{kind}: the state to load is of an optimizer of another kind"):
            optimizer.load_state_dict(other.state_dict())
        assert optimizer.state_dict() == before


def test_adam_and_adamw_take_different_steps():
    for kind, other in (("Adam", "AdamW"), ("AdamW", "Adam")):
        module, optimizer = make(kind, False)
        train(module, optimizer, range(1))
        with pytest.raises(ValueError, match=f"{other}: the state to load is of an optimizer of another kind"):
            make(other, False)[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("change", [{"step": "x"}, {"step": -1}, {"step": 1.5}, {"step": NAN}, {"exp_avg": None},
                                    {"exp_avg": torch.ones(2)}, {"mu_product": torch.ones(())},
                                    {"exp_avg": torch.zeros(30, 9).to_sparse()},
                                    {"exp_avg": torch.zeros(30, 9, device="meta")},
                                    {"exp_avg": torch.zeros(30, 9, dtype=torch.complex64)}])  # fmt: skip
def test_a_refused_state_leaves_the_optimizer_as_it_was(change):
    weights = [bag(seed).weight for seed in range(2)]
    optimizer = rk.optim.Adam(weights, lr=1.0)
    for p in weights:
        rk.embedding_bag(p, ids(0), sparse=True).sum().backward()
    optimizer.step()
    groups, states = [dict(g) for g in optimizer.param_groups], {p: dict(optimizer.state[p]) for p in weights}
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["lr"] = 99.0
    state_dict["state"][1].update(change)
    with pytest.raises(ValueError, match="Adam: the state of table 1 must have"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups == groups
    assert all(optimizer.state[p][name] is value for p in weights for name, value in states[p].items())


def test_what_a_scheduler_left_in_a_group_is_kept():
    module, optimizer = make("SGD", False)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    other = make("SGD", False)[1]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_lr"] == 0.1 and other.param_groups[0]["initial_lr"] == pytest.approx(0.004)


def test_to_torch_loses_nothing():
    module, optimizer = make("Adam", False, weight_decay=0.1)
    theirs = torch.optim.SparseAdam(module.parameters())
    with pytest.raises(ValueError, match="to_torch: SparseAdam has no weight_decay, and here it is 0.1"):
        rk.optim.to_torch(optimizer, theirs)
    optimizer = make("Adam", False, max_row_norm=2.0)[1]
    with pytest.raises(ValueError, match="to_torch: Adam has no max_row_norm, and here it is 2.0"):
        rk.optim.to_torch(optimizer, torch.optim.Adam(module.parameters()))
    for options in ({"amsgrad": True}, {"maximize": True}):
        with pytest.raises(ValueError, match=f"to_torch: Adam has {next(iter(options))}, Adam has none"):
            rk.optim.to_torch(make("Adam", False)[1], torch.optim.Adam(module.parameters(), **options))
    with pytest.raises(ValueError, match="to_torch: the optimizers must have the same groups of params"):
        rk.optim.to_torch(make("Adam", False)[1], torch.optim.Adam(rk.EmbeddingBag(31, 9).parameters()))


CONTINUE = """
import sys
sys.path.insert(0, "tests/nn")
import torch, test_optim_state as t
path, kind, fused = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
module, optimizer = t.make(kind, fused)
saved = torch.load(path)
module.load_state_dict(saved["module"])
optimizer.load_state_dict(saved["optimizer"])
t.train(module, optimizer, range(3, 6))
torch.save(module.state_dict(), path)
"""


@pytest.mark.slow
@KINDS
def test_continued_in_a_new_process(kind, tmp_path):
    never_stopped, optimizer = make(kind, True)
    train(never_stopped, optimizer, range(6))
    module, optimizer = make(kind, True)
    train(module, optimizer, range(3))
    path = tmp_path / "saved.pt"
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", CONTINUE, path, kind, "True"], cwd=ROOT, check=True)
    assert torch.equal(torch.load(path)["weight"], never_stopped.weight)


def test_rowwise_adagrad_is_fbgemms():
    """On the CPU, over 100 steps; FBGEMM has float32 alone, and what is summed in another order rounds apart."""
    reason = "FBGEMM (fbgemm-gpu-cpu, one binary for each torch release) is not installed"
    pytest.importorskip("fbgemm_gpu", reason=reason, exc_type=ImportError)
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    ours = rk.TableBatchedEmbeddingBag([40, 600], 16)
    rk.optim.fuse(ours, rk.optim.RowWiseAdagrad(ours.parameters(), lr=0.05, eps=1e-6))
    theirs = SplitTableBatchedEmbeddingBagsCodegen(
        [(w.size(0), 16, EmbeddingLocation.HOST, ComputeDevice.CPU) for w in ours.weights],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.05, eps=1e-6,
    )  # fmt: skip
    for own, weight in zip(theirs.split_embedding_weights(), ours.weights):
        own.copy_(weight.detach())
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randint(0, w.size(0), (100, 5), generator=generator) for w in ours.weights]
        out, expected = ours(batch), theirs(torch.cat([i.flatten() for i in batch]), torch.arange(0, 1001, 5))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        out.sin().sum().backward()
        expected.sin().sum().backward()
    for own, weight in zip(theirs.split_embedding_weights(), ours.weights):
        torch.testing.assert_close(own, weight.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("theirs", [torch.optim.Adam, torch.optim.SparseAdam])
def test_to_torch_makes_no_infinities(theirs):
    """torch keeps a float16 table's moments in float16."""
    weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float16))
    optimizer, other = rk.optim.Adam([weight]), theirs([weight])
    weight.grad = torch.sparse_coo_tensor([[1]], torch.full((1, 3), 9e3, dtype=torch.float16), weight.shape)
    optimizer.step()
    with pytest.raises(
        ValueError, match="to_torch: exp_avg_sq of table 0 has 81000, which torch.float16 has no number"
    ):
        rk.optim.to_torch(optimizer, other)
    assert not other.state


def test_to_torch_takes_more_steps_than_float16_counts():
    """torch counts in float32, whatever the table's dtype."""
    weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float16))
    optimizer, theirs = rk.optim.Adam([weight]), torch.optim.Adam([weight])
    optimizer.make_state()
    optimizer.state[weight]["step"] = 70_000
    assert rk.optim.to_torch(optimizer, theirs).state[weight]["step"] == 70_000
