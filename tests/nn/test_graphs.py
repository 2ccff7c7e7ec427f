"""``graphed`` with graphs that a CPU can replay: each is the function again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankkernels import graphed, graphs


@pytest.fixture
def captures(monkeypatch) -> list:
    """The captures, as if tensors were a GPU's."""
    made = []

    def capture(run, pool):
        made.append(run)
        out = torch.zeros(())
        return lambda: out.copy_(run()), out

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(graphs, "_on_side_stream", lambda run: run())
    monkeypatch.setattr(graphs, "_is_on_gpu", lambda t: True)
    return made


def training(graph: bool):
    torch.manual_seed(0)
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step(batch, scale=1.0):
        optimizer.zero_grad()
        loss = scale * (layer(batch["x"]).squeeze(1) - batch["y"]).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return layer, graphed(step, warmup=2, most=2) if graph else step


def batch(seed: int, B: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(B, 3, generator=generator), "y": torch.randn(B, generator=generator)}


def test_every_call_is_one_step(captures):
    (layer, step), (expected_layer, expected) = training(True), training(False)
    sizes = [5, 5, 4, 5, 5, 4, 7, 4, 4, 7, 7, 7, 5]
    for i, B in enumerate(sizes):
        assert torch.equal(step(batch(i, B)), expected(batch(i, B)))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), expected_layer.parameters()))
    assert len(captures) == 2, "of 5 and of 4; 7 was one shape too many"


def test_the_batch_given_is_not_kept_and_not_written_to(captures):
    (_, step), (_, expected) = training(True), training(False)
    given = batch(0)
    for i in range(5):
        for name, t in batch(i).items():
            given[name].copy_(t)
        before = {name: t.clone() for name, t in given.items()}
        assert torch.equal(step(given), expected(batch(i)))
        assert all(torch.equal(before[name], t) for name, t in given.items())


def test_other_arguments_and_dtypes_choose_a_graph(captures):
    (_, step), (_, expected) = training(True), training(False)
    for i in range(6):
        assert torch.equal(step(batch(i), scale=1.0), expected(batch(i), scale=1.0))
    for i in range(6):
        assert torch.equal(step(batch(i), scale=2.0), expected(batch(i), scale=2.0))
    assert len(captures) == 2


def test_without_a_gpu_all_calls_run_as_they_are():
    (_, step), (_, expected) = training(True), training(False)
    for i in range(6):
        assert torch.equal(step(batch(i)), expected(batch(i)))


def test_bad_numbers():
    for numbers in ({"warmup": 0}, {"most": 0}):
        with pytest.raises(ValueError, match="graphed: warmup and most must be at least 1"):
            graphed(lambda: None, **numbers)
