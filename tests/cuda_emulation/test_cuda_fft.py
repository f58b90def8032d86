"""The transforms within a block against torch.fft, at every length that the kernels use."""

import ctypes

import pytest
import torch
from cuda_emulation.build import build

SEEDS = (0, 1, 2)
# What kernels of up to 130 taps lead to, and a few large ones with many passes.
LENGTHS = sorted({n for k in range(2, 131) for n in (k, 2 * k - 1)} | {486, 625, 729, 1000})


@pytest.fixture(scope="module")
def fft():
    library = ctypes.CDLL(str(build("fft")))
    library.fft_run.restype = library.fft_run_real.restype = ctypes.c_char_p
    integer, pointer, seed = ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64
    library.fft_run.argtypes = [ctypes.c_bool, *[integer] * 3, seed, *[pointer] * 3]
    library.fft_run_real.argtypes = [ctypes.c_bool, *[integer] * 2, seed, *[pointer] * 3]
    return library


def sizes(fft):
    return sorted({fft.fft_next_size(n) for n in LENGTHS})


def error(found, exact):
    return float((found.to(exact.dtype) - exact).abs().max() / exact.abs().max())


def test_lengths(fft):
    assert sizes(fft)[:12] == [2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18]
    for n in LENGTHS:
        size = fft.fft_next_size(n)
        assert n <= size <= 1.25 * n + 1
    # The fewest passes of radices up to eight.
    assert [fft.fft_passes(n) for n in (8, 36, 64, 72, 125, 144)] == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex(fft, dtype):
    epsilon = torch.finfo(dtype).eps
    for seed in SEEDS:
        for n in sizes(fft):
            rows = 3
            x = torch.randn(rows, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
            for limit in (n, n // 2):
                spectrum, filtered = torch.zeros_like(x), torch.zeros_like(x)
                message = fft.fft_run(
                    dtype == torch.complex128, n, rows, limit, seed,
                    x.data_ptr(), spectrum.data_ptr(), filtered.data_ptr(),
                )  # fmt: skip
                assert message == b""
                padded = torch.nn.functional.pad(x[:, :limit].to(torch.complex128), (0, n - limit))
                exact = torch.fft.fft(padded)
                product = torch.fft.ifft(exact.real * exact)[:, :limit]
                assert error(spectrum, exact) < 8 * epsilon
                assert error(filtered[:, :limit], product) < 16 * epsilon
                assert (filtered[:, limit:] == 0).all()  # not written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_real_columns(fft, dtype):
    epsilon = torch.finfo(dtype).eps
    for seed in SEEDS:
        for h in sizes(fft):
            if h > 512:
                continue
            n, columns = 2 * h, 3
            x = torch.randn(n, columns, dtype=dtype, generator=torch.Generator().manual_seed(n))
            spectrum = torch.zeros(h + 1, columns, dtype=dtype.to_complex())
            back = torch.zeros_like(x)
            message = fft.fft_run_real(
                dtype == torch.float64, n, columns, seed,
                x.data_ptr(), spectrum.data_ptr(), back.data_ptr(),
            )  # fmt: skip
            assert message == b""
            assert error(spectrum, torch.fft.rfft(x.to(torch.float64), dim=0)) < 8 * epsilon
            assert error(back, x.to(torch.float64)) < 8 * epsilon
