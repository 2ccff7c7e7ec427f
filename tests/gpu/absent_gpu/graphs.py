"""DeepFM and DIN traced on CUDA tensors that have no memory. test_cuda_tracing.py runs this file in a process of its
own, by run.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bench.gpu import host, page, report
from rankkernels import DIN
from rankkernels.nn import ActivationUnit, SequenceFeature, SparseFeature

#: PyTorch's ops that make the host wait for the device.
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


def din_masked(B: int, rows: int):
    items = SparseFeature("item", rows, 8)
    history = SequenceFeature("history", rows, 8, pooling="concat", shared_with="item", padding_idx=0)
    attention = {"dims": [16], "activation": "sigmoid", "use_softmax": True}
    model = DIN([], [history], [items], {"dims": [16]}, attention, mask_padding=True)
    x = {"item": torch.randint(rows, (B,)), "history": torch.randint(rows, (B, 7))}
    return model, x, torch.randint(2, (B,)).float()


def deepfm(B: int, rows: int):
    return report.deepfm(B, rows).ours()


def din(B: int, rows: int):
    return report.din(B, rows).ours()


MODELS = {"DeepFM": deepfm, "DIN": din, "DIN, padding masked": din_masked}
FORWARD = {"DeepFM": {"embedding_fm", "norm_activation"}}
BACKWARD = {"DeepFM": {"embedding_fm_backward", "embedding_bag_backward", "norm_activation_backward"}}


class Waits(nn.Module):
    """A model with one thing in it that it should not have."""

    def __init__(self, model: nn.Module, what):
        super().__init__()
        self.model, self.what = model, what

    def forward(self, x):
        return self.what(self.model(x))


def on_cuda(make, what=None):
    """The tracing mode and, on its CUDA device, the model, a batch and labels."""
    torch._dynamo.reset()
    model, x, y = make(B=48, rows=30)
    model = model if what is None else Waits(model, what)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        return mode, model.to("cuda:0"), {name: t.to("cuda:0") for name, t in x.items()}, y.to("cuda:0")


def loss(model, x, y):
    return F.binary_cross_entropy(model(x), y)


def calls(graph: torch.fx.Graph) -> list[tuple[str, torch.fx.Node]]:
    """Names of the ops, ours with their namespace."""
    found = []
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.name
            found.append((name.removeprefix("aten::"), node))
    return found


def ours(graphs: list[torch.fx.GraphModule]) -> list[str]:
    prefix = "rankkernels::"
    return [name[len(prefix) :] for g in graphs for name, _ in calls(g.graph) if name.startswith(prefix)]


def waits(graphs: list[torch.fx.GraphModule]) -> list[str]:
    """What makes the host wait: reads of values, and tensors that are not on the GPU."""
    found = []
    for g in graphs:
        for name, node in calls(g.graph):
            values = [v for v in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
            if name in WAITING or any(v.device.type != "cuda" for v in values):
                found.append(name)
    return found


def compiled(make, what=None) -> list[torch.fx.GraphModule]:
    """Forward's and backward's graph of a training step, without a graph break."""
    mode, model, x, y = on_cuda(make, what)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with mode:
        torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(model, x, y).backward()
    return graphs


def traced(make, what=None) -> list[torch.fx.GraphModule]:
    """The same with make_fx: one graph."""
    mode, model, x, y = on_cuda(make, what)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with mode:
        return [make_fx(lambda x, y: torch.autograd.grad(loss(model, x, y), parameters))(x, y)]


class Loss(nn.Module):
    """Of a model, as a module with one result: what torch.export takes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return (loss(self.model, x, y),)


def exported(make, what=None) -> list[torch.fx.GraphModule]:
    """torch.export of the loss in training, and the backward of what it exported: one graph."""
    mode, model, x, y = on_cuda(make, what)
    with mode:
        step = torch.export.export(Loss(model), (x, y)).module()
        parameters = [p for p in step.parameters() if p.requires_grad]
        return [make_fx(lambda x, y: torch.autograd.grad(step(x, y)[0], parameters))(x, y)]


def exported_in_eval(make, what=None) -> list[torch.fx.GraphModule]:
    """torch.export of what serves: the forward in eval."""
    mode, model, x, _ = on_cuda(make, what)
    with mode:
        return [torch.export.export(model.eval(), (x,)).graph_module]


#: Every way of tracing once or twice; the rest is slow.
SOME = {(compiled, "DeepFM"), (compiled, "DIN")}
SOME |= {(traced, "DIN"), (exported, "DeepFM"), (exported_in_eval, "DIN, padding masked")}


@pytest.mark.parametrize(
    "trace, name",
    [
        pytest.param(trace, name, marks=[] if (trace, name) in SOME else pytest.mark.slow)
        for trace in (compiled, traced, exported, exported_in_eval)
        for name in MODELS
    ],
)
def test_our_ops_are_in_the_graph_and_nothing_waits(trace, name):
    graphs = trace(MODELS[name])
    forward = FORWARD.get(name, {"embedding_bag", "din_attention", "norm_activation"})
    backward = set() if trace is exported_in_eval else BACKWARD.get(name, {f"{op}_backward" for op in forward})
    expected = forward | backward
    if trace is traced and name == "DeepFM":  # without a compiler small layers are torch's own, but for Dice
        expected -= {"norm_activation", "norm_activation_backward"}
    assert set(ours(graphs)) == expected
    assert not waits(graphs)
    assert len(graphs) == (2 if trace is compiled else 1)


#: Of a training step without the optimizer: at most so many of Triton's launches, of CUDA C++'s, of PyTorch's inside
#: our ops and of PyTorch's in the rest of the model.
LAUNCHES = {
    "CUDA C++": {"DeepFM": (0, 8, 0, 32), "DIN": (28, 6, 8, 31)},
    "Triton": {"DeepFM": (6, 0, 4, 32), "DIN": (34, 0, 10, 31)},
}
#: With the tables' Adam in it, all together.
FUSED_LAUNCHES = {"CUDA C++": {"DeepFM": 40, "DIN": 73}, "Triton": {"DeepFM": 40, "DIN": 74}}
#: What Triton's then costs the host at most, microseconds by ``bench.gpu.host``, PyTorch's launches among it.
FUSED_HOST = {"DeepFM": 235, "DIN": 630}
#: Of both with exact Adam, on meta tensors: what read a value, and so waited, would raise.
EXACT_LAUNCHES, EXACT_HOST = {"DeepFM": 45, "DIN": 76}, {"DeepFM": 290, "DIN": 655}


@pytest.mark.parametrize("lookups", ["CUDA C++", "Triton"])
def test_a_step_launches_no_more_than_it_did(lookups):
    pytest.importorskip("triton", reason="Triton is not installed")
    launched = report.model_launches(cuda_cpp=lookups == "CUDA C++")
    for name, most in LAUNCHES[lookups].items():
        counts = page.launch_counts(launched[name])
        assert all(n <= m for n, m in zip(counts, most, strict=True)), (name, counts)
        called = sorted(c.op for c in launched[name] if c.op)
        assert called == sorted(ours(traced(MODELS[name])))
    fused = report.model_launches(fused=True, cuda_cpp=lookups == "CUDA C++")
    for name, most in FUSED_LAUNCHES[lookups].items():
        assert sum(len(call.launches) for call in fused[name]) <= most
    if lookups == "Triton":
        for name, most in FUSED_HOST.items():
            assert sum(map(host.microseconds, fused[name])) <= most
        exact = report.model_launches(fused=True, cuda_cpp=False, exact=True)
        for name, most in EXACT_LAUNCHES.items():
            launches = [kernel for call in exact[name] for kernel in call.launches if kernel != "detach_"]
            assert len(launches) <= most, launches
            assert launches.count("sort") == 1
            assert sum(map(host.microseconds, exact[name])) <= EXACT_HOST[name]


#: What a unit's training step launches, running statistics and rows' kernels included, and costs the host.
MOST_OF_A_UNIT, MOST_US_OF_A_UNIT = 15, 140


@pytest.mark.parametrize("use_softmax", [False, True])
@pytest.mark.parametrize("form", ["padded", "lengths", "mask", "offsets"])
@pytest.mark.parametrize("D", [16, 64])
def test_a_unit_in_training_launches_little_beside_its_kernels(D, form, use_softmax):
    ahead_of_time = pytest.importorskip("bench.gpu.ahead_of_time", reason="Triton is not installed")
    B, L = 1024, 50
    with torch.device("meta"):
        unit = ActivationUnit(D, [36], use_softmax=use_softmax)
        history = torch.empty((B * L, D) if form == "offsets" else (B, L, D), requires_grad=True)
        target = torch.empty(B, D, requires_grad=True)
        rows = {
            "padded": {}, "lengths": {"lengths": torch.empty(B, dtype=torch.long)},
            "mask": {"mask": torch.empty(B, L, dtype=torch.bool)},
            "offsets": {"offsets": torch.empty(B + 1, dtype=torch.long)},
        }[form]  # fmt: skip
    with ahead_of_time.compiling("sm_90", only_counting=True) as calls:
        out = unit(history, target, **rows)
        out.backward(torch.empty_like(out))
    launches = [name for call in calls for name in call.launches]
    assert len(launches) <= MOST_OF_A_UNIT, launches
    assert sum(map(host.microseconds, calls)) <= MOST_US_OF_A_UNIT


@pytest.mark.parametrize("trace", [pytest.param(compiled, marks=pytest.mark.slow), traced])
@pytest.mark.parametrize(
    "what, op",
    [
        (lambda y: y * y.new_ones(y.sum().long().item()).sum(), "_local_scalar_dense"),
        (lambda y: y * y.cpu().sum().to(y.device), "_to_copy"),
        (lambda y: y * y.nonzero().size(0), "nonzero"),
    ],
    ids=["item", "cpu", "nonzero"],
)
def test_a_model_that_waits_is_noticed(trace, what, op):
    try:
        assert op in waits(trace(deepfm, what))
    except torch._dynamo.exc.Unsupported as error:
        assert op in str(error)


def test_a_graph_break_is_noticed():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent branching"):
        compiled(deepfm, lambda y: y if y.sum() > 0 else -y)
