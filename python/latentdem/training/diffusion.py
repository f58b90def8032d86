"""Training of the packaged diffusion model on the latents of the packaged autoencoder.

A :class:`diffusers.UNet2DModel` without attention, so that it runs at any image size, with
Stable Diffusion's noise schedule and v-prediction (Salimans and Ho 2022): near t = 0 the
error of the noise, near t = 1000 that of the image.

It learns sharp pictures and their motion-blurred twins under one label each.  A prior of sharp
pictures alone likes blurred ones better, being smoother; with both, the label tells them apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdem.training.autoencoder import LATENT_CHANNELS
from latentdem.training.common import TrainingPlan, train
from latentdem.training.data import PictureBank, load_images
from latentdem.training.kernels import training_kernel

CLASSES = ("sharp", "blurred", "unknown")
"""Labels of the denoiser; a tenth of the training pictures of either kind is ``unknown``."""

SHARP, BLURRED, UNKNOWN = range(3)

TILE = 64
"""Side of the encoded pictures in latent pixels (256 image pixels)."""

CROPS = ((32, 4), (64, 1), (32, 4), (16, 8))
"""Side of the crops in latent pixels and share of the batch, in turns."""

BATCH = {"cpu": 2, "cuda": 64}
"""How many times the crops of one turn make a batch."""

MARGIN = 16
"""Image pixels around a tile that are blurred with it and thrown away: half a kernel or more."""

POOL = {"cpu": 256, "cuda": 8192}
"""Encoded pairs of a sharp tile and its blurred twin."""

HELD_OUT_PAIRS = {"cpu": 8, "cuda": 128}

REFRESH_STEPS = 500
"""Every so many steps a 24th of the pool is drawn and encoded anew, on a GPU."""

MAX_KERNEL = 25
KERNELS = 384
RANKING_TIMESTEPS = (100, 200, 300, 400, 500, 600)
LOSS_TIMESTEPS = (50, 200, 400, 600, 800)

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


def build_unet() -> UNet2DModel:
    """The architecture, with fresh weights."""
    unet = UNet2DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 128, 160),
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=16,
        add_attention=False,
        num_class_embeds=len(CLASSES),
    )
    # As large as the embedding of the timestep, which it is added to, not ten times as large.
    nn.init.normal_(unet.class_embedding.weight, std=0.1)
    return unet


def blur_kernels(count: int, seed: int) -> Tensor:
    """``[count,25,25]``: training kernels of 5 to 25 pixels that blur visibly, centred."""
    rng = np.random.default_rng(seed)
    kernels = torch.zeros(count, MAX_KERNEL, MAX_KERNEL)
    for target in kernels:
        size = 2 * int(rng.integers(2, MAX_KERNEL // 2 + 1)) + 1
        kernel = training_kernel(rng, size)
        while kernel.max() > 0.4:
            kernel = training_kernel(rng, size)
        start = (MAX_KERNEL - size) // 2
        target[start : start + size, start : start + size] = kernel
    return kernels


def blur_tiles(images: Tensor, kernels: Tensor) -> Tensor:
    """Blur ``images [B,3,H,W]`` with ``kernels [B,k,k]``, periodically, by plain FFT."""
    size = images.shape[-2:]
    radius = kernels.shape[-1] // 2
    padded = F.pad(kernels, (0, size[1] - kernels.shape[-1], 0, size[0] - kernels.shape[-2]))
    transfer = torch.fft.rfft2(padded.roll((-radius, -radius), (-2, -1)))[:, None]
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=size)


class LatentPool:
    """Sharp tiles and their blurred twins, encoded once, on the device.

    Args:
        images: what :func:`latentdem.training.data.load_images` returned.
        autoencoder: its encoder makes the latents.
        pairs: number of sharp tiles, and of blurred ones.
        device: where everything lives.
        seed: seed of the crops, kernels and pairings.
    """

    def __init__(
        self,
        images: list[tuple[Tensor, float]],
        autoencoder: AutoencoderKL,
        pairs: int,
        device: torch.device,
        *,
        seed: int,
    ) -> None:
        self.bank = PictureBank(images, device, seed=seed)
        self.autoencoder = autoencoder
        self.kernels = blur_kernels(min(pairs, KERNELS), seed).to(device)
        self.pairs, self.device, self.filled = pairs, device, 0
        # [2,pairs,c,64,64]: sharp, blurred; half precision, as the weights are shipped.
        self.latents = torch.zeros(
            2, pairs, LATENT_CHANNELS, TILE, TILE, dtype=torch.float16, device=device
        )
        self.refresh(pairs)

    @torch.no_grad()
    def refresh(self, count: int, chunk: int = 64) -> None:
        """Replace the ``count`` oldest pairs."""
        side, margin = 4 * TILE, MARGIN
        with torch.autocast(self.device.type, enabled=False):
            for _ in range(0, count, chunk):
                amount = min(chunk, count, self.pairs - self.filled)
                wide = self.bank.batch(amount, side + 2 * margin)
                which = torch.randint(
                    len(self.kernels), (amount,), device=self.device, generator=self.bank.generator
                )
                kernels = self.kernels[which]
                flips = self.bank.uniform(3, amount, 1, 1) < 0.5
                for flip, turned in zip(
                    flips,
                    (lambda k: k.flip(-1), lambda k: k.flip(-2), lambda k: k.transpose(-1, -2)),
                    strict=True,
                ):
                    kernels = torch.where(flip, turned(kernels), kernels)
                for row, tiles in enumerate((wide, blur_tiles(wide, kernels))):
                    # Pictures have 8 bits, blurred ones too: nothing else may tell them apart.
                    tiles = ((tiles + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
                    tiles = tiles[..., margin : margin + side, margin : margin + side]
                    x = F.pixel_unshuffle(tiles, 2).contiguous(memory_format=torch.channels_last)
                    latents = self.autoencoder.encode(x).latent_dist.mode()
                    self.latents[row, self.filled : self.filled + amount] = latents.half()
                self.filled = (self.filled + amount) % self.pairs

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[c,1,1]`` of each channel over the sharp tiles."""
        sample = self.latents[0, :2048].double()
        mean, std = sample.mean((0, 2, 3)), sample.std((0, 2, 3))
        return mean.float()[:, None, None], std.float()[:, None, None]

    def batch(self, count: int, size: int) -> tuple[Tensor, Tensor]:
        """Crops ``[count,c,size,size]`` float32, not standardised, and their labels ``[count]``."""
        draw = self.bank.uniform(5, count)
        kind = (draw[0] < 0.35).long()  # the sharp ones are what EM asks for
        tile = (draw[1] * self.pairs).long().clamp_max(self.pairs - 1)
        steps = torch.arange(size, device=self.device)
        span = TILE - size + 1
        rows, columns = (
            (place * span).long().clamp_max(span - 1)[:, None] + steps for place in draw[2:4]
        )
        # Indices on both sides of a slice: the channels come last, in memory too.
        crops = self.latents[
            kind[:, None, None], tile[:, None, None], :, rows[:, :, None], columns[:, None, :]
        ]
        labels = torch.where(draw[4] < 0.1, UNKNOWN, kind)
        return crops.permute(0, 3, 1, 2).float(), labels


def diffusion_loss(
    unet: nn.Module,
    scheduler: DDPMScheduler,
    latents: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    labels: Tensor,
) -> Tensor:
    """Squared error of the predicted velocity, mean over each item, ``[B]``."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps)
    output = unet(noisy, timesteps, class_labels=labels).sample
    return (output.float() - target).square().mean((1, 2, 3))


@torch.no_grad()
def rank_pairs(
    unet: nn.Module, scheduler: DDPMScheduler, pairs: Tensor
) -> tuple[list[float], float, list[float]]:
    """What the labels know of held-out pairs ``[2,N,c,h,w]`` (sharp, blurred), standardised.

    Returns:
        The sharp ones' loss under their label at ``LOSS_TIMESTEPS``; the share of pairs where
        loss(blurred) - loss(sharp), over all of ``RANKING_TIMESTEPS``, is larger for the sharp
        twin; that share at each of them alone.
    """
    device, count = pairs.device, pairs.shape[1]
    generator = torch.Generator().manual_seed(5)
    chunk = 64

    def loss(kind: int, timestep: int, label: int, noise: Tensor) -> Tensor:
        parts = [
            diffusion_loss(
                unet,
                scheduler,
                latents,
                torch.full((len(latents),), timestep, device=device),
                random,
                torch.full((len(latents),), label, device=device),
            )
            for latents, random in zip(pairs[kind].split(chunk), noise.split(chunk), strict=True)
        ]
        return torch.cat(parts)

    def noise() -> Tensor:
        return torch.randn(pairs.shape[1:], generator=generator).to(device)

    losses = [float(loss(SHARP, t, SHARP, noise()).mean()) for t in LOSS_TIMESTEPS]
    total = torch.zeros(count, device=device)
    shares = []
    for timestep in RANKING_TIMESTEPS:
        random = noise()
        score = [
            loss(kind, timestep, BLURRED, random) - loss(kind, timestep, SHARP, random)
            for kind in (SHARP, BLURRED)
        ]
        total += score[0] - score[1]
        shares.append(float((score[0] > score[1]).float().mean()))
    return losses, float((total > 0).float().mean()), shares


def train_diffusion(
    folder: Path,
    autoencoder: AutoencoderKL,
    checkpoint: Path,
    *,
    minutes: float,
    resume: bool,
    device: torch.device,
    checkpoint_seconds: float = 120.0,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Train the UNet; returns its EMA weights and the latents' mean and standard deviation.

    The weights and ``autoencoder`` are on ``device`` afterwards, the statistics on the CPU.
    """
    torch.manual_seed(resume)
    autoencoder = autoencoder.to(device)
    kind = device.type
    pool = LatentPool(
        load_images(folder, "train"), autoencoder, POOL[kind], device, seed=21 + resume
    )
    mean, std = pool.statistics()
    save_file(
        {"mean": mean.cpu().contiguous(), "std": std.cpu().contiguous()},
        checkpoint.with_name("latent_statistics.safetensors"),
    )
    scheduler = DDPMScheduler(**SCHEDULER)
    pairs = LatentPool(
        load_images(folder, "validation"), autoencoder, HELD_OUT_PAIRS[kind], device, seed=5
    ).latents
    held_out = (pairs.float() - mean) / std

    def loss(model: nn.Module, step: int) -> Tensor:
        if kind != "cpu" and step % REFRESH_STEPS == REFRESH_STEPS - 1:
            pool.refresh(POOL[kind] // 24)
        size, share = CROPS[step % len(CROPS)]
        latents, labels = pool.batch(share * BATCH[kind], size)
        latents = ((latents - mean) / std).contiguous(memory_format=torch.channels_last)
        # Stratified: every batch has all noise levels.
        count = len(latents)
        places = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        timesteps = (places * 1000).long().clamp_max(999)
        noise = torch.randn_like(latents)
        return diffusion_loss(model, scheduler, latents, timesteps, noise, labels).mean()

    def report(ema: nn.Module) -> str:
        losses, share, shares = rank_pairs(ema, scheduler, held_out)
        return (
            f"held-out loss at t = {LOSS_TIMESTEPS}: "
            + " ".join(f"{value:.4f}" for value in losses)
            + f"; sharp before blurred {share:.3f} of pairs, at t = {RANKING_TIMESTEPS}: "
            + " ".join(f"{value:.2f}" for value in shares)
        )

    plan = TrainingPlan(
        minutes=minutes,
        learning_rate=1e-3,
        ema_decay=0.9995,
        device=device,
        checkpoint_seconds=checkpoint_seconds,
    )
    unet = build_unet().to(memory_format=torch.channels_last)
    ema = train("diffusion model", unet, loss, plan, checkpoint, resume=resume, validate=report)
    return ema, mean.cpu().flatten(), std.cpu().flatten()
