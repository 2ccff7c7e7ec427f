"""Which way attention takes on a GPU, for a grid of its configurations on CUDA tensors that have no memory, and a
mixture's experts.
test_cuda_tracing.py runs this file in a process of its own, by run.py.
"""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from graphs import WAITING
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.ahead_of_time import launches_kernel, tensor_bytes
from rankkernels import reference
from rankkernels.nn import ActivationUnit, CrossNetMix, MultiHeadTargetAttention
from rankkernels.ops import _library
from rankkernels.testing import OpCase, din_attention_case

SINGLE, HALF, DOUBLE = torch.float32, torch.float16, torch.float64
FORMS = ("padded", "lengths", "mask", "offsets")


class Calls(TorchDispatchMode):
    """The names of the ops that are called, and the bytes that they take and return."""

    #: How often norm_activation reads or writes arrays of its input's size: _triton/norm_activation.py.
    PASSES = {"rankkernels::norm_activation": 3, "rankkernels::norm_activation_backward": 5}

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names.append(name.removeprefix("aten::"))
        if name in self.PASSES:
            x, *_ = result
            self.bytes += self.PASSES[name] * x.numel() * x.element_size()
        elif launches_kernel(func):
            self.bytes += tensor_bytes((args, kwargs, result))
        return result


def step(case: OpCase, dtype: torch.dtype = SINGLE) -> list[str]:
    """The ops of a forward and a backward of a case, in which the reference must not run."""
    stop = mock.patch.object(reference, "din_attention", side_effect=AssertionError("the reference runs"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, stop:
        inputs = [mode.from_tensor(t).to("cuda:0") for t in case.inputs(dtype)]
        inputs = [t.requires_grad_(t.is_floating_point()) for t in inputs]
        with Calls() as calls:
            out = case.function(*inputs)
            torch.autograd.grad(out, [t for t in inputs if t.requires_grad], torch.empty_like(out), allow_unused=True)
    return calls.names


FUSED = {"rankkernels::din_attention", "rankkernels::din_attention_backward"}


def assert_fused(names: list[str]) -> None:
    assert {name for name in names if name.startswith("rankkernels::")} == FUSED


def assert_composed(names: list[str], layers: int, waits: bool = False) -> None:
    """A library's products, each once in the forward, and no wait."""
    assert not FUSED.intersection(names)
    assert bool(WAITING.intersection(names)) <= waits
    products = sum(names.count(op) for op in ("mm", "addmm", "linear"))
    # The forward's: c, each layer's and the output's; the backward's: two for each.
    assert products <= 3 * (layers + 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_norm, training", [(True, True), (True, False), (False, False)])
def test_what_the_kernels_serve_is_fused(form, batch_norm, training):
    for widths in ([36], [128]) if batch_norm and training else ([36], [80, 40], [128, 128]):
        assert_fused(step(din_attention_case(4, 5, 8, widths, "dice", batch_norm, False, training, form)))
    assert_fused(step(din_attention_case(4, 5, 8, [36], form="lengths", users=2)))


#: (D, widths, dtype, what else of the case): none of these has a fused kernel.
COMPOSED = {
    "the widths of torch-rechub's example": (8, [256, 128], SINGLE, {}),
    "a wide layer": (8, [200], HALF, {}),
    "a wide history": (160, [36], SINGLE, {}),
    "three layers": (8, [64, 32, 16], SINGLE, {}),
    "no hidden layer": (8, [], SINGLE, {}),
    "float64": (8, [36], DOUBLE, {}),
    "two normalized layers": (8, [80, 40], SINGLE, {"training": True, "batch_norm": True}),
    "dropout": (8, [256], SINGLE, {"dropout": 0.5}),
}


def every_form_in_turn(names):
    """Each with each form, but for one in turn slow."""
    for n, name in enumerate(names):
        for i, form in enumerate(FORMS):
            yield pytest.param(name, form, marks=[] if i == n % len(FORMS) else pytest.mark.slow)


@pytest.mark.parametrize("what, form", [*every_form_in_turn(COMPOSED)])
def test_what_they_do_not_serve_is_composed(what, form):
    D, widths, dtype, options = COMPOSED[what]
    for activation, batch_norm, use_softmax, training in (
        ("dice", True, False, True), ("relu", False, True, False), ("dice_batch_norm", True, True, True),
        ("dice_batch_norm", False, False, True), ("prelu", True, True, False),
    ):  # fmt: skip
        chosen = {"batch_norm": batch_norm, "use_softmax": use_softmax, "training": training} | options
        names = step(din_attention_case(4, 5, D, widths, activation, form=form, **chosen), dtype)
        assert_composed(names, len(widths))
        assert "rankkernels::norm_activation" in names or activation != "dice" or not widths


@pytest.mark.parametrize("widths", [[36], pytest.param([256, 128], marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_scores_counted_padding_and_shared_histories_are_composed(form, widths):
    for options in (
        {"return_scores": True}, {"count_padding": True}, {"count_padding": True, "use_softmax": True},
        {"return_scores": True, "users": 2}, {"dropout": 0.1, "return_scores": True, "users": 3},
    ):  # fmt: skip
        if form == "offsets" and "users" in options:
            continue  # their size waits, and a tracer has none
        assert_composed(step(din_attention_case(4, 5, 8, widths, form=form, **options)), len(widths))


@pytest.mark.parametrize("what", ["has_triton", "_has_tensor_cores"])
def test_without_a_triton_or_a_gpu_that_serves_all_is_composed(what, monkeypatch):
    monkeypatch.setattr(_library, what, False if what == "has_triton" else lambda index: False)
    for widths, form in itertools.product(([36], [80, 40], [256, 128]), FORMS):
        names = step(din_attention_case(4, 5, 8, widths, form=form))
        assert_composed(names, len(widths))
        assert not any(name.startswith("rankkernels::") for name in names)


@pytest.mark.parametrize("widths", [[36], [256, 128]], ids=["fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_products_are_in_its_dtype(widths, dtype):
    class Products(TorchDispatchMode):
        dtypes = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in {"aten::mm", "aten::addmm", "aten::bmm", *FUSED}:
                self.dtypes.add(args[-1].dtype if func._schema.name.startswith("aten") else args[0].dtype)
            return func(*args, **(kwargs or {}))

    def autocast(on: bool) -> None:  # torch.autocast refuses without a GPU
        torch.set_autocast_enabled("cuda", on)
        torch.set_autocast_dtype("cuda", dtype if on else torch.float16)

    with FakeTensorMode(), torch.device("cuda:0"), Products() as products:
        unit = ActivationUnit(8, widths)
        history, target = torch.randn(4, 5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        autocast(True)
        try:
            out = unit(history, target)
        finally:
            autocast(False)
        out.sum().backward()
    assert products.dtypes == {dtype}
    assert out.dtype == history.grad.dtype == unit.attention.mlp[0].weight.grad.dtype == SINGLE


@pytest.mark.parametrize("D, fused", [(8, True), (136, False)])
def test_a_target_attends_by_the_op_where_a_kernel_serves_it(D, fused):
    graphs = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda:0"):
        layer = MultiHeadTargetAttention(D, 8, 2)
        inputs = torch.randn(4, D), torch.randn(4, 5, D), torch.ones(4, 5)
        with Calls() as calls:
            layer(*inputs).sum().backward()
        torch.compile(layer, fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)(*inputs)
    ours = {name for name in calls.names if name.startswith("rankkernels::")}
    op = "rankkernels::target_attention"
    assert ours == ({op, op + "_backward"} if fused else set())
    assert any(str(node.target).startswith("rankkernels") for (g,) in [graphs] for node in g.graph.nodes) == fused


@pytest.mark.parametrize(
    "experts, rank, dtype, fused",
    [(4, 8, SINGLE, True), (64, 64, HALF, True), (65, 4, SINGLE, False), (4, 65, SINGLE, False), (4, 8, DOUBLE, False)],
)
@pytest.mark.filterwarnings("ignore::rankkernels.ops._table.ReferenceWarning")
def test_experts_are_the_op_where_a_kernel_serves_them(experts, rank, dtype, fused):
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.device("cuda:0"), Calls() as calls:
            CrossNetMix(7, 1, rank, experts)(torch.randn(5, 7)).sum().backward()
    finally:
        torch.set_default_dtype(SINGLE)
    ours = {name for name in calls.names if "experts" in name}
    assert ours == ({"rankkernels::mixed_experts", "rankkernels::mixed_experts_backward"} if fused else set())


class Eager(nn.Module):
    """torch-rechub's ActivationUnit, of the same modules."""

    def __init__(self, unit: ActivationUnit):
        super().__init__()
        self.layers = unit.attention.mlp

    def forward(self, history, target):
        B, L, D = history.shape
        t = target[:, None].expand(B, L, D)
        x = torch.cat([t, history, t - history, t * history], -1).view(-1, 4 * D)
        for layer in self.layers:
            x = reference.dice(x, layer.alpha, layer.epsilon) if hasattr(layer, "epsilon") else layer(x)
        return (x.view(B, L, 1) * history).sum(1)


def test_torch_rechubs_example_moves_a_third_of_eager():
    """Two histories of 50 rows, 8 wide, under [256, 128]: examples/ranking/run_amazon_electronics.py."""

    def counted(make) -> tuple[int, int]:
        torch.manual_seed(0)
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda:0"):
                unit = make(ActivationUnit(8, [256, 128]))
            history, target = (torch.randn(4096, *shape, device="cuda:0") for shape in ((50, 8), (8,)))
            history.requires_grad_(), target.requires_grad_()
            with FlopCounterMode(display=False) as flops, Calls() as calls:
                F.mse_loss(unit(history, target), torch.zeros_like(target)).backward()
        return calls.bytes, flops.get_total_flops()

    (ours, flops), (eager, eager_flops) = counted(lambda unit: unit), counted(Eager)
    print(f"| {ours / 1e9:.2f} GB of eager's {eager / 1e9:.2f}, {flops / 1e9:.0f} Gflop of {eager_flops / 1e9:.0f} |")
    assert ours <= eager / 3 and flops <= eager_flops
