"""The CUDA path of the deconvolutions, emulated, against the plain torch reference."""

import zlib

import pytest
import torch
from ops.samples import BOUNDARIES, SAMPLES, Sample

from latentdem_ext import reference
from latentdem_ext.testing import assert_accurate

# Several blocks of bins, and planes that share kernels in both ways.
LARGE = [Sample((3, 2, 40, 36), (3, 1, 9, 12)), Sample((2, 3, 37, 31), (1, 3, 5, 4))]
all_samples = pytest.mark.parametrize("sample", [*SAMPLES, *LARGE], ids=str)
all_boundaries = pytest.mark.parametrize("boundary", BOUNDARIES)
real = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
RATIOS = ("number", "image", "bin", "shared bin")


@pytest.fixture
def emulated(emulator, request):
    """The emulated operators; the cases take turns with three orders of threads and blocks."""
    emulator.seed(zlib.crc32(request.node.name.encode()) % 3)
    return emulator.operators


def make_ratio(kind, image):
    batch, channels, height, width = image.shape
    shape = {
        "number": (),
        "image": (batch,),
        "bin": (batch, channels, height, width // 2 + 1),
        "shared bin": (1, 1, height, width // 2 + 1),
    }[kind]
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
    return weights.to(image.dtype)


def wiener_gradients(image, observation, kernel, ratio, mask, passes, weight):
    """Gradients by autograd through the reference; the ratio's per bin of every plane."""
    size = (*image.shape[:3], image.shape[3] // 2 + 1)
    shape = (-1, 1, 1, 1) if ratio.dim() == 1 else ratio.shape
    inputs = [t.detach().clone() for t in (image, observation.expand_as(image), kernel)]
    inputs.append(ratio.reshape(shape).expand(size).clone())
    for t in inputs:
        t.requires_grad_()
    output = reference.wiener_deconv2d(*inputs, mask=mask, passes=passes)
    return torch.autograd.grad((output * weight).sum(), inputs)


@all_samples
@real
@pytest.mark.parametrize(
    ("masked", "passes", "kinds"), [(False, 3, RATIOS), (True, 1, RATIOS[:1]), (True, 3, RATIOS)]
)
def test_wiener(emulated, sample, dtype, masked, passes, kinds):
    image, kernel, observation, mask = sample.tensors("circular", dtype)
    for kind in kinds:
        tensors = (image, observation, kernel, make_ratio(kind, image), *((mask,) * masked))
        assert_accurate(
            lambda x, y, k, r, m=None: emulated.wiener_deconv2d(x, y, k, r, m, passes),
            lambda x, y, k, r, m=None: reference.wiener_deconv2d(x, y, k, r, mask=m, passes=passes),
            *tensors,
            slack=32,
        )


@all_samples
@real
@pytest.mark.parametrize(
    ("masked", "passes", "kind"), [(False, 1, "bin"), (True, 1, "image"), (True, 3, "shared bin")]
)
def test_wiener_gradients(emulated, sample, dtype, masked, passes, kind):
    image, kernel, observation, mask = sample.tensors("circular", dtype)
    weight = torch.rand(image.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensors = (image, observation, kernel, make_ratio(kind, image), weight, *((mask,) * masked))
    found = emulated.wiener_deconv2d_backward(
        weight, *tensors[:4], mask if masked else None, passes, True, True, True
    )
    for index, result in enumerate(found):
        assert_accurate(
            lambda *t, r=result: r,
            lambda x, y, k, r, w, m=None, i=index: wiener_gradients(x, y, k, r, m, passes, w)[i],
            *tensors,
            slack=64,
        )


@pytest.mark.parametrize("masked", [False, True])
def test_each_wiener_gradient_alone_and_one_observation(emulated, masked):
    image, kernel, observation, mask = LARGE[0].tensors("circular", torch.float64)
    ratio, weight = make_ratio("bin", image), torch.rand_like(image)
    mask, passes = (mask, 3) if masked else (None, 1)
    shared = observation[:1]
    exact = wiener_gradients(image, shared, kernel, ratio, mask, passes, weight)
    for wanted in range(4):
        needs = [index == wanted for index in (1, 2, 3)]
        found = emulated.wiener_deconv2d_backward(
            weight, image, shared, kernel, ratio, mask, passes, *needs
        )
        for index, result in enumerate(found):
            if index in (0, wanted):
                torch.testing.assert_close(result, exact[index], rtol=1e-10, atol=1e-11)
            else:
                assert result.shape == (0,)
    out = emulated.wiener_deconv2d(image, shared, kernel, ratio, mask, passes)
    plain = reference.wiener_deconv2d(image, shared, kernel, ratio, mask=mask, passes=passes)
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-11)


@all_samples
@all_boundaries
@pytest.mark.parametrize(
    ("masked", "variation", "dtype"),
    [(False, 0.0, torch.float32), (True, 0.02, torch.float32), (True, 0.02, torch.float64)],
)
def test_richardson_lucy(emulated, sample, boundary, masked, variation, dtype):
    image, kernel, observation, mask = sample.tensors(boundary, dtype)
    mask[..., 0, 0] = 1  # at least one pixel is seen
    tensors = (observation + 0.1, kernel, image + 0.1, *((mask,) * masked))
    assert_accurate(
        lambda y, k, u, m=None: emulated.richardson_lucy(y, k, u, m, boundary, 3, variation, 1e-4),
        lambda y, k, u, m=None: reference.richardson_lucy(
            y, k, initial=u, iterations=3, boundary=boundary, mask=m,
            total_variation=variation, eps=1e-4,
        ),
        *tensors,
        slack=256 if dtype == torch.float32 else 4096,
    )  # fmt: skip


def test_unseen_pixels_stay_and_nans_are_not_hidden(emulated):
    image, kernel, observation, mask = LARGE[0].tensors("circular")
    mask[..., :20] = 0
    found = emulated.richardson_lucy(observation, kernel, image, mask, "circular", 2, 0.0, 1e-7)
    assert torch.equal(found[..., 12:14], image[..., 12:14])
    assert not torch.equal(found[..., 28:], image[..., 28:])
    observation[0, 0, 5, 5] = torch.nan
    found = emulated.richardson_lucy(observation, kernel, image, None, "circular", 2, 0.0, 1e-7)
    assert found[0, 0].isnan().any()
    assert not found[1:].isnan().any()


def test_empty_batch_and_no_iterations(emulated):
    image, kernel = torch.rand(0, 3, 8, 9), torch.rand(1, 1, 3, 3)
    ratio = torch.tensor(0.1)
    assert emulated.wiener_deconv2d(image, image, kernel, ratio, None, 1).shape == image.shape
    grads = emulated.wiener_deconv2d_backward(
        image, image, image, kernel, ratio, None, 1, True, True, True
    )
    assert [g.shape for g in grads[:2]] == [image.shape] * 2
    assert torch.equal(grads[2], torch.zeros_like(kernel))
    assert grads[3].shape == (0, 3, 8, 5)
    lucy = emulated.richardson_lucy(image[..., 2:, 2:], kernel, image, None, "valid", 2, 0.0, 1e-7)
    assert lucy.shape == image.shape
    start = torch.rand(1, 1, 8, 9)
    assert torch.equal(
        emulated.richardson_lucy(start, kernel, start, None, "circular", 0, 0.0, 1e-7), start
    )


def test_half_precision_and_layout(emulated):
    image, kernel, observation, _ = SAMPLES[6].tensors("circular", torch.bfloat16)
    ratio = torch.tensor(0.5)
    last = image.contiguous(memory_format=torch.channels_last)
    out = emulated.wiener_deconv2d(last, observation, kernel, ratio, None, 1)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = reference.wiener_deconv2d(image.double(), observation.double(), kernel.double(), 0.5)
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_order_of_threads_and_blocks_does_not_change_a_bit(emulator):
    image, kernel, observation, mask = LARGE[1].tensors("reflect")
    results = []
    for seed in range(3):
        emulator.seed(seed)
        ops = emulator.operators
        results.append(
            (
                *ops.wiener_deconv2d_backward(
                    image, image, observation, kernel, torch.tensor(0.1), mask, 2, True, True, True
                ),
                ops.richardson_lucy(observation, kernel, image, mask, "reflect", 2, 0.01, 1e-4),
            )
        )
    for result in results[1:]:
        for left, right in zip(results[0], result, strict=True):
            assert torch.equal(left, right)


def test_errors_are_those_of_the_cpu(emulated):
    image, kernel = torch.rand(1, 1, 8, 8), torch.rand(1, 1, 3, 3)
    with pytest.raises(ValueError, match="passes must be at least 1, found 0"):
        emulated.wiener_deconv2d(image, image, kernel, torch.tensor(0.1), None, 0)
    with pytest.raises(ValueError, match="grad must have the shape of image_hat"):
        emulated.wiener_deconv2d_backward(
            image[..., 1:], image, image, kernel, torch.tensor(0.1), None, 1, True, True, True
        )
    with pytest.raises(ValueError, match="eps must be positive, found 0"):
        emulated.richardson_lucy(image, kernel, image, None, "circular", 1, 0.0, 0.0)
