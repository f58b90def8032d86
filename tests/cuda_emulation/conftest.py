import pytest
from cuda_emulation.build import Emulated


@pytest.fixture(scope="session")
def emulator():
    return Emulated()


@pytest.fixture(params=[0, 1, 2], ids=lambda seed: f"seed{seed}")
def emulated(emulator, request):
    """The emulated operators under one of several orders of threads and blocks; 0 is natural."""
    emulator.seed(request.param)
    return emulator.operators
