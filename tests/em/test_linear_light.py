"""Blur in linear light: the curve, the model behind it, the whole EM, and the option's ways in."""

import pytest
import torch
from em.test_blur_model import scene
from em.test_deblur import invoke

import latentdem
import latentdem_ext as ext
from latentdem.batch import Options
from latentdem.devices import no_synchronisation
from latentdem.em.models import ModelOptions
from latentdem.em.settings import ProxSettings
from latentdem.evaluate import photograph_crop
from latentdem.io import to_pil
from latentdem.metrics import aligned_psnr, maximum_normalized_correlation
from latentdem.operators.blur import BlurModel, EdgeStepSettings
from latentdem.operators.linear_light import LinearLightModel, slope, to_display, to_light
from latentdem.operators.motion import random_motion_kernel

FAST = {"kernel_size": 9, "noise_std": 0.01, "steps": 2, "assume_blurred": True}


def blurred_light(sharp, kernel, noise=0.01):
    light = ext.blur_conv2d(to_light(sharp), kernel, boundary="valid")
    generator = torch.Generator().manual_seed(0)
    return (to_display(light) + noise * torch.randn(light.shape, generator=generator)).clamp(0, 1)


def linear(observed, kernel_size=9, boundary="valid"):
    inner = BlurModel(
        to_light(observed), kernel_size=kernel_size, noise_std=0.01, boundary=boundary
    )
    return LinearLightModel(inner, observed, noise_std=0.01)


def test_the_curve_is_that_of_srgb():
    # IEC 61966-2-1, by its own formula.
    levels = torch.arange(256).double() / 255
    expected = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels.tolist()
    ]
    assert torch.allclose(to_light(levels), torch.tensor(expected).double(), atol=1e-12)


def test_the_curve_has_an_inverse_and_a_slope_everywhere():
    values = torch.linspace(-0.5, 1.5, 401).double()
    assert torch.allclose(to_display(to_light(values)), values, atol=1e-6)
    inside = torch.linspace(0.001, 0.999, 100).double().requires_grad_()
    (gradient,) = torch.autograd.grad(to_light(inside).sum(), inside)
    assert torch.allclose(slope(inside.detach()), gradient, atol=1e-9)
    # Black noise stays as large as it is: no value is amplified beyond the toe's slope.
    light = torch.linspace(-0.01, 0.01, 101).double()
    assert float(to_display(light).diff().max() / light.diff()[0]) <= 12.93


def test_the_model_is_the_blur_of_the_light():
    sharp = 0.9 * photograph_crop("coffee", 48)
    kernel = random_motion_kernel(9, seed=1)
    model = linear(sharp, boundary="circular")
    assert model.canvas == (48, 48) and torch.allclose(model.padded, sharp, atol=1e-5)
    expected = to_display(ext.blur_conv2d(to_light(sharp), kernel, boundary="circular"))
    assert torch.allclose(model.simulate(sharp, kernel), expected, atol=1e-6)
    misfit = float((expected - sharp).square().mean())
    assert float(model.residual_variance(sharp, kernel)) == pytest.approx(misfit, rel=1e-4)


def test_adjoint_is_that_of_the_light():
    model = linear(torch.rand(1, 3, 20, 24).double())
    kernel = random_motion_kernel(9, seed=1).double()
    image, residual = torch.rand(2, 2, 3, *model.canvas).double()
    left = (model.model.simulate(image, kernel) * residual).sum()
    right = (image * model.adjoint(residual, kernel)).sum()
    assert float((left - right).abs() / left.abs()) < 1e-12


def test_proximal_step_is_the_minimiser_of_the_linearised_problem():
    observed = 0.1 + 0.8 * torch.rand(1, 3, 20, 24).double()
    model = linear(observed)
    estimate = 0.1 + 0.8 * torch.rand(2, 3, *model.canvas).double()
    kernel, ratio = random_motion_kernel(9, seed=1).double(), 0.3
    x = model.proximal(estimate, kernel, ratio=ratio, imputations=60)
    steep = slope(estimate)
    step = (to_light(x) - to_light(estimate)) / steep
    light = to_light(estimate) + steep * step
    misfit = model.mask * (model.model.simulate(light, kernel) - model.model.target)
    weighted = misfit / slope(model.target).square()
    gradient = steep * model.adjoint(weighted, kernel) + ratio * step
    assert float(gradient.abs().max()) < 1e-6
    quick = model.proximal(estimate, kernel, ratio=ratio, imputations=3)
    assert float((quick - x).norm() / (estimate - x).norm()) < 0.2


def test_small_steps_are_those_of_the_display_values():
    """Where the picture is even the curve is a straight line, and both models agree."""
    observed = 0.5 + 0.001 * torch.rand(1, 3, 32, 32).double()
    kernel = random_motion_kernel(9, seed=1).double()
    plain = BlurModel(observed, kernel_size=9, noise_std=0.01, boundary="circular")
    model = linear(observed, boundary="circular")
    estimate = 0.5 + 0.001 * torch.rand(1, 3, 32, 32).double()
    a, b = (m.proximal(estimate, kernel, ratio=0.3, imputations=60) for m in (plain, model))
    assert float((a - b).norm() / (a - estimate).norm()) < 0.02


def test_m_step_finds_the_kernel_of_the_true_image():
    kernel = random_motion_kernel(9, seed=3)
    sharp = scene(160)
    observed = blurred_light(sharp, kernel, noise=0.002)
    found = []
    for model in (linear(observed), BlurModel(observed, kernel_size=9, noise_std=0.01)):
        image = model.padded.clone()
        model.crop(image).copy_(sharp[..., 4:-4, 4:-4])
        start = torch.full((1, 1, 9, 9), 1 / 81)
        settings = EdgeStepSettings(denoiser_share=0, momentum=0)
        answer = model.update(image, start, settings)
        found.append(float(maximum_normalized_correlation(answer, kernel)))
    assert found[0] > 0.95 and found[0] > found[1]


def test_nothing_in_a_step_waits_for_the_device():
    model = linear(photograph_crop("coffee", 48))
    kernel = random_motion_kernel(9, seed=1)
    ratio = torch.tensor(0.1)
    with no_synchronisation():
        image = model.proximal(model.padded, kernel, ratio=ratio)
        model.residual_variance(image, kernel)
        model.update(image, kernel, EdgeStepSettings())


def test_em_beats_the_display_values_on_light_that_was_blurred():
    kernel = random_motion_kernel(13, seed=4)
    sharp = photograph_crop("motorcycle", 140)
    observed = blurred_light(sharp, kernel)
    truth = sharp[..., 6:-6, 6:-6]
    values = []
    for light in (True, False):
        result = latentdem.deblur(
            observed,
            kernel=kernel,
            noise_std=0.01,
            settings=ProxSettings(steps=6, chains=1),
            linear_light=light,
        )
        assert result.report["linear_light"] is light
        values.append(aligned_psnr(result.image, truth, margin=6, search=2)[0])
    assert values[0] > values[1] + 1


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1),
        ({"boundary": "circular"}, 1),
        ({"blur": "defocus"}, 1),
        ({"scale": 2}, 2),
        ({"grid": (1, 2)}, 1),
        ({"tile": 64, "image": torch.rand(1, 3, 128, 80)}, 1),
    ],
)
def test_with_every_other_option(options, factor):
    image = options.pop("image", torch.rand(1, 3, 40, 36))
    result = latentdem.deblur(image, linear_light=True, **options, **FAST)
    assert result.image.shape[-2:] == tuple(side * factor for side in image.shape[-2:])
    assert torch.isfinite(result.image).all()
    assert torch.allclose(result.kernel.sum((-2, -1)), torch.ones(result.kernel.shape[:2]))


def test_batch_mates_change_nothing():
    # With the kernel: in noise it hangs on thresholds, which rounding crosses.
    known = FAST | {"kernel": random_motion_kernel(9, seed=1)}
    image = torch.rand(2, 3, 40, 36)
    both = latentdem.deblur(image, linear_light=True, batch_size=2, **known)
    one = latentdem.deblur(image[1:], linear_light=True, **known)
    assert torch.allclose(both.image[1:], one.image, atol=1e-4)


def test_the_published_method_knows_none(tmp_path):
    image = torch.rand(1, 3, 40, 36)
    message = "method 'paper' knows no linear light: use method 'prox'"
    for call in (
        lambda: latentdem.deblur(image, linear_light=True, method="paper", **FAST),
        lambda: Options(linear_light=True, method="paper"),
        lambda: ModelOptions(linear_light=True).check_method("paper"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    to_pil(image[0]).save(tmp_path / "photo.png")
    result = invoke("deblur", tmp_path / "photo.png", "-o", tmp_path / "out", "--linear-light",
                    "--method", "paper")  # fmt: skip
    assert result.exit_code == 1 and message in result.output
    assert result.output.count("\n") == 1
