"""Zero123 in its two layouts, tiny and untrained, step by step as its pipelines compute it."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from em.diffusers_stand_in import SCHEDULE, kl_autoencoder, text_unet
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import latentdem
from latentdem.cli import app
from latentdem.em.denoising_score import without_view
from latentdem.em.novel_views import sample_views
from latentdem.em.schedules import descending
from latentdem.priors.zero123 import Zero123Prior, load_zero123_prior

WIDTH = 12
LAYOUTS = {"cc_projection": "projection", "clip_camera_projection": "proj"}


class Parts:
    """The networks of one, and their folder."""

    def __init__(self, folder, layout="cc_projection", variant=None):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        self.folder = folder
        self.vae = kl_autoencoder(scaling_factor=0.18215).eval()
        self.unet = text_unet(WIDTH, in_channels=8).eval()
        self.image_encoder = transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                image_size=28, patch_size=14, projection_dim=WIDTH,
            )
        ).eval()  # fmt: skip
        self.scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
        self.linear = nn.Linear(WIDTH + 4, WIDTH)
        for part in ("vae", "unet", "image_encoder"):
            getattr(self, part).save_pretrained(folder / part, variant=variant)
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / layout).mkdir()
        weights = {f"{LAYOUTS[layout]}.{k}": v.data for k, v in self.linear.named_parameters()}
        save_file(weights, folder / layout / "diffusion_pytorch_model.safetensors")
        kinds = {"unet": ["diffusers", "UNet2DConditionModel"], layout: ["zero123", "Projection"]}
        (folder / "model_index.json").write_text(
            json.dumps({"_class_name": "Zero123Pipeline", "_diffusers_version": "0.20", **kinds})
        )

    @torch.no_grad()
    def conditioning(self, view, numbers):
        """Unscaled latents of ``view``, projected embedding: ``_encode_image_with_pose``."""
        x = 2 * view - 1
        small = (F.interpolate(x, (28, 28), mode="bicubic", align_corners=True) + 1) / 2
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        clip = self.image_encoder((small - mean) / std).image_embeds[:, None]
        context = self.linear(torch.cat([clip, torch.tensor([[numbers]])], -1))
        return self.vae.encode(x).latent_dist.mode(), context


@pytest.fixture
def view():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stable", [False, True])
def test_guided_trajectory_as_its_pipelines_sample_it(tmp_path, view, layout, stable):
    parts = Parts(tmp_path / ("stable-zero123" if stable else "zero123-xl"), layout)
    prior = latentdem.load_objects_prior(parts.folder)
    assert isinstance(prior, Zero123Prior) and prior.stable is stable
    assert prior.name == f"{parts.folder.name} ({'Stable ' if stable else ''}Zero123)"
    source, target = torch.tensor([[20.0, 0.0, 1.8]]), torch.tensor([[50.0, -40.0, 2.0]])
    polar, azimuth = math.radians(-30), math.radians(-40)
    last = math.radians(90 - 20) if stable else 0.2
    latents, context = parts.conditioning(view, [polar, math.sin(azimuth), math.cos(azimuth), last])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = latentdem.SamplerSettings(steps=4, guidance=3.0)
    result = sample_views(prior, prior.embed(view), source, target, settings=settings)
    schedule = descending(999, 4)
    z, levels = noise, parts.scheduler.alphas_cumprod
    for here, after in zip(schedule, [*schedule[1:], None], strict=True):
        beside = torch.cat([torch.zeros_like(latents), latents])
        told = torch.cat([torch.zeros_like(context), context])
        output = parts.unet(torch.cat([torch.cat([z, z]), beside], 1), here, told).sample
        free, guided = output.chunk(2)
        epsilon = free + 3.0 * (guided - free)
        z = (z - (1 - levels[here]) ** 0.5 * epsilon) / levels[here] ** 0.5
        if after is not None:
            z = levels[after] ** 0.5 * z + (1 - levels[after]) ** 0.5 * epsilon
    # The first step divides by sqrt(abar) = 0.07.
    assert (result.latents - z).abs().max() < 1e-5 * z.abs().max()
    views = (parts.vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(result.views, views, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_what_a_given_view_becomes(tmp_path, view):
    parts = Parts(tmp_path / "zero123", variant="fp16")
    prior = load_zero123_prior(parts.folder, stable=True)
    assert prior.stable and prior.image_size == 32
    given = prior.embed(view)
    unscaled, _ = parts.conditioning(view, [0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(given.latents, unscaled * 0.18215, atol=1e-5, rtol=1e-5)
    assert given.elevation.tolist() == [15.0] and given.tokens.shape == (1, 1, WIDTH)
    noisy, still = torch.randn(1, 4, 16, 16), torch.zeros(1, 3)
    nothing = without_view(given)
    _, epsilon = prior.predict(noisy, 300, nothing, still)
    zeros = torch.zeros(1, 1, WIDTH)
    expected = parts.unet(torch.cat([noisy, 0 * noisy], 1), 300, zeros).sample
    torch.testing.assert_close(epsilon, expected, atol=1e-5, rtol=1e-5)
    half = load_zero123_prior(parts.folder, dtype="bf16")
    z0, _ = half.predict(noisy, 300, half.embed(view), still)
    assert z0.dtype == torch.float32 and half.denoiser.dtype == torch.bfloat16


def test_gradients_reach_the_pose(tmp_path, view):
    prior = load_zero123_prior(Parts(tmp_path / "zero123").folder)
    with torch.no_grad():
        given = prior.embed(view)
    pose = torch.tensor([[10.0, 20.0, 0.1]], requires_grad=True)
    prior.predict(torch.randn(1, 4, 16, 16), 300, given, pose)[1].square().sum().backward()
    assert pose.grad.abs().min() > 0


def test_an_object_from_two_views(tmp_path):
    prior = load_zero123_prior(Parts(tmp_path / "zero123").folder)
    generator, views = torch.Generator().manual_seed(0), torch.ones(2, 3, 40, 40)
    views[..., 10:30, 10:30] = torch.rand(2, 3, 20, 20, generator=generator)
    result = latentdem.reconstruct(
        list(views), prior=prior,
        settings=latentdem.ReconstructSettings(
            rounds=1, resolution=16, iterations=5, samples_per_ray=24,
            poses=latentdem.PoseSettings(azimuth_step=120, levels=(0.5,), modes=1, iterations=1),
            sampler=latentdem.SamplerSettings(targets=2, steps=2, guidance=3.0),
        ),
    )  # fmt: skip
    assert result.report["prior"] == "zero123 (Zero123)"
    assert bool(result.novel_views.isfinite().all())


def test_what_is_no_zero123(tmp_path):
    parts = Parts(tmp_path / "zero123")
    with pytest.raises(ValueError, match="is Zero123, a prior of objects: load_objects_prior"):
        latentdem.load_prior(parts.folder)
    with pytest.raises(ValueError, match="stable: only for Zero123; name its folder or hub id"):
        latentdem.load_objects_prior(stable=True)
    with pytest.raises(FileNotFoundError, match="no such folder, and no hub id"):
        load_zero123_prior(tmp_path / "missing" / "too")
    result = CliRunner().invoke(app, ["prior", "info", str(parts.folder)])
    assert "of the given view (SamplerSettings)" in result.output
    weights = parts.folder / "cc_projection" / "diffusion_pytorch_model.safetensors"
    save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"holds no projection\.weight and bias"):
        load_zero123_prior(parts.folder)
    save_file({f"projection.{k}": torch.zeros(n) for k, n in (("weight", (9, 9)), ("bias", 9))},
              weights)  # fmt: skip
    with pytest.raises(ValueError, match="its projection 9 numbers where CLIP gives 12"):
        load_zero123_prior(parts.folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="is a pickle"):
        load_zero123_prior(parts.folder)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match="it has no cc_projection or clip_camera_projection"):
        load_zero123_prior(parts.folder)


def test_no_code_is_fetched_from_a_hub(tmp_path, monkeypatch):
    parts, asked = Parts(tmp_path / "zero123"), []

    def fetch(source, **options):
        asked.append((source, options))
        return str(parts.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert latentdem.load_objects_prior("owner/stable-zero123").stable
    assert asked == [("owner/stable-zero123", {"allow_patterns": ["*.json", "*.safetensors"]})]


def test_without_transformers(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "zero123")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'latentdem\[text\]'"):
        load_zero123_prior(parts.folder)
