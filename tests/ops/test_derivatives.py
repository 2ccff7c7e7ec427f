"""Derivatives of every op and every layer: second ones, forward mode and ``torch.func``, compared with the same of the
reference or of torch's own modules. Where there is no derivative there is an error; never another number."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import rankkernels as rk
from rankkernels import optim, reference
from rankkernels.ops._activations import ACTIVATIONS
from rankkernels.testing import (
    OpCase,
    bilinear_interaction_case,
    cross_layer_case,
    cross_network_case,
    din_attention_case,
    embedding_bag_case,
    embedding_fm_case,
    ffm_interaction_case,
    fm_interaction_case,
    mixed_cross_layer_case,
    mixed_experts_case,
    norm_activation_case,
    pairwise_dot_case,
    relative_error,
)

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own ops under its older vmap


def random_cases() -> list[OpCase]:
    """Small cases of every op, of shapes and settings drawn at random, the same ones in every run."""
    draw, cases = random.Random(0), []

    def few(low: int = 1) -> int:
        return draw.randint(low, 4)

    for i in range(4):
        B, D, padding = few(), few(), draw.choice((None, 1))
        cases.append(fm_interaction_case(B, few(), D, i % 2 == 0))
        modes = [draw.choice(("sum", "mean")), draw.choice(("none", "max", "mean"))]
        rows, weighted = [few(2), few(2)], i % 2 == 0
        cases.append(embedding_bag_case(rows, [few(), few()], [0, 1], modes, B, 3, padding, weighted, not weighted))
        cases.append(embedding_fm_case(rows, D, [0, 1], ["none", modes[0]], B, 2, i % 2 == 1, padding, few(0)))
    for i, activation in enumerate(ACTIVATIONS):
        norm = activation == "dice_batch_norm" or i % 2 == 0
        cases.append(norm_activation_case(few() + 2, few(2), activation, norm, training=draw.random() < 0.5))
        form = ("padded", "lengths", "mask", "offsets")[i % 4]
        cases.append(
            din_attention_case(
                few() + 2, 3, few(), [few(2)], activation, norm, i % 3 == 0, i % 2 == 1, form, 0.3 * (i == 2)
            )
        )
    cases += [cross_network_case(3, 2, 2), cross_layer_case(2, 3), pairwise_dot_case(2, 3, 2)]
    cases += [pairwise_dot_case(2, 3, 2, True), ffm_interaction_case(2, 3, 2), ffm_interaction_case(1, 2, 3, False)]
    cases += [mixed_experts_case(2, 2, 3), mixed_cross_layer_case(2, 3, 2, 2)]
    cases += [bilinear_interaction_case(2, 3, 2), bilinear_interaction_case(2, 3, 2, "field_each")]
    return cases


CASES = {case.id: case for case in random_cases()}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

#: What is asked of a function of one vector, at ``x`` and in the direction ``v``.
TRANSFORMS = {
    "value": lambda f, x, v: f(x),
    "grad": lambda f, x, v: grad(lambda x: f(x).square().sum())(x),
    "grad of grad": lambda f, x, v: grad(lambda x: grad(lambda x: f(x).pow(3).sum())(x).square().sum())(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](torch.cos(f(x)))[0],
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "jvp without gradients": torch.no_grad()(lambda f, x, v: jvp(f, (x,), (v,))[1]),
    "jvp of grad": lambda f, x, v: jvp(grad(lambda x: f(x).square().sum()), (x,), (v,))[1],
    "vmap": lambda f, x, v: vmap(f)(torch.stack([x, v])),
    "vmap of grad": lambda f, x, v: vmap(grad(lambda x: f(x).square().sum()))(torch.stack([x, v])),
    "grad of vmap": lambda f, x, v: grad(lambda x: vmap(f)(torch.stack([x, x * v])).square().sum())(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "hessian": lambda f, x, v: hessian(lambda x: f(x).square().sum())(x),
    "jacrev of jacrev": lambda f, x, v: jacrev(jacrev(lambda x: f(x).square().sum()))(x),
    "dual numbers": lambda f, x, v: tangent(f, x, v),
    "double backward": lambda f, x, v: double_backward(f, x, v),
    "batched gradients": lambda f, x, v: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward mode of backward": lambda f, x, v: tangent_of_gradient(f, x, v),
}


def tangent(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def double_backward(f, x, v):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((g * v).sum(), x)[0]


def tangent_of_gradient(f, x, v):
    """The forward is past when the tangents come: they are the gradient's alone."""
    x = x.clone().requires_grad_()
    out = f(x)
    with forward_ad.dual_level():
        (g,) = torch.autograd.grad(out, x, forward_ad.make_dual(torch.ones_like(out), torch.cos(out.detach())))
        return forward_ad.unpack_dual(g).tangent


def of_vector(function, tensors):
    """``function`` of ``tensors`` as one of a vector: the values of those in floating point one after the other; and
    the vector."""
    x = torch.cat([t.detach().flatten() for t in tensors if t.is_floating_point()])

    def of(x):
        at, given = 0, []
        for t in tensors:
            n = t.numel()
            given.append(x[at : at + n].view(t.shape) if t.is_floating_point() else t)
            at += n if t.is_floating_point() else 0
        return function(*given)

    return of, x


def compare(ours, theirs, x) -> None:
    """The value of each transform of ``ours``, wherever ``theirs`` has one."""
    v = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).cos()
    for name, transform in TRANSFORMS.items():
        try:
            expected = transform(theirs, x, v)
        except RuntimeError as error:  # shapes that depend on what is batched
            assert "vmap" in str(error), name
            continue
        assert relative_error(transform(ours, x, v), expected) < 1e-9, name


@ALL
def test_transforms_of_ops(case):
    tensors = case.inputs(torch.float64)
    (ours, x), (theirs, _) = of_vector(case.function, tensors), of_vector(case.reference, tensors)
    compare(ours, theirs, x)


@ALL
def test_gradcheck(case):
    inputs = case.inputs(torch.float64, requires_grad=True)
    assert gradcheck(case.function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(case.function, inputs, check_fwd_over_rev=True)


def features():
    """torch-rechub's; those that it cannot take in float64, pooled and dense ones, are left to the ops' own cases."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature

    sparse = [SparseFeature("user", 3, 2), SparseFeature("item", 4, 2, padding_idx=0)]
    return sparse, SequenceFeature("history", 4, 2, pooling="concat", shared_with="item")


BATCH = {
    "user": torch.tensor([2, 0, 1]),
    "item": torch.tensor([1, 0, 3]),
    "history": torch.tensor([[1, 2, 0], [3, 3, 1], [0, 0, 0]]),
}


def layers():
    """torch-rechub's layers and models, and what each is called with."""
    from torch_rechub.basic.activation import Dice
    from torch_rechub.basic.layers import FM, LR, MLP, EmbeddingLayer
    from torch_rechub.models.ranking import DIN, DeepFM
    from torch_rechub.models.ranking.din import ActivationUnit

    sparse, history = features()
    x = torch.randn(3, 4, dtype=torch.float64)
    yield "FM", FM(), (torch.randn(3, 2, 2, dtype=torch.float64),)
    yield "LR", LR(4, sigmoid=True), (x,)
    yield "Dice", Dice(), (x,)
    for activation in ("sigmoid", "relu", "dice", "prelu", "softmax", "leakyrelu"):
        yield f"MLP-{activation}", MLP(4, dims=[3], activation=activation), (x,)
        unit = ActivationUnit(2, dims=[3], activation=activation, use_softmax=activation == "dice")
        yield f"ActivationUnit-{activation}", unit, (torch.randn(3, 3, 2, dtype=torch.float64), x[:, :2])
    yield "EmbeddingLayer", EmbeddingLayer([*sparse, history]), (BATCH, sparse, True)
    yield "DeepFM", DeepFM(sparse, sparse, {"dims": [3]}), (BATCH,)
    yield "DIN", DIN([sparse[0]], [history], [sparse[1]], {"dims": [3]}, {"dims": [3]}), (BATCH,)


def of_parameters(module, arguments):
    """``module(*arguments)`` as a function of its parameters and of the arguments in floating point, one vector."""
    names, parameters = zip(*module.named_parameters()) if list(module.parameters()) else ((), ())
    inputs = [a for a in arguments if isinstance(a, torch.Tensor)]

    def function(*tensors):
        given = dict(zip(names, tensors)), (*tensors[len(names) :], *arguments[len(inputs) :])
        return functional_call(module, *given)

    return of_vector(function, [*parameters, *inputs])


LAYERS = ["FM", "LR", "Dice", "EmbeddingLayer", "DeepFM", "DIN"] + [
    f"{layer}-{activation}"
    for layer in ("MLP", "ActivationUnit")
    for activation in ("sigmoid", "relu", "dice", "prelu", "softmax", "leakyrelu")
]


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_layers(name):
    pytest.importorskip("torch_rechub")
    theirs, arguments = next((layer, arguments) for n, layer, arguments in layers() if n == name)
    theirs = theirs.double().eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours = rk.accelerate(nn.Sequential(copy.deepcopy(theirs)))[0]
    (of_ours, x), (of_theirs, _) = of_parameters(ours, arguments), of_parameters(theirs, arguments)
    compare(of_ours, of_theirs, x)


def test_transforms_of_a_bag():
    for mode in ("sum", "mean", "max"):
        bag, ids = rk.EmbeddingBag(5, 3, mode=mode).double(), torch.tensor([[1, 2], [4, 4]])
        ours, x = of_parameters(bag, (ids,))
        compare(ours, lambda x, mode=mode: reference.embedding_bag(x.view(5, 3), ids, mode=mode), x)


def test_gradients_of_samples_with_ids_of_their_own():
    table, ids = torch.randn(5, 3, dtype=torch.float64), torch.tensor([[1, 2], [4, 4], [0, 1]])
    one = grad(lambda table, ids: rk.embedding_bag(table, ids[None]).square().sum())
    batched = vmap(one, (None, 0))(table, ids)
    assert relative_error(batched, torch.stack([one(table, i) for i in ids])) < 1e-12
    assert torch.equal(vmap(lambda i: rk.embedding_bag(table, i[None]))(ids)[:, 0], rk.embedding_bag(table, ids))


def lookup(optimizer, sparse, tables):
    ids = [torch.tensor([0, 2]) for _ in tables]
    return rk.embedding_fm(tables, ids, torch.ones(1, 4), optimizer=optimizer, sparse=sparse)[1]


def lookup_alone(optimizer, sparse, tables):
    ids = [torch.tensor([0, 2]) for _ in tables]
    return rk.table_batched_embedding_bag(tables, ids, modes=["none"] * 2, optimizer=optimizer, sparse=sparse)[0]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "sparse"])
@pytest.mark.parametrize("call", [lookup, lookup_alone])
def test_sparse_and_fused_gradients_have_no_derivative(call, fused):
    tables = [torch.randn(4, 2, requires_grad=True) for _ in range(2)]
    before = [t.detach().clone() for t in tables]
    optimizer = optim.SGD(tables, lr=1.0) if fused else None
    with pytest.raises(RuntimeError, match="is differentiable once"):
        call(optimizer, not fused, tables).sum().backward(create_graph=True)
    if fused:
        with pytest.raises(RuntimeError, match="not in forward mode"):
            grad(lambda t: call(optimizer, False, [t, tables[1]]).sum())(tables[0])
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="not in forward mode"):
            call(optimizer, False, [tables[0], forward_ad.make_dual(tables[1], tables[1].detach())])
    else:  # under torch.func they are dense
        ours = grad(lambda t: call(None, True, [t, tables[1]]).square().sum())(tables[0])
        assert torch.equal(ours, grad(lambda t: call(None, False, [t, tables[1]]).square().sum())(tables[0]))
    assert all(map(torch.equal, tables, before))


def test_large_products_without_gradients():
    """``linear`` gives these to another library where no gradient is taken, which knows nothing of tangents."""
    layer = rk.MLP(256, dims=[256], output_layer=False, activation="sigmoid").eval()
    x, v = torch.randn(2, 512, 256)
    with torch.no_grad():
        assert relative_error(jvp(layer, (x,), (v,))[1], jvp(layer.mlp, (x,), (v,))[1]) < 1e-5
