"""The packaged priors, loading, and the training loop's resume."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from torch import nn

import latentdem
from latentdem.evaluate import photograph_crop
from latentdem.metrics import maximum_normalized_correlation, psnr
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors import kernel as kernel_priors
from latentdem.priors import latent as latent_priors
from latentdem.priors.latent import LatentPrior
from latentdem.priors.packaged import packaged_files
from latentdem.training.common import TrainingPlan, choose_device, lighten_norms, train


@pytest.fixture(scope="module")
def prior():
    return latentdem.load_prior()


def test_packaged_weights_are_small_and_described():
    files = packaged_files()
    assert sum(path.stat().st_size for path in files) < 40e6
    for path in files:
        assert path.with_suffix(".md").stat().st_size > 500


def test_round_trip_of_an_unseen_photograph(prior):
    image = photograph_crop("astronaut", 256)
    with torch.no_grad():
        latents = prior.encode(image)
        assert latents.shape == (1, prior.latent_mean.shape[0], 64, 64)
        assert 0.5 < float(latents.std()) < 2
        assert float(psnr(prior.decode(latents, (256, 256)), image)) > 27


@pytest.mark.parametrize("size", [(16, 16), (50, 33), (1, 7)])
def test_sizes_are_padded_and_cropped(prior, size):
    with torch.no_grad():
        image = torch.rand(1, 3, *size)
        assert prior.decode(prior.encode(image), size).shape == image.shape


def test_prior_denoises(prior):
    image = photograph_crop("coffee", 128)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = prior.encode(image)
        for timestep in (100, 300, 600):
            abar = float(prior.alphas_cumprod[timestep])
            noise = torch.randn(latents.shape, generator=generator)
            noisy = abar**0.5 * latents + (1 - abar) ** 0.5 * noise
            estimate, epsilon = prior.predict(noisy, timestep)
            identity = (noisy / abar**0.5 - latents).square().mean()
            assert (estimate - latents).square().mean() < 0.5 * identity
            torch.testing.assert_close(
                abar**0.5 * estimate + (1 - abar) ** 0.5 * epsilon, noisy, rtol=1e-4, atol=1e-4
            )


def test_calibration_rises_with_the_noise(prior):
    values = [prior.error_std(t) for t in (0, 100, 300, 600, 999)]
    assert values == sorted(values)
    assert 0 < values[0] < 0.1
    assert prior.error_std(-5) == values[0]


def test_kernel_prior_cleans_a_kernel():
    model = latentdem.load_kernel_prior()
    kernel = random_motion_kernel(25, seed=42)
    noisy = (kernel + 0.1 * kernel.max() * torch.randn(kernel.shape)).clamp_min(0)
    with torch.no_grad():
        clean = model(noisy / noisy.sum())
    assert float(clean.sum()) == pytest.approx(1, abs=1e-5)
    assert clean.min() >= 0
    before = maximum_normalized_correlation(noisy, kernel)
    assert maximum_normalized_correlation(clean, kernel) > before


@pytest.mark.parametrize("loader", [latentdem.load_prior, latentdem.load_kernel_prior])
def test_loading_errors(loader, tmp_path):
    with pytest.raises(FileNotFoundError, match="train one with: latentdem train"):
        loader(tmp_path / "missing.safetensors")
    pickle = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, pickle)
    with pytest.raises(ValueError, match="is not a"):
        loader(pickle)
    with pytest.raises(ValueError, match=r"not a .*prior"):
        swapped = loader is latentdem.load_prior
        loader(kernel_priors.PACKAGED if swapped else latent_priors.PACKAGED)


def test_a_users_own_diffusers_model_works():
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    denoiser = UNet2DModel(in_channels=4, out_channels=4, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    own = LatentPrior.from_diffusers(autoencoder, denoiser, DDIMScheduler(), images=images)
    assert own.prediction_type == "epsilon"
    result = latentdem.deblur(images[:1], prior=own, kernel_size=5, noise_std=0.01, steps=2)
    assert torch.isfinite(result.image).all()
    assert result.report["prior"] == "custom"


def test_training_resumes_from_its_checkpoint(tmp_path: Path):
    """A run in two halves has as many steps as it should, and keeps its optimiser's state."""

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        steps.append(step)
        return (model(torch.ones(1, 3, 4, 4)) - 2).square().mean()

    steps: list[int] = []
    checkpoint = tmp_path / "run.safetensors"
    model = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
    short = TrainingPlan(minutes=0.005, learning_rate=1e-2, report_every=10**6)
    first = train("t", model, loss, short, checkpoint, resume=True)
    half = len(steps)
    again = train("t", nn.Conv2d(3, 2, 3), loss, short, checkpoint, resume=True)
    assert len(steps) == half  # its minutes are spent: nothing to do
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    long = TrainingPlan(minutes=0.01, learning_rate=1e-2, report_every=10**6)
    train("t", nn.Conv2d(3, 2, 3), loss, long, checkpoint, resume=True)
    assert steps == list(range(len(steps)))
    assert len(steps) > half


def test_training_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used"):
        choose_device("abacus")
    with pytest.raises(ValueError, match="training runs on cpu and cuda"):
        choose_device("meta")


def test_norms_keep_the_type_of_what_they_get():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.GroupNorm(2, 4), nn.LayerNorm(6)])
    for norm in model:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, 6)
    expected = [norm(x) for norm in model]
    lighten_norms(model)
    for norm, value in zip(model, expected, strict=True):
        assert torch.equal(norm(x), value)
        with torch.autocast("cpu", torch.bfloat16):
            half = norm(x.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), value, atol=0.05, rtol=0.05)
        half.float().square().sum().backward()
        assert norm.weight.grad.dtype == torch.float32 and norm.weight.grad.abs().min() > 0
    for plain in (nn.LayerNorm(6, bias=False), nn.GroupNorm(2, 4, affine=False)):
        value = plain(x)
        lighten_norms(plain)
        assert torch.equal(plain(x), value)
