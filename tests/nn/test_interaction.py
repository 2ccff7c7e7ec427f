"""Cross networks, FFM, bilinear products, and the models of cross networks, against the installed torch-rechub."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import rankkernels as rk
from rankkernels.testing import relative_error, relative_errors

basic = pytest.importorskip("torch_rechub.basic.layers", reason="torch-rechub is not installed")
ranking = pytest.importorskip("torch_rechub.models.ranking")
features_ = pytest.importorskip("torch_rechub.basic.features")

#: Arguments of a layer and the shapes of its inputs without the batch.
LAYERS = {
    "network": ("CrossNetwork", (11, 3), [(11,)]),
    "network-one_layer": ("CrossNetwork", (8, 1), [(8,)]),
    "network-no_layer": ("CrossNetwork", (8, 0), [(8,)]),
    "network-3d": ("CrossNetwork", (6, 4), [(5, 6)]),
    "layer": ("CrossLayer", (9,), [(9,), (9,)]),
    "v2": ("CrossNetV2", (13, 3), [(13,)]),
    "v2-3d": ("CrossNetV2", (5, 2), [(3, 5)]),
    "mix": ("CrossNetMix", (13,), [(13,)]),
    "mix-small": ("CrossNetMix", (7, 3, 2, 3), [(7,)]),
    "mix-one_expert": ("CrossNetMix", (7, 1, 5, 1), [(7,)]),
    "ffm": ("FFM", (5,), [(5, 5, 7)]),
    "ffm-keep_dim": ("FFM", (4, False), [(4, 4, 16)]),
    "bilinear-all": ("BiLinearInteractionLayer", (7, 4, "field_all"), [(4, 7)]),
    "bilinear-each": ("BiLinearInteractionLayer", (8, 5, "field_each"), [(5, 8)]),
    "bilinear": ("BiLinearInteractionLayer", (6, 5), [(5, 6)]),
}
ALL = pytest.mark.parametrize("name", LAYERS)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs from one seed, checked for equal weights, in float64 with random biases."""
    cls, arguments, _ = LAYERS[name]
    made = []
    for library in (rk, basic):
        torch.manual_seed(0)
        made.append((getattr(library, cls)(*arguments), torch.get_rng_state()))
    (ours, state), (theirs, their_state) = made
    assert torch.equal(state, their_state), "both must draw the same random numbers"
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    for parameter in theirs.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours.double(), theirs.double()


def inputs_of(name: str, B: int = 6, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, *shape, dtype=dtype, generator=generator) for shape in LAYERS[name][2]]


def results(layer: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of all inputs and parameters."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = layer(*inputs)
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [*inputs, *layer.parameters()]
    grads = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads))]


def assert_equal_results(ours, theirs, inputs, tolerance=1e-12):
    a, b = results(ours, inputs), results(theirs, inputs)
    assert [t.shape for t in a] == [t.shape for t in b]
    assert max(relative_errors(a, b)) < tolerance


@ALL
def test_equals_torch_rechub(name):
    ours, theirs = pair(name)
    assert_equal_results(ours, theirs, inputs_of(name))
    for layer in (ours, theirs):
        layer.float()
    assert_equal_results(ours, theirs, inputs_of(name, dtype=torch.float32), 2e-5)


@ALL
def test_accelerated(name):
    _, theirs = pair(name)
    ours = rk.accelerate(copy.deepcopy(theirs))
    assert type(ours) is getattr(rk, LAYERS[name][0])
    assert_equal_results(ours, theirs, inputs_of(name))
    assert type(rk.restore(ours)) is type(theirs)


@ALL
def test_modules_that_somebody_follows_are_called(name):
    """With hooks on the linear layers and another forward of their own."""
    ours, theirs = pair(name)
    linears = [m for m in ours.modules() if isinstance(m, nn.Linear)]
    seen = []
    for linear in linears:
        linear.register_forward_hook(lambda module, *_: seen.append(module))
    assert_equal_results(ours, theirs, inputs_of(name))
    used = linears[:-1] if name == "bilinear-each" else linears  # the last field has no pair of its own
    assert {id(m) for m in seen} == {id(m) for m in used}


@ALL
@pytest.mark.parametrize("B", [0, 1])
def test_small_batches(name, B):
    """torch-rechub's mixture loses the batch's dimension of a batch of one."""
    ours, theirs = pair(name)
    inputs = inputs_of(name, 2)
    expected = theirs(*inputs)[:B]
    torch.testing.assert_close(ours(*(t[:B] for t in inputs)), expected, rtol=1e-12, atol=1e-12)


@ALL
def test_strided_inputs(name):
    ours, theirs = pair(name)
    inputs = [torch.stack([t, t], -1)[..., 0] for t in inputs_of(name)]
    assert_equal_results(ours, theirs, [t.transpose(0, -1).contiguous().transpose(0, -1) for t in inputs])


@ALL
def test_autocast_and_16_bit(name):
    ours, theirs = pair(name)
    for layer in (ours, theirs):
        layer.float()
    inputs = inputs_of(name, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(ours(*inputs), theirs(*inputs).float()) < 0.05
        ours(*(t.bfloat16() for t in inputs))
    exact = theirs(*inputs)
    assert relative_error(ours.bfloat16()(*(t.bfloat16() for t in inputs)), exact) < 0.05


@pytest.mark.parametrize("name", ["network", "v2", "mix", "ffm", "bilinear-each"])
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()
    ours, theirs = pair(name)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_equal_results(compiled, theirs, inputs_of(name))


def features() -> list:
    return [
        *(features_.SparseFeature(n, 9, 4) for n in ("user", "item", "shop")),
        features_.DenseFeature("price"),
        features_.SequenceFeature("tags", 9, 4, "mean", shared_with="user", padding_idx=0),
    ]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = {name: torch.randint(0, 9, (7,), generator=generator) for name in ("user", "item", "shop")}
    return {**x, "price": torch.rand(7, generator=generator), "tags": torch.randint(0, 9, (7, 3), generator=generator)}


MODELS = {
    "DCN": lambda library, f: library.DCN(f, 3, {"dims": [8, 5]}),
    "DCNv2": lambda library, f: library.DCNv2(f, 2, {"dims": [8, 5], "activation": "prelu"}),
    "DCNv2-stacked": lambda library, f: library.DCNv2(f, 2, {"dims": [8]}, "stacked", False),
    "DCNv2-crossnet_only": lambda library, f: library.DCNv2(f, 2, {"dims": [8]}, "crossnet_only", low_rank=3),
    "EDCN": lambda library, f: library.EDCN(f, 2, {"dropout": 0.0}),
    "EDCN-addition": lambda library, f: library.EDCN(f, 1, {}, "pointwise_addition", False),
    "EDCN-concatenation": lambda library, f: library.EDCN(f, 2, {}, "concatenation", temperature=2),
    "EDCN-attention": lambda library, f: library.EDCN(f, 2, {}, "attention_pooling"),
}


@pytest.mark.usefixtures("float64")  # torch-rechub's pooling masks are of the default dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, training):
    """Ours, theirs, and theirs accelerated: weights from one seed, outputs, gradients, buffers."""
    models = []
    for library in (rk, ranking):
        torch.manual_seed(0)
        models.append(MODELS[name](library, features()).double().train(training))
    ours, theirs = models
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
    for module in theirs.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    ours.load_state_dict(theirs.state_dict())
    accelerated = rk.accelerate(copy.deepcopy(theirs))
    assert type(accelerated) is type(ours)
    x = {key: t.double() if t.is_floating_point() else t for key, t in batch().items()}
    found = []
    for model in (theirs, ours, accelerated):
        y = model(x)
        y.backward(torch.linspace(-1, 1, len(y), dtype=y.dtype))
        assert all((p.grad is None) == (q.grad is None) for p, q in zip(model.parameters(), theirs.parameters()))
        found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()])
    for other in found[1:]:
        assert max(relative_errors(other, found[0])) < 1e-12


def test_what_models_refuse():
    x = features()
    with pytest.raises(ValueError, match="DCN: features must not be empty"):
        rk.DCN([], 2, {"dims": [3]})
    with pytest.raises(ValueError, match="DCNv2: model_structure must be one of crossnet_only, stacked, parallel, got"):
        rk.DCNv2(x, 2, {"dims": [3]}, "beside")
    with pytest.raises(ValueError, match="EDCN: bridge_type must be one of hadamard_product, .*, got 'none'"):
        rk.EDCN(x, 2, {}, "none")
    with pytest.raises(ValueError, match="EDCN: n_cross_layers must be positive, got 0"):
        rk.EDCN(x, 0, {})
    with pytest.raises(ValueError, match="EDCN: feature 'history' has pooling='concat'"):
        rk.EDCN([features_.SequenceFeature("history", 9, 4, "concat")], 2, {})
    with pytest.raises(NotImplementedError, match="unknown bilinear_type 'none', expected one of field_all"):
        rk.BiLinearInteractionLayer(3, 4, "none")
    for shape in ((7,), (3, 2, 7), ()):
        with pytest.raises(ValueError, match=re.escape(f"CrossNetMix: x must be [B, 7], got shape {list(shape)}")):
            rk.CrossNetMix(7)(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixtures_bias_may_be_one_number(dtype):
    net = rk.CrossNetMix(7).to(dtype)
    whole = copy.deepcopy(net)
    net.bias[0], whole.bias[0] = nn.Parameter(net.bias[0].new_ones(1, 1)), nn.Parameter(net.bias[0].new_ones(7, 1))
    x = torch.randn(5, 7, dtype=dtype)
    torch.testing.assert_close(net(x), whole(x))
