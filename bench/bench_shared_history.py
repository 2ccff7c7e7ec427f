"""Samples that share users: one history a user, read through ``history_index``, against a copy for each sample.

The floor is that of the attention's products alone, which sharing does not change: 2 D H flops a pair of sample and row
in the first layer, whichever way (docs/shared_histories.md).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rankkernels as rk
from rankkernels.nn.features import SequenceFeature, SparseFeature

SHAPES = [(64, 100, [80, 40]), (16, 50, [36])]
USERS, TARGETS, ROWS = 64, 8, 100_000


def flops(pairs: int, L: int, D: int, widths: list[int]) -> int:
    """Of the attention's forward: its products, M of each sample, the pooling."""
    layers = sum(a * b for a, b in zip((D, *widths), (*widths, 1)))
    return 2 * pairs * (L * (layers + D) + 2 * D * widths[0])


def title(D: int, L: int, widths: list[int]) -> str:
    return f"L{L} D{D} {widths}".replace(", ", ",")


@pytest.mark.parametrize("D, L, widths", SHAPES, ids=lambda value: str(value))
def test_training_step(D, L, widths, threads, race):
    """DIN's forward and backward, lookups and the tables' dense gradients included."""
    features = (
        [SparseFeature("user", ROWS, embed_dim=D)],
        [SequenceFeature("history", ROWS, embed_dim=D, pooling="concat", shared_with="item")],
    )
    torch.manual_seed(0)
    model = rk.DIN(
        *features,
        [SparseFeature("item", ROWS, embed_dim=D)],
        {"dims": [256, 128]},
        {"dims": widths},
        user_features=["user"],
    )
    index = torch.arange(USERS).repeat_interleave(TARGETS)
    of_users = {"user": torch.randint(ROWS, (USERS,)), "history": torch.randint(ROWS, (USERS, L))}
    item, clicks = torch.randint(ROWS, (len(index),)), torch.rand(len(index))
    shared, copies = (x | {"item": item} for x in (of_users, {k: v[index] for k, v in of_users.items()}))
    tables = list(model.embedding.parameters())

    def step(x, **options):
        model.zero_grad(set_to_none=True)
        loss = F.binary_cross_entropy(model(x, **options), clicks)
        loss.backward()
        return loss.detach(), *(t.grad for t in tables)

    race(
        lambda: step(shared, user_index=index),
        {"a copy each": lambda: step(copies)},
        case=f"DIN {title(D, L, widths)} {USERS} users x {TARGETS} targets",
        kind="forward + backward",
        flops=3 * flops(len(index), L, D, widths),
    )


@pytest.mark.parametrize("candidates", [100, 700, 2000])
@pytest.mark.parametrize("D, L, widths", SHAPES, ids=lambda value: str(value))
def test_one_user(D, L, widths, candidates, threads, race):
    """The attention's forward: of a history looked up, against that of one copied, or seen with a stride of 0."""
    torch.manual_seed(0)
    unit = rk.ActivationUnit(D, widths).eval()
    history, target, index = torch.randn(1, L, D), torch.randn(candidates, D), torch.zeros(candidates).long()
    with torch.inference_mode():
        race(
            lambda: unit(history, target, history_index=index),
            {
                "a copy each": lambda: unit(history[index], target),
                "stride 0": lambda: unit(history.expand(candidates, L, D), target),
            },
            case=f"attention {title(D, L, widths)} 1 user x {candidates} candidates",
            kind="forward",
            flops=flops(candidates, L, D, widths),
        )
