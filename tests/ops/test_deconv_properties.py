"""The Wiener step against dense normal equations; Richardson-Lucy against what it promises."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ops.samples import BOUNDARIES
from ops.strategies import draws, dtypes, matrix_of, on_simplex, seeds, sizes

import latentdem_ext as ext
from latentdem_ext import reference


def dense_blur(kernel, height, width):
    """``[HW,HW]`` of a circular blur with one plane of taps."""
    return matrix_of(
        lambda x: reference.blur_conv2d(x[None, None], kernel[None, None].double()), height, width
    )


@st.composite
def scenes(draw, high=7):
    """``image_hat, observation, kernel`` with every way of sharing, and what made them."""
    height, width, kh, kw = draw(sizes(high))
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    uniform = draws(draw(seeds))
    image = uniform(batch, channels, height, width)
    observation = uniform(draw(st.sampled_from([1, batch])), channels, height, width)
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, channels]))
    return image, observation, on_simplex(uniform(*lead, kh, kw) + 1e-3), uniform


@settings(max_examples=60)
@given(scenes(), st.sampled_from(["number", "image", "frequency"]), dtypes)
def test_wiener_solves_the_normal_equations(scene, kind, dtype):
    """``(K'K + R) x = K'y + R x_hat`` plane by plane, R diagonal in Fourier space."""
    image, observation, kernel, uniform = scene
    batch, channels, height, width = image.shape
    if kind == "frequency":
        # Even in both frequencies, so that R is a real convolution.
        rows = 0.1 + uniform(batch, channels, height, 1)
        rows = rows + rows.flip(2).roll(1, 2)
        ratio = rows * (0.1 + uniform(1, 1, 1, width // 2 + 1))
    else:
        ratio = 0.1 + uniform(*(() if kind == "number" else (batch,)))
    found = ext.wiener_deconv2d(*(t.to(dtype) for t in (image, observation, kernel, ratio)))
    exact = torch.empty_like(image)
    taps = kernel.expand(batch, channels, *kernel.shape[2:])
    data = observation.expand_as(image)
    for b in range(batch):
        for c in range(channels):
            blur = dense_blur(taps[b, c], height, width)
            if kind == "frequency":
                weight = matrix_of(
                    lambda x, r=ratio[b, c]: torch.fft.irfft2(
                        r * torch.fft.rfft2(x), s=(height, width)
                    ),
                    height,
                    width,
                )
            else:
                weight = ratio.expand(batch)[b] * torch.eye(height * width, dtype=torch.float64)
            rhs = blur.T @ data[b, c].flatten() + weight @ image[b, c].flatten()
            exact[b, c] = torch.linalg.solve(blur.T @ blur + weight, rhs).reshape(height, width)
    # The condition number is at most (1 + 0.01) / 0.01.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance)


@settings(max_examples=40)
@given(scenes(), st.integers(1, 4))
def test_every_imputation_descends_towards_the_masked_minimiser(scene, passes):
    image, observation, kernel, uniform = scene
    batch, channels, height, width = image.shape
    mask = (uniform(1, 1, height, width) > 0.4).double()
    ratio = 0.2 + float(uniform(1))

    def objective(x):
        misfit = ext.blur_conv2d(x, kernel) - observation
        return (mask * misfit.square()).sum() + ratio * (x - image).square().sum()

    def solve(count):
        return ext.wiener_deconv2d(image, observation, kernel, ratio, mask=mask, passes=count)

    before, after = objective(solve(passes)), objective(solve(passes + 1))
    assert after <= before * (1 + 1e-12) + 1e-14
    taps = kernel.expand(batch, channels, *kernel.shape[2:])
    blur = dense_blur(taps[-1, -1], height, width)
    seen = mask.flatten()
    normal = blur.T @ (seen[:, None] * blur) + ratio * torch.eye(height * width).double()
    rhs = blur.T @ (seen * observation[-1, -1].flatten()) + ratio * image[-1, -1].flatten()
    exact = torch.linalg.solve(normal, rhs).reshape(height, width)
    # The rest shrinks at least by 1 / (1 + ratio) a pass.
    torch.testing.assert_close(solve(150)[-1, -1], exact, rtol=0, atol=1e-8)


@st.composite
def photons(draw):
    """A noisy observation, a kernel that sums to one, a boundary, a mask and a start, or none."""
    boundary = draw(st.sampled_from(BOUNDARIES))
    height, width, kh, kw = draw(sizes(14, kernel=6))
    batch, channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    uniform = draws(draw(seeds), draw(dtypes))
    kernel = on_simplex(uniform(draw(st.sampled_from([1, batch])), 1, kh, kw) + 1e-3)
    initial = uniform(batch, channels, height, width) + 0.05
    shape = ext.blur_conv2d(initial, kernel, boundary=boundary).shape
    observation = (8 * uniform(*shape)).floor() / 8  # some pixels are dark
    mask = (uniform(1, 1, *shape[2:]) > 0.3).to(initial.dtype)
    mask[..., 0, 0] = 1
    options = {
        "boundary": boundary,
        "mask": draw(st.sampled_from([None, mask])),
        "initial": draw(st.sampled_from([None, initial])),
    }
    return observation, kernel, options


@settings(max_examples=60)
@given(photons(), st.integers(0, 4), st.sampled_from([0.0, 0.02, 0.25]))
def test_richardson_lucy_stays_non_negative(scene, iterations, variation):
    observation, kernel, options = scene
    found = ext.richardson_lucy(
        observation, kernel, iterations=iterations, total_variation=variation, **options
    )
    assert torch.isfinite(found).all()
    assert found.min() >= 0
    if iterations == 0 and options["initial"] is not None:
        assert torch.equal(found, options["initial"])
    # Iterations add up.
    half = options | {"initial": found}
    onwards = ext.richardson_lucy(
        observation, kernel, iterations=2, total_variation=variation, **half
    )
    whole = ext.richardson_lucy(
        observation, kernel, iterations=iterations + 2, total_variation=variation, **options
    )
    torch.testing.assert_close(onwards, whole)


@settings(max_examples=40)
@given(photons(), st.integers(1, 4))
def test_richardson_lucy_keeps_the_flux_of_a_circular_blur(scene, iterations):
    observation, kernel, options = scene
    assume(options["boundary"] != "valid")  # where image and observation differ in size
    options |= {"boundary": "circular", "mask": None}
    found = ext.richardson_lucy(observation, kernel, iterations=iterations, **options)
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        found.sum((-2, -1)), observation.sum((-2, -1)), rtol=tolerance, atol=tolerance
    )


@settings(max_examples=60)
@given(photons())
def test_the_poisson_likelihood_never_falls(scene):
    observation, kernel, options = scene
    observation, kernel = observation.double() + 0.01, kernel.double()
    mask, initial = (
        None if options[name] is None else options[name].double() for name in ("mask", "initial")
    )
    boundary = options["boundary"]
    seen = torch.ones_like(observation) if mask is None else mask.expand_as(observation)

    def likelihood(image):
        prediction = ext.blur_conv2d(image, kernel, boundary=boundary).clamp_min(1e-7)
        return (seen * (observation * prediction.log() - prediction)).sum()

    image = ext.richardson_lucy(
        observation, kernel, iterations=0, initial=initial, mask=mask, boundary=boundary
    )
    last = likelihood(image)
    for _ in range(4):
        image = ext.richardson_lucy(
            observation, kernel, iterations=1, initial=image, mask=mask, boundary=boundary
        )
        now = likelihood(image)
        assert now >= last - 1e-10 * last.abs() - 1e-12
        last = now


@settings(max_examples=20)
@given(scenes(), st.floats(0.05, 3.0))
def test_wiener_limits(scene, scale):
    """A huge ratio keeps ``x_hat``; a perfect ``x_hat`` is kept whatever the ratio."""
    image, observation, kernel, _ = scene
    kept = ext.wiener_deconv2d(image, observation, kernel, 1e14)
    torch.testing.assert_close(kept, image, rtol=0, atol=1e-12)
    blurred = ext.blur_conv2d(image, kernel)
    again = ext.wiener_deconv2d(image, blurred, kernel, scale, passes=2)
    torch.testing.assert_close(again, image, rtol=0, atol=1e-12)
    # Linear in (x_hat, y) together.
    single = ext.wiener_deconv2d(scale * image, scale * observation, kernel, 0.3)
    double = scale * ext.wiener_deconv2d(image, observation, kernel, 0.3)
    assert float((single - double).abs().max()) == pytest.approx(0, abs=1e-11)
