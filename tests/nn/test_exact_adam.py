"""Adam and AdamW with exact=True: dense Adam's numbers for every row, and their state."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from exact_adam import Dense, bag, behind, close, draw, make, options_of, through_file, train
from torch import Tensor, nn

import rankkernels as rk
from rankkernels.ops import _exact_table

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
KINDS = pytest.mark.parametrize("kind", ["Adam", "AdamW"])
WAYS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "stepped"])
SCHEDULES = {
    "constant": lambda s, n: 1.0,
    "cosine": lambda s, n: (1 + math.cos(math.pi * s / n)) / 2,
    "warm_up": lambda s, n: min(1.0, (s + 1) / (n / 10)),
    "jump": lambda s, n: 1.0 if s < n // 2 else 0.1,
}


@KINDS
@WAYS
def test_is_dense_adam(kind, fused):
    """Weights and moments of every row, those that no batch looked up as well."""
    module, optimizer = make(kind, fused)
    dense = Dense(kind, module)
    train(module, optimizer, dense, range(200))
    close(module.weight, dense.weight)
    theirs, ours = dense.optimizer.state[dense.weight], optimizer.state[module.weight]
    for name in ("exp_avg", "exp_avg_sq"):
        close(ours[name], theirs[name])
    assert ours["step"] == theirs["step"] == 200 and (module.weight.grad is None) == fused


def run(kind, dtype, schedule, magnitude, steps, zipf, **options) -> list[list[Tensor]]:
    """Ours, torch's in the same dtype and torch's in float64: weight and moments of each."""
    module, optimizer = make(kind, True, bag(dtype=dtype), **options)
    same, true = Dense(kind, module, dtype, **options), Dense(kind, module, **options)
    for step in range(steps):
        lr = 0.01 * SCHEDULES[schedule](step, steps)
        for each in (optimizer, same.optimizer, true.optimizer):
            each.param_groups[0]["lr"] = lr
        ids, grad = draw(step, zipf=zipf)
        size = 10 ** (-3 - 5 * torch.rand(3, 1, generator=torch.Generator().manual_seed(step), dtype=torch.float64))
        grad = (grad * (size if magnitude is None else magnitude)).to(dtype).double()
        module(ids[:, None]).backward(grad.to(dtype))
        same.step(ids, grad)
        true.step(ids, grad)
    ours = [module.weight, *(optimizer.state_dict()["state"][0][n] for n in ("exp_avg", "exp_avg_sq"))]
    theirs = [[d.weight, *(d.optimizer.state[d.weight][n] for n in ("exp_avg", "exp_avg_sq"))] for d in (same, true)]
    return [[t.detach().double() for t in each] for each in (ours, *theirs)]


def check_against_torch(kind, schedule, magnitude, eps, betas, zipf, steps):
    for dtype in (torch.float32, torch.float64):
        ours, same, true = run(kind, dtype, schedule, magnitude, steps, zipf, eps=eps, betas=betas)
        for a, b, c in zip(ours, same, true):
            if dtype is torch.float64:
                torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10 * float(c.abs().max()))
            else:
                allowed = 3 * (b - c).abs() + 1e-5 * c.abs() + 1e-6 * c.abs().amax()
                assert ((a - c).abs() <= allowed).all()
                assert (a - c).norm() <= 3 * (b - c).norm() + 1e-7 * c.norm()


@KINDS
@pytest.mark.parametrize(
    "schedule, magnitude, eps, betas",
    [
        ("cosine", None, 1e-8, (0.9, 0.999)),
        ("warm_up", 1e-8, 1e-8, (0.9, 0.999)),
        ("jump", 1e-6, 1e-6, (0.8, 0.99)),
    ],
)
def test_schedules_and_gradients_near_eps(kind, schedule, magnitude, eps, betas):
    check_against_torch(kind, schedule, magnitude, eps, betas, True, 200)


@pytest.mark.slow
@pytest.mark.parametrize("i, schedule", list(enumerate(SCHEDULES)))
@pytest.mark.parametrize("j, magnitude", list(enumerate([1e-3, 1e-5, 1e-8, None])))
@pytest.mark.parametrize("k, eps, betas", [(0, 1e-8, (0.9, 0.999)), (1, 1e-6, (0.8, 0.99))])
def test_two_thousand_steps(i, schedule, j, magnitude, k, eps, betas):
    """Adam and AdamW in turn, with every two of the other settings."""
    kind = ("Adam", "AdamW")[(i + j + k) % 2]
    check_against_torch(kind, schedule, magnitude, eps, betas, eps == 1e-8, 2000)


def test_a_row_that_is_looked_up_for_the_first_time_after_long(monkeypatch):
    """Over a history that is full several times, and longer than a gradient has effects."""
    monkeypatch.setattr(_exact_table, "MOST_STEPS", 100)
    module, optimizer = make("AdamW", True)
    dense = Dense("AdamW", module)
    for step in range(450):
        ids, grad = draw(step, R=3) if step not in (50, 449) else (torch.tensor([20]), torch.ones(1, 5).double())
        module(ids[:, None]).backward(grad)
        dense.step(ids, grad)
    close(module.weight, dense.weight)


@KINDS
def test_tables_that_step_apart(kind):
    """A table without a gradient takes no step, as in torch; the others' histories go on without it."""
    torch.manual_seed(0)
    module = rk.TableBatchedEmbeddingBag([20, 30, 9], [4, 6, 3], concat=False, tables=[0, 1, 2, 0]).double()
    module, optimizer = make(kind, True, module)
    dense = [nn.Parameter(w.detach().clone()) for w in module.weights]
    theirs = getattr(torch.optim, kind)(dense, lr=0.01, **options_of(kind))
    for step in range(60):
        ids = [draw(4 * step + i, R=w.size(0))[0] for i, w in enumerate(dense)] + [draw(4 * step + 3, R=20)[0]]
        used = [i for i in range(4) if (step + i) % 3]
        theirs.zero_grad()
        sum(module([i[:, None] for i in ids])[f].sin().sum() for f in used).backward()
        sum(dense[f % 3][ids[f]].sin().sum() for f in used).backward()
        theirs.step()
    for a, b in zip(module.weights, dense):
        close(a, b)


@WAYS
def test_padding_and_frozen_rows(fused):
    """The padding row gets no gradient; with AdamW it decays as in torch."""
    torch.manual_seed(0)
    module = rk.EmbeddingBag(30, 5, mode="mean", padding_idx=2, sparse=not fused).double()
    with torch.no_grad():
        module.weight[2] = 1.0
    module, optimizer = make("AdamW", fused, module)
    dense = Dense("AdamW", module)
    for step in range(40):
        ids = torch.stack([draw(step, R=6)[0], draw(step + 99, R=6)[0]])
        module.zero_grad()
        module(ids).sin().sum().backward()
        optimizer.step()
        dense.optimizer.zero_grad()
        F.embedding_bag(ids, dense.weight, mode="mean", padding_idx=2).sin().sum().backward()
        dense.optimizer.step()
    close(module.weight, dense.weight)


@pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_is_stepped_bit_for_bit_at_any_number_of_threads(dtype):
    results = []
    for fused, threads in ((False, 1), (True, 1), (True, 2), (False, 2)):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        module = rk.TableBatchedEmbeddingBag([40, 3000], [5, 64], modes="sum", sparse=not fused, dtype=dtype)
        module, optimizer = make("AdamW", fused, module)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            ids = [torch.randint(0, rows, (900, 4), generator=generator) for rows in (40, 3000)]
            module.zero_grad()
            module(ids).float().sin().sum().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernel_is_the_default(dtype):
    """The ops on the CPU against their plain PyTorch defaults."""
    from rankkernels.ops import _idle_steps as ops

    results = []
    for key in ("CPU", "CompositeExplicitAutograd"):
        keys, calls = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), torch.ops.rankkernels
        history, decay = ops.new_history(64, 0.9, 0.999), 1.0
        for step in range(10, 40):
            calls.adam_history.default.redispatch(keys, history, 9, step, 0.9, 0.999, 0.01, decay, decay * 0.99)
            decay *= 0.99
        torch.manual_seed(0)
        state = torch.promote_types(dtype, torch.float32)
        weight, m, v = torch.randn(50, 19).to(dtype), torch.randn(50, 19, dtype=state), torch.rand(50, 19, dtype=state)
        last = torch.randint(-39, 40, (50,), dtype=torch.int32)
        last[last > 0] = last[last > 0].clamp(min=9)
        tables = [weight], [m, v * 1e-12], [last], [history]
        features = [torch.randint(50, (20, 2))], [], [], [0], [1], [7], [11], []
        calls.embedding_catch_up.default.redispatch(keys, *tables, *features, "", [39.0, 9.0, decay, 1e-8])
        calls.embedding_mark_steps.default.redispatch(keys, [last], *features, [40])
        some = [t.clone() for t in (history, weight, m, tables[1][1], last)]
        calls.embedding_catch_up_all.default.redispatch(keys, *tables, [39.0, 9.0, decay, 1e-8])
        results.append([*some, weight, m, tables[1][1], last])
    for a, b in zip(*results):
        rtol = {torch.float64: 1e-12, torch.float32: 3e-6, torch.int32: 0}.get(a.dtype, 1e-2)
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-300 if a.dtype == torch.float64 else rtol * 1e-6)


@KINDS
@WAYS
def test_saved_and_continued(kind, fused):
    """As if it had never been interrupted, bit for bit, whether or not it goes on in another process."""
    whole, optimizer = make(kind, fused)
    train(whole, optimizer, None, range(10))
    saved = through_file([whole.state_dict(), optimizer.state_dict()])
    train(whole, optimizer, None, range(10, 20))
    other = bag(sparse=not fused)
    other.load_state_dict(saved[0])
    other, second = make(kind, fused, other)
    second.load_state_dict(saved[1])
    train(other, second, None, range(10, 20))
    assert torch.equal(whole.weight, other.weight)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state_dict()["state"][0][name], second.state_dict()["state"][0][name])


@KINDS
def test_to_torch_and_back(kind):
    module, optimizer = make(kind, True)
    dense = Dense(kind, module)
    train(module, optimizer, dense, range(20))
    copied = nn.Parameter(module.weight.detach().clone())
    theirs = rk.optim.to_torch(optimizer, getattr(torch.optim, kind)([copied], lr=0.5))
    for step in range(20, 30):
        ids, grad = draw(step)
        copied.grad = torch.zeros_like(copied).index_add(0, ids, grad)
        theirs.step()
        dense.step(ids, grad)
    close(copied, dense.weight)
    back, again = make(kind, True)
    with torch.no_grad():
        back.weight.copy_(copied)
    again.load_state_dict(theirs.state_dict())
    train(back, again, dense, range(30, 40))
    close(back.weight, dense.weight)
    if kind == "Adam":
        with pytest.raises(ValueError, match="SparseAdam has no place for the state of Adam with exact=True"):
            rk.optim.to_torch(optimizer, torch.optim.SparseAdam([copied]))


def test_other_betas_and_another_eps_from_some_step_on():
    module, optimizer = make("AdamW", True)
    dense = Dense("AdamW", module)
    for i, settings in enumerate(({"betas": (0.8, 0.99)}, {"eps": 1e-3}, {"weight_decay": 0.0}, {"weight_decay": 0.3})):
        train(module, optimizer, dense, range(10 * i, 10 * i + 10))
        for each in (optimizer, dense.optimizer):
            each.param_groups[0].update(settings)
    train(module, optimizer, dense, range(40, 50))
    close(module.weight, dense.weight)


def test_gradients_of_rows_that_this_process_never_read():
    """As DistributedDataParallel brings them from others."""
    module, optimizer = make("AdamW", False)
    dense = Dense("AdamW", module)
    for step in range(40):
        ids, grad = draw(step)
        module.weight.grad = torch.sparse_coo_tensor(ids[None], grad, (30, 5), check_invariants=False)
        optimizer.step()
        dense.step(ids, grad)
    close(module.weight, dense.weight)


def test_a_second_optimizer_takes_over():
    module, optimizer, expected = behind()
    other = rk.optim.Adam(module.parameters(), exact=True)
    close(module.weight, expected)
    optimizer.flush()
    with pytest.raises(RuntimeError, match=r"AdamW: a table of shape \[30, 5\] is another optimizer's by now"):
        train(module, optimizer, None, range(1))
    rk.optim.fuse(module, other)
    train(module, other, None, range(2))


def test_an_optimizer_that_is_gone_leaves_its_tables_right():
    module, optimizer, expected = behind()
    module.fused_optimizer = None
    del optimizer
    close(module.weight, expected)


@pytest.mark.parametrize("convert", ["dtype", "data"])
def test_a_table_that_became_another(convert):
    module, optimizer, expected = behind()
    if convert == "dtype":
        module.float()
    else:
        module.weight.data = torch.zeros(40, 5, dtype=torch.float64)
    assert convert == "data" or torch.allclose(module.weight.double(), expected)
    with pytest.raises(RuntimeError, match="moved" if convert == "dtype" else "replaced after its state was made"):
        train(module, optimizer, None, range(1))


def test_what_cannot_be_exact():
    weight = nn.Parameter(torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"Adam: with exact=True weight_decay must be 0, got 0.1: coupled"):
        rk.optim.Adam([weight], weight_decay=0.1, exact=True)
    with pytest.raises(ValueError, match=r"AdamW: with exact=True lr weight_decay must be below 1"):
        rk.optim.AdamW([weight], lr=2.0, weight_decay=0.5, exact=True)
    for betas in ((0.9, 0.9), (0.9, 0.0), (0.999, 0.999)):
        with pytest.raises(ValueError, match=r"with exact=True the second of betas must fade much more slowly"):
            rk.optim.Adam([weight], betas=betas, exact=True)
    assert type(weight) is nn.Parameter
    for betas in ((0.0, 0.9), (0.5, 0.9), (0.9, 0.99), (0.95, 0.999), (0.99, 0.999), (0.9, 0.95)):
        rk.optim.Adam([nn.Parameter(torch.randn(3, 2))], betas=betas, exact=True)
    optimizer = rk.optim.Adam([weight], exact=True)
    with pytest.raises(ValueError, match="weight_decay must be 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 2))], "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 2))], "lr": 0.1})
