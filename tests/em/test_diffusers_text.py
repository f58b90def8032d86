"""Guidance, SDXL, distilled models and fast decoders, against diffusers' own pipelines."""

import json
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionXLImg2ImgPipeline,
)
from em.diffusers_stand_in import (
    SCHEDULE,
    kl_autoencoder,
    save_consistency_model,
    save_latent_diffusion,
    save_stable_diffusion,
    save_xl,
    text_unet,
    tiny_autoencoder,
    trajectory,
)
from typer.testing import CliRunner

import latentdem
from latentdem.batch import Options
from latentdem.batch.inputs import Item
from latentdem.batch.request import PRIOR_OPTIONS, Requests, digest
from latentdem.cli import app
from latentdem.devices import parse_dtype
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.io import to_pil
from latentdem.priors import LatentPrior, load_prior
from latentdem.priors.calibration import dead_leaves
from latentdem.priors.conditioning import guidance_embedding

# Of diffusers' schedulers, inside NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
IMAGES = dead_leaves(1, 32, seed=3)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@torch.no_grad()
def same_trajectory(prior, pipeline, channels=4, **options):
    noise = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = pipeline(
        num_inference_steps=5, latents=noise, output_type="latent", height=32, width=32, **options
    ).images
    steps = pipeline.scheduler.timesteps.tolist()
    found = trajectory(prior, noise, steps, float(pipeline.scheduler.final_alpha_cumprod))
    torch.testing.assert_close(found, expected, **CLOSE)
    return found


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_as_diffusers_guides(tmp_path, prediction_type):
    folder, pipeline = save_stable_diffusion(tmp_path, prediction_type)
    options = {"images": IMAGES, "prompt": "a cat"}
    plain = load_prior(folder, guidance=5, **options)
    found = same_trajectory(plain, pipeline, prompt=["a cat"] * 2, guidance_scale=5.0)
    negative = load_prior(folder, guidance=5.0, negative_prompt="cat", **options)
    other = same_trajectory(
        negative, pipeline, prompt=["a cat"] * 2, negative_prompt=["cat"] * 2, guidance_scale=5.0
    )
    assert not torch.allclose(found, other) and plain.guidance == 5.0
    assert len({*plain.digests(), *negative.digests()}) == 4  # two networks, two conditionings
    result = latentdem.deblur(
        IMAGES, prior=negative, kernel_size=5, settings=ProxSettings(steps=2, chains=2)
    )
    assert bool(result.image.isfinite().all())


def test_what_guidance_cannot_do(tmp_path):
    folder, _ = save_latent_diffusion(tmp_path / "no_text")
    with pytest.raises(ValueError, match="takes no text, found prompt and guidance: leave it out"):
        load_prior(folder, prompt="a cat", guidance=3.0, images=IMAGES)
    with pytest.raises(ValueError, match="takes no text, found negative_prompt"):
        load_prior(folder, negative_prompt="a cat", images=IMAGES)
    folder, _ = save_stable_diffusion(tmp_path)
    for scale in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"guidance must be at least 1 \(1: none\), found"):
            load_prior(folder, guidance=scale)
    with pytest.raises(ValueError, match="does nothing at guidance 1: pass guidance, 5 say"):
        load_prior(folder, negative_prompt="cat")


@pytest.mark.parametrize("force_zeros", [True, False])
def test_xl_as_diffusers_runs_it(tmp_path, force_zeros):
    folder, pipeline = save_xl(tmp_path, force_zeros=force_zeros)
    prior = load_prior(folder, prompt="a cat", guidance=5.0, images=IMAGES)
    assert prior.name == "pipeline (StableDiffusionXLPipeline)"
    same_trajectory(prior, pipeline, prompt=["a cat"] * 2, guidance_scale=5.0)
    prior = load_prior(folder, prompt="a", negative_prompt="cat", guidance=5.0, images=IMAGES)
    texts = {"prompt": ["a"] * 2, "negative_prompt": ["cat"] * 2}
    same_trajectory(prior, pipeline, **texts, guidance_scale=5.0)
    prior = load_prior(folder, images=IMAGES)
    same_trajectory(prior, pipeline, prompt=[""] * 2, guidance_scale=1.0)
    with torch.no_grad():
        z = pipeline.vae.encode(2 * IMAGES - 1).latent_dist.mode()
        torch.testing.assert_close(prior.encode(IMAGES), z * 0.13025, **CLOSE)
        theirs = pipeline.vae.decode(z).sample / 2 + 0.5
        torch.testing.assert_close(prior.decode(z * 0.13025, (32, 32)), theirs, **CLOSE)


def test_number_formats(tmp_path):
    folder, _ = save_xl(tmp_path / "xl", force_upcast=True)
    prior = load_prior(folder, dtype="fp16", images=IMAGES)
    assert prior.dtype == prior.denoiser.dtype == torch.float16
    assert prior.autoencoder.dtype == torch.float32
    assert prior.conditioning["added_cond_kwargs"]["time_ids"].dtype == torch.float16
    assert bool(prior.calibration_rmse.isfinite().all())
    for dtype, kept in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        other = prior.to(dtype=dtype)
        assert other.dtype == other.autoencoder.dtype == kept
    assert other.to(dtype="fp16").autoencoder.dtype == torch.float32
    assert prior.to(dtype=torch.float16) is prior
    result = latentdem.deblur(
        IMAGES, prior=prior, kernel_size=5, settings=PaperSettings(steps=2, every=1, last=1),
        method="paper",
    )  # fmt: skip
    assert bool(result.image.isfinite().all()) and result.report["dtype"] == "float16"
    folder, _ = save_xl(tmp_path / "fixed", force_upcast=False)
    assert load_prior(folder, dtype="fp16", images=IMAGES).autoencoder.dtype == torch.float16
    # Stable Diffusion 1's configuration says nothing, which diffusers reads as force_upcast=True
    # and heeds in SDXL alone.
    folder, _ = save_stable_diffusion(tmp_path / "one")
    prior = load_prior(folder, dtype=torch.float16, images=IMAGES)
    assert prior.autoencoder.dtype == prior.dtype == torch.float16
    assert load_prior(dtype="bf16").dtype == parse_dtype("bf16") == torch.bfloat16
    for wrong in ("half", torch.int32):
        with pytest.raises(ValueError, match="dtype must be fp32, fp16 or bf16"):
            load_prior(folder, dtype=wrong)


SCHEDULERS = [
    EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, PNDMScheduler, LCMScheduler,
    DPMSolverMultistepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_levels_of_every_scheduler(kind):
    parts = kl_autoencoder(), latentdem.load_prior().denoiser
    expected = DDIMScheduler(**SCHEDULE).alphas_cumprod
    options = {"timestep_spacing": "trailing", "steps_offset": 1}
    if kind is LCMScheduler:
        options["original_inference_steps"] = 50
    unused = torch.zeros(0, 3, 8, 8)

    def levels(scheduler):
        LatentPrior.calibrate, keep = lambda *_: None, LatentPrior.calibrate
        try:
            return LatentPrior.from_diffusers(*parts, scheduler, images=unused).alphas_cumprod
        finally:
            LatentPrior.calibrate = keep

    scheduler = kind(**SCHEDULE, **options)
    scheduler.set_timesteps(4)
    assert torch.equal(levels(scheduler), expected)
    betas = torch.linspace(0.001, 0.02, 50).tolist()
    trained = kind(trained_betas=betas, num_train_timesteps=50)
    assert torch.equal(levels(trained), (1 - torch.tensor(betas)).cumprod(0))
    if kind is not PNDMScheduler:
        zero = kind(**SCHEDULE, rescale_betas_zero_snr=True)
        reference = DDIMScheduler(**SCHEDULE, rescale_betas_zero_snr=True).alphas_cumprod
        assert reference[-1] == 0 and 0 <= levels(zero)[-1] < 1e-7
        torch.testing.assert_close(levels(zero)[:-1], reference[:-1])
    if kind is DPMSolverMultistepScheduler:
        flow = kind(**SCHEDULE, prediction_type="flow_prediction", use_flow_sigmas=True)
        with pytest.raises(ValueError, match="must be one of epsilon, v_prediction, sample"):
            levels(flow)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "kind", [partial(DDIMScheduler, clip_sample=False), EulerDiscreteScheduler]
)
def test_zero_terminal_signal(tmp_path, kind, prediction_type):
    scheduler = kind(
        **SCHEDULE, rescale_betas_zero_snr=True, prediction_type=prediction_type,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    folder, _ = save_stable_diffusion(tmp_path, scheduler=scheduler)
    prior = load_prior(folder, images=IMAGES)
    assert prior.alphas_cumprod[-1] < 1e-7
    assert bool(prior.calibration_rmse.isfinite().all()) and prior.calibration_rmse.max() < 5
    noisy = torch.randn(1, 4, 16, 16)
    z0, epsilon = prior.predict(noisy, 999)
    assert bool(z0.isfinite().all())
    torch.testing.assert_close(epsilon, noisy, atol=2e-3, rtol=0)
    for method, settings in (
        ("prox", ProxSettings(steps=2, chains=1, start=0.9999)),
        ("paper", PaperSettings(steps=3, every=1, last=1)),
    ):
        result = latentdem.deblur(
            IMAGES, prior=prior, kernel_size=5, noise_std=0.01, method=method, settings=settings
        )
        assert bool(result.image.isfinite().all())


@torch.no_grad()
def test_turbo_in_one_step(tmp_path):
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing", steps_offset=1)
    folder, pipeline = save_stable_diffusion(tmp_path, scheduler=scheduler)
    prior = load_prior(folder, prompt="a cat", images=IMAGES)
    noise = torch.randn(1, 4, 16, 16)
    expected = pipeline(
        "a cat", num_inference_steps=1, guidance_scale=0.0, latents=noise, output_type="latent",
        height=32, width=32,
    ).images  # fmt: skip
    (timestep,) = pipeline.scheduler.timesteps.tolist()
    # diffusers' Euler has z_t / sqrt(abar), and starts it from noise without the picture's part.
    abar = float(prior.alphas_cumprod[int(timestep)])
    found, _ = prior.predict((1 - abar) ** 0.5 * noise, int(timestep))
    # Divided by sqrt(abar) = 0.07, so values are large.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_consistency_model_as_diffusers_samples_it(tmp_path):
    scheduler = LCMScheduler(**SCHEDULE, steps_offset=1)
    folder, pipeline = save_consistency_model(tmp_path, scheduler)
    prior = load_prior(folder, prompt="a cat", guidance=8.0, images=IMAGES)
    assert prior.guidance == 1.0  # the network reads it
    noise = torch.randn(1, 4, 16, 16)
    expected = pipeline(
        "a cat", num_inference_steps=4, guidance_scale=8.0, latents=noise, output_type="latent",
        generator=torch.Generator().manual_seed(3), height=32, width=32,
    ).images  # fmt: skip
    steps = pipeline.scheduler.timesteps.tolist()
    generator, latents = torch.Generator().manual_seed(3), noise
    for here, after in zip(steps, [*steps[1:], None], strict=True):
        skip, out = pipeline.scheduler.get_scalings_for_boundary_condition_discrete(here)
        latents = out * prior.predict(latents, here)[0] + skip * latents
        if after is not None:
            abar = float(prior.alphas_cumprod[after])
            fresh = torch.randn(noise.shape, generator=generator)
            latents = abar**0.5 * latents + (1 - abar) ** 0.5 * fresh
    torch.testing.assert_close(latents, expected, **CLOSE)
    theirs = pipeline.get_guidance_scale_embedding(torch.tensor([7.0]), embedding_dim=11)
    torch.testing.assert_close(guidance_embedding(8.0, 11), theirs)
    with pytest.raises(ValueError, match="reads the guidance scale itself"):
        load_prior(folder, negative_prompt="cat", guidance=8.0)


def test_fast_decoder(tmp_path):
    folder, pipeline = save_stable_diffusion(tmp_path)
    tiny = tiny_autoencoder()
    tiny.save_pretrained(tmp_path / "tiny", safe_serialization=True)
    prior = load_prior(folder, fast_decoder=tmp_path / "tiny", images=IMAGES)
    slow = load_prior(folder, images=IMAGES)
    pipeline.vae = tiny
    noise = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(prior.encode(IMAGES), slow.encode(IMAGES))
        expected = pipeline(
            "", num_inference_steps=3, guidance_scale=1.0, latents=noise, output_type="pt",
            height=32, width=32,
        ).images  # fmt: skip
        steps = pipeline.scheduler.timesteps.tolist()
        z = trajectory(prior, noise, steps, float(pipeline.scheduler.final_alpha_cumprod))
    found = prior.decode(z, (32, 32))
    torch.testing.assert_close(found.clamp(0, 1), expected, **CLOSE)
    assert not torch.equal(prior.calibration_rmse, slow.calibration_rmse)
    z.requires_grad_()
    prior.decode(z, (32, 32)).square().sum().backward()
    assert float(z.grad.abs().sum()) > 0
    assert len(prior.digests()) == len(slow.digests()) + 1
    half = prior.to(dtype="bf16")
    assert half.decoder.dtype == torch.bfloat16 and prior.decoder.dtype == torch.float32
    for method, settings in (
        ("prox", ProxSettings(steps=2, chains=1)),
        ("paper", PaperSettings(steps=2, every=1, last=1)),
    ):
        result = latentdem.deblur(
            IMAGES, prior=half, kernel_size=5, noise_std=0.01, method=method, settings=settings
        )
        assert bool(result.image.isfinite().all())


def test_what_is_no_fast_decoder(tmp_path):
    folder, _ = save_stable_diffusion(tmp_path)
    with pytest.raises(ValueError, match="but AutoencoderKL"):
        load_prior(folder, fast_decoder=folder / "vae")
    with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
        load_prior(folder, fast_decoder=tmp_path / "missing" / "too")
    tiny_autoencoder(latent_channels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="decodes 3 channels to 2 times the side, the prior's"):
        load_prior(folder, fast_decoder=tmp_path / "three")
    weights = next((tmp_path / "three").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="is a pickle"):
        load_prior(folder, fast_decoder=tmp_path / "three")
    with pytest.raises(ValueError, match="fast_decoder: only for priors in diffusers' layout"):
        load_prior(fast_decoder=tmp_path / "three")


@torch.no_grad()
def test_a_folder_whose_autoencoder_is_tiny(tmp_path):
    torch.manual_seed(1)
    folder, pipeline = save_stable_diffusion(tmp_path, vae=tiny_autoencoder())
    prior = load_prior(folder, images=IMAGES)
    z = pipeline.vae.encode(2 * IMAGES - 1).latents
    torch.testing.assert_close(prior.encode(IMAGES), z, **CLOSE)
    theirs = pipeline.vae.decode(z).sample / 2 + 0.5
    torch.testing.assert_close(prior.decode(z, (32, 32)), theirs, **CLOSE)


def test_folders_with_only_half_precision_files(tmp_path):
    folder, pipeline = save_stable_diffusion(tmp_path)
    pipeline.save_pretrained(tmp_path / "half", safe_serialization=True, variant="fp16")
    found, expected = (load_prior(f, images=IMAGES) for f in (tmp_path / "half", folder))
    assert found.digests() == expected.digests()


def test_other_uses_of_a_model_are_refused(tmp_path):
    _, pipeline = save_stable_diffusion(tmp_path)
    pipeline.unet = text_unet(in_channels=9)
    pipeline.save_pretrained(tmp_path / "inpainting", safe_serialization=True)
    with pytest.raises(ValueError, match="UNet takes 9 channels where latents have 4"):
        load_prior(tmp_path / "inpainting")
    _, base = save_xl(tmp_path / "xl")
    parts = {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
    kept = {k: v for k, v in base.components.items() if k not in parts}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, **kept, add_watermarker=False)
    refiner.save_pretrained(tmp_path / "refiner", safe_serialization=True)
    with pytest.raises(ValueError, match="is a refiner, which goes on from another model's"):
        load_prior(tmp_path / "refiner")


@pytest.fixture
def photo(tmp_path):
    to_pil(IMAGES[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_deblur_command_takes_texts_and_a_fast_decoder(tmp_path, photo):
    folder, _ = save_stable_diffusion(tmp_path)
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    words = ["deblur", photo, "-o", out, "--kernel-size", 5, "--steps", 1, "--prior", folder]
    texts = ["--prompt", "a cat", "--negative-prompt", "cat", "--fast-decoder", tmp_path / "tiny"]
    result = invoke(*words, *texts, "--guidance", 3)
    assert result.exit_code == 0, result.output
    request = json.loads((out / "report.json").read_text())["request"]
    assert (request["prompt"], request["negative_prompt"], request["guidance"]) == (
        "a cat", "cat", 3.0,
    )  # fmt: skip
    report = (out / "report.json").read_bytes()
    again = invoke(*words, *texts, "--guidance", 3)
    assert "(--force" in again.output and (out / "report.json").read_bytes() == report
    invoke(*words, *texts, "--guidance", 4)
    assert (out / "report.json").read_bytes() != report
    result = invoke(*words[:-2], "--prompt", "a cat", "--guidance", 2)
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        "error: prompt, guidance: only for priors in diffusers' layout; name a folder or a hub id "
        "(--prior)"
    ]


def test_batch_does_not_mix_texts(tmp_path, photo):
    folder, _ = save_stable_diffusion(tmp_path)
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")

    def requests(**options):
        return Requests(Options(prior=str(folder), **options), "cpu").options(Item("a", "a", "a"))

    plain = requests()
    assert not set(PRIOR_OPTIONS) & set(plain)
    tiny = {"fast_decoder": str(tmp_path / "tiny")}
    choices = [{"prompt": "a"}, {"negative_prompt": "a"}, {"guidance": 2.0}, tiny]
    assert len({digest(requests(**options)) for options in [{}, *choices]}) == 5
    before = digest(requests(**tiny))
    torch.manual_seed(5)
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    assert digest(requests(**tiny)) != before  # other weights under the same name
    words = ["batch", photo, "-o", tmp_path / "out", "--kernel-size", 5, "--steps", 1]
    texts = ["--prompt", "a cat", "--guidance", 2]
    result = invoke(*words, "--prior", folder, *texts, "--fast-decoder", tmp_path / "tiny")
    assert result.exit_code == 0, result.output
    (report,) = (tmp_path / "out").rglob("report.json")
    assert json.loads(report.read_text())["request"]["prompt"] == "a cat"
    result = invoke(*words, *texts)
    assert result.exit_code == 1 and "prompt, guidance: only for priors in diff" in result.output
    result = invoke(*words, "--prior", folder, "--guidance", 0.5)
    assert result.exit_code == 1 and "guidance must be at least 1" in result.output
    folder, _ = save_latent_diffusion(tmp_path / "no_text")
    result = invoke(*words, "--prior", folder, *texts)
    assert result.exit_code == 1
    assert "LDMPipeline takes no text, found prompt and guidance: leave it out" in result.output


def info(path):
    result = invoke("prior", "info", path)
    assert result.exit_code == 0, result.output
    return dict(" ".join(line.split()).split(" ", 1) for line in result.stdout.splitlines())


def test_info_of_folders(tmp_path):
    folder, pipeline = save_xl(tmp_path / "xl")
    found = info(folder)
    count = sum(value.numel() for value in pipeline.unet.state_dict().values())
    assert found["pipeline"] == "StableDiffusionXLPipeline"
    assert found["unet"] == f"UNet2DConditionModel, {count:,} parameters, F32"
    assert found["prediction"] == "type epsilon" and found["text"] == "two encoders"
    assert found["in"] == "float16 the autoencoder stays in float32"
    pipeline.unet.to(torch.float16)
    pipeline.unet.save_pretrained(folder / "unet", variant="fp16")
    assert info(folder) == found  # what is read without a variant
    folder, _ = save_consistency_model(tmp_path / "lcm", LCMScheduler(**SCHEDULE, steps_offset=1))
    assert info(folder)["guidance"].startswith("read by the network")
    folder, _ = save_latent_diffusion(tmp_path / "no_text")
    found = info(folder)
    assert found["text"] == "none" and "vqvae" in found and "vae" not in found
    next((folder / "unet").glob("*.safetensors")).write_bytes(b"no weights")
    assert "is not a safetensors file" in invoke("prior", "info", folder).output
    assert "has no model_index.json" in invoke("prior", "info", tmp_path).output


def test_without_transformers(tmp_path, monkeypatch):
    folder, _ = save_stable_diffusion(tmp_path)

    def fail(*_, **__):
        raise AttributeError("'super' object has no attribute")  # as diffusers says it

    loader = "latentdem.priors.diffusers_folder"
    monkeypatch.setattr(f"{loader}.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(ValueError, match="no attribute"):
        load_prior(folder)
    monkeypatch.setattr(f"{loader}.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need transformers: pip install 'latentdem\[text\]'"):
        load_prior(folder)
