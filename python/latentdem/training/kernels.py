"""Kernels to train the kernel prior on, and synthetic damage to them.

Kernels are inertial random walks, straight strokes, arcs, defocus discs and Gaussians.  Half of
the damaged ones are M-step answers on training photographs whose restoration used a wrong
kernel; the other half are corrupted by blur, modulation along the stroke, noise, threshold.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import latentdem_ext as ext
from latentdem.operators.motion import rasterize
from latentdem.training.data import CropSampler


def training_kernel(rng: np.random.Generator, size: int) -> Tensor:
    """One random kernel ``[size,size]``; four in five are camera shakes."""
    kind = rng.random()
    reach = rng.uniform(0.3, 0.95) * (size - 1) / 2
    if kind < 0.03:
        radius = max(reach * 0.6, 0.6)
        axis = np.arange(size) - size // 2
        distance = np.hypot(axis[:, None], axis[None, :])
        disc = np.clip(radius + 0.5 - distance, 0, 1)
        return torch.from_numpy(disc / disc.sum()).float()
    if kind < 0.05:
        grid = torch.arange(size, dtype=torch.float64) - size // 2
        profile = torch.exp(-0.5 * (grid / max(reach / 3, 0.5)) ** 2)
        gauss = torch.outer(profile, profile)
        return (gauss / gauss.sum()).float()
    steps = 240
    if kind < 0.25:
        bend = rng.normal(0, 1.2) if rng.random() < 0.6 else 0.0
        angle = rng.uniform(0, 2 * np.pi) + bend * np.linspace(-0.5, 0.5, steps)
        velocity = np.stack([np.sin(angle), np.cos(angle)], -1)
    else:
        # A hand: velocity with inertia, a pull towards the centre, and rare jerks.
        inertia = rng.uniform(0.93, 0.995)
        pull = 10 ** rng.uniform(-5, -3.2)
        jerk = rng.uniform(0, 0.025)
        velocity = np.zeros((steps, 2))
        place, v = np.zeros(2), rng.normal(size=2)
        for i in range(steps):
            v = inertia * v + (1 - inertia**2) ** 0.5 * rng.normal(size=2) - pull * place
            if rng.random() < jerk:
                v = v + 1.5 * rng.normal(size=2)
            place = place + v
            velocity[i] = v
    path = velocity.cumsum(0)
    path -= path.mean(0)
    path *= reach / max(np.abs(path).max(), 1e-9)
    path += rng.uniform(-0.5, 0.5, 2)
    weights = np.exp(rng.uniform(0, 0.8) * np.interp(
        np.linspace(0, 6, steps), np.arange(7), rng.normal(size=7)
    ))  # fmt: skip
    kernel = rasterize(torch.from_numpy(path), torch.from_numpy(weights), size)
    if rng.random() < 0.3:
        kernel = _smooth(kernel[None, None], rng.uniform(0.3, 0.8))[0, 0]
    return kernel / kernel.sum()


def _smooth(kernel: Tensor, sigma: float) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    axis = torch.arange(-radius, radius + 1, dtype=torch.float32)
    profile = torch.exp(-0.5 * (axis / sigma) ** 2)
    profile = profile / profile.sum()
    kernel = F.conv2d(F.pad(kernel, (0, 0, radius, radius)), profile.view(1, 1, -1, 1))
    return F.conv2d(F.pad(kernel, (radius, radius, 0, 0)), profile.view(1, 1, 1, -1))


def _normalize(kernel: Tensor) -> Tensor:
    kernel = kernel.clamp_min(0)
    return kernel / kernel.sum((-2, -1), keepdim=True).clamp_min(1e-8)


def corrupt(kernels: Tensor, rng: np.random.Generator) -> Tensor:
    """Synthetic M-step damage to ``kernels [B,1,k,k]``."""
    damaged = []
    size = kernels.shape[-1]
    for kernel in kernels[:, None]:
        k = _smooth(kernel, rng.uniform(0.2, 2.0)) if rng.random() < 0.8 else kernel
        coarse = torch.from_numpy(rng.uniform(0.2, 1.8, (1, 1, 4, 4))).float()
        k = k * F.interpolate(coarse, size=(size, size), mode="bicubic").clamp_min(0.05)
        if rng.random() < 0.5:
            angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(1, 0.3 * size)
            shift = (round(distance * np.sin(angle)), round(distance * np.cos(angle)))
            k = k + rng.uniform(0, 0.3) * k.roll(shift, (-2, -1))
        noise = torch.from_numpy(rng.normal(size=(1, 1, size, size))).float()
        if rng.random() < 0.5:
            noise = 2 * _smooth(noise, rng.uniform(0.4, 1.2))
        k = k + 10 ** rng.uniform(-2.5, -0.7) * k.max() * noise
        k = k * (k > rng.uniform(0, 0.08) * k.max())
        damaged.append(_normalize(k))
    return torch.cat(damaged)


def m_step_answers(images: Tensor, kernels: Tensor, rng: np.random.Generator) -> Tensor:
    """What the M-step says when the image was restored with a wrong kernel.

    Args:
        images: ``[B,3,H,W]`` in [0, 1].
        kernels: the true kernels ``[B,1,k,k]``.
        rng: random numbers.
    """
    size = kernels.shape[-1]
    sigma = 10 ** rng.uniform(-2.3, -1.5)
    observed = ext.blur_conv2d(images, kernels)
    observed = observed + sigma * torch.from_numpy(rng.normal(size=observed.shape)).float()
    wrong = corrupt(kernels, rng)
    share = rng.uniform(0, 1)
    grid = F.pad(share * wrong + (1 - share) * _smooth(kernels, rng.uniform(0.5, 3)),
                 (0, images.shape[-1] - size, 0, images.shape[-2] - size))  # fmt: skip
    spectrum = torch.fft.rfft2(grid.roll((-(size // 2), -(size // 2)), (-2, -1)))
    data = torch.fft.rfft2(observed)
    guess = torch.fft.rfft2(_smooth_images(observed, rng.uniform(0.3, 1.5)))
    weight = 10 ** rng.uniform(-3, -1.3)
    restored = guess + spectrum.conj() * (data - spectrum * guess) / (
        spectrum.abs().square() + weight
    )
    estimate = torch.fft.irfft2(restored, s=images.shape[-2:])
    power = images.shape[-2] * images.shape[-1] * sigma**2
    answer = ext.kernel_map_update(
        estimate,
        observed,
        torch.full_like(kernels, 1 / size**2),
        noise_std=sigma,
        penalty=30 * power / sigma**2,
        regularization=0.0,
        iterations=6,
        prior="none",
        domain="gradient",
        image_variance=rng.uniform(0.01, 0.08) ** 2,
    )
    threshold = rng.uniform(0.0, 0.08)
    return _normalize(answer * (answer > threshold * answer.amax((-2, -1), keepdim=True)))


def _smooth_images(images: Tensor, sigma: float) -> Tensor:
    return _smooth(images.flatten(0, 1)[:, None], sigma).reshape(images.shape)


def align(truth: Tensor, answer: Tensor) -> Tensor:
    """``truth [1,1,k,k]`` moved, to a quarter of a pixel, to where ``answer`` agrees best.

    Where a kernel sits is a gauge; a network that had to guess it would blur its answer.
    """
    size = truth.shape[-1]
    pad = 2 * size
    spectrum = torch.fft.rfft2(truth.double(), s=(pad, pad))
    other = torch.fft.rfft2(answer.double(), s=(pad, pad))
    correlation = torch.fft.irfft2(other * spectrum.conj(), s=(pad, pad))
    best = int(correlation.flatten().argmax())
    rows = torch.fft.fftfreq(pad, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(pad, dtype=torch.float64)[None, :]
    score, moved = -1.0, truth
    for dy in (-0.5, -0.25, 0.0, 0.25, 0.5):
        for dx in (-0.5, -0.25, 0.0, 0.25, 0.5):
            y, x = best // pad + dy, best % pad + dx
            phase = torch.exp(-2j * torch.pi * (rows * y + columns * x))
            candidate = torch.fft.irfft2(spectrum * phase, s=(pad, pad))[..., :size, :size]
            candidate = candidate.clamp_min(0)
            agreement = float(
                F.cosine_similarity(candidate.flatten(), answer.double().flatten(), 0)
            )
            if agreement > score:
                score, moved = agreement, candidate
    return (moved / moved.sum().clamp_min(1e-12)).to(truth.dtype)


def augment(damaged: Tensor, truth: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One of the square's eight symmetries, for both alike."""
    turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
    pair = [t.rot90(turns, (-2, -1)) for t in (damaged, truth)]
    damaged, truth = (t.flip(-1) for t in pair) if mirrored else pair
    return damaged, truth


def make_pairs(
    sampler: CropSampler, rng: np.random.Generator, count: int, size: int
) -> tuple[Tensor, Tensor]:
    """``count`` damaged kernels ``[count,1,size,size]`` and the true ones, aligned to them."""
    truth = torch.stack([training_kernel(rng, size) for _ in range(count)])[:, None]
    half = count // 2
    images = (sampler.batch(half) + 1) / 2
    damaged = torch.cat([m_step_answers(images, truth[:half], rng), corrupt(truth[half:], rng)])
    damaged = ext.recenter_kernel(damaged, subpixel=False)
    truth = torch.cat([align(*pair) for pair in zip(truth.split(1), damaged.split(1), strict=True)])
    return damaged, truth
