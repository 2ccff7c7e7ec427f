"""Lazy optimizers: against torch's, fused against stepped, and over a restart."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import rankkernels as rk
from rankkernels.testing import relative_error

pytestmark = pytest.mark.filterwarnings("ignore::rankkernels.ReferenceWarning", "ignore:Sparse invariant checks")
OURS = {
    "sgd": (rk.optim.SGD, {}),
    "sgd_decay": (rk.optim.SGD, {"weight_decay": 0.01}),
    "adagrad": (rk.optim.Adagrad, {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
    "rowwise_adagrad": (rk.optim.RowWiseAdagrad, {"weight_decay": 0.01}),
    "adam": (rk.optim.Adam, {"betas": (0.8, 0.95)}),
    "adamw": (rk.optim.AdamW, {"weight_decay": 0.1}),
    "ftrl": (rk.optim.FTRL, {"l1": 0.05, "l2": 0.01}),
    "ftrl_power": (rk.optim.FTRL, {"lr_power": -0.3, "beta": 0.0}),
    "rowwise_adam": (rk.optim.RowWiseAdam, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
    "rowwise_rmsprop": (rk.optim.RowWiseRMSprop, {"ar_alpha": 2.0}),
}
OWN = {"lr_power": -0.4, "beta": 0.5, "l1": 0.2, "l2": 0.1, "ar_alpha": 1.5, "min_shrinkage": 0.2}
EVERY = pytest.mark.parametrize("name", OURS)


def tables(seed: int = 0, dtype: torch.dtype = torch.float32, widths=(5, 16), **options) -> rk.TableBatchedEmbeddingBag:
    torch.manual_seed(seed)
    return rk.TableBatchedEmbeddingBag([40, 600], list(widths), tables=[0, 1, 1], modes=["sum", "mean", "sum"],
                                       padding_idx=[3, None], dtype=dtype, **options)  # fmt: skip


def batch(step: int, B: int = 200):
    generator = torch.Generator().manual_seed(step)
    hot = torch.rand(B, 4, generator=generator) < 0.5
    return [torch.where(hot, 7, torch.randint(0, rows, (B, 4), generator=generator)) for rows in (40, 600, 600)]


def train(module, optimizer, steps, start: int = 0, B: int = 200):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        module(batch(step, B)).float().sin().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "name, theirs, options",
    [
        ("adam", torch.optim.SparseAdam, {"betas": (0.8, 0.95)}),
        ("adagrad", torch.optim.Adagrad, {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
        ("sgd", torch.optim.SGD, {}),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_is_torchs_over_100_steps(name, theirs, options, fused):
    ours, expected = tables(sparse=not fused, dtype=torch.float64), tables(sparse=True, dtype=torch.float64)
    optimizer = OURS[name][0](ours.parameters(), lr=0.05, **options)
    if fused:
        rk.optim.fuse(ours, optimizer)
    train(ours, optimizer, 100)
    train(expected, theirs(expected.parameters(), lr=0.05, **options), 100)
    for a, b in zip(ours.parameters(), expected.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert (a.grad is None) == fused


@pytest.mark.parametrize("name, theirs", [("adamw", torch.optim.AdamW), ("adagrad", torch.optim.Adagrad)])
def test_is_torchs_dense_optimizer_where_every_row_is_looked_up(name, theirs):
    cls, options = OURS[name]
    everything = torch.arange(30)[:, None]
    results = []
    for make in (lambda p: rk.optim.fuse(p, cls(p.parameters(), lr=0.05, **options)),
                 lambda p: theirs(p.parameters(), lr=0.05, **options)):  # fmt: skip
        torch.manual_seed(0)
        module = rk.EmbeddingBag(30, 7, mode="sum").double()
        made = make(module)
        for _ in range(50):
            module.zero_grad()
            module(everything).sin().sum().backward()
            if isinstance(made, torch.optim.Optimizer):
                made.step()
        results.append(module.weight)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_rowwise_adagrad_by_its_formula():
    module = rk.EmbeddingBag(20, 6, mode="sum").double()
    weight, total = module.weight.detach().clone(), torch.zeros(20, dtype=torch.float64)
    rk.optim.fuse(module, rk.optim.RowWiseAdagrad(module.parameters(), lr=0.1, eps=1e-3))
    for step in range(20):
        ids = torch.randint(0, 20, (8, 3), generator=torch.Generator().manual_seed(step))
        module(ids).square().sum().backward()
        grad = torch.zeros_like(weight).index_add(0, ids.flatten(), (2 * weight[ids].sum(1)).repeat_interleave(3, 0))
        total += grad.square().mean(1)
        weight -= 0.1 * grad / (total.sqrt() + 1e-3)[:, None]
    torch.testing.assert_close(module.weight, nn.Parameter(weight), rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(bool(rk.ops._library.no_extension), reason="what the C++ kernels promise")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("widths", [(5, 16), (64, 128)])
@EVERY
def test_fused_is_stepped_bit_for_bit_at_any_number_of_threads(name, widths, clipped, dtype):
    cls, options = OURS[name]
    if clipped:
        options = options | {"max_row_norm": 0.5}
    results = []
    for fused, threads in ((False, 1), (True, 1), (True, 2), (False, 2)):
        torch.set_num_threads(threads)
        module = tables(sparse=not fused, widths=widths, dtype=dtype)
        optimizer = cls(module.parameters(), lr=0.05, **options)
        if fused:
            rk.optim.fuse(module, optimizer)
        train(module, optimizer, 5, B=2000)
        results.append(list(module.parameters()))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sgd_decay", "adagrad", "adam", "adamw", "ftrl"])
def test_columns_do_not_depend_on_the_width(name, dtype):
    """64 columns, which are a kernel of their own, and the same 64 of 65."""
    results = []
    for D in (64, 65):
        torch.manual_seed(0)
        values, grad_out = torch.randn(600, 65).to(dtype), torch.randn(200, 65).to(dtype)
        module = rk.TableBatchedEmbeddingBag([600], D, dtype=dtype)
        module.weights[0].data.copy_(values[:, :D])
        cls, options = OURS[name]
        rk.optim.fuse(module, cls(module.parameters(), lr=0.05, **options))
        for step in range(3):
            module(batch(step)[1:2]).backward(grad_out[:, :D])
        results.append(module.weights[0][:, :64])
    assert torch.equal(*results)


@EVERY
def test_kernel_is_the_reference(name):
    """The op on the CPU against its plain PyTorch default."""
    from rankkernels.ops import embedding_bag_update as ops

    kind = OURS[name][0]._kind
    number, own = ops.OPTIMIZERS.index(kind), ops.RULES[kind].settings
    hyper = [0.1, 0.8, 0.95, 1e-3, 0.05, 3.0, 0.5, 1.5, 0.0, *(OWN[s] for s in own)]
    for dtype, D in ((torch.float32, 17), (torch.float64, 9), (torch.bfloat16, 33), (torch.float16, 5)):
        weight = torch.randn(50, D).to(dtype)
        state_dtype = torch.promote_types(dtype, torch.float32)
        rows, values, results = torch.tensor([0, 3, 7, 30, 49]), torch.randn(5, D).to(dtype), []
        before = [torch.rand(shape, dtype=state_dtype) for shape in ops.state_shapes(kind, weight.shape)]
        apart, default, side_by_side = ([state.clone() for state in before] for _ in range(3))
        if ops.RULES[kind].elementwise == 2:
            side_by_side = list(torch.stack(before, 1).unbind(1))
        for key, states in (("CPU", side_by_side), ("CPU", apart), ("CompositeExplicitAutograd", default)):
            arguments = weight.clone(), states, rows, values, number, hyper
            torch.ops.rankkernels.sparse_update.default.redispatch(
                torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *arguments
            )
            results.append([arguments[0], *arguments[1]])
        untouched = torch.ones(50, dtype=torch.bool).index_fill(0, rows, False)
        for a, same, b, old in zip(*results, [weight, *before]):
            assert torch.equal(a[untouched], old[untouched]) and torch.equal(a, same)
            assert relative_error(a, b) < (1e-6 if a.dtype in (torch.float32, torch.float64) else 1e-2)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_continued(name, dtype):
    cls, options = OURS[name]

    def start():
        module = tables(dtype=dtype)
        optimizer = cls(module.parameters(), lr=0.05, **options)
        return rk.optim.fuse(module, optimizer), optimizer

    never_stopped, optimizer = start()
    train(never_stopped, optimizer, 6)
    first, optimizer = start()
    train(first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"module": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    second, optimizer = start()
    second.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, 3, start=3)
    for a, b in zip(never_stopped.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_state_of_torchs_optimizer_is_taken():
    theirs_module, ours_module = tables(sparse=True), tables()
    theirs = torch.optim.SparseAdam(theirs_module.parameters(), lr=0.05)
    train(theirs_module, theirs, 3)
    ours_module.load_state_dict(theirs_module.state_dict())
    ours = rk.optim.Adam(ours_module.parameters())
    ours.load_state_dict(theirs.state_dict())
    for group in ours.param_groups:
        group.setdefault("weight_decay", 0.0)
    rk.optim.fuse(ours_module, ours)
    train(theirs_module, theirs, 3, start=3)
    train(ours_module, ours, 3, start=3)
    for a, b in zip(ours_module.parameters(), theirs_module.parameters()):
        torch.testing.assert_close(a, b)


def test_fused_model():
    """DeepFM with its tables fused and the rest under torch's Adam: only looked-up rows move, the loss falls."""
    features = [rk.SparseFeature(f"c{i}", 50, 4) for i in range(3)]
    model = rk.DeepFM(features, features, {"dims": [8], "dropout": 0})
    layer = model.embedding
    rows = rk.optim.Adam(layer.parameters(), lr=0.05)
    rk.optim.fuse(model, rows)
    in_tables = set(layer.parameters())
    rest = torch.optim.Adam([p for p in model.parameters() if p not in in_tables], lr=0.01)
    x = {f.name: torch.randint(0, 25, (64,)) for f in features}
    y = torch.randint(0, 2, (64,)).float()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    losses = []
    for _ in range(60):
        rest.zero_grad()
        loss = nn.functional.binary_cross_entropy(model(x), y)
        loss.backward()
        rest.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for f in features:
        moved = (before[f"embed_dict.{f.name}.weight"] != layer.embed_dict[f.name].weight).any(1)
        assert torch.equal(moved.nonzero()[:, 0], x[f.name].unique())
        assert layer.embed_dict[f.name].weight.grad is None


def test_a_table_without_a_gradient_takes_no_step():
    module = tables(concat=False)
    optimizer = rk.optim.Adam(module.parameters(), weight_decay=0.1)
    rk.optim.fuse(module, optimizer)
    before = [p.detach().clone() for p in module.parameters()]
    factors = [None, torch.rand(200, 4, requires_grad=True), torch.rand(200, 4, requires_grad=True)]
    outs = module(batch(0), per_sample_weights=factors)
    outs[1].sum().backward()
    assert torch.equal(module.weights[0], before[0]) and not torch.equal(module.weights[1], before[1])
    assert optimizer.state[module.weights[0]] == {} and (factors[1].grad != 0).all() and (factors[2].grad == 0).all()


def test_a_schedule_and_a_tensor_learning_rate():
    module = tables()
    optimizer = rk.optim.SGD(module.parameters(), lr=torch.tensor(0.5))
    rk.optim.fuse(module, optimizer)
    before = module.weights[0].detach().clone()
    for group in optimizer.param_groups:
        group["lr"].fill_(0.0)
    train(module, optimizer, 1)
    assert torch.equal(module.weights[0], before)


def test_what_cannot_be_fused():
    module = tables()
    optimizer = rk.optim.SGD(module.parameters())
    module.weights[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"fuse: table weights.1 is frozen"):
        rk.optim.fuse(module, optimizer)
    module.weights[1].requires_grad_()
    with pytest.raises(ValueError, match=r"fuse: table 0.weights.1 is not among the optimizer's params"):
        rk.optim.fuse(nn.Sequential(module), rk.optim.SGD([module.weights[0]]))
    with pytest.raises(ValueError, match="fuse: Linear has no layer of embedding tables"):
        rk.optim.fuse(nn.Linear(2, 3), optimizer)
    assert module.fused_optimizer is None
    layer = rk.EmbeddingLayer([rk.SparseFeature("a", 9, 4)])
    layer.embed_dict["a"] = nn.Embedding(9, 4, max_norm=1.0)
    with pytest.raises(ValueError, match="fuse: table embed_dict.a is looked up by a module of its own"):
        rk.optim.fuse(layer, rk.optim.SGD(layer.parameters()))
    bag = rk.EmbeddingBag(9, 4, scale_grad_by_freq=True)
    with pytest.raises(ValueError, match="is looked up by a module of its own: EmbeddingBag"):
        rk.optim.fuse(bag, rk.optim.SGD(bag.parameters()))
    with pytest.raises(RuntimeError, match=r"SGD: the gradient of a table of shape \[40, 5\] is dense"):
        module(batch(0)).sum().backward()
        optimizer.step()
    with pytest.raises(ValueError, match=r"Adam: betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"):
        rk.optim.Adam(module.parameters(), betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="Adam: lr must not be negative"):
        rk.optim.Adam(module.parameters(), lr=-1.0)
    with pytest.raises(ValueError, match=r"SGD: tables must be floating-point \[R, D\], got \[3\]"):
        rk.optim.SGD([torch.randn(3)])
    for odd in (torch.randn(3, 2).to(torch.float8_e5m2), torch.randn(3, 2).to_sparse(), torch.randn(3, 2).cfloat()):
        with pytest.raises(ValueError, match=r"SGD: tables must be floating-point \[R, D\], got \[3, 2\], torch"):
            optimizer.add_param_group({"params": [odd]})
    assert len(optimizer.param_groups) == 1


def test_a_table_frozen_after_it_was_fused():
    module = tables()
    rk.optim.fuse(module, rk.optim.SGD(module.parameters()))
    module.weights[1].requires_grad_(False)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"SGD: table 1 of shape \[600, 16\] is frozen"):
        module(batch(0)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@pytest.mark.parametrize("path", ["squeezed", "stacked", "lookup"])
def test_fused_in_every_way_through_an_embedding_layer(path):
    """The tables step in the backward whichever way the layer looks them up."""
    features = [rk.SparseFeature("a", 20, 4), rk.SparseFeature("b", 9, 4)]
    layer = rk.EmbeddingLayer(features)
    rk.optim.fuse(layer, rk.optim.SGD(layer.parameters(), lr=1.0))
    x = {"a": torch.tensor([1, 2]), "b": torch.tensor([0, 3])}
    before = {name: table.weight.detach().clone() for name, table in layer.embed_dict.items()}
    if path == "lookup":
        out = torch.cat(layer.lookup(x, features), 1)
    else:
        out = layer(x, features, squeeze_dim=path == "squeezed")
    out.sum().backward()
    for name, table in layer.embed_dict.items():
        expected = before[name].index_add(0, x[name], -torch.ones(2, 4))
        torch.testing.assert_close(table.weight, expected)
        assert table.weight.grad is None
