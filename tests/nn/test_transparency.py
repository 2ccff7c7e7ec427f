"""Whoever may see a module's call sees it: torch-rechub's DeepFM and DIN, accelerated and not, under every kind of
change to each of their modules. Outputs, gradients, buffers and what the hooks were given must be the same in three
steps of training and in eval."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune

import rankkernels as rk

features_ = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
Dice = pytest.importorskip("torch_rechub.basic.activation").Dice
ranking = pytest.importorskip("torch_rechub.models.ranking")
B, L, V, D = 7, 5, 9, 4
pytestmark = pytest.mark.usefixtures("float64")


def deepfm(activation="relu") -> nn.Module:
    features = [
        features_.SparseFeature("user", V, D),
        features_.SparseFeature("item", V, D, padding_idx=0),
        features_.SparseFeature("other", V, D, shared_with="item"),
        features_.SequenceFeature("hist", V, D, pooling="mean", shared_with="item", padding_idx=0),
        features_.SequenceFeature("tags", V, D, pooling="sum"),
    ]
    return ranking.DeepFM(features, features, {"dims": [6, 5], "dropout": 0.2, "activation": activation})


def din(activation="dice") -> nn.Module:
    features = [
        features_.SparseFeature("user", V, D),
        features_.SequenceFeature("tags", V, D, pooling="mean", padding_idx=0),
    ]
    history = [features_.SequenceFeature("hist", V, D, pooling="concat", shared_with="item", padding_idx=0)]
    target = [features_.SparseFeature("item", V, D)]
    attention = {"dims": [6, 5], "activation": activation}
    return ranking.DIN(features, history, target, {"dims": [6], "dropout": 0.2}, attention)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"user": (B,), "item": (B,), "other": (B,), "hist": (B, L), "tags": (B, L)}
    return {name: torch.randint(V, shape, generator=generator) for name, shape in shapes.items()}


@functools.cache
def built(build) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def run(model: nn.Module) -> list[torch.Tensor]:
    """Everything that can be told of three steps of SGD and an evaluation."""
    x, seen = batch(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model.train()
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        y = model(x)
        (y * torch.linspace(-1, 1, B, dtype=y.dtype)).sum().backward()
        seen += [
            y.detach().clone(),
            *(torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()),
        ]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        seen.append(model(x))
    return [*seen, model(x).detach(), *model.state_dict().values()]


def outcome(model: nn.Module, change) -> tuple[list | Exception, list]:
    """What ``run`` gives after ``change(model, log)``, an error if it ends in one, and the log."""
    log = []
    torch.manual_seed(3)  # spectral_norm starts from random vectors
    with change(model, log) or contextlib.nullcontext():
        try:
            return run(model), log
        except Exception as error:  # whatever torch-rechub's model raises, ours is to raise too
            return error, log


def assert_same(build, change, accelerate_first: bool = True):
    theirs, ours = copy.deepcopy(built(build)), copy.deepcopy(built(build))
    for name, module in [*theirs.named_modules(), *ours.named_modules()]:
        module.__dict__["path"] = name
    expected, expected_log = outcome(theirs, change)
    if accelerate_first:
        rk.accelerate(ours)
        got, log = outcome(ours, change)
    else:
        got, log = outcome(ours, lambda model, log: (change(model, log), rk.accelerate(model))[0])
    if isinstance(expected, Exception):
        assert type(got) is type(expected), f"{type(got)} where torch-rechub's model raises {expected!r}"
        return
    if isinstance(got, Exception):
        raise got
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert [entry[:2] for entry in log] == [entry[:2] for entry in expected_log]
    torch.testing.assert_close([e[2] for e in log], [e[2] for e in expected_log], rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- changes


def values(arguments) -> list[torch.Tensor]:
    return [t.detach().clone() for t in arguments if isinstance(t, torch.Tensor)]


def note(log, module, *arguments):
    found = values(arguments)
    log.append((module.path, [(t.shape, t.dtype) for t in found], found))


def moved(t):
    """Another tensor in its place: ids in another order, other numbers."""
    if not isinstance(t, torch.Tensor):
        return t
    return t * 1.25 + 0.01 if t.is_floating_point() else t.flip(0)


def scaled(grads):
    return tuple(None if g is None else g * 0.75 for g in grads)


def pre(log, module, arguments):
    note(log, module, *arguments)
    return tuple(map(moved, arguments))


def pre_kwargs(log, module, arguments, keywords):
    note(log, module, *arguments, *keywords.values())
    return tuple(map(moved, arguments)), keywords


def post(log, module, arguments, out):
    note(log, module, *arguments, out)
    return moved(out)


def post_kwargs(log, module, arguments, keywords, out):
    return post(log, module, arguments, out)


def backward(log, module, grad_input, grad_output):
    note(log, module, *grad_output)
    return scaled(grad_input)


def backward_pre(log, module, grad_output):
    note(log, module, *grad_output)
    return scaled(grad_output)


def own_forward(module, log):
    forward = module.forward
    module.forward = lambda *a, **k: (note(log, module, *a), moved(forward(*a, **k)))[1]


def subclass(module, log):
    """As FSDP2 and parametrizations do it: the type changes, the object stays."""
    cls = type(module)

    def forward(self, *a, **k):
        note(log, self, *a)
        return moved(cls.forward(self, *a, **k))

    module.__class__ = type(cls.__name__, (cls,), {"forward": forward})


def each_parameter(module, change):
    for name, p in list(module.named_parameters(recurse=False)):
        change(name, p)


def on_matrices(make):
    def change(module, log):
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 2:
                make(module, name)

    return change


HOOKS = {
    "forward_pre": lambda m, log: m.register_forward_pre_hook(functools.partial(pre, log)),
    "forward_pre_kwargs": lambda m, log: m.register_forward_pre_hook(
        functools.partial(pre_kwargs, log), with_kwargs=True
    ),
    "forward": lambda m, log: m.register_forward_hook(functools.partial(post, log)),
    "forward_kwargs": lambda m, log: m.register_forward_hook(functools.partial(post_kwargs, log), with_kwargs=True),
    "forward_always": lambda m, log: m.register_forward_hook(functools.partial(post, log), always_call=True),
    "full_backward": lambda m, log: m.register_full_backward_hook(functools.partial(backward, log)),
    "full_backward_pre": lambda m, log: m.register_full_backward_pre_hook(functools.partial(backward_pre, log)),
    "backward": lambda m, log: m.register_backward_hook(functools.partial(backward, log)),
    "own_forward": own_forward,
    "subclass": subclass,
}  # fmt: skip
WEIGHTS = {
    "parametrize": lambda m, log: each_parameter(
        m, lambda name, p: parametrize.register_parametrization(m, name, nn.Tanh())
    ),
    "weight_norm": on_matrices(lambda m, name: nn.utils.weight_norm(m, name)),
    "new_weight_norm": on_matrices(lambda m, name: nn.utils.parametrizations.weight_norm(m, name)),
    "spectral_norm": on_matrices(lambda m, name: nn.utils.spectral_norm(m, name)),
    "new_spectral_norm": on_matrices(lambda m, name: nn.utils.parametrizations.spectral_norm(m, name)),
    "prune": lambda m, log: each_parameter(m, lambda name, p: prune.l1_unstructured(m, name, 0.4)),
    "frozen": lambda m, log: each_parameter(m, lambda name, p: p.requires_grad_(False)),
    "no_parameter": lambda m, log: each_parameter(
        m, lambda name, p: (delattr(m, name), setattr(m, name, p.detach() * 1.5))
    ),
    "eval": lambda m, log: setattr(m, "train", lambda mode=True: nn.Module.train(m, False)),
}


def paths(build, *types) -> list[str]:
    return [name for name, m in built(build).named_modules() if not types or isinstance(m, types)]


def with_parameters(build) -> list[str]:
    return [name for name, m in built(build).named_modules() if list(m.parameters(recurse=False))]


MODELS = pytest.mark.parametrize("build", [deepfm, din])


@pytest.mark.parametrize("change", HOOKS)
@MODELS
def test_every_call_of_every_module(build, change):
    for path in paths(build):
        assert_same(build, lambda model, log: HOOKS[change](model.get_submodule(path), log) and None)


@pytest.mark.parametrize("change", ["forward", "own_forward"])
@MODELS
def test_changes_made_before_accelerate(build, change):
    for path in paths(build):
        assert_same(build, lambda model, log: HOOKS[change](model.get_submodule(path), log) and None, False)


@pytest.mark.parametrize("change", WEIGHTS)
@MODELS
def test_every_weight_of_every_module(build, change):
    for path in with_parameters(build):
        assert_same(build, lambda model, log: WEIGHTS[change](model.get_submodule(path), log))


class removed:
    """A context that removes a global hook of the modules of ``model`` alone."""

    def __init__(self, register, hook, model, log):
        def of_the_model(module, *arguments):
            return hook(log, module, *arguments) if "path" in module.__dict__ else None

        self.handle = register(of_the_model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


GLOBAL_HOOKS = {
    "forward_pre": (torch_module.register_module_forward_pre_hook, pre),
    "forward": (torch_module.register_module_forward_hook, post),
    "full_backward_pre": (torch_module.register_module_full_backward_pre_hook, backward_pre),
}


@pytest.mark.parametrize("change", GLOBAL_HOOKS)
@MODELS
def test_global_hooks(build, change):
    register, hook = GLOBAL_HOOKS[change]
    assert_same(build, functools.partial(removed, register, hook))
    assert not any((torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks))


def test_global_backward_hooks():
    """Of a model without an operation in place, in which such a hook is an error."""
    build = functools.partial(deepfm, "sigmoid")
    assert_same(build, functools.partial(removed, torch_module.register_module_full_backward_hook, backward))
    assert_same(din, functools.partial(removed, torch_module.register_module_full_backward_hook, backward))


def setting(**attributes):
    def change(module, log):
        for name, value in attributes.items():
            setattr(module, name, value(module) if callable(value) else value)

    return change


SETTINGS = {
    nn.BatchNorm1d: [
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 0.7},
        {"eps": 0.5},
        {"weight": None, "bias": None},
        {"weight": None},
        {"bias": None},
        {"running_mean": None, "running_var": None},
        {"num_batches_tracked": None},
        {"num_batches_tracked": None, "momentum": None},
        {"track_running_stats": False, "running_mean": None, "running_var": None},
    ],
    nn.Linear: [{"bias": None}],
    nn.Dropout: [{"p": 0.5}, {"inplace": True, "p": 0.5}, {"p": 1.0}],
    nn.Embedding: [
        {"max_norm": 0.6},
        {"max_norm": 0.6, "norm_type": 1.0},
        {"scale_grad_by_freq": True},
        {"padding_idx": 3},
        {"padding_idx": -2},
        {"padding_idx": None},
    ],
    ranking.deepfm.LR: [{"sigmoid": True}],
    ranking.deepfm.FM: [{"reduce_sum": False}],
    ranking.din.ActivationUnit: [{"use_softmax": True}],
}


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
@MODELS
def test_every_setting(build, kind):
    if kind is nn.Dropout:  # in place it is an error behind an activation whose backward reads what it returned
        build = functools.partial(build, "leakyrelu")
    for path in paths(build, kind):
        for attributes in SETTINGS[kind]:
            assert_same(build, lambda model, log: setting(**attributes)(model.get_submodule(path), log))


ACTIVATIONS = {
    "relu": [lambda: nn.ReLU(), lambda: nn.ReLU6(), lambda: nn.Identity(), lambda: nn.Tanh()],
    "prelu": [lambda: nn.PReLU(5), lambda: nn.PReLU(6)],
    "leakyrelu": [lambda: nn.LeakyReLU(0.3), lambda: nn.LeakyReLU(0.01, inplace=True)],
    "dice": [lambda: Dice(0.7)],
    "sigmoid": [lambda: nn.Hardsigmoid()],
    "softmax": [lambda: nn.Softmax(dim=0)],
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("build", [deepfm, din])
def test_every_activation_exchanged(build, activation):
    build = functools.partial(build, activation)
    mlp = "mlp.mlp" if build.func is deepfm else "attention_layers.0.attention.mlp"
    for at in ("2", "6"):
        for make in ACTIVATIONS[activation]:

            def change(model, log):
                torch.manual_seed(1)
                model.get_submodule(mlp)[int(at)] = make()

            assert_same(build, change, accelerate_first=False)


class Mean(nn.Module):
    def forward(self, history, target):
        return history.mean(1) + target


class Table(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, ids):
        return self.table(ids) * 0.5


class Embeddings(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, features, squeeze_dim=False):
        return self.layer(x, features, squeeze_dim) * 0.5


def test_modules_of_ones_own():
    def exchange(path, make):
        def change(model, log):
            model.set_submodule(path, make(model.get_submodule(path)))

        return change

    assert_same(din, exchange("attention_layers.0", lambda _: Mean()))
    assert_same(din, exchange("attention_layers.0.attention", lambda m: nn.Sequential(m, nn.Tanh())))
    for build in (deepfm, din):
        assert_same(build, exchange("embedding.embed_dict.item", Table))
        assert_same(build, exchange("embedding", Embeddings))
        assert_same(build, exchange("mlp", lambda m: nn.Sequential(m, nn.Tanh())))
        assert_same(build, exchange("mlp.mlp", lambda m: nn.Sequential(m, nn.Tanh())))
    assert_same(deepfm, exchange("fm", lambda m: nn.Flatten()))
    assert_same(deepfm, exchange("linear", lambda m: nn.Sequential(m, nn.Tanh())))
