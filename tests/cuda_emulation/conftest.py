import os

import pytest
from cuda_emulation.build import Emulated
from cuda_emulation.device import OnDevice

# Where the operators run: on a device of that name instead of in the emulator.
DEVICE = os.environ.get("LATENTDEM_EMULATION_DEVICE")
needs_emulator = {"test_plan", "test_planted", "test_cuda_fft"}


def pytest_collection_modifyitems(items):
    if DEVICE is None:
        return
    skip = pytest.mark.skip(reason="of the emulator itself")
    for item in items:
        if item.path.stem in needs_emulator or item.name.startswith("test_runs_where_torch_looks"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def emulator():
    return Emulated() if DEVICE is None else OnDevice(DEVICE)


@pytest.fixture(params=[0, 1] if DEVICE is None else [0], ids=lambda seed: f"seed{seed}")
def emulated(emulator, request):
    """The emulated operators, in the natural and in a random order of threads and blocks."""
    emulator.seed(request.param)
    return emulator.operators
