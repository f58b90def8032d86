"""The forward model: canvas, proximal step, M-step."""

from itertools import pairwise

import pytest
import torch

import latentdem
import latentdem_ext as ext
from latentdem.metrics import maximum_normalized_correlation
from latentdem.operators import initialization
from latentdem.operators.blur import BlurModel, EdgeStepSettings, MStepSettings, clipped
from latentdem.operators.edges import l0_deconvolution, smooth_total_variation
from latentdem.operators.initialization import estimate_kernel, kernel_sizes
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors.kernel import KernelDenoiserNet


def scene(side=96, seed=0):
    """Random rectangles: edges in every direction, like a photograph."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((1, 3, side, side), 0.5)
    for _ in range(60):
        y, x = (int(torch.randint(0, side - 4, (), generator=generator)) for _ in range(2))
        h, w = (int(torch.randint(3, side // 3, (), generator=generator)) for _ in range(2))
        image[..., y : y + h, x : x + w] = torch.rand(1, 3, 1, 1, generator=generator)
    return image


@pytest.mark.parametrize("size", [(40, 37), (17, 90), (9, 9)])
def test_canvas_holds_the_observation(size):
    observed = 0.9 * torch.rand(1, 3, *size)
    model = BlurModel(observed, kernel_size=9, noise_std=0.01)
    assert all(side % 16 == 0 for side in model.canvas)
    assert all(c >= s + 18 for c, s in zip(model.canvas, size, strict=True))
    assert torch.equal(model.crop(model.padded), observed)
    assert model.mask.sum() == size[0] * size[1]
    assert model.padded.shape[-2:] == model.canvas


def test_circular_proximal_step_is_the_minimiser():
    observed, estimate = 0.9 * torch.rand(2, 1, 3, 24, 24).double()
    kernel = torch.rand(1, 1, 5, 5).double()
    kernel /= kernel.sum()
    model = BlurModel(observed, kernel_size=5, noise_std=0.01, boundary="circular")
    ratio = 0.07
    x = model.proximal(estimate, kernel, ratio=ratio)
    # Gradient of ||k*x - y||^2 / 2 + ratio ||x - x_hat||^2 / 2 vanishes there.
    _, gradient, _ = ext.blur_gradients(x, kernel, observed)
    assert (gradient + ratio * (x - estimate)).abs().max() < 1e-10


def test_imputation_approaches_the_masked_minimiser():
    observed = torch.rand(1, 3, 32, 32).double()
    model = BlurModel(observed, kernel_size=5, noise_std=0.01)
    estimate = torch.rand(1, 3, *model.canvas).double()
    kernel = random_motion_kernel(5, seed=1).double()
    sizes = []
    for passes in (1, 3, 40):
        x = model.proximal(estimate, kernel, ratio=0.5, imputations=passes)
        _, gradient, _ = ext.blur_gradients(x, kernel, model.padded, mask=model.mask)
        sizes.append(float((gradient + 0.5 * (x - estimate)).norm()))
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 1e-4 * sizes[0]


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_m_step_finds_the_kernel_of_the_true_image(boundary):
    kernel = random_motion_kernel(11, seed=3)
    sharp = scene(128)
    observed = ext.blur_conv2d(sharp, kernel, boundary=boundary)
    model = BlurModel(observed, kernel_size=11, noise_std=0.005, boundary=boundary)
    image = sharp
    if boundary == "valid":
        image = model.padded.clone()
        model.crop(image).copy_(sharp[..., 5:-5, 5:-5])
    found = model.initial_kernel()
    settings = MStepSettings(denoiser_share=0)
    for _ in range(5):
        found = model.m_step(image, found, image_std=0.01, settings=settings)
    assert maximum_normalized_correlation(found, kernel) > 0.97
    assert found.min() >= 0
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_residual_variance_sees_only_the_observation():
    observed = torch.rand(1, 3, 32, 32)
    model = BlurModel(observed, kernel_size=5, noise_std=0.01)
    delta = torch.zeros(1, 1, 5, 5)
    delta[..., 2, 2] = 1
    other = model.padded + 5 * (1 - model.mask)
    assert model.residual_variance(other, delta) < 1e-9
    assert float(model.residual_variance(other + 0.1 * model.mask, delta)) == pytest.approx(
        0.01, rel=1e-3
    )


def test_edge_step_is_not_fooled_by_ringing():
    """From an image restored with a wrong kernel, edges give a better kernel than all gradients."""
    kernel = random_motion_kernel(11, seed=3)
    sharp = scene(138)
    observed = ext.blur_conv2d(sharp, kernel, boundary="valid")
    observed = observed + 0.01 * torch.randn(observed.shape)
    model = BlurModel(observed, kernel_size=11, noise_std=0.01)
    wrong = model.initial_kernel()
    image = model.proximal(model.padded, wrong, ratio=0.01)
    found = model.update(image, wrong, EdgeStepSettings(denoiser_share=0))
    plain = EdgeStepSettings(denoiser_share=0, edge_weight=1e-7)
    naive = model.update(image, wrong, plain)
    before = maximum_normalized_correlation(wrong, kernel)
    after = maximum_normalized_correlation(found, kernel)
    assert after > before + 0.05
    assert after > maximum_normalized_correlation(naive, kernel)
    assert found.min() >= 0
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("size", "answers"), [(9, 1), (17, 3), (39, 30)])
def test_the_kernel_prior_is_asked_more_often_of_large_kernels(size, answers):
    """At the end of each scale, and above 35 pixels at each of its five alternations."""

    class Spy(KernelDenoiserNet):
        asked = 0

        def forward(self, kernel, evidence=None):
            self.asked += 1
            return kernel

    spy = Spy()
    estimate_kernel(scene(96), size, kernel_prior=spy)
    assert spy.asked == answers
    scales = sum(k >= initialization.SMALLEST_DENOISED for k in kernel_sizes(size))
    assert answers == scales * (1 if size <= initialization.LARGE else initialization.ITERATIONS)


@pytest.mark.parametrize("boundary", ["valid", "circular"])
def test_first_kernel_from_the_observation_alone(boundary):
    kernel = random_motion_kernel(15, seed=8)
    observed = ext.blur_conv2d(scene(160, seed=1), kernel, boundary=boundary)
    observed = observed + 0.005 * torch.randn(observed.shape)
    found = estimate_kernel(observed, 15, boundary=boundary)
    delta = torch.zeros_like(kernel)
    delta[..., 7, 7] = 1
    assert maximum_normalized_correlation(found, kernel) > 0.75
    assert maximum_normalized_correlation(delta, kernel) < 0.5
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 25, 65])
def test_kernel_sizes_are_odd_and_rise(size):
    sizes = kernel_sizes(size)
    assert sizes[-1] == size
    assert all(a < b for a, b in pairwise(sizes))
    assert all(s % 2 == 1 for s in sizes)


def test_l0_smoothing_keeps_edges_and_drops_texture():
    step = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    step[..., 8:24, 8:24] = 1
    textured = step + 0.02 * torch.randn(step.shape, dtype=torch.float64)
    smooth = l0_deconvolution(textured, None, weight=0.02)
    assert (smooth - step).abs().max() < 0.05
    assert (smooth - step).norm() < 0.5 * (textured - step).norm()


def test_total_variation_drops_ripples_and_keeps_edges():
    sharp = scene()
    ripples = 0.02 * (-1.0) ** torch.arange(96)
    smooth = smooth_total_variation(torch.cat([sharp + ripples, sharp]), 0.03)
    assert smooth.shape == (2, 3, 96, 96) and smooth.dtype == torch.float32
    assert (smooth[:1] - sharp).abs().median() < 0.008
    edges = sharp.diff(dim=-1).abs() > 0.2
    assert smooth[1:].diff(dim=-1).abs()[edges].min() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3)])
def test_total_variation_of_the_smallest_images(size):
    image = torch.rand(1, 3, *size)
    smooth = smooth_total_variation(image, 0.01)
    assert smooth.shape == image.shape and torch.isfinite(smooth).all()


def test_kernel_of_unknown_size_outgrows_its_frame(monkeypatch):
    asked = []

    def estimate(observation, size, **options):
        asked.append(size)
        kernel = torch.zeros(1, 1, size, size)
        reach = min(15, size // 2)
        kernel[..., size // 2, size // 2 - reach : size // 2 + reach + 1] = 1
        return kernel / kernel.sum()

    monkeypatch.setattr(initialization, "estimate_kernel", estimate)
    found = initialization.find_kernel(torch.rand(1, 3, 8, 8), smallest=17, largest=65)
    # A stroke of 31 pixels lies within 35 less two at each side.
    assert asked == [17, 25, 35]
    assert found.shape[-1] == 35
    asked.clear()
    assert initialization.find_kernel(found, smallest=9, largest=11).shape[-1] == 11
    assert asked == [9, 11]


def test_size_is_found_where_it_is_not_given():
    observed = ext.blur_conv2d(scene(96), random_motion_kernel(9, seed=2), boundary="valid")
    images = torch.cat([observed, torch.full_like(observed, 0.5)])
    result = latentdem.deblur(images, noise_std=0.01, steps=1)
    sizes = result.report["kernel_sizes"]
    assert result.report["kernel_size_estimated"]
    assert result.kernel.shape[-1] == max(sizes) == result.report["kernel_size"]
    assert all(9 <= size <= 29 and size % 2 for size in sizes)
    assert torch.allclose(result.kernel.sum((-2, -1)), torch.ones(2, 1), atol=1e-5)
    told = latentdem.deblur(images[:1], noise_std=0.01, steps=1, kernel_size=sizes[0])
    assert torch.allclose(told.image, result.image[:1], atol=1e-5)
    assert not told.report["kernel_size_estimated"]


def test_clipped_highlights_are_no_observation():
    observed = 0.8 * torch.rand(1, 3, 24, 24)
    observed[:, 1, 3:6, 4:6] = 1
    for boundary in ("valid", "circular"):
        model = BlurModel(observed, kernel_size=5, noise_std=0.01, boundary=boundary)
        assert float(model.mask.sum()) == 24 * 24 - 6
        kernel = random_motion_kernel(5, seed=1)
        image = torch.rand(1, 3, *model.canvas)
        brighter = model.padded.clone()
        # What is there does not matter: neither to the proximal step nor to the residual.
        x = model.proximal(image, kernel, ratio=0.1)
        residual = float(model.residual_variance(image, kernel))
        model.crop(brighter)[:, :, 3:6, 4:6] = 5
        model.padded = model.target = brighter
        assert torch.allclose(model.proximal(image, kernel, ratio=0.1), x, atol=1e-5)
        assert float(model.residual_variance(image, kernel)) == pytest.approx(residual, rel=1e-5)
        assert float(model.window[..., 3:6, 4:6].max()) == 0


def test_white_paper_and_unclipped_pictures_are_observed_everywhere():
    assert float(clipped(torch.ones(1, 3, 8, 8)).sum()) == 0
    bright = torch.rand(1, 3, 20, 20)
    bright[..., 0, 0] = 1.0
    bright[..., 1, 1] = 1.2
    assert float(clipped(bright).sum()) == 0
