"""torch's own tools on our models, accelerated and built: the rows of the page "Works with"."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import rankkernels as rk
import rankkernels.flops  # noqa: F401 (registers the formulas)
from rankkernels import serve

B, L, V, D = 16, 5, 20, 4


def deepfm(library=rk, features=rk) -> nn.Module:
    torch.manual_seed(0)
    lists = [features.SparseFeature(f"c{i}", V, D) for i in range(3)]
    lists.append(features.SequenceFeature("tags", V, D, pooling="mean", padding_idx=0))
    return library.DeepFM([*lists, features.DenseFeature("price")], lists, {"dims": [8, 6]})


def din(library=rk, features=rk) -> nn.Module:
    torch.manual_seed(0)
    item = features.SparseFeature("c0", V, D, padding_idx=0)
    history = features.SequenceFeature("tags", V, D, pooling="concat", shared_with="c0", padding_idx=0)
    return library.DIN([features.SparseFeature("c1", V, D)], [history], [item], {"dims": [8]}, {"dims": [6]})


MODELS = pytest.mark.parametrize("build", [deepfm, din])


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = {f"c{i}": torch.randint(1, V, (B,), generator=generator) for i in range(3)}
    return x | {"tags": torch.randint(0, V, (B, L), generator=generator), "price": torch.rand(B, generator=generator)}


def flops(model: nn.Module, training: bool) -> tuple[int, dict[str, int]]:
    model.train(training)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        y = model(batch())
        if training:
            y.sum().backward()
    return counter.get_total_flops(), {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def test_every_op_has_a_formula():
    ops = {name.removeprefix("rankkernels::") for name in torch._C._dispatch_get_all_op_names()
           if name.startswith("rankkernels::")} - {"cpu_isa", "cuda_refusal", "gather_ranks", "is_hip",
                                                         "use_huge_pages"}  # fmt: skip
    assert not [op for op in ops if getattr(torch.ops.rankkernels, op) not in flop_registry]


@pytest.mark.parametrize("training", [True, False])
@MODELS
def test_flops_of_models_are_torch_rechubs(build, training):
    """The counter follows all modules' calls, so the layers call them one after the other."""
    features = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
    ranking = pytest.importorskip("torch_rechub.models.ranking")
    theirs = build(ranking, features)
    ours = rk.accelerate(copy.deepcopy(theirs))
    assert flops(ours, training)[0] == flops(theirs, training)[0] > 0


def test_flops_of_a_frozen_models_candidates():
    user, item = rk.SparseFeature("user", 9, 4), rk.SparseFeature("item", 9, 4)
    history = rk.SequenceFeature("history", 9, 4, pooling="concat", shared_with="item")
    frozen = serve.freeze(rk.DIN([user], [history], [item], {"dims": [3]}, {"dims": [2]}))
    with FlopCounterMode(display=False) as counter:
        frozen.rank({"user": 1, "history": [1, 2, 3, 4, 5]}, {"item": torch.arange(7)})
    attention, mlp = (
        5 * (4 * 2 + 2 + 4),
        (4 + 4) * 3 + 3,
    )  # the user's columns are a bias
    assert counter.get_total_flops() == 2 * 7 * (attention + mlp)


def counted(function, *arguments) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        outs = function(*arguments)
        sum(out.sum() for out in outs if out.requires_grad).backward()
    return {str(op).removeprefix("rankkernels."): n for op, n in counter.get_flop_counts()["Global"].items()}


def test_flops_of_din_attention():
    H, history, target = 6, torch.randn(B, L, D, requires_grad=True), torch.randn(B, D)
    params = [torch.randn(shape) for shape in ((H, 4 * D), (H,), (1, H), (1,))]
    rows, others = 2 * B * L * (D * H + H), 2 * B * D * H + 2 * B * L * D
    found = counted(lambda: rk.din_attention(history, target, params, activation="relu"))
    assert found["din_attention"] == rows + others
    assert found["din_attention_backward"] == 3 * rows + 2 * others
    index = torch.arange(B) % 2
    shared = counted(lambda: rk.din_attention(history[:2], target, params, activation="relu", history_index=index))
    assert shared["din_attention"] == found["din_attention"]
    scores = counted(lambda: rk.din_attention(history, target, params, activation="relu", return_scores=True))
    assert scores["din_attention"] == found["din_attention"] - 2 * B * L * D


def test_flops_of_embedding_fm():
    tables = [torch.randn(V, D, requires_grad=True) for _ in range(3)]
    ids = [torch.randint(0, V, (B,)) for _ in tables]
    found = counted(lambda: rk.embedding_fm(tables, ids, torch.randn(1, 3 * D, requires_grad=True)))
    assert found["embedding_fm"] == 2 * B * 3 * D and found["embedding_fm_backward"] == 2 * found["embedding_fm"]
    assert found["embedding_bag_backward"] == 0
    assert counted(lambda: [rk.fm_interaction(torch.randn(B, 3, D, requires_grad=True))])["fm_interaction"] == 0


# -------------------------------------------------------------------------------------------------- names in a profile


@MODELS
def test_the_profiler_names_the_ops(build):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        build()(batch()).sum().backward()
    names = {event.name for event in profile.events()}
    expected = {"embedding_fm"} if build is deepfm else {"embedding_bag", "din_attention", "din_attention_backward"}
    assert {f"rankkernels::{op}" for op in expected} <= names


# ------------------------------------------------------------------------------------------------------------ precision


@MODELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(build, dtype):
    model, expected = build(), build()
    with torch.autocast("cpu", dtype):
        y = model(batch())
        loss = (y - 0.5).square().mean()
    loss.backward()
    torch.testing.assert_close(y.float(), expected(batch()), rtol=0.05, atol=0.02)
    assert all(p.grad is None or p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@MODELS
@pytest.mark.parametrize("accelerated", [False, True], ids=["ours", "accelerated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_dtypes(build, dtype, accelerated):
    """Dense columns and all: the batch is as the loader gave it."""
    if accelerated:
        features = pytest.importorskip("torch_rechub.basic.features", reason="torch-rechub is not installed")
        ranking = pytest.importorskip("torch_rechub.models.ranking")
        model = rk.accelerate(build(ranking, features)).to(dtype)
    else:
        model = build().to(dtype)
    expected = build()
    for training in (True, False):
        y = model.train(training)(batch())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected.train(training)(batch()), rtol=0.05, atol=0.02)
    y.sum().backward()
    assert all(p.grad.dtype == dtype for p in model.parameters() if p.grad is not None)


# ------------------------------------------------------------------------------------------------------------ averaged


def trained(model: nn.Module, steps: int, after_step=lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        after_step()


@MODELS
@pytest.mark.parametrize("ema", [False, True], ids=["SWA", "EMA"])
def test_averaged_models(build, ema):
    """The average is of the weights that were, and its statistics are made anew."""
    swa = torch.optim.swa_utils
    model, weights = build(), []
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5) if ema else None)

    def after_step():
        average.update_parameters(model)
        weights.append(model.mlp.mlp[0].weight.detach().clone())

    trained(model, 3, after_step)
    expected = (weights[0] + weights[1]) / 4 + weights[2] / 2 if ema else sum(weights) / 3
    torch.testing.assert_close(average.module.mlp.mlp[0].weight, expected)
    swa.update_bn([batch(step) for step in range(3)], average)
    norm = average.module.mlp.mlp[1]
    assert norm.num_batches_tracked == 3 and average.eval()(batch()).shape == (B,)


def loss_of(model: nn.Module, x: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.binary_cross_entropy(model(x), x["price"])


def same_weights(found: nn.Module, expected: nn.Module):
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, msg=name)


@MODELS
def test_lightning(build, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, x, index):
            return loss_of(self.model, x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=True,
        default_root_dir=tmp_path,
    )  # fmt: skip
    task, expected = Task(), build()
    trainer.fit(task, torch.utils.data.DataLoader([batch(step) for step in range(3)], batch_size=None))
    trained(expected, 3)
    same_weights(task.model, expected)
    (path,) = tmp_path.rglob("*.ckpt")
    same_weights(Task.load_from_checkpoint(path).model, expected)


@MODELS
def test_hugging_face_accelerate(build):
    accelerate = pytest.importorskip("accelerate", reason="Hugging Face's accelerate is not installed")
    accelerator, expected = accelerate.Accelerator(cpu=True), build()
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch(step)))
        accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
    trained(expected, 3)
    same_weights(accelerator.unwrap_model(model), expected)


@pytest.mark.slow
@MODELS
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_every_mode_of_compile(build, mode):
    torch._dynamo.reset()
    model, expected = build().double(), build().double()  # some gradients are zero but for rounding
    compiled = torch.compile(model, mode=mode)
    for _ in range(2):
        y, wanted = compiled(batch()), expected(batch())
        torch.testing.assert_close(y, wanted)
        y.sum().backward(), wanted.sum().backward()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in expected.parameters()], rtol=1e-9, atol=1e-10
    )
