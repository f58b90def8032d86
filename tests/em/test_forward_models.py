"""Forward models beside the uniform blur: adjoints, proximal steps, M-steps, and the whole EM."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from em.test_blur_model import scene
from em.test_deblur import invoke

import latentdem
import latentdem_ext as ext
from latentdem.em.models import ModelOptions
from latentdem.io import kernel_sheet, open_image, to_pil
from latentdem.metrics import maximum_normalized_correlation
from latentdem.operators.blur import EdgeStepSettings
from latentdem.operators.blur_families import FamilyBlurModel, family_kernels
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian, objective
from latentdem.operators.motion import random_motion_kernel
from latentdem.operators.super_resolution import SuperResolutionModel, upsample
from latentdem.operators.varying import VaryingBlurModel
from latentdem.priors.kernel import load_kernel_prior

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
FAST = {"kernel_size": 9, "noise_std": 0.01, "steps": 2}


class Halve(latentdem.ForwardModel):
    """Nothing but ``simulate``: what the base class makes of it."""

    def simulate(self, image, parameters):
        return parameters * (image + image.roll(1, -1))

    def start_parameters(self):
        return torch.tensor([0.3])

    def update(self, image, parameters, settings):
        basis = self.simulate(image, torch.ones(1))
        return ((basis * self.target).sum() / basis.square().sum())[None]


def models():
    coarse = torch.rand(1, 3, 20, 24).double()
    kernel = ext.gaussian_kernel(13, 1.6, dtype=torch.float64)
    for scale in (2, 3, 4):
        model = SuperResolutionModel(coarse, scale=scale, kernel_size=13, noise_std=0.01)
        yield pytest.param(model, kernel, id=f"x{scale}")
    fine = torch.rand(1, 3, 40, 36).double()
    kernels = torch.cat([random_motion_kernel(9, seed=s) for s in range(4)], 1).double()
    varying = VaryingBlurModel(fine, grid=(2, 2), kernel_size=9, noise_std=0.01)
    yield pytest.param(varying, kernels, id="varying")
    yield pytest.param(Halve(fine, noise_std=0.01), torch.tensor([0.4]).double(), id="own")


MODELS = list(models())


@pytest.mark.parametrize(("model", "parameters"), MODELS)
def test_adjoint_is_the_adjoint(model, parameters):
    image = torch.rand(2, 3, *model.canvas).double()
    residual = torch.rand(2, 3, *model.target.shape[-2:]).double()
    left = (model.simulate(image, parameters) * residual).sum()
    right = (image * model.adjoint(residual, parameters)).sum()
    assert float((left - right).abs() / left.abs()) < 1e-12


@pytest.mark.parametrize(("model", "parameters"), MODELS)
def test_proximal_step_is_the_minimiser(model, parameters):
    estimate = torch.rand(2, 3, *model.canvas).double()
    ratio = 0.3
    x = model.proximal(estimate, parameters, ratio=ratio, imputations=60)
    misfit = model.mask * (model.simulate(x, parameters) - model.target)
    gradient = model.adjoint(misfit, parameters) + ratio * (x - estimate)
    assert float(gradient.abs().max()) < 1e-6
    # The few steps that a run takes come near it.
    quick = model.proximal(estimate, parameters, ratio=ratio, imputations=3)
    assert float((quick - x).norm() / (estimate - x).norm()) < 0.2


@pytest.mark.parametrize(("model", "parameters"), MODELS)
def test_residual_variance_is_that_of_the_observed(model, parameters):
    image = torch.rand(2, 3, *model.canvas).double()
    misfit = (model.simulate(image, parameters) - model.target)[..., model.mask[0, 0] > 0]
    expected = float(misfit.square().mean())
    assert float(model.residual_variance(image, parameters)) == pytest.approx(expected, rel=1e-9)


def test_chains_do_not_matter_to_one_another():
    model = Halve(torch.rand(1, 3, 16, 16), noise_std=0.01)
    estimate = torch.rand(3, 3, 16, 16)
    together = model.proximal(estimate, torch.tensor([0.4]), ratio=0.1)
    alone = model.proximal(estimate[1:2], torch.tensor([0.4]), ratio=0.1)
    assert torch.allclose(together[1:2], alone, atol=1e-6)


def test_coarse_and_fine_pictures_lie_on_one_another():
    # A ramp is its own blurred picture, so that nothing but a shift could change it.
    ramp = torch.linspace(0.2, 0.8, 24).expand(1, 3, 20, 24).contiguous()
    for scale in (2, 3, 4):
        model = SuperResolutionModel(ramp, scale=scale, kernel_size=5, noise_std=0.01)
        delta = torch.zeros(1, 1, 5, 5)
        delta[..., 2, 2] = 1
        assert model.crop(model.padded).shape[-2:] == (20 * scale, 24 * scale)
        misfit = (model.simulate(model.padded, delta) - model.target) * model.mask
        inner = misfit[..., 8:-8, 8:-8]
        step = 0.6 / 23
        # Half a fine pixel where the factor is even; torch's bicubic is not exact on ramps.
        allowed = 0.5 / scale + 0.05 if scale % 2 == 0 else 0.0
        assert float(inner.abs().max()) <= (allowed + 1e-3) * step


@pytest.mark.parametrize(("family", "size"), [("defocus", 3.3), ("gaussian", 1.7)])
@pytest.mark.parametrize("assumed", [0.6, 1.5])
def test_family_m_step_finds_the_size(family, size, assumed):
    kernel = family_kernels(family, 17, torch.tensor([size]))
    observed = ext.blur_conv2d(scene(160), kernel, boundary="valid")
    observed = observed + 0.01 * torch.randn_like(observed)
    model = FamilyBlurModel(observed, kernel_size=17, noise_std=0.01, family=family)
    assert model.size_of(model.start_parameters()) == pytest.approx(size, rel=0.2)
    # From an image that a wrong size has restored, and noise rings in.
    wrong = family_kernels(family, 17, torch.tensor([assumed * size]))
    image = model.proximal(model.padded, wrong, ratio=0.01)
    found = model.size_of(model.update(image, wrong, EdgeStepSettings(momentum=0)))
    assert abs(found - size) < 0.75 * abs(assumed - 1) * size


def test_varying_m_step_tells_the_patches_apart():
    kernels = torch.zeros(1, 2, 9, 9)
    kernels[0, 0, 4, 1:8] = kernels[0, 1, 1:8, 4] = 1 / 7
    sharp = scene(136)
    weights = ext.blend_windows(136, 136, 1, 2, 68)
    observed = ext.varying_blur2d(sharp, kernels[0], weights, boundary="valid")
    model = VaryingBlurModel(observed, grid=(1, 2), kernel_size=9, noise_std=0.01)
    image = model.padded.clone()
    model.crop(image).copy_(sharp[..., 4:-4, 4:-4])
    start = torch.full((1, 2, 9, 9), 1 / 81)
    found = model.update(image, start, EdgeStepSettings(denoiser_share=0, momentum=0))
    for patch in range(2):
        # Whatever its place: a flat kernel before tells none.
        own, other = (
            maximum_normalized_correlation(found[:, patch : patch + 1], kernels[:, p : p + 1])
            for p in (patch, 1 - patch)
        )
        assert own > 0.85 and own > 1.5 * other
    assert torch.allclose(found.sum((-2, -1)), torch.ones(1, 2), atol=1e-5)


@pytest.mark.parametrize(("model", "parameters"), MODELS)
def test_hyper_laplacian_takes_any_linear_model(model, parameters):
    settings = HyperLaplacianSettings(weight=1e-3, beta_last=1.0, alternations=6, solver_steps=30)
    values = []
    image = hyper_laplacian(
        model, parameters, settings, progress=lambda _, value: values.append(value)
    )
    assert image.shape == model.padded.shape
    # Half-quadratic splitting: at one beta it never rises.
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(values))
    assert objective(model, parameters, image, settings) < objective(
        model, parameters, model.padded, settings
    )


@pytest.mark.parametrize(("model", "parameters"), MODELS[:-1])
def test_power_is_that_of_the_operator(model, parameters):
    noise = torch.randn(16, 1, *model.canvas, dtype=torch.float64)
    kept = float((noise * model.adjoint(model.simulate(noise, parameters), parameters)).mean())
    height, width = model.canvas
    both = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)  # the other half, too
    both[0] = both[-1] = 1
    expected = float((model.power(parameters) * both).sum()) / (height * width)
    # Where patches are cross-faded the squares of their weights do not sum to one.
    varies = isinstance(model, VaryingBlurModel)
    assert kept == pytest.approx(expected, rel=0.5 if varies else 0.1)


def test_super_resolution_starts_in_fine_pixels():
    kernel = random_motion_kernel(13, seed=3)
    observed = ext.blur_downsample2d(scene(204), kernel, 2, boundary="valid")
    model = SuperResolutionModel(
        observed, scale=2, kernel_size=13, noise_std=0.005, kernel_prior=load_kernel_prior()
    )
    assert model.searches
    found = model.start_parameters()
    assert found.shape == (1, 1, 13, 13)
    assert maximum_normalized_correlation(found, kernel) > 0.8
    # The same in coarse pixels is half as long.
    coarse = torch.nn.functional.interpolate(kernel, scale_factor=0.5, mode="area")
    assert maximum_normalized_correlation(found, coarse) < 0.8


def test_super_resolution_m_step_finds_the_kernel_of_the_true_image():
    kernel = random_motion_kernel(9, seed=3)
    sharp = scene(168)
    observed = ext.blur_downsample2d(sharp, kernel, 2, boundary="valid")
    model = SuperResolutionModel(observed, scale=2, kernel_size=9, noise_std=0.005)
    image = model.padded.clone()
    model.crop(image).copy_(sharp[..., 4:-4, 4:-4])
    found = torch.full((1, 1, 9, 9), 1 / 81)
    for _ in range(6):
        found = model.update(image, found, EdgeStepSettings(denoiser_share=0, momentum=0))
    assert maximum_normalized_correlation(found, kernel) > 0.9


@pytest.mark.parametrize(
    ("options", "kernels", "factor"),
    [
        ({"blur": "defocus"}, 1, 1),
        ({"blur": "gaussian", "boundary": "circular"}, 1, 1),
        ({"scale": 2}, 1, 2),
        ({"scale": 3, "boundary": "circular"}, 1, 3),
        ({"grid": 2}, 4, 1),
        ({"grid": (1, 2), "boundary": "circular"}, 2, 1),
    ],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_deblur_by_each_model(options, kernels, factor, channels, tmp_path):
    image = torch.rand(1, channels, 40, 36)
    result = latentdem.deblur(image, **options, **FAST)
    assert result.image.shape == (1, channels, 40 * factor, 36 * factor)
    assert result.kernel.shape == (1, kernels, 9, 9)
    assert torch.allclose(result.kernel.sum((-2, -1)), torch.ones(1, kernels), atol=1e-4)
    assert torch.isfinite(result.image).all()
    again = latentdem.deblur(image, **options, **FAST)
    assert torch.equal(again.image, result.image)
    result.save(tmp_path)
    saved = np.load(tmp_path / "kernel.npy")
    assert saved.shape == ((9, 9) if kernels == 1 else (kernels, 9, 9))
    assert open_image(tmp_path / "restored.png").size == (36 * factor, 40 * factor)
    known = latentdem.deblur(image, kernel=result.kernel, noise_std=0.01, steps=1, **options)
    assert torch.allclose(known.kernel, result.kernel, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur": "fog"}, "blur must be one of motion, defocus, gaussian, found 'fog'"),
        ({"scale": 5}, "scale must be one of 1, 2, 3, 4, found 5"),
        ({"grid": 0}, "grid must be positive"),
        ({"grid": 6}, "take a coarser grid"),
        ({"grid": 2, "scale": 2}, "cannot be combined"),
        ({"scale": 2, "method": "paper"}, "use method 'prox'"),
        ({"grid": 2, "kernel": torch.ones(1, 1, 3, 3)}, r"kernel must have shape \[1, 4, 3, 3\]"),
        ({"scale": 2, "tile": 64, "image": torch.rand(1, 1, 64, 64)}, "in one piece"),
    ],
)
def test_bad_options(options, message):
    image = options.pop("image", torch.rand(1, 3, 40, 36))
    with pytest.raises(ValueError, match=message):
        latentdem.deblur(image, **({} if "kernel" in options else {"kernel_size": 9}), **options)


def test_default_kernel_sizes():
    assert ModelOptions().default_kernel_size(256, 300) == 25
    assert ModelOptions().default_kernel_size(2000, 3000) == 35
    assert ModelOptions(scale=2).default_kernel_size(100, 90) == 21
    assert ModelOptions(scale=4).default_kernel_size(8, 9) == 31
    assert ModelOptions().default_kernel_size(8, 9) == 7


def test_command_line(tmp_path):
    photo = tmp_path / "photo.png"
    to_pil(torch.rand(3, 40, 36)).save(photo)
    common = ("-o", tmp_path / "out", "--kernel-size", 9, "--steps", 1)
    done = invoke("deblur", photo, *common, "--grid", "1x2", "--trace")
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "out" / "kernel.npy").shape == (2, 9, 9)
    done = invoke("deblur", photo, *common, "--scale", 2)
    assert done.exit_code == 0, done.output
    assert open_image(tmp_path / "out" / "restored.png").size == (72, 80)
    done = invoke("deblur", photo, *common, "--blur", "defocus")
    assert done.exit_code == 0, done.output
    failed = invoke("deblur", photo, *common, "--grid", "three")
    assert failed.exit_code == 1
    assert "--grid takes 3 or 3x2" in failed.output


def test_kernel_sheet():
    kernels = torch.arange(1.0, 7.0)[:, None, None].expand(6, 3, 3)
    assert kernel_sheet(kernels[:1]).equal(kernels[0])
    sheet = kernel_sheet(kernels, 2)
    assert sheet.shape == (3 * 4 - 1, 2 * 4 - 1)
    assert float(sheet[0, 0]) == float(sheet[-1, -1]) == 1
    assert float(sheet[3].sum()) == 0


def test_upsample_keeps_corners():
    ramp = torch.linspace(0, 1, 8).expand(1, 1, 8, 8)
    assert torch.allclose(
        upsample(ramp, 3)[..., 1::3][..., 2:-2], ramp[..., 2:-2].repeat_interleave(3, -2), atol=1e-6
    )


def test_invert_refuses_other_channels():
    with pytest.raises(ValueError, match=r"must be \[1,3,H,W\]"):
        latentdem.invert(Halve(torch.rand(1, 1, 8, 8), noise_std=0.01))


def test_own_operator(capsys):
    main = runpy.run_path(str(EXAMPLES / "own_operator.py"))["main"]
    found, before, after = main(side=96, length=11, steps=3)
    assert found == 11
    assert after < 0.6 * before
    assert "11 pixels" in capsys.readouterr().out
