"""DeepFM and DIN of PyTorch's own modules: whom ours race where no other library is installed.

Layers, parameter names and numbers are torch-rechub's, so that a state of ours loads. Histories are padded to one
length, and padding counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankkernels import reference


class Dice(nn.Module):
    """x [N, H] -> [N, H], with the statistics of a row's units."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return reference.dice(x, self.alpha)


def hidden(width: int, dims: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inner, outer in zip((width, *dims), dims):
        layers += [nn.Linear(inner, outer), nn.BatchNorm1d(outer), activation(), nn.Dropout(0)]
    return layers


class MLP(nn.Module):
    """x [N, width] -> [N, 1]."""

    def __init__(self, width: int, dims: Sequence[int], activation: type[nn.Module]):
        super().__init__()
        self.mlp = nn.Sequential(*hidden(width, dims, activation), nn.Linear((width, *dims)[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class ActivationUnit(nn.Module):
    """history [B, L, D] and target [B, D] -> [B, D]."""

    def __init__(self, width: int, dims: Sequence[int]):
        super().__init__()
        self.attention = MLP(4 * width, dims, Dice)

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        t = target[:, None].expand_as(history)
        rows = torch.cat([t, history, t - history, t * history], -1).flatten(0, 1)
        return (self.attention(rows).view(*history.shape[:2], 1) * history).sum(1)


class Tables(nn.Module):
    """An ``nn.Embedding`` each."""

    def __init__(self, names: Sequence[str], rows: int, width: int):
        super().__init__()
        self.embed_dict = nn.ModuleDict({name: nn.Embedding(rows, width) for name in names})

    def forward(self, name: str, ids: Tensor) -> Tensor:
        return self.embed_dict[name](ids)


class DeepFM(nn.Module):
    """A batch of ids [B] of ``sparse`` and of numbers [B] of ``dense`` -> probabilities [B]."""

    def __init__(self, sparse: Sequence[str], dense: Sequence[str], rows: int, width: int, dims: Sequence[int]):
        super().__init__()
        self.sparse, self.dense = sparse, dense
        self.embedding = Tables(sparse, rows, width)
        self.linear = nn.ModuleDict({"fc": nn.Linear(len(sparse) * width, 1)})
        self.mlp = MLP(len(sparse) * width + len(dense), dims, nn.ReLU)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        fields = torch.stack([self.embedding(name, x[name]) for name in self.sparse], 1)
        wide = fields.flatten(1)
        deep = self.mlp(torch.cat([wide, *(x[name][:, None] for name in self.dense)], 1))
        return torch.sigmoid((self.linear["fc"](wide) + reference.fm_interaction(fields) + deep).squeeze(1))


class DIN(nn.Module):
    """A batch of ids [B] of ``sparse`` and, of each of ``attended``, a target [B] and a history [B, L] in the target's
    table -> probabilities [B]."""

    def __init__(
        self, sparse: Sequence[str], attended: Sequence[str], rows: int, width: int, attention: Sequence[int], dims
    ):
        super().__init__()
        self.sparse, self.attended = sparse, attended
        self.embedding = Tables([*sparse, *(f"target_{name}" for name in attended)], rows, width)
        self.attention_layers = nn.ModuleList(ActivationUnit(width, attention) for _ in attended)
        self.mlp = MLP((len(sparse) + 2 * len(attended)) * width, dims, Dice)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        pooled, targets = [], []
        for name, unit in zip(self.attended, self.attention_layers):
            target, history = (self.embedding(f"target_{name}", x[f"{of}_{name}"]) for of in ("target", "history"))
            pooled.append(unit(history, target))
            targets.append(target)
        others = [self.embedding(name, x[name]) for name in self.sparse]
        return torch.sigmoid(self.mlp(torch.cat([*pooled, *targets, *others], 1)).squeeze(1))
