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
from latentdem.training.data import PictureBank, load_images

LATENT_CHANNELS = 12
KL_WEIGHT = 2e-4
"""Weight of the KL divergence (nats per pixel value) against the squared error in [-1, 1]."""

PHOTOGRAPH_KL_WEIGHT = 1e-3
"""The same for photographs.

At the optimum every latent's own noise adds weight / 2 to the squared error of an image: with 12
latents for 48 pixel values 1.2e-4, or 45 dB.  Much less would let neighbouring latents mean quite
different images, and EM's latents are never quite right.
"""

CROPS = ((64, 8), (128, 2), (64, 8), (192, 1))
"""Side of the crops in pixels and share of the batch, in turns.

Group normalisation sees the whole image: trained on small ones only, it would be off on large ones.
"""

BATCH = {"cpu": 1, "cuda": 32}
"""How many times the crops of one turn make a batch."""

LATENT_NOISE = 0.05
"""Noise in standardised latents under which the round trip is also measured."""


def build_autoencoder(
    latent_channels: int = LATENT_CHANNELS, widths: tuple[int, int] = (64, 112)
) -> AutoencoderKL:
    """The architecture, with fresh weights (about 2 M parameters)."""
    return AutoencoderKL(
        in_channels=12,
        out_channels=12,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
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


def autoencoder_loss(model: nn.Module, images: Tensor, kl_weight: float = KL_WEIGHT) -> Tensor:
    """Squared error, absolute error of the gradients, and the KL term."""
    output, divergence = reconstruct(model, images, sample=True)
    edges = sum(
        (F.l1_loss(a, b) for a, b in zip(_gradient(output), _gradient(images), strict=True)),
        start=torch.zeros(()),
    )
    return F.mse_loss(output, images) + 0.05 * edges + kl_weight * divergence


def _psnr(output: Tensor, image: Tensor) -> float:
    """PSNR (dB) of images in [-1, 1]."""
    return float(-10 * torch.log10(((output.clamp(-1, 1) - image) / 2).square().mean()))


def mean_psnr(model: nn.Module, images: list[Tensor]) -> float:
    """Mean PSNR (dB) of the round trip over ``images``, each [1,3,H,W] in [-1, 1]."""
    with torch.no_grad():
        return sum(
            _psnr(reconstruct(model, image, sample=False)[0], image) for image in images
        ) / len(images)


@torch.no_grad()
def noisy_psnr(model: Any, images: list[Tensor], noise: float = LATENT_NOISE) -> float:
    """Mean PSNR (dB) of ``D(E(x) + noise)``; ``noise`` in standard deviations of each latent."""
    latents = [model.encode(F.pixel_unshuffle(x, 2)).latent_dist.mode() for x in images]
    std = torch.cat([z.flatten(2) for z in latents], 2).std(2)[..., None, None]
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for image, z in zip(images, latents, strict=True):
        random = torch.randn(z.shape, generator=generator).to(z)
        output = model.decode(z + noise * std * random).sample
        total += _psnr(F.pixel_shuffle(output, 2), image)
    return total / len(images)


@torch.no_grad()
def seam_ratio(model: nn.Module, images: list[Tensor]) -> float:
    """How much worse the round trip's gradients are across the borders of 4 x 4 blocks.

    The root-mean-square error of neighbouring pixels' differences across the borders of the pixels
    that share one latent, over that within: 1 without seams.
    """
    across, within = [], []
    for image in images:
        error = reconstruct(model, image, sample=False)[0] - image
        for difference in (error.diff(dim=-1), error.diff(dim=-2).transpose(-1, -2)):
            border = torch.arange(difference.shape[-1], device=image.device) % 4 == 3
            across.append(difference[..., border].square().mean())
            within.append(difference[..., ~border].square().mean())
    return float((torch.stack(across).mean() / torch.stack(within).mean()).sqrt())


def validation_images(folder: Path, device: torch.device | None = None) -> list[Tensor]:
    """Held-out photographs, cropped to multiples of 32, ``[1,3,H,W]`` in [-1, 1]."""
    images = []
    for image, _ in load_images(folder, "validation"):
        height, width = (min(side // 32 * 32, 384) for side in image.shape[1:])
        crop = image[None, :, :height, :width].to(device).float() / 127.5 - 1
        images.append(crop.contiguous(memory_format=torch.channels_last))
    return images


def train_autoencoder(
    folder: Path,
    checkpoint: Path,
    *,
    minutes: float,
    resume: bool,
    device: torch.device,
    checkpoint_seconds: float = 120.0,
) -> nn.Module:
    """Train on crops of the pictures in ``folder``; returns the EMA weights, on ``device``."""
    torch.manual_seed(resume)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    bank = PictureBank(load_images(folder, "train"), device, seed=1 + resume)
    held_out = validation_images(folder, device)
    plan = TrainingPlan(
        minutes=minutes, learning_rate=1e-3, device=device, checkpoint_seconds=checkpoint_seconds
    )

    def loss(model: nn.Module, step: int) -> Tensor:
        size, share = CROPS[step % len(CROPS)]
        images = bank.batch(share * BATCH[device.type], size)
        return autoencoder_loss(model, images, PHOTOGRAPH_KL_WEIGHT)

    def report(ema: nn.Module) -> str:
        return (
            f"held-out PSNR {mean_psnr(ema, held_out):.2f} dB, "
            f"with noise in the latents {noisy_psnr(ema, held_out):.2f} dB, "
            f"seams {seam_ratio(ema, held_out):.3f}"
        )

    return train("autoencoder", model, loss, plan, checkpoint, resume=resume, validate=report)
