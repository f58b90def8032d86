"""Methods to compare with: each does what its equations say, and the suite keeps its books."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from em.test_blur_model import scene
from rich.console import Console
from typer.testing import CliRunner

import latentdem
import latentdem_ext as ext
from latentdem import evaluate_baselines
from latentdem.baselines import (
    ROWS,
    BlindDPSSettings,
    ClassicalSettings,
    FastEMSettings,
    HyperLaplacianSettings,
    Row,
    choose_rows,
    hyper_laplacian,
    restore,
)
from latentdem.baselines.blind_dps import (
    image_gradient,
    kernel_descent,
    kernel_gradient,
    kernel_weight,
)
from latentdem.baselines.common import first_kernel
from latentdem.baselines.fast_em import denoised_kernel, guided_prediction
from latentdem.cli import app
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.evaluate_baselines import run_baselines, summarize
from latentdem.metrics import maximum_normalized_correlation, psnr
from latentdem.operators.blur import BlurModel
from latentdem.operators.hyper_laplacian import _shrink, objective
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors.kernel import load_kernel_prior

QUIET = Console(quiet=True)
KERNEL = random_motion_kernel(9, seed=2)


def observe(side=72, seed=0):
    """A blurred, noisy scene ``[1,3,side-8,side-8]`` and the sharp one under it."""
    sharp = scene(side, seed)
    blurred = ext.blur_conv2d(sharp, KERNEL, boundary="valid")
    noise = torch.randn(blurred.shape, generator=torch.Generator().manual_seed(seed))
    return (blurred + 0.01 * noise).clamp(0, 1), sharp[..., 4:-4, 4:-4]


@pytest.fixture(scope="module")
def problem():
    observed, sharp = observe()
    return BlurModel(observed, kernel_size=9, noise_std=0.01), observed, sharp


# Non-blind deconvolution ----------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 2 / 3, 1.0])
@pytest.mark.parametrize("beta", [1.0, 30.0])
def test_shrinkage_is_the_minimiser(exponent, beta):
    values = torch.arange(-30, 31).double() / 10
    grid = torch.arange(-30000, 30001).double() / 10000
    cost = grid.abs().pow(exponent) + beta / 2 * (grid - values[:, None]).square()
    found = _shrink(values, beta, exponent)
    own = found.abs().pow(exponent) + beta / 2 * (found - values).square()
    assert (own - cost.amin(1)).abs().max() < 1e-6
    assert float(found[30]) == 0 and torch.equal(found, -found.flip(0))


def test_hyper_laplacian_sharpens_and_its_objectives_fall(problem):
    model, observed, sharp = problem
    settings = HyperLaplacianSettings(alternations=3)
    steps = []
    image = hyper_laplacian(model, KERNEL, settings, progress=lambda *step: steps.append(step))
    assert float(psnr(model.crop(image), sharp)) > float(psnr(observed, sharp)) + 5
    assert len(steps) == 3 * 6
    for (beta, before), (same, after) in pairwise(steps):
        assert beta != same or after <= before * (1 + 1e-6)
    assert objective(model, KERNEL, image, settings) < 0.5 * objective(
        model, KERNEL, model.padded, settings
    )
    flat = hyper_laplacian(model, KERNEL, replace(settings, weight=1.0))
    assert float(model.crop(flat).std()) < 0.5 * float(sharp.std())


class AnyLinear(BlurModel):
    """The same blur, of which the solver does not know that it is a convolution."""

    def simulate(self, image, kernel):
        return super().simulate(image, kernel)


@pytest.mark.parametrize(("boundary", "size"), [("valid", (30, 41)), ("circular", (33, 27))])
@pytest.mark.parametrize("channels", [1, 3])
def test_hyper_laplacian_is_the_same_on_pictures_and_on_spectra(boundary, size, channels):
    observed = observe()[0][:, :channels, : size[0], : size[1]].double()
    told = {"kernel_size": 9, "noise_std": 0.01, "boundary": boundary}
    model, other = BlurModel(observed, **told), AnyLinear(observed, **told)
    kernel = KERNEL.double()
    assert model.transfer(kernel) is not None and other.transfer(kernel) is None
    values = []
    found, expected = (
        hyper_laplacian(
            each, kernel, HyperLaplacianSettings(), progress=lambda _, value: values.append(value)
        )
        for each in (model, other)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(values[: len(values) // 2], values[len(values) // 2 :])


@pytest.mark.parametrize(("side", "peak", "seed"), [(24, 1.0, 2), (40, 0.95, 1), (24, 0.82, 0)])
def test_hyper_laplacian_stops_where_it_has_converged(side, peak, seed):
    """Everything is known and hardly blurred: conjugate gradients are done in a step or two."""
    observed = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
    kernel = torch.zeros(1, 1, 9, 9)
    kernel[..., 4, 3:6] = torch.tensor([(1 - peak) / 2, peak, (1 - peak) / 2])
    model = BlurModel(observed, kernel_size=9, noise_std=0.01, boundary="circular")
    image = hyper_laplacian(model, kernel, HyperLaplacianSettings(weight=5e-4))
    assert torch.isfinite(image).all()
    assert float(model.residual_variance(image, kernel)) < 0.1**2


@pytest.mark.parametrize("name", ["wiener", "richardson-lucy", "hyper-laplacian"])
def test_deconvolutions_with_the_true_kernel(problem, name):
    _, observed, sharp = problem
    row = Row(ClassicalSettings(name), kernel_prior=False, true_kernel=True)
    (state,) = restore(row, observed, kernel_size=9, noise_std=0.01, true_kernel=KERNEL)
    assert float(psnr(state.image, sharp)) > float(psnr(observed, sharp)) + 2.5
    assert torch.equal(state.kernel, KERNEL)
    assert state.evaluations == state.backward_passes == 0


# BlindDPS -------------------------------------------------------------------------------


def test_blind_dps_gradients_are_those_of_the_stated_losses():
    observed, _ = observe(40)
    model = BlurModel(observed.double(), kernel_size=9, noise_std=0.01)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, *model.canvas, generator=generator, dtype=torch.float64)
    kernel = KERNEL.double() + 0.01
    image.requires_grad_()
    kernel.requires_grad_()

    def blur(x):
        power = torch.fft.fft2(torch.nn.functional.pad(
            kernel, (0, model.canvas[1] - 9, 0, model.canvas[0] - 9)
        ).roll((-4, -4), (-2, -1)))  # fmt: skip
        return torch.fft.ifft2(torch.fft.fft2(x) * power).real

    residual = (model.mask * (blur(image) - model.padded)).norm()
    (expected,) = torch.autograd.grad(residual, image)
    value, gradient = image_gradient(model, image.detach(), kernel.detach())
    assert value == pytest.approx(residual.item(), rel=1e-9)
    assert (gradient - expected).abs().max() < 1e-9

    loss = 0
    for axis in (-2, -1):
        x, y = (a.roll(-1, axis) - a for a in (image, model.padded))
        loss = loss + 0.5 * (kernel_weight(model) * (blur(x) - y).square()).sum()
    (expected,) = torch.autograd.grad(loss, kernel)
    value, gradient = kernel_gradient(model, image.detach(), kernel.detach())
    assert value == pytest.approx(loss.item(), rel=1e-9)
    assert (gradient - expected).abs().max() < 1e-8 * expected.abs().max()


def test_kernel_descent_finds_the_kernel_of_a_sharp_image(problem):
    model, _, sharp = problem
    image = model._pad(sharp)
    settings = BlindDPSSettings(kernel_step=1.0, denoising=0.0)
    kernel, losses = model.initial_kernel(), []
    for _ in range(60):
        losses.append(kernel_gradient(model, image, kernel)[0])
        kernel = kernel_descent(model, image, kernel, settings)
        assert kernel.min() >= 0 and float(kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert float(maximum_normalized_correlation(model.initial_kernel(), KERNEL)) < 0.7
    assert float(maximum_normalized_correlation(kernel, KERNEL)) > 0.97


# Fast EM --------------------------------------------------------------------------------


def gaussian_prior(abar, slope=1.0):
    """Unit Gaussian latents that are the pixels; ``slope`` scales the network's Jacobian."""
    return SimpleNamespace(
        alphas_cumprod=torch.tensor([abar], dtype=torch.float64),
        encode=lambda image: image,
        decode=lambda latents, size: latents,
        predict=lambda z, t: (abar**0.5 * (slope * z + (1 - slope) * z.detach()), None),
    )


@pytest.mark.parametrize("abar", [0.05, 0.5, 0.95])
def test_guidance_is_exact_for_a_gaussian(abar):
    generator = torch.Generator().manual_seed(0)
    side, sigma = 12, 0.2
    kernel = random_motion_kernel(3, seed=1).double()
    observed, noisy = torch.randn(2, 1, 1, side, side, generator=generator, dtype=torch.float64)
    model = BlurModel(observed, kernel_size=3, noise_std=sigma, boundary="circular")
    noisy.requires_grad_()
    prior = gaussian_prior(abar)
    clean, _ = prior.predict(noisy, 0)
    variance = 1 - abar
    found = guided_prediction(
        prior, model, noisy, clean, clean.detach(), 0, kernel,
        image_std=variance**0.5, noise_std=sigma,
    )  # fmt: skip
    basis = torch.eye(side**2, dtype=torch.float64).reshape(-1, 1, side, side)
    blur = ext.blur_conv2d(basis, kernel, boundary="circular").flatten(1).T
    mean = abar**0.5 * noisy.detach().flatten()
    system = variance * blur @ blur.T + sigma**2 * torch.eye(side**2, dtype=torch.float64)
    misfit = torch.linalg.solve(system, observed.flatten() - blur @ mean)
    expected = mean + variance * blur.T @ misfit
    assert (found.flatten() - expected).abs().max() < 1e-9


def test_guidance_never_outruns_its_target():
    observed, noisy = torch.rand(2, 1, 1, 12, 12)
    model = BlurModel(observed, kernel_size=3, noise_std=0.1, boundary="circular")
    noisy.requires_grad_()
    lengths = []
    for slope in (0.5, 1.0, 20.0):
        prior = gaussian_prior(0.5, slope)
        clean, _ = prior.predict(noisy, 0)
        found = guided_prediction(
            prior, model, noisy, clean, clean.detach(), 0, KERNEL[..., 3:6, 3:6],
            image_std=0.5, noise_std=0.1,
        )  # fmt: skip
        lengths.append((found - clean).norm().item())
    assert lengths[0] == pytest.approx(0.5 * lengths[1], rel=1e-4)
    assert lengths[2] == pytest.approx(lengths[1], rel=1e-4)


def test_plug_and_play_step_finds_the_kernel(problem):
    model, observed, sharp = problem
    model = BlurModel(observed, kernel_size=9, noise_std=0.01, kernel_prior=load_kernel_prior())
    with torch.no_grad():
        kernel = denoised_kernel(
            model, model._pad(sharp), model.initial_kernel(), 0.0, FastEMSettings()
        )
    assert float(maximum_normalized_correlation(kernel, KERNEL)) > 0.9


# All rows -------------------------------------------------------------------------------


def small(row):
    """The row with as little work as its code allows."""
    settings = row.settings
    if isinstance(settings, ClassicalSettings):
        return row
    if isinstance(settings, ProxSettings):
        return replace(row, settings=replace(settings, steps=2, chains=1))
    return replace(row, settings=replace(settings, steps=2))


@pytest.mark.parametrize("name", ROWS)
def test_rows_give_kernels_heed_seeds_and_know_no_batch_mates(name):
    row = small(ROWS[name])
    pair = torch.cat([observe(40, seed)[0] for seed in (0, 1)])
    options = {"kernel_size": 9, "noise_std": 0.01, "true_kernel": KERNEL}
    together = restore(row, pair, seed=3, **options)
    (alone,) = restore(row, pair[1:], seed=3, **options)
    assert torch.equal(together[1].image, alone.image)
    assert torch.equal(together[1].kernel, alone.kernel)
    for state in together:
        assert state.image.shape == (1, 3, 32, 32)
        assert 0 <= float(state.image.min()) <= float(state.image.max()) <= 1
        assert state.kernel.shape == (1, 1, 9, 9) and float(state.kernel.min()) >= 0
        assert float(state.kernel.sum()) == pytest.approx(1, abs=1e-5)
    (other,) = restore(row, pair[1:], seed=4, **options)
    assert row.random != torch.equal(other.image, alone.image)
    gradients = isinstance(row.settings, PaperSettings | BlindDPSSettings | FastEMSettings)
    assert alone.backward_passes == (2 if gradients else 0)
    assert torch.equal(alone.kernel, KERNEL) == row.true_kernel


def test_rows_of_this_package_are_what_deblur_does(problem):
    _, observed, _ = problem
    for name, method in (("prox", "prox"), ("paper", "paper")):
        row = small(ROWS[name])
        (state,) = restore(row, observed, kernel_size=9, noise_std=0.01, seed=5)
        result = latentdem.deblur(
            observed, kernel_size=9, noise_std=0.01, seed=5, method=method, settings=row.settings
        )
        assert torch.equal(state.image, result.image)
        assert torch.equal(state.kernel, result.kernel)


def test_rows_are_what_they_are_called():
    dps = ROWS["dps-em"].settings
    assert dps.annealing == "constant" and dps.every == 1
    assert ROWS["paper"].settings.every == 4
    assert ROWS["paper, every step"].settings == replace(ROWS["paper"].settings, every=1)
    assert not ROWS["l0"].kernel_prior and ROWS["l0 + kernel prior"].kernel_prior
    assert ROWS["search"].settings.search and not ROWS["l0 + kernel prior"].settings.search
    assert [name for name, row in ROWS.items() if row.true_kernel] == [
        "hyper-laplacian, true kernel", "prox, true kernel",
    ]  # fmt: skip
    assert {name for name, row in ROWS.items() if not row.random} >= {"l0", "wiener"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_rows(["prox", "magic"]), "rows must be among: .*found 'magic'"),
        (lambda: choose_rows([]), "rows must be among"),
        (lambda: restore(ROWS["prox, true kernel"], torch.rand(1, 3, 32, 32), kernel_size=5,
                         noise_std=0.01), "needs the true kernel"),
        (lambda: HyperLaplacianSettings(weight=0.0), "weight must be positive"),
        (lambda: HyperLaplacianSettings(exponent=1.5), "exponent must lie in"),
        (lambda: ClassicalSettings("inverse"), "deconvolution must be one of"),
        (lambda: FastEMSettings(steps=0), "steps must be positive"),
        (lambda: FastEMSettings(fresh_noise=2.0), "fresh_noise must lie in"),
        (lambda: BlindDPSSettings(kernel_steps=0), "kernel_steps must be positive"),
        (lambda: BlindDPSSettings(denoising=2.0), "denoising must lie in"),
        (lambda: first_kernel(BlurModel(torch.rand(1, 3, 16, 16), kernel_size=3, noise_std=0.1),
                              "dot"), "first_kernel must be one of"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The suite ------------------------------------------------------------------------------


def test_suite_measures_resumes_and_refuses_another_setup(tmp_path, monkeypatch):
    whole = evaluate_baselines.observe

    def cropped(*arguments, **options):
        return tuple(image[..., 80:176, 80:176] for image in whole(*arguments, **options))

    monkeypatch.setattr(evaluate_baselines, "observe", cropped)
    names = ["l0", "prox", "prox, true kernel"]
    rows = {name: small(ROWS[name]) for name in names}
    output = tmp_path / "baselines.json"
    options = {"images": 1, "kernels": 1, "kernel_size": 9, "console": QUIET}
    first = run_baselines(output, rows=rows, **options)
    assert [r["row"] for r in first["rows"]] == names
    wanted = {
        "psnr_blind", "psnr_blind_raw", "ssim_blind", "vif_blind", "mnc", "kernel_rmse",
        "error_ratio", "network_evaluations", "backward_passes", "seconds", "peak_mb", "picture",
    }  # fmt: skip
    assert all(wanted <= set(r) for r in first["rows"])
    ceiling = first["rows"][2]
    assert ceiling["mnc"] == pytest.approx(1) and ceiling["error_ratio"] == 1
    assert first["rows"][0]["psnr_true_kernel"] == ceiling["psnr_blind"]
    assert first["rows"][0]["network_evaluations"] == 0 < ceiling["network_evaluations"]
    summary = first["summary"]
    assert list(summary) == names
    assert summary["prox"]["difference"] == 0
    expected = first["rows"][0]["psnr_blind"] - first["rows"][1]["psnr_blind"]
    assert summary["l0"]["difference"] == pytest.approx(expected)
    page = output.with_suffix(".html").read_text()
    assert page.count("<img") == 3 and "prox, true kernel" in page

    asked = []

    def measure(self, row, picture):
        asked.append((self.seed, picture.name))
        return {k: v for k, v in first["rows"][1].items() if k not in ("row", "seed")}

    monkeypatch.setattr(evaluate_baselines.Pair, "measure", measure)
    again = run_baselines(output, rows=rows, seeds=2, **options)
    # What is there is kept, and another seed is nothing to a method without random numbers.
    assert asked == [(1, "astronaut-0-1-prox.png"), (1, "astronaut-0-1-prox-true_kernel.png")]
    assert again["rows"][:3] == first["rows"]
    assert json.loads(output.read_text()) == again
    with pytest.raises(ValueError, match="another setup"):
        run_baselines(output, rows=rows, noise_std=0.02, **options)


def record(row, image, value, seed=0):
    return {
        "row": row, "image": image, "kernel": 0, "seed": seed, "psnr_input": 20.0,
        "psnr_blind": value, "psnr_blind_raw": value, "ssim_blind": 0.5, "vif_blind": 0.5,
        "mnc": 0.9, "kernel_rmse": 0.01, "kernel_peak": 0.6 if row == "l0" else 0.1,
        "error_ratio": 4.0, "seconds": 2.0, "network_evaluations": 0, "backward_passes": 0,
        "peak_mb": None,
    }  # fmt: skip


def test_differences_are_paired():
    found = summarize(
        [
            record("prox", "a", 25.0), record("prox", "a", 27.0, seed=1), record("prox", "b", 30.0),
            record("l0", "a", 24.0), record("l0", "b", 29.0), record("l0", "c", 10.0),
        ]
    )  # fmt: skip
    assert found["l0"]["pairs"] == 3 and found["prox"]["pairs"] == 2
    assert found["l0"]["difference"] == pytest.approx(-1.5)  # without c, which prox lacks
    assert (found["l0"]["difference_low"], found["l0"]["difference_high"]) == (-2.0, -1.0)
    assert found["l0"]["share_no_blur"] == found["l0"]["share_failed"] == 1
    assert found["l0"]["peak_mb"] is None
    alone = summarize([record("l0", "a", 24.0)])
    assert alone["l0"]["difference"] is None
    assert evaluate_baselines.difference(alone["l0"]) == ""
    assert evaluate_baselines.difference(found["l0"]) == "-1.50 (-2.00 to -1.00)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "magic"], "rows must be among"),
        (["--images", "9"], "images must lie between 1 and 8"),
        (["--kernel-size", "8"], "kernel_size must be odd"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, arguments, message):
    output = tmp_path / "x.json"
    command = ["evaluate", "--suite", "baselines", "-o", str(output), *arguments]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert not output.exists()
