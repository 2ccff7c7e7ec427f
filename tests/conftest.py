"""Before torch is imported: threads that wait sleep, so that the suite does not crawl on a machine with other work."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# For ``bench``, which is not installed; last, so that a build on PYTHONPATH is tested before the sources.
sys.path.append(str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="seed of every test's random tensors (default 0)")


@pytest.fixture(autouse=True)
def seed_and_threads(request):
    """Each test draws the same numbers alone and among others, and leaves as many threads as it found."""
    torch.manual_seed(request.config.getoption("seed"))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned():
    """torch.empty gives NaN: what an op leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, torch-rechub's masks too, which are float32 in every model otherwise."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
