"""Training of the packaged objects prior: an autoencoder of views, then the denoiser.

The denoiser sees two views of one object: the given one, and the wanted one's latent under noise.
Its loss is that of Zero123, with v-prediction (Salimans and Ho 2022) as in the 2D prior; in a few
of the pairs the given view is left out, so that the model knows the unconditional case, too.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdem.operators.pose import relative_pose
from latentdem.priors.latent import load_prior
from latentdem.priors.objects import (
    POSE_FEATURES,
    PROXIES,
    CameraModel,
    ObjectsPrior,
    ViewEmbedder,
    ViewEmbedding,
    network_output,
    save_objects_prior,
)
from latentdem.training.autoencoder import (
    LATENT_CHANNELS,
    autoencoder_loss,
    mean_psnr,
)
from latentdem.training.common import TrainingPlan, round_to_half, train
from latentdem.training.diffusion import SCHEDULER
from latentdem.training.object_views import SIDE, draw_split, on_white, read_shards

TOKEN_WIDTH = 160
LATENT_SIDE = SIDE // 4
LEFT_OUT = 0.08
"""Share of the pairs whose given view is hidden."""

ENCODED_VIEWS = 12
"""Of each training object, the first ones: an epoch of all pairs is out of reach anyhow."""

CAMERA_ERROR = (4.0, 0.0, 0.04)
"""Deviation of the given view's elevation, azimuth and radius as the model is told them."""

TARGETS = 3
"""Wanted views for each given one: its embedding is computed once for all."""


class ConditionalDenoiser(nn.Module):
    """The three networks that are trained together; attributes as in :class:`ObjectsPrior`."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = UNet2DConditionModel(
            sample_size=LATENT_SIDE,
            in_channels=2 * LATENT_CHANNELS + len(PROXIES) * (LATENT_CHANNELS + 1),
            out_channels=LATENT_CHANNELS,
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TOKEN_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=POSE_FEATURES,
        )
        self.embedder = ViewEmbedder(LATENT_CHANNELS, LATENT_SIDE, TOKEN_WIDTH, layers=3)
        self.context = nn.Linear(TOKEN_WIDTH + POSE_FEATURES, TOKEN_WIDTH)
        self.camera = CameraModel()


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_views(folder: Path, split: str, autoencoder: AutoencoderKL, cache: Path) -> Path:
    """Mean latents ``[O,ENCODED_VIEWS,c,16,16]`` float16 and poses of a split.

    Made once for an autoencoder: one that was trained on encodes anew.
    """
    path = cache / f"latents-{split}.safetensors"
    made_by = {"autoencoder": _fingerprint(autoencoder), "views": str(ENCODED_VIEWS)}
    if path.exists():
        with safe_open(path, framework="pt") as handle:
            if handle.metadata() == made_by:
                return path
    latents, poses = [], []
    for _, shard in track(read_shards(folder, split), f"encoding {split} views", total=None):
        rgba = shard["images"][:, :ENCODED_VIEWS]
        images = on_white(rgba).flatten(0, 1)
        parts = []
        for chunk in images.split(256):
            x = F.pixel_unshuffle(chunk * 2 - 1, 2).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                parts.append(autoencoder.encode(x).latent_dist.mode().half())
        latents.append(torch.cat(parts).unflatten(0, rgba.shape[:2]).contiguous())
        poses.append(shard["poses"][:, :ENCODED_VIEWS])
    partial = path.with_suffix(".partial")
    save_file({"latents": torch.cat(latents), "poses": torch.cat(poses)}, partial, made_by)
    partial.replace(path)
    return path


class PairSampler:
    """Random given views with ``TARGETS`` wanted views each, of the same object."""

    def __init__(self, path: Path, seed: int) -> None:
        tensors = load_file(path)
        self.latents, self.poses = tensors["latents"], tensors["poses"]
        self.rng = np.random.default_rng(seed)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel ``[c,1,1]``."""
        some = self.latents[:: max(1, len(self.latents) // 400)].double().flatten(0, 1)
        mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3))
        return mean.float()[:, None, None], std.float()[:, None, None]

    def batch(self, given: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and poses of ``given`` views ``[B,...]`` and of wanted ``[B,TARGETS,...]``."""
        objects = self.rng.integers(len(self.latents), size=given)
        views = self.rng.permuted(np.tile(np.arange(self.latents.shape[1]), (given, 1)), axis=1)[
            :, : TARGETS + 1
        ]
        rows = torch.from_numpy(objects)[:, None]
        columns = torch.from_numpy(views)
        latents, poses = self.latents[rows, columns].float(), self.poses[rows, columns]
        return latents[:, 0], poses[:, 0], latents[:, 1:], poses[:, 1:]


def pair_loss(
    model: ConditionalDenoiser,
    given: Tensor,
    given_pose: Tensor,
    wanted: Tensor,
    wanted_pose: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    hidden: Tensor,
    scheduler: DDPMScheduler,
) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the velocity, and of the given view's own camera.

    Args:
        model: the networks.
        given: standardised latents ``[B,c,s,s]``.
        given_pose: ``[B,3]``.
        wanted: ``[B,T,c,s,s]``.
        wanted_pose: ``[B,T,3]``.
        timesteps: ``[B*T]``.
        noise: ``[B*T,c,s,s]``.
        hidden: bool ``[B*T]``: whose given view is left out.
        scheduler: of the noise.
    """
    tokens, own = model.embedder(given)
    pose = relative_pose(given_pose[:, None], wanted_pose).flatten(0, 1)
    targets = wanted.flatten(0, 1)
    shown = (~hidden).float()
    count = wanted.shape[1]
    own_camera = given_pose + torch.randn(given_pose.shape) * given_pose.new_tensor(CAMERA_ERROR)
    view = ViewEmbedding(given, tokens, own_camera[:, 0], own_camera[:, 2])
    view = view[torch.arange(len(given)).repeat_interleave(count)]
    output = network_output(
        model,
        scheduler.add_noise(targets, noise, timesteps),
        timesteps,
        replace(
            view,
            latents=view.latents * shown[:, None, None, None],
            tokens=view.tokens * shown[:, None, None],
        ),
        pose * shown[:, None],
    )
    loss = F.mse_loss(output, scheduler.get_velocity(targets, noise, timesteps))
    camera = model.camera
    low = torch.tensor([camera.elevation[0], camera.radius[0]])
    high = torch.tensor([camera.elevation[1], camera.radius[1]])
    truth = (given_pose[:, [0, 2]] - (low + high) / 2) / ((high - low) / 2)
    return loss, F.mse_loss(own, truth)


def train_denoiser(
    latents: Path, held_out: Path, checkpoint: Path, *, minutes: float, resume: bool
) -> tuple[ConditionalDenoiser, Tensor, Tensor]:
    """Train on the encoded views; returns EMA weights and the latents' mean and deviation."""
    torch.manual_seed(1)
    camera, scheduler = CameraModel(), DDPMScheduler(**SCHEDULER)
    sampler, test = PairSampler(latents, 31 + resume), PairSampler(held_out, 33)
    mean, std = sampler.statistics()
    model: nn.Module = ConditionalDenoiser()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def standardise(x: Tensor) -> Tensor:
        return ((x - mean) / std).contiguous()

    def loss(model: nn.Module, step: int) -> Tensor:
        given, given_pose, wanted, wanted_pose = sampler.batch(8)
        count = wanted.shape[0] * wanted.shape[1]
        # Poses are decided at high noise; near t = 0 the latent itself says nearly all.
        share = torch.from_numpy(sampler.rng.random(count)) ** 0.5
        velocity, own = pair_loss(
            cast(ConditionalDenoiser, model),
            standardise(given),
            given_pose,
            standardise(wanted),
            wanted_pose,
            (share * 1000).long().clamp(max=999),
            torch.randn(count, *given.shape[1:]),
            torch.from_numpy(sampler.rng.random(count) < LEFT_OUT),
            scheduler,
        )
        return velocity + 0.3 * own

    def report(ema: nn.Module) -> str:
        test.rng = np.random.default_rng(33)
        generator = torch.Generator().manual_seed(7)
        lines = []
        given, given_pose, wanted, wanted_pose = test.batch(24)
        count = wanted.shape[0] * wanted.shape[1]
        noise = torch.randn(count, *given.shape[1:], generator=generator)
        for timestep in (200, 500, 800):
            values = []
            for hidden in (False, True):
                with torch.no_grad():
                    velocity, own = pair_loss(
                        cast(ConditionalDenoiser, ema), standardise(given), given_pose,
                        standardise(wanted), wanted_pose, torch.full((count,), timestep), noise,
                        torch.full((count,), hidden), scheduler,
                    )  # fmt: skip
                values.append(float(velocity))
            lines.append(f"{timestep}: {values[0]:.4f} ({values[1]:.4f})")
        scale = (camera.elevation[1] - camera.elevation[0]) / 2
        return (
            "held-out loss at t (without the given view): "
            + ", ".join(lines)
            + f"; elevation and radius RMS {float(own) ** 0.5:.3f} of {scale:.0f} degrees"
        )

    plan = TrainingPlan(
        minutes=minutes, learning_rate=6e-4, ema_decay=0.998, checkpoint_seconds=240
    )
    ema = train("denoiser", model, loss, plan, checkpoint, resume=resume, validate=report)
    return cast(ConditionalDenoiser, ema), mean, std


class ViewSampler:
    """Random whole views ``[B,3,64,64]`` in [-1, 1]."""

    def __init__(self, folder: Path, split: str, seed: int) -> None:
        shards = [shard["images"].flatten(0, 1) for _, shard in read_shards(folder, split)]
        self.images = torch.cat(shards)
        self.rng = np.random.default_rng(seed)

    def batch(self, count: int) -> Tensor:
        """``count`` of them."""
        index = torch.from_numpy(self.rng.integers(len(self.images), size=count))
        x = on_white(self.images[index]) * 2 - 1
        return x.contiguous(memory_format=torch.channels_last)


def train_view_autoencoder(
    folder: Path, checkpoint: Path, *, minutes: float, resume: bool
) -> AutoencoderKL:
    """Train the packaged 2D prior's autoencoder further, on views; returns EMA weights."""
    torch.manual_seed(0)
    sampler = ViewSampler(folder, "train", 41 + resume)
    held_out = list(ViewSampler(folder, "heldout", 43).batch(100).split(1))
    model = load_prior().autoencoder.requires_grad_(True)

    def loss(model: nn.Module, step: int) -> Tensor:
        return autoencoder_loss(model, sampler.batch(12))

    def report(ema: nn.Module) -> str:
        return f"held-out PSNR {mean_psnr(ema, held_out):.2f} dB"

    plan = TrainingPlan(minutes=minutes, learning_rate=8e-4, ema_decay=0.998)
    ema = train("view autoencoder", model, loss, plan, checkpoint, resume=resume, validate=report)
    return cast(AutoencoderKL, ema)


def make_objects_prior(
    data: Path, runs: Path, output: Path, *, autoencoder_minutes: float, denoiser_minutes: float
) -> None:
    """Draw the views, train (or go on training) all networks, write the prior to ``output``.

    Checkpoints in ``runs`` make a killed run go on where it was; a finished stage is not trained
    again unless its minutes are raised.
    """
    draw_split(data, "heldout")
    draw_split(data, "train")
    autoencoder = cast(
        AutoencoderKL,
        round_to_half(
            train_view_autoencoder(
                data,
                runs / "view_autoencoder.safetensors",
                minutes=autoencoder_minutes,
                resume=True,
            )
        ),
    )
    networks, mean, std = train_denoiser(
        encode_views(data, "train", autoencoder, runs),
        encode_views(data, "heldout", autoencoder, runs),
        runs / "denoiser.safetensors",
        minutes=denoiser_minutes,
        resume=True,
    )
    write_prior(output, autoencoder, networks, mean, std)


def write_prior(
    output: Path,
    autoencoder: AutoencoderKL,
    networks: ConditionalDenoiser,
    mean: Tensor,
    std: Tensor,
) -> None:
    """Write trained networks as a prior."""
    scheduler = DDIMScheduler(**SCHEDULER)
    prior = ObjectsPrior(
        autoencoder=autoencoder,
        denoiser=networks.denoiser,
        embedder=networks.embedder,
        context=networks.context,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        latent_mean=mean,
        latent_std=std,
        unshuffle=2,
        image_size=SIDE,
        camera=CameraModel(),
        name="latentdem objects 1",
    )
    save_objects_prior(output, prior, dict(scheduler.config))
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
