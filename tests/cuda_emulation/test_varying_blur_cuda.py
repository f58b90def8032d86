"""The CUDA path of spatially varying blur, emulated, against the plain torch reference."""

import zlib

import pytest
import torch
from ops.samples import BOUNDARIES
from ops.test_varying_blur import CASES, tensors

import latentdem_ext as ext
from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

# Several tiles, of which some patches miss some; and the spectral path, extended and in place.
LARGE = [
    ((2, 1, 37, 70), (2, 3, 5), 1, 3, 6),
    ((1, 2, 40, 33), (0, 4, 4), 4, 2, 4),
    ((2, 3, 40, 36), (0, 21, 22), 2, 2, 6),
    ((3, 1, 37, 33), (3, 15, 31), 1, 2, 4),
]
all_cases = pytest.mark.parametrize(
    "case", [*CASES, *LARGE], ids=lambda c: "x".join(map(str, c[0]))
)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)


@pytest.fixture
def emulated(emulator, request):
    """The emulated operators; the cases take turns with three orders of threads and blocks."""
    emulator.seed(zlib.crc32(request.node.name.encode()) % 3)
    return emulator.operators


def batched(kernels):
    return kernels if kernels.dim() == 4 else kernels[None]


@all_cases
@all_boundaries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(emulated, case, boundary, dtype):
    image, kernels, weights, _, _ = tensors(case, boundary, dtype)
    assert_accurate(
        lambda x, k, w: emulated.varying_blur2d(x, k, w, boundary),
        lambda x, k, w: reference.varying_blur2d(x, k, w, boundary=boundary),
        image,
        batched(kernels),
        weights,
        slack=32,
    )


@all_cases
@all_boundaries
def test_adjoints(emulated, case, boundary):
    """``<A(x, k), r>``, ``<x, A'r>`` and ``<k, K'r>`` are one number."""
    image, kernels, weights, observation, _ = tensors(case, boundary, torch.float64)
    kernels, residual = batched(kernels), observation - 0.5
    blurred = emulated.varying_blur2d(image, kernels, weights, boundary)
    back = emulated.varying_blur2d_adjoint(residual, kernels, weights, boundary)
    taps = emulated.varying_blur2d_kernels(image, residual, weights, boundary, list(kernels.shape))
    tolerance = 1e-13 * float(blurred.norm() * residual.norm())
    product = float((blurred * residual).sum())
    assert abs(product - float((image * back).sum())) <= tolerance
    assert abs(product - float((kernels * taps).sum())) <= tolerance


@all_cases
@all_boundaries
@pytest.mark.parametrize(("masked", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_gradients(emulated, case, boundary, masked, dtype):
    image, kernels, weights, observation, mask = tensors(case, boundary, dtype)
    inputs = (image, batched(kernels), weights, observation, *((mask,) * masked))
    found = emulated.varying_blur_gradients(*inputs[:4], mask if masked else None, boundary)
    for index, result in enumerate(found):
        assert_accurate(
            lambda *t, r=result: r,
            lambda x, k, w, y, m=None, i=index: reference.varying_blur_gradients(
                x, k, w, y, mask=m, boundary=boundary
            )[i],
            *inputs,
            slack=64,
        )


@all_boundaries
@pytest.mark.parametrize("size", [3, 21])
def test_patches_without_weight_and_weights_around_the_border(emulated, boundary, size):
    image = torch.rand(1, 2, 40, 36, dtype=torch.float64)
    kernels = torch.rand(1, 3, size, size, dtype=torch.float64)
    weights = torch.zeros(3, 40, 36, dtype=torch.float64)
    weights[0, [[0], [39]], [0, 35]] = torch.rand(2, 2, dtype=torch.float64)
    weights[2, 33:, 3] = -1
    blurred = emulated.varying_blur2d(image, kernels, weights, boundary)
    plain = reference.varying_blur2d(image, kernels, weights, boundary=boundary)
    torch.testing.assert_close(blurred, plain, rtol=1e-9, atol=1e-11)
    residual = torch.rand_like(plain)
    back = emulated.varying_blur2d_adjoint(residual, kernels, weights, boundary)
    plain = reference.varying_blur2d_adjoint(residual, kernels, weights, boundary=boundary)
    torch.testing.assert_close(back, plain, rtol=1e-9, atol=1e-11)
    grad = emulated.varying_blur2d_kernels(image, residual, weights, boundary, [1, 3, size, size])
    assert grad[:, 1].abs().max() < 1e-12
    assert grad[:, 2].abs().max() > 0.1


def test_empty_batch(emulated):
    image, kernels, weights, observation, _ = tensors(LARGE[0], "valid")
    loss, grad_image, grad_kernels = emulated.varying_blur_gradients(
        image[:0], kernels[:0], weights, observation[:0], None, "valid"
    )
    assert (loss.shape, grad_image.shape) == ((0,), (0, 1, 37, 70))
    assert grad_kernels.shape == (0, 3, 3, 5)
    nothing = emulated.varying_blur2d_kernels(
        image[:0], observation[:0], weights, "valid", [1, 3, 3, 5]
    )
    assert torch.equal(nothing, torch.zeros(1, 3, 3, 5))


def test_order_of_threads_and_blocks_does_not_change_a_bit(emulator):
    for case in LARGE[0], LARGE[2]:
        image, kernels, weights, observation, mask = tensors(case, "reflect")
        results = []
        for seed in range(3):
            emulator.seed(seed)
            results.append(
                emulator.operators.varying_blur_gradients(
                    image, batched(kernels), weights, observation, mask, "reflect"
                )
            )
        for result in results[1:]:
            for left, right in zip(results[0], result, strict=True):
                assert torch.equal(left, right)


def test_equal_kernels_are_the_uniform_blur(emulated):
    image, kernel = torch.rand(1, 2, 40, 37), torch.rand(1, 1, 5, 4)
    weights = ext.blend_windows(40, 37, 2, 2, 7)
    varying = emulated.varying_blur2d(image, kernel.expand(1, 4, 5, 4), weights, "replicate")
    uniform = emulated.blur_conv2d(image, kernel, "replicate")
    torch.testing.assert_close(varying, uniform, rtol=1e-5, atol=1e-5)


def test_errors_are_those_of_the_cpu(emulated):
    image, kernels, weights = torch.rand(1, 1, 8, 8), torch.rand(1, 2, 3, 3), torch.rand(2, 8, 8)
    with pytest.raises(ValueError, match="weights must have shape"):
        emulated.varying_blur2d(image, kernels, weights[:1], "circular")
    with pytest.raises(ValueError, match="residual must have the shape of the blurred image"):
        emulated.varying_blur2d_adjoint(image, kernels, weights, "valid")
