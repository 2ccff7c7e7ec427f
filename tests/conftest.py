"""Before torch is imported: threads that wait sleep, so that the suite does not crawl on a machine with other work."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture
def seed_and_threads():
    """One seed for each test, and as many threads after it as before."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
