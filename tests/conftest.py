"""Rules of the suite: seeded, isolated, warnings are errors, CUDA is never skipped silently."""

import os

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_cuda: needs a GPU")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("LATENTDEM_REQUIRE_CUDA") == "1":
        return
    skip = pytest.mark.skip(reason="no GPU (set LATENTDEM_REQUIRE_CUDA=1 to fail instead)")
    for item in items:
        if "needs_cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def isolated_random_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
