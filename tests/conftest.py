"""Rules of the suite: seeded, isolated, warnings are errors, CUDA is never skipped silently.

Hypothesis draws the same examples every time; ``LATENTDEM_EXPLORE=1`` draws others.
"""

import os
import signal

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("explore" if os.environ.get("LATENTDEM_EXPLORE") == "1" else "fixed")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_cuda: needs a GPU")
    # In the background of a script Ctrl-C is ignored, by all that is started from there, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
