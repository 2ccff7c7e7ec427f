"""Models on their way out of Python: torch.export, AOTInductor, torch.jit.trace, TensorBoard and ONNX."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.export import Dim, export

import rankkernels as rk
from rankkernels import optim

SPARSE = [rk.SparseFeature("user", 50, 8), rk.SparseFeature("item", 40, 8, padding_idx=0)]
TAGS = rk.SequenceFeature("tags", 30, 8, pooling="mean", padding_idx=0)
HISTORY = rk.SequenceFeature("history", 40, 8, pooling="concat", shared_with="item")
AGE = rk.DenseFeature("age")


def batch(B: int, names=("user", "item", "tags", "history", "age"), L: int = 5) -> dict[str, torch.Tensor]:
    x = {
        "user": torch.randint(50, (B,)),
        "item": torch.randint(40, (B,)),
        "tags": torch.randint(30, (B, 3)),
        "history": torch.randint(40, (B, L)) * (torch.rand(B, L) > 0.3) * (torch.arange(B) > 0)[:, None],
        "age": torch.rand(B),
    }
    return {name: x[name] for name in names}


def deepfm():
    features = [*SPARSE, TAGS]
    return rk.DeepFM([*features, AGE], features, {"dims": [16]}), ("user", "item", "tags", "age")


def plain_deepfm():
    return rk.DeepFM(SPARSE, SPARSE, {"dims": [16], "activation": "dice"}), ("user", "item")


def din():
    attention = {"dims": [6], "activation": "dice", "use_softmax": True}
    return rk.DIN([SPARSE[0], AGE], [HISTORY], [SPARSE[1]], {"dims": [8]}, attention), (
        "user",
        "item",
        "history",
        "age",
    )


def masked_din():
    attention = {"dims": [6], "activation": "relu", "use_softmax": True}
    masked = rk.SequenceFeature("history", 40, 8, pooling="concat", shared_with="item", padding_idx=0)
    model = rk.DIN([SPARSE[0]], [masked], [SPARSE[1]], {"dims": [8]}, attention, mask_padding=True)
    return model, ("user", "item", "history")


MODELS = pytest.mark.parametrize("make", [deepfm, plain_deepfm, din, masked_din])


def trained(make):
    model, names = make()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval(), names


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@MODELS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_export_of_a_fused_model(make, grad):
    """What is exported is for inference: it looks up and does not step."""
    model, names = trained(make)
    optim.fuse(model, optim.Adam(model.embedding.parameters()))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.set_grad_enabled(grad):
        exported = export(model, (batch(4, names),), dynamic_shapes=({name: {0: Dim.DYNAMIC} for name in names},))
    x = batch(7, names)
    assert close(exported.module()(x), model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Attention(torch.nn.Module):
    """The op without a normalization, which has no running statistics."""

    def __init__(self):
        super().__init__()
        self.params = torch.nn.ParameterList(torch.randn(shape) for shape in ((6, 32), 6, (1, 6), 1))

    def forward(self, x):
        return rk.din_attention(x["history"], x["target"], list(self.params), activation="relu")[0]


def packaged(model, x, shapes, folder):
    """The model as AOTInductor's package."""
    with torch.no_grad():
        program = export(model, (x,), dynamic_shapes=(shapes,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "m.pt2"))
    return torch._inductor.aoti_load_package(path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [deepfm, masked_din])
def test_aot_inductor(make, tmp_path):
    """Dynamic in the batch and the history's length, after training with a fused optimizer."""
    model, names = trained(make)
    optim.fuse(model, optim.Adam(model.embedding.parameters()))
    shapes = {name: lengths_too(name, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}) for name in names}
    run = packaged(model, batch(4, names), shapes, tmp_path)
    for x in (batch(7, names), batch(1, names, L=9)):
        assert close(run(x), model(x).detach())


@pytest.mark.slow
def test_aot_inductor_of_attention_alone(tmp_path):
    model, x = Attention(), {"history": torch.randn(3, 5, 8), "target": torch.randn(3, 8)}
    run = packaged(model, x, {"history": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "target": {0: Dim.DYNAMIC}}, tmp_path)
    x = {"history": torch.randn(7, 2, 8), "target": torch.randn(7, 8)}
    assert close(run(x), model(x).detach())


def test_exported_programs_have_no_empty_list():
    """AOTInductor makes None of one."""
    for model, x in ((Attention(), {"history": torch.randn(3, 5, 8), "target": torch.randn(3, 8)}),
                     *((m, batch(4, names)) for m, names in map(trained, (deepfm, masked_din)))):  # fmt: skip
        program = export(model.eval(), (x,))
        called = [node for node in program.graph.nodes if "rankkernels" in str(node.target)]
        assert called and [] not in [value for node in called for value in node.args]


@MODELS
def test_script_is_refused(make):
    model, _ = trained(make)
    with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile .*docs/export.md"):
        torch.jit.script(model)


@MODELS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_jit_trace(make, fused):
    model, names = trained(make)
    if fused:
        optim.fuse(model, optim.Adam(model.embedding.parameters()))
    x = batch(4, names)
    assert close(torch.jit.trace(model, (x,), strict=False)(x), model(x))


def test_tensorboard_graph(tmp_path):
    board = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    model, names = trained(deepfm)
    with board.SummaryWriter(tmp_path) as writer:
        writer.add_graph(model, (batch(4, names),), use_strict_trace=False)


class Columns(torch.nn.Module):
    """A model that takes tensors only, as the older exporter does."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *columns):
        return self.model(dict(zip(self.names, columns)))


def lengths_too(name: str, what: dict) -> dict:
    """``what`` is dynamic of a feature: its batch, and a history's length."""
    return {i: value for i, value in what.items() if i == 0 or name == "history"}


def to_onnx(model, way: str, names, path: str) -> None:
    x = batch(4, names)
    shapes = {name: lengths_too(name, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}) for name in names}
    if way == "module":
        torch.onnx.export(model, (), path, kwargs={"x": x}, dynamo=True, dynamic_shapes={"x": shapes}, verbose=False)
    elif way == "program":
        torch.onnx.export(export(model, (x,), dynamic_shapes=(shapes,)), (), path, dynamo=True, verbose=False)
    else:
        axes = {name: lengths_too(name, {0: "batch", 1: "length"}) for name in names}
        torch.onnx.export(Columns(model, names).eval(), tuple(x.values()), path, dynamo=False,
                          input_names=list(names), dynamic_axes=axes)  # fmt: skip


@MODELS
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fused", "plain"])
@pytest.mark.parametrize("way", ["module", "program", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_onnx(make, fused, way, tmp_path):
    """Of a model, of a program of torch.export, and by the older exporter; other batches and longer histories."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, names = trained(make)
    if fused:
        optim.fuse(model, optim.Adam(model.embedding.parameters()))
    path = str(tmp_path / "model.onnx")
    to_onnx(model, way, names, path)
    session = onnxruntime.InferenceSession(path)
    for x in (batch(7, names), batch(1, names, L=9)):
        given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), x.values(), strict=True)}
        assert close(torch.from_numpy(session.run(None, given)[0]).reshape(-1), model(x).detach())


#: Ops on tensors alone, each with what is given to it and, once it is exported, to onnxruntime.
OPS = {
    "sum": lambda w, ids: rk.embedding_bag(w, ids, mode="sum", padding_idx=2),
    "mean": lambda w, ids: rk.embedding_bag(w, ids, mode="mean", padding_idx=2),
    "max": lambda w, ids: rk.embedding_bag(w, ids, mode="max", padding_idx=2),
    "weighted": lambda w, ids: rk.embedding_bag(w, ids, mode="mean", per_sample_weights=w[: len(ids), :3]),
}


@pytest.mark.parametrize("mode", OPS)
@pytest.mark.filterwarnings("ignore")
def test_bags_in_torchs_own_operators(mode):
    """What exporters to ONNX get is what the op computes; empty bags, too."""
    w, ids = torch.randn(9, 4), torch.tensor([[0, 2, 5], [2, 2, 2], [8, 1, 1]])
    expected = OPS[mode](w, ids)
    with mock.patch("torch.onnx.is_in_onnx_export", lambda: True):
        traced = torch.jit.trace(OPS[mode], (w, ids))
    assert "rankkernels::" not in str(traced.graph)
    torch.testing.assert_close(traced(w, ids), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_softmax", [True, False])
@pytest.mark.parametrize("count_padding", [True, False])
@pytest.mark.parametrize("return_scores", [True, False])
@pytest.mark.parametrize("form", ["padded", "mask", "lengths", "shared"])
@pytest.mark.filterwarnings("ignore")
def test_attention_in_torchs_own_operators(form, return_scores, count_padding, use_softmax):
    options = dict(use_softmax=use_softmax, count_padding=count_padding, return_scores=return_scores, activation="relu")
    history, target, params = torch.randn(3, 5, 4), torch.randn(3, 4), [torch.randn(s) for s in ((6, 16), 6, (1, 6), 1)]
    given = {
        "padded": {}, "mask": {"mask": torch.rand(3, 5) > 0.5}, "lengths": {"lengths": torch.tensor([0, 5, 2])},
        "shared": {"history_index": torch.tensor([2, 0, 2]), "lengths": torch.tensor([0, 5, 2])},
    }[form]  # fmt: skip

    def attend(history, target):
        return rk.din_attention(history, target, params, **given, **options)[0]

    expected = attend(history, target)
    with mock.patch("torch.onnx.is_in_onnx_export", lambda: True):
        traced = torch.jit.trace(attend, (history, target))
    assert "rankkernels::" not in str(traced.graph)
    torch.testing.assert_close(traced(history, target), expected, rtol=1e-5, atol=1e-5)
