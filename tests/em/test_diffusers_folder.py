"""Pipelines in diffusers' layout, tiny and untrained, saved and read as the real ones are."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from em.diffusers_stand_in import (
    IMAGES,
    save_latent_diffusion,
    save_stable_diffusion,
    trajectory,
)
from typer.testing import CliRunner

import latentdem
from latentdem.cli import app
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.io import to_pil
from latentdem.priors import load_prior
from latentdem.priors.calibration import dead_leaves
from latentdem.priors.diffusers_folder import is_hub_id, load_diffusers_prior


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_stable_diffusion_as_diffusers_runs_it(tmp_path, prediction_type):
    folder, pipeline = save_stable_diffusion(tmp_path, prediction_type)
    prior = load_prior(folder, prompt="a cat", images=IMAGES)
    assert prior.prediction_type == prediction_type
    assert prior.name == "pipeline (StableDiffusionPipeline)"
    with torch.no_grad():
        z = pipeline.vae.encode(2 * IMAGES - 1).latent_dist.mode()
        torch.testing.assert_close(prior.encode(IMAGES), z * 0.18215, atol=1e-5, rtol=1e-5)
        ours = prior.decode(prior.encode(IMAGES), (64, 64))
        theirs = pipeline.vae.decode(z).sample / 2 + 0.5
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        noise = torch.randn(2, 4, 16, 16)
        expected = pipeline(
            ["a cat"] * 2, num_inference_steps=5, guidance_scale=1.0, latents=noise,
            output_type="latent", height=32, width=32,
        ).images  # fmt: skip
        steps = pipeline.scheduler.timesteps.tolist()
        found = trajectory(prior, noise, steps, float(pipeline.scheduler.final_alpha_cumprod))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    other = load_diffusers_prior(folder, images=IMAGES)
    assert not torch.equal(prior.predict(noise, 500)[0], other.predict(noise, 500)[0])


def test_unconditional_latent_diffusion_as_diffusers_runs_it(tmp_path):
    folder, pipeline = save_latent_diffusion(tmp_path)
    prior = load_prior(str(folder))
    scale = pipeline.vqvae.config.scaling_factor
    with torch.no_grad():
        z = pipeline.vqvae.encode(2 * IMAGES - 1).latents
        torch.testing.assert_close(prior.encode(IMAGES), z * scale, atol=1e-5, rtol=1e-5)
        theirs = pipeline.vqvae.decode(z).sample / 2 + 0.5
        ours = prior.decode(z * scale, (64, 64))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        pipeline.scheduler.set_timesteps(4)
        steps = pipeline.scheduler.timesteps.tolist()
        noise = torch.randn(1, 3, 16, 16)
        expected = noise
        for t in steps:
            output = pipeline.unet(expected, t).sample
            expected = pipeline.scheduler.step(output, t, expected).prev_sample
        found = trajectory(prior, noise, steps, float(pipeline.scheduler.final_alpha_cumprod))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="takes no text"):
        load_prior(folder, prompt="a cat")


def test_both_methods_and_the_command_take_a_folder(tmp_path):
    folder, _ = save_stable_diffusion(tmp_path)
    prior = load_prior(folder, images=IMAGES)
    for method, settings in (
        ("prox", ProxSettings(steps=2, chains=2)),
        ("paper", PaperSettings(steps=2, every=1, last=1)),
    ):
        result = latentdem.deblur(
            IMAGES, prior=prior, kernel_size=5, noise_std=0.01, method=method, settings=settings
        )
        assert bool(result.image.isfinite().all())
    photo = tmp_path / "photo.png"
    to_pil(IMAGES[0]).save(photo)
    command = ["deblur", str(photo), "-o", str(tmp_path / "out"), "--kernel-size", "5",
               "--steps", "1", "--prior", str(folder)]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prior"] == "pipeline (StableDiffusionPipeline)"


def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path):
    folder, _ = save_latent_diffusion(tmp_path)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"is a pickle.*weights_only=True.*\.bin .*\.safetensors"):
        load_prior(folder)


def test_what_is_no_prior(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no model_index\.json"):
        load_prior(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no prior at"):
        load_prior(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
        load_diffusers_prior(tmp_path / "missing" / "too")
    with pytest.raises(ValueError, match="only for priors in diffusers' layout"):
        load_prior(prompt="a cat")
    folder, pipeline = save_latent_diffusion(tmp_path)
    DDPMPipeline(pipeline.unet, DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    with pytest.raises(ValueError, match="is a DDPMPipeline; a prior needs an autoencoder"):
        load_prior(tmp_path / "pixels")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "Nothing"]}))
    with pytest.raises(ValueError, match="Nothing"):
        load_prior(folder)


def test_hub_ids_are_read_from_safetensors_only(monkeypatch):
    asked = []

    def refuse(source, **options):
        asked.append((source, options))
        raise OSError("not reachable\nmore")

    monkeypatch.setattr(
        "latentdem.priors.diffusers_folder.DiffusionPipeline.from_pretrained", refuse
    )
    with pytest.raises(ValueError, match=r"^owner/name: not reachable$"):
        load_prior("owner/name")
    ((source, options),) = asked
    assert source == "owner/name" and options["use_safetensors"] is True
    assert is_hub_id("owner/name-1.5") and not is_hub_id("a/b/c") and not is_hub_id("name")


def test_calibration_pictures_are_sharp_at_every_scale():
    pictures = dead_leaves(2, 64)
    assert pictures.shape == (2, 3, 64, 64)
    assert torch.equal(pictures, dead_leaves(2, 64)) and not torch.equal(*pictures)
    assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1

    def energy(x):
        return float(x.diff(dim=-1).square().mean())

    half = torch.nn.functional.avg_pool2d(pictures, 2)
    assert energy(pictures) / energy(half) > 0.45  # as the training photographs must be
