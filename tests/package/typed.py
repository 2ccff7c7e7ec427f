"""What users write against the public names, for a type checker (`make lint`): it is not run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import rankkernels as rk
from rankkernels import optim, reference, serve
from rankkernels.adoption import Report


def layers_and_models() -> nn.Module:
    item = rk.SparseFeature("item", vocab_size=50, embed_dim=8, padding_idx=0, oov="hash")
    clicks = rk.SequenceFeature("clicks", 50, 8, pooling="concat", shared_with="item", padding_idx=0)
    prices = rk.DenseFeature("prices", embed_dim=3)
    given = rk.SparseFeature("shop", 2, 2, initializer=rk.Pretrained([[1.0, 2.0], [3.0, 4.0]], freeze=False))
    assert_type(item.get_embedding_layer(), nn.Embedding)
    nn.Sequential(rk.MLP(8, dims=[16], activation=nn.ReLU), rk.LR(16), rk.FM(), rk.Dice(), rk.ActivationUnit(8))
    assert_type(rk.DIN([prices], [clicks], [item], {"dims": [16]}, {"dims": [36]}, mask_padding=True), rk.DIN)
    tables = rk.TableBatchedEmbeddingBag([10, 20], 8, modes=["sum", "mean"], padding_idx=[None, 0])
    assert_type(rk.look_up([nn.Embedding(5, 8)], [torch.tensor([3])]), list[Tensor])
    assert_type(rk.DeepFM([item, given], [item], {"dims": [16], "dropout": 0.1}), rk.DeepFM)
    return tables


def ops(x: Tensor, ids: Tensor) -> None:
    assert_type(rk.fm_interaction(x, reduce_sum=False), Tensor)
    assert_type(rk.din_attention(x, x[:, 0], [x, x], lengths=ids, use_softmax=True), tuple[Tensor, Tensor])
    assert_type(rk.norm_activation(x, activation="relu", batch_norm=True, training=True), tuple[Tensor, Tensor])
    assert_type(rk.embedding_bag(x, ids, ids, mode="sum", padding_idx=0), Tensor)
    assert_type(rk.table_batched_embedding_bag([x, x], (ids, ids), modes=["sum", "mean"], concat=True), list[Tensor])
    assert_type(rk.embedding_fm([x], [ids], names=["item"]), tuple[Tensor, Tensor, Tensor | None])
    assert_type(reference.fm_interaction(x), Tensor)


def training(model: nn.Module) -> None:
    tables = optim.Adam(model.parameters(), lr=1e-3)
    assert_type(optim.fuse(model, tables), nn.Module)
    assert_type(optim.to_torch(tables, torch.optim.Adam(model.parameters())), torch.optim.Optimizer)
    for optimizer in (optim.SGD, optim.Adagrad, optim.AdamW, optim.RowWiseAdagrad, optim.RowWiseAdam, optim.FTRL):
        optimizer([{"params": model.parameters(), "lr": 1e-2}])
    assert_type(rk.accelerate(model), nn.Module)
    assert_type(rk.explain(model), Report)
    assert_type(rk.restore(model), nn.Module)


def serving(model: nn.Module, request: dict[str, Tensor]) -> str:
    frozen = serve.freeze(model, tables="int8")
    assert_type(frozen, serve.FrozenModel)
    assert_type(frozen(request), Tensor)
    frozen.save("model.pt")
    assert_type(serve.load("model.pt", mmap=True), serve.FrozenModel)
    assert_type(rk.Vocabulary(["a", "b"], unknown="hash", hash_rows=4)(["a", "c"]), Tensor)
    assert_type(rk.library_path(), str)
    return rk.cmake_prefix
