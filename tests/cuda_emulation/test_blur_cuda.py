"""The CUDA path of the blur operators, emulated, against the plain torch reference."""

import pytest
import torch
from ops.samples import BOUNDARIES, EMPTY, SAMPLES, Sample

from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate, assert_adjoint

# Several tiles and chunks, and planes that share kernels in both ways.
LARGE = [
    Sample((2, 2, 37, 70), (1, 1, 3, 5)),
    Sample((3, 2, 40, 36), (3, 1, 9, 12)),
    Sample((1, 3, 72, 64), (1, 3, 12, 11)),
]
all_samples = pytest.mark.parametrize("sample", [*SAMPLES, *LARGE], ids=str)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
real = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@all_samples
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_forward(emulated, sample, boundary, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    assert_accurate(
        lambda x, k: emulated.blur_conv2d(x, k, boundary),
        lambda x, k: reference.blur_conv2d(x, k, boundary=boundary),
        image,
        kernel,
        slack=32,
    )


@all_samples
@all_boundaries
@real
def test_adjoints(emulated, sample, boundary, dtype):
    image, kernel, _, _ = sample.tensors(boundary, dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    size = list(image.shape[2:])
    assert_adjoint(
        lambda x: emulated.blur_conv2d(x, kernel, boundary),
        lambda r: emulated.blur_conv2d_adjoint(r, kernel, boundary, size),
        image,
        tolerance=tolerance,
    )
    assert_adjoint(
        lambda k: emulated.blur_conv2d(image, k, boundary),
        lambda r: emulated.blur_conv2d_kernel(image, r, boundary, list(kernel.shape)),
        kernel,
        tolerance=tolerance,
    )


@all_samples
@all_boundaries
@real
@pytest.mark.parametrize("masked", [False, True])
def test_data_term_and_gradients(emulated, sample, boundary, dtype, masked):
    image, kernel, observation, mask = sample.tensors(boundary, dtype)
    tensors = (image, kernel, observation, *((mask,) if masked else ()))

    def plain(x, k, y, m=None):
        return reference.blur_gradients(x, k, y, boundary=boundary, mask=m)

    weights = mask if masked else None
    results = emulated.blur_gradients(image, kernel, observation, weights, boundary)
    for index, result in enumerate(results):
        assert_accurate(
            lambda *t, r=result: r, lambda *t, i=index: plain(*t)[i], *tensors, slack=64
        )
    loss = emulated.blur_data_term(image, kernel, observation, weights, boundary)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, plain(*tensors)[0], rtol=64 * eps, atol=64 * eps)


@all_samples
@all_boundaries
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_downsampling(emulated, sample, boundary, factor):
    image, kernel, _, _ = sample.tensors(boundary)
    assert_accurate(
        lambda x, k: emulated.blur_downsample2d(x, k, boundary, factor),
        lambda x, k: reference.blur_downsample2d(x, k, factor, boundary=boundary),
        image,
        kernel,
        slack=32,
    )
    assert_adjoint(
        lambda x: emulated.blur_downsample2d(x, kernel, boundary, factor),
        lambda r: emulated.blur_downsample2d_adjoint(
            r, kernel, boundary, factor, list(image.shape[2:])
        ),
        image,
    )


@pytest.mark.parametrize("sample", EMPTY, ids=str)
@all_boundaries
def test_empty_batch(emulated, sample, boundary):
    image, kernel, observation, _ = sample.tensors(boundary)
    assert emulated.blur_conv2d(image, kernel, boundary).shape == observation.shape
    loss, grad_image, grad_kernel = emulated.blur_gradients(
        image, kernel, observation, None, boundary
    )
    assert (loss.shape, grad_image.shape) == ((0,), image.shape)
    assert grad_kernel.abs().sum() == 0


def test_order_of_threads_and_blocks_does_not_change_a_bit(emulator):
    for sample, boundary in ((LARGE[0], "reflect"), (LARGE[1], "circular"), (LARGE[2], "circular")):
        image, kernel, observation, _ = sample.tensors(boundary)
        results = []
        for seed in range(4):
            emulator.seed(seed)
            results.append(
                emulator.operators.blur_gradients(image, kernel, observation, None, boundary)
            )
        for result in results[1:]:
            for left, right in zip(results[0], result, strict=True):
                assert torch.equal(left, right)


def test_errors_are_those_of_the_cpu(emulated):
    with pytest.raises(ValueError, match="kernel must be no larger than image"):
        emulated.blur_conv2d(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 9, 3), "circular")
    with pytest.raises(TypeError, match="image must be float32"):
        emulated.blur_conv2d(torch.ones(1, 1, 8, 8).long(), torch.rand(1, 1, 3, 3), "circular")
