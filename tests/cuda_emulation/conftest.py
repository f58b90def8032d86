import pytest
from cuda_emulation.build import Emulated


@pytest.fixture(scope="session")
def emulator():
    return Emulated()


@pytest.fixture(params=[0, 1], ids=lambda seed: f"seed{seed}")
def emulated(emulator, request):
    """The emulated operators, in the natural and in a random order of threads and blocks."""
    emulator.seed(request.param)
    return emulator.operators
