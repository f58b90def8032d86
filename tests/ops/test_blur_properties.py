"""Varying and downsampled blurs on drawn shapes: adjoints, gradients, and the blur they contain."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.samples import BOUNDARIES
from ops.strategies import draws, dtypes, seeds, sizes

import latentdem_ext as ext
from latentdem_ext.testing import assert_adjoint

boundaries = st.sampled_from(BOUNDARIES)


def tolerance_of(dtype):
    return 1e-6 if dtype == torch.float32 else 1e-13


@st.composite
def varying(draw):
    """Image, kernels of all images or of each, weights on boxes that may be empty or wrap."""
    height, width, kh, kw = draw(sizes(18))
    batch, channels, patches = (draw(st.integers(1, high)) for high in (2, 3, 4))
    dtype = draw(dtypes)
    uniform = draws(draw(seeds), dtype)
    image = uniform(batch, channels, height, width)
    lead = draw(st.sampled_from([(), (1,), (batch,)]))
    kernels = uniform(*lead, patches, kh, kw) / (kh * kw)
    weights = torch.zeros(patches, height, width, dtype=dtype)
    for weight in weights:
        h, w = draw(st.integers(0, height)), draw(st.integers(1, width))
        shift = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        weight[:h, :w] = uniform(h, w)
        weight.copy_(weight.roll(shift, (0, 1)))
    return image, kernels, weights


@settings(max_examples=80)
@given(varying(), boundaries)
def test_varying_blur_has_its_adjoints(problem, boundary):
    image, kernels, weights = problem
    tolerance = tolerance_of(image.dtype)
    assert_adjoint(
        lambda x: ext.varying_blur2d(x, kernels, weights, boundary=boundary),
        lambda r: ext.varying_blur2d_adjoint(r, kernels, weights, boundary=boundary),
        image,
        tolerance=tolerance,
    )
    batched = kernels if kernels.dim() == 4 else kernels[None]
    size = list(batched.shape)
    assert_adjoint(
        lambda k: ext.varying_blur2d(image, k, weights, boundary=boundary),
        lambda r: torch.ops.latentdem.varying_blur2d_kernels(image, r, weights, boundary, size),
        batched,
        tolerance=tolerance,
    )


@settings(max_examples=50)
@given(varying(), boundaries, st.booleans(), seeds)
def test_varying_gradients_are_those_of_the_loss(problem, boundary, masked, seed):
    image, kernels, weights = (t.double() for t in problem)
    image.requires_grad_()
    kernels.requires_grad_()
    blurred = ext.varying_blur2d(image, kernels, weights, boundary=boundary)
    uniform = draws(seed)
    observation = uniform(*blurred.shape)
    mask = (uniform(1, 1, *blurred.shape[2:]) > 0.3).double() if masked else None
    squared = (blurred - observation).square()
    loss = 0.5 * (squared if mask is None else mask * squared).sum((1, 2, 3))
    expected = (loss, *torch.autograd.grad(loss.sum(), (image, kernels)))
    found = ext.varying_blur_gradients(
        image.detach(), kernels.detach(), weights, observation, mask=mask, boundary=boundary
    )
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@settings(max_examples=50)
@given(varying(), boundaries)
def test_one_map_is_a_plain_blur(problem, boundary):
    """Equal kernels under weights that sum to one, and a single map of ones."""
    image, kernels, weights = (t.double() for t in problem)
    kernel = kernels.reshape(-1, *kernels.shape[-2:])[0]
    plain = ext.blur_conv2d(image, kernel[None, None], boundary=boundary)
    ones = torch.ones_like(weights[:1])
    single = ext.varying_blur2d(image, kernel[None], ones, boundary=boundary)
    torch.testing.assert_close(single, plain, rtol=1e-10, atol=1e-11)
    rest = 1 - weights.sum(0, keepdim=True)
    split = torch.cat([weights, rest])
    equal = kernel.expand(len(split), *kernel.shape)
    blended = ext.varying_blur2d(image, equal, split, boundary=boundary)
    torch.testing.assert_close(blended, plain, rtol=1e-10, atol=1e-11)
    residual = plain + 1
    adjoint = ext.varying_blur2d_adjoint(residual, equal, split, boundary=boundary)
    expected = ext.blur_conv2d_adjoint(residual, kernel[None, None], boundary=boundary)
    torch.testing.assert_close(adjoint, expected, rtol=1e-10, atol=1e-10)


@st.composite
def downsampled(draw):
    """Image, kernel with every way of sharing, factor up to beyond the image."""
    height, width, kh, kw = draw(sizes(24))
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    uniform = draws(draw(seeds), draw(dtypes))
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, channels]))
    kernel = uniform(*lead, kh, kw) / (kh * kw)
    return uniform(batch, channels, height, width), kernel, draw(st.integers(1, 9))


@settings(max_examples=100)
@given(downsampled(), boundaries)
def test_downsampling_keeps_every_nth_pixel_of_the_blur(problem, boundary):
    image, kernel, factor = problem
    found = ext.blur_downsample2d(image, kernel, factor, boundary=boundary)
    blurred = ext.blur_conv2d(image, kernel, boundary=boundary)
    tolerance = 1e-5 if image.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        found, blurred[..., ::factor, ::factor], rtol=tolerance, atol=tolerance
    )
    size = (image.shape[2], image.shape[3])

    def adjoint(residual):
        return ext.blur_downsample2d_adjoint(
            residual, kernel, factor, boundary=boundary, image_size=size
        )

    assert_adjoint(
        lambda x: ext.blur_downsample2d(x, kernel, factor, boundary=boundary),
        adjoint,
        image,
        tolerance=tolerance_of(image.dtype),
    )
    spread = torch.zeros_like(blurred)
    spread[..., ::factor, ::factor] = found
    expected = ext.blur_conv2d_adjoint(spread, kernel, boundary=boundary)
    torch.testing.assert_close(adjoint(found), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=40)
@given(downsampled(), boundaries, seeds)
def test_gradients_of_a_downsampled_loss(problem, boundary, seed):
    image, kernel, factor = (t.double() if torch.is_tensor(t) else t for t in problem)
    image.requires_grad_()
    kernel.requires_grad_()
    found = ext.blur_downsample2d(image, kernel, factor, boundary=boundary)
    plain = ext.blur_conv2d(image, kernel, boundary=boundary)[..., ::factor, ::factor]
    residual = draws(seed)(*found.shape)
    left = torch.autograd.grad((found * residual).sum(), (image, kernel))
    right = torch.autograd.grad((plain * residual).sum(), (image, kernel))
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)
