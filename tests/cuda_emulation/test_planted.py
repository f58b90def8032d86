"""The emulator catches one planted defect of each kind, and passes its correct twin."""

import ctypes
import re

import pytest
from cuda_emulation.build import build

# Kernel -> what the message must say, beside the kernel's name, block and thread.
EXPECTED = {
    "read_past_the_end": r"out-of-bounds access.*read of 4 bytes.*'in', byte 1024 of 1024",
    "write_past_the_end": r"out-of-bounds access.*write of 4 bytes.*'out', byte 1024 of 1024",
    "write_past_shared": r"out-of-bounds access.*write.*shared array 'first', byte 256 of 256",
    "write_past_dynamic_shared": r"out-of-bounds access.*write.*'dynamic shared memory', byte 256",
    "wide_load_across_the_end": r"out-of-bounds access.*read.*'in', byte 1024 of 1024",
    "barrier_in_a_branch": r"divergent barrier.*waits in __syncthreads.*while .* has exited",
    "barrier_after_return": r"divergent barrier.*waits in __syncthreads.*while .* has exited",
    "two_barriers": r"divergent barrier.*planted.cu:\d+, while .* waits in __syncthreads",
    "missing_barrier": r"data race.*'tile'.*not ordered after the (read|write) by block",
    "missing_warp_barrier": r"data race.*'tile'.*not ordered after the (read|write) by block",
    "same_place_from_two_threads": r"data race.*write.*'out'.*not ordered after the write by",
    "blocks_share_a_sum": r"data race.*write.*'out', byte 0.*not ordered after the write by block",
    "block_reads_another": r"(data race|uninitialised read).*'out'",
    "plain_beside_atomic": r"data race.*'out', byte 0.*not ordered after the (read|atomic)",
    "shared_nobody_wrote": r"uninitialised read.*shared array 'tile'.*nothing has written",
    "global_nobody_wrote": r"uninitialised read.*global array 'out'.*nothing has written",
    "shuffle_in_a_branch": r"divergent warp operation.*waits in a shuffle.*0xffffffff.*has exited",
    "shuffle_masks_differ": r"divergent warp operation.*with mask .*while .*with mask ",
    "shuffle_without_the_caller": r"mask without the calling lane.*0x7fffffff",
    "shuffle_from_outside": r"shuffle from a lane outside the mask.*reads lane 16",
    "misaligned_load": r"misaligned access.*read of 8 bytes",
    "host_memory": r"out-of-bounds access.*read of 4 bytes",
    "block_too_large": r"invalid configuration for kernel block_too_large: .*block \(2048,1,1\)",
}
SEEDS = (0, 1, 2, 3, 12345)


@pytest.fixture(scope="module")
def planted():
    library = ctypes.CDLL(str(build("planted")))
    library.planted_name.restype = library.planted_run.restype = ctypes.c_char_p
    library.planted_run.argtypes = [ctypes.c_int, ctypes.c_bool, ctypes.c_uint64]
    names = [library.planted_name(i).decode() for i in range(library.planted_count())]

    def run(name, bad, seed):
        return library.planted_run(names.index(name), bad, seed).decode()

    run.names = names
    return run


def test_every_defect_has_an_expectation(planted):
    assert sorted(planted.names) == sorted(EXPECTED)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXPECTED)
def test_the_correct_twin_passes(planted, name, seed):
    assert planted(name, False, seed) == ""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXPECTED)
def test_the_defect_is_caught(planted, name, seed):
    message = planted(name, True, seed)
    assert re.search(EXPECTED[name], message), message
    if name != "block_too_large":  # which never starts
        assert re.search(rf"in kernel {name}, block \(\d,0,0\), thread \(\d+,0,0\)", message), (
            message
        )
