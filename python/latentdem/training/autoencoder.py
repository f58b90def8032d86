"""Training of the packaged autoencoder.

A :class:`diffusers.AutoencoderKL` behind a 2x pixel-unshuffle: full-resolution
convolutions are what costs on a CPU, and half-resolution ones on 12 channels see the
same pixels.  Latents have a quarter of the image's side.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from latentdem.training.common import TrainingPlan, train
from latentdem.training.data import CropSampler, load_images

LATENT_CHANNELS = 8
KL_WEIGHT = 2e-4
"""Weight of the KL divergence (nats per pixel value) against the squared error in [-1, 1]."""


def build_autoencoder() -> AutoencoderKL:
    """The architecture, with fresh weights (about 1 M parameters)."""
    return AutoencoderKL(
        in_channels=12,
        out_channels=12,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        mid_block_add_attention=False,
    )


def reconstruct(model: Any, images: Tensor, *, sample: bool) -> tuple[Tensor, Tensor]:
    """Return ``(D(E(x)) [B,3,H,W], KL in nats per pixel value)`` for x in [-1, 1]."""
    posterior = model.encode(F.pixel_unshuffle(images, 2)).latent_dist
    latents = posterior.sample() if sample else posterior.mode()
    output = F.pixel_shuffle(model.decode(latents).sample, 2)
    return output, posterior.kl().sum() / images.numel()


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def autoencoder_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Squared error, absolute error of the gradients, and the KL term."""
    output, divergence = reconstruct(model, images, sample=True)
    edges = sum(
        (F.l1_loss(a, b) for a, b in zip(_gradient(output), _gradient(images), strict=True)),
        start=torch.zeros(()),
    )
    return F.mse_loss(output, images) + 0.05 * edges + KL_WEIGHT * divergence


def mean_psnr(model: nn.Module, images: list[Tensor]) -> float:
    """Mean PSNR (dB) of the round trip over ``images``, each [1,3,H,W] in [-1, 1]."""
    total = 0.0
    with torch.no_grad():
        for image in images:
            output, _ = reconstruct(model, image, sample=False)
            error = ((output.clamp(-1, 1) - image) / 2).square().mean()
            total += float(-10 * torch.log10(error))
    return total / len(images)


def validation_images(folder: Path) -> list[Tensor]:
    """Held-out photographs, cropped to multiples of 32, ``[1,3,H,W]`` in [-1, 1]."""
    images = []
    for image, _ in load_images(folder, "validation"):
        height, width = (min(side // 32 * 32, 384) for side in image.shape[1:])
        crop = image[None, :, :height, :width].float() / 127.5 - 1
        images.append(crop.contiguous(memory_format=torch.channels_last))
    return images


def train_autoencoder(folder: Path, checkpoint: Path, *, minutes: float, resume: bool) -> nn.Module:
    """Train on 64-pixel crops of the pictures in ``folder``; returns the EMA weights."""
    torch.manual_seed(0)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    sampler = CropSampler(load_images(folder, "train"), 64, seed=1 + resume)
    held_out = validation_images(folder)
    plan = TrainingPlan(minutes=minutes, learning_rate=1e-3)

    def loss(model: nn.Module, step: int) -> Tensor:
        images = sampler.batch(8).contiguous(memory_format=torch.channels_last)
        return autoencoder_loss(model, images)

    def report(ema: nn.Module) -> str:
        return f"held-out PSNR {mean_psnr(ema, held_out):.2f} dB"

    return train("autoencoder", model, loss, plan, checkpoint, resume=resume, validate=report)
