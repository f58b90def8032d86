"""Training of the packaged diffusion model on the latents of the packaged autoencoder.

A :class:`diffusers.UNet2DModel` without attention, so that it runs at any image size, with
Stable Diffusion's noise schedule and v-prediction (Salimans and Ho 2022): near t = 0 the
error of the noise, near t = 1000 that of the image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdem.training.autoencoder import LATENT_CHANNELS, validation_images
from latentdem.training.common import TrainingPlan, train
from latentdem.training.data import load_images

CROP = 32
"""Side of the training crops in latent pixels (128 image pixels)."""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet() -> UNet2DModel:
    """The architecture, with fresh weights."""
    return UNet2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        add_attention=False,
    )


def _encode(autoencoder: AutoencoderKL, image: Tensor) -> Tensor:
    """Mean latents ``[8,H/4,W/4]`` float16 of ``image [3,H,W]`` uint8."""
    height, width = (side // 8 * 8 for side in image.shape[1:])
    x = image[None, :, :height, :width].float() / 127.5 - 1
    x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return autoencoder.encode(x).latent_dist.mode()[0].half().contiguous()


class LatentSampler:
    """Random latent crops of the training pictures, encoded once as a whole.

    Every picture is there as it is, mirrored, and (if large) at half size.
    """

    def __init__(self, folder: Path, autoencoder: AutoencoderKL, seed: int) -> None:
        self.latents: list[Tensor] = []
        weights: list[float] = []
        for image, weight in track(load_images(folder, "train"), "encoding latents"):
            versions = [image, image.flip(-1)]
            if min(image.shape[1:]) >= 2 * 160:
                half = F.avg_pool2d(image.float(), 2).round().to(torch.uint8)
                versions += [half, half.flip(-1)]
            for version in versions:
                latent = _encode(autoencoder, version)
                if min(latent.shape[1:]) < CROP:
                    continue
                self.latents.append(latent)
                # Flat pictures are thinned out, as flat crops are for the autoencoder.
                gradient = (version[:, 1:].float() - version[:, :-1].float()).abs().mean()
                interest = min(1.0, float(gradient) / 6 + 0.1)
                weights.append(weight * interest * float(latent[0].numel()) ** 0.5)
        self.probability = np.array(weights) / sum(weights)
        self.rng = np.random.default_rng(seed)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel over random crops."""
        sample = torch.cat([self.batch(64) for _ in range(16)]).double()
        return sample.mean((0, 2, 3)).float(), sample.std((0, 2, 3)).float()

    def batch(self, count: int) -> Tensor:
        """``[count,8,32,32]`` float32, not standardised."""
        crops = []
        for index in self.rng.choice(len(self.latents), count, p=self.probability):
            latent = self.latents[index]
            top, left = (int(self.rng.integers(side - CROP + 1)) for side in latent.shape[1:])
            crops.append(latent[:, top : top + CROP, left : left + CROP])
        return torch.stack(crops).float()


def diffusion_loss(
    unet: nn.Module, scheduler: DDPMScheduler, latents: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared error of the predicted velocity."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    return F.mse_loss(unet(noisy, timesteps).sample, target)


def train_diffusion(
    folder: Path, autoencoder: AutoencoderKL, checkpoint: Path, *, minutes: float, resume: bool
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train the UNet; returns its EMA weights and the latents' mean and standard deviation."""
    torch.manual_seed(0)
    sampler = LatentSampler(folder, autoencoder, seed=21)
    mean, std = (s[:, None, None].contiguous() for s in sampler.statistics())
    save_file({"mean": mean, "std": std}, checkpoint.with_name("latent_statistics.safetensors"))
    sampler.rng = np.random.default_rng(22 + resume)
    scheduler = DDPMScheduler(**SCHEDULER)
    held_out = [
        ((_encode(autoencoder, ((x[0] + 1) * 127.5).round().to(torch.uint8)).float() - mean) / std)
        for x in validation_images(folder)
    ]

    def loss(model: nn.Module, step: int) -> Tensor:
        latents = (sampler.batch(16) - mean) / std
        latents = latents.contiguous(memory_format=torch.channels_last)
        timesteps = torch.from_numpy(sampler.rng.integers(0, 1000, 16))
        return diffusion_loss(model, scheduler, latents, timesteps, torch.randn_like(latents))

    def report(ema: nn.Module) -> str:
        generator = torch.Generator().manual_seed(5)
        losses = []
        with torch.no_grad():
            for timestep in (50, 200, 400, 600, 800):
                total = 0.0
                for latent in held_out:
                    noise = torch.randn(latent.shape, generator=generator)
                    total += float(
                        diffusion_loss(
                            ema,
                            scheduler,
                            latent[None],
                            torch.tensor([timestep]),
                            noise[None],
                        )
                    )
                losses.append(total / len(held_out))
        return "held-out loss at t = 50, 200, 400, 600, 800: " + " ".join(
            f"{value:.4f}" for value in losses
        )

    plan = TrainingPlan(minutes=minutes, learning_rate=8e-4, ema_decay=0.9995)
    unet = build_unet().to(memory_format=torch.channels_last)
    ema = train("diffusion model", unet, loss, plan, checkpoint, resume=resume, validate=report)
    return ema, mean.flatten(), std.flatten()
