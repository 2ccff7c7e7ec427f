"""The same mathematics in other libraries, and each of them under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import machine
from rankkernels.testing import OpCase


def compiled(functions: dict[str, Callable], names: dict[str, str] | None = None) -> dict[str, Callable]:
    """Each function followed by itself under torch.compile, named "NAME compiled" unless ``names`` says otherwise."""
    both = {}
    for name, function in functions.items():
        both[name] = function
        both[(names or {}).get(name, f"{name} compiled")] = torch.compile(function)
    return both


#: How many threads zentorch goes on with, whatever torch is told later: those of its first call.
threads_of_zentorch: list[int] = []


def missing_zentorch() -> str | None:
    """Why zentorch cannot be measured here and now, or None."""
    if machine.missing("zentorch"):
        return machine.missing("zentorch")
    if threads_of_zentorch in ([], [torch.get_num_threads()]):
        return None
    return f"computes with {threads_of_zentorch[0]} threads, those of its first call"


def zentorch(function: Callable) -> dict[str, Callable]:
    """``function``, which has no linear layers, under AMD's compiler backend for inference where that can be measured.

    With linear layers it fails the race's check of results: docs/performance/measuring.md.
    """
    if missing_zentorch():
        return {}
    compiled = torch.compile(function, backend="zentorch")

    def noted(*args):
        threads_of_zentorch[:] = threads_of_zentorch or [torch.get_num_threads()]
        return compiled(*args)

    return {"zentorch": noted}


def missing(*peers: str) -> dict[str, str]:
    """Why each of these cannot be measured here and now, of those that cannot."""
    reasons = {peer: missing_zentorch() if peer == "zentorch" else machine.missing(peer) for peer in peers}
    return {peer: reason for peer, reason in reasons.items() if reason}


def fbgemm_tables(shapes: Iterable[Sequence[int]], device: str = "cpu", **options: object) -> nn.Module:
    """FBGEMM's table-batched operator with tables of these shapes [rows, D]. Options that are names of its enumerations
    (``optimizer``, ``pooling_mode``) are given as such."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    enumerations = {"optimizer": EmbOptimType, "pooling_mode": PoolingMode}
    options = {name: enumerations[name][v] if name in enumerations else v for name, v in options.items()}
    on_cpu = device == "cpu"
    place = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    place = place, ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    options |= {} if on_cpu else {"device": torch.device(device)}
    return SplitTableBatchedEmbeddingBagsCodegen([(*shape, *place) for shape in shapes], **options)


def fbgemm_copy(weights: Sequence[Tensor], device: str = "cpu", **options: object) -> nn.Module:
    """The same with copies of the tables ``weights``."""
    module = fbgemm_tables([w.shape for w in weights], device, **options)
    for own, weight in zip(module.split_embedding_weights(), weights):
        own.copy_(weight.detach())
    return module


def fm_layers(fields: int) -> dict[str, nn.Module]:
    """Each library's second-order FM layer, x [B, F, D] -> [B, 1]."""
    layers: dict[str, nn.Module] = {}
    if not machine.missing("torch-rechub"):
        from torch_rechub.basic.layers import FM

        layers["torch-rechub"] = FM()
    if not machine.missing("deepctr-torch"):
        from deepctr_torch.layers.interaction import FM

        layers["DeepCTR-Torch"] = FM()
    if not machine.missing("fuxictr"):
        from fuxictr.pytorch.layers.interactions import InnerProductInteraction

        layers["FuxiCTR"] = InnerProductInteraction(fields, output="product_sum")
    return layers


def one_query_attention(case: OpCase) -> dict[str, Callable]:
    """torch's attention, its keys the values and its queries a sample's, where it takes the histories' form: padded,
    one a sample."""

    def attention(query, history, *rest):
        mask = rest[0][:, None, None] if rest else None
        return F.scaled_dot_product_attention(
            query[:, None], history[:, None], history[:, None], mask, scale=1.0
        ).squeeze(1)

    _, _, lengths, _, offsets, index = case.arguments(*case.inputs())
    return {"torch's attention": attention} if lengths is offsets is index is None else {}


def hidden_layers(activation: str, H: int, eps: float) -> dict[str, Callable]:
    """Batch normalization by the batch's statistics and the activation, x [N, H] -> [N, H], as functions of x and of
    weight, bias and alpha, by whoever has that activation; the running statistics are updated along the way."""
    norm = nn.BatchNorm1d(H, eps)

    def normalized(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, x)

    if activation == "relu":
        return {"eager": lambda x, weight, bias: torch.relu(normalized(x, weight, bias))}
    if activation == "dice" and not machine.missing("torch-rechub"):
        from torch_rechub.basic.activation import Dice

        dice = Dice()
        return {
            "torch-rechub": lambda x, weight, bias, alpha: torch.func.functional_call(
                dice, {"alpha": alpha}, normalized(x, weight, bias)
            )
        }
    if activation == "dice_batch_norm" and not machine.missing("deepctr-torch"):
        from deepctr_torch.layers.activation import Dice

        dice = Dice(H, epsilon=eps)
        return {
            "DeepCTR-Torch": lambda x, weight, bias, alpha: torch.func.functional_call(
                dice, {"bn.weight": weight, "bn.bias": bias, "alpha": alpha}, x
            )
        }
    return {}


def masked_attentions(
    D: int, widths: list[int], activation: str, use_softmax: bool, params: list[nn.Parameter], L: int
) -> dict[str, Callable]:
    """DIN attention without batch normalization, as functions of history, target and lengths; ``params`` as in
    ``rankkernels.din_attention``: weight and bias of each layer."""
    functions: dict[str, Callable] = {}
    if not machine.missing("deepctr-torch"):
        from deepctr_torch.layers.sequence import AttentionSequencePoolingLayer

        deepctr = AttentionSequencePoolingLayer(widths, activation, weight_normalization=use_softmax, embedding_dim=D)
        local = deepctr.local_att
        share([*local.dnn.linears, local.dense], params)
        functions["DeepCTR-Torch"] = lambda h, t, n: deepctr(t.unsqueeze(1), h, n.unsqueeze(1)).squeeze(1)
    if not machine.missing("fuxictr"):
        from fuxictr.pytorch.layers.attentions.target_attention import DIN_Attention

        name = {"sigmoid": "Sigmoid", "relu": "ReLU"}[activation]
        fuxi = DIN_Attention(D, widths, name, use_softmax=use_softmax)
        share([m for m in fuxi.attention_layer.mlp if isinstance(m, nn.Linear)], params)
        functions["FuxiCTR"] = lambda h, t, n: fuxi(t, h, torch.arange(L) < n[:, None])
    if use_softmax and not machine.missing("tzrec-sekai"):
        from bench.harness.torch_easyrec import DINEncoder

        name = {"sigmoid": "nn.Sigmoid", "relu": "nn.ReLU"}[activation]
        encoder = DINEncoder(D, D, "x", {"hidden_units": widths, "activation": name})
        share([*(layer.perceptron[0] for layer in encoder.mlp.mlp), encoder.linear], params)
        functions["TorchEasyRec"] = lambda h, t, n: encoder({"x.query": t, "x.sequence": h, "x.sequence_length": n})
    return functions


def share(linears: list[nn.Module], params: list[nn.Parameter]) -> None:
    """The layers' weights and biases become ``params`` themselves, so that their gradients are asked of everyone."""
    for linear, weight, bias in zip(linears, params[::2], params[1::2]):
        linear.weight, linear.bias = weight, bias
