"""Models on their way out of Python: torch.export, AOTInductor, torch.jit.trace, TensorBoard and ONNX."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

import rankkernels as rk
from rankkernels import optim

SPARSE = [rk.SparseFeature("user", 50, 8), rk.SparseFeature("item", 40, 8, padding_idx=0)]
TAGS = rk.SequenceFeature("tags", 30, 8, pooling="mean", padding_idx=0)
HISTORY = rk.SequenceFeature("history", 40, 8, pooling="concat", shared_with="item")
AGE = rk.DenseFeature("age")


def batch(B: int, names=("user", "item", "tags", "history", "age")) -> dict[str, torch.Tensor]:
    x = {
        "user": torch.randint(50, (B,)),
        "item": torch.randint(40, (B,)),
        "tags": torch.randint(30, (B, 3)),
        "history": torch.randint(40, (B, 5)),
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


@pytest.mark.parametrize("make", [deepfm, din])
def test_aot_inductor(make, tmp_path):
    model, names = trained(make)
    x = batch(4, names)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(export(model, (x,)), package_path=str(tmp_path / "m.pt2"))
        assert close(torch._inductor.aoti_load_package(package)(x), model(x))


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


@MODELS
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.filterwarnings("ignore")
def test_onnx(make, dynamo, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, names = trained(make)
    path, x = str(tmp_path / "model.onnx"), batch(4, names)
    if dynamo:
        shapes = {"x": {name: {0: Dim.DYNAMIC} for name in names}}
        torch.onnx.export(model, (), path, kwargs={"x": x}, dynamo=True, dynamic_shapes=shapes)
    else:
        # The older exporter takes tensors only.
        class Columns(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, *columns):
                return self.model(dict(zip(names, columns)))

        torch.onnx.export(
            Columns().eval(), tuple(x.values()), path, dynamo=False, input_names=list(names),
            dynamic_axes={name: {0: "batch"} for name in names},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    x = batch(7, names)
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), x.values())}
    assert len(given) == len(names)
    assert close(torch.from_numpy(session.run(None, given)[0]).reshape(-1), model(x).detach())
