"""Training of the sharpness classifier: the same crops with blur and without."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.io import to_pil
from latentdem.priors.sharpness import SharpnessNet, difference_statistics
from latentdem.priors.weights import save_network
from latentdem.training.common import TrainingPlan, round_to_half, train
from latentdem.training.data import CropSampler, fetch, load_images, read_manifest
from latentdem.training.kernels import training_kernel

SIZES = (5, 5, 7, 7, 9, 9, 11, 13, 17, 21, 25, 33, 45)
SIDE = 192
PAIRS_PER_SHARD = 200
JPEG_SHARE = 0.25
LARGEST_PEAK = 0.4
"""Kernels with a larger value blur too little to be called a blur, and too much for none."""
SOFTEST = 0.5
"""Standard deviation in pixels of the mildest lenses: pictures that are sharp all the same."""


def stored(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``image [1,3,H,W]`` as a camera would store it: in 8 bits, some as JPEG."""
    if rng.random() >= JPEG_SHARE:
        return (image.clamp(0, 1) * 255).round() / 255
    buffer = io.BytesIO()
    to_pil(image[0].clamp(0, 1)).save(buffer, "JPEG", quality=int(rng.integers(75, 97)))
    pixels = np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def blur_kernel(rng: np.random.Generator) -> Tensor:
    """A kernel ``[1,1,k,k]`` that does blur."""
    while True:
        kernel = training_kernel(rng, int(rng.choice(SIZES)))
        if float(kernel.max()) < LARGEST_PEAK:
            return kernel[None, None]


def lens_kernel(rng: np.random.Generator) -> Tensor:
    """A kernel ``[1,1,5,5]`` that no one would call a blur; in half of all cases none at all."""
    sigma = rng.uniform(0.2, SOFTEST) if rng.random() < 0.5 else 1e-3
    profile = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
    kernel = torch.outer(profile, profile)
    return (kernel / kernel.sum())[None, None]


def sharp_and_blurred(crops: CropSampler, rng: np.random.Generator) -> Tensor:
    """One crop without blur and with one, ``[2,3,192,192]``, with noise, in 8 bits or as JPEG."""
    scene = (crops.batch(1) + 1) / 2
    found = []
    for kernel in (lens_kernel(rng), blur_kernel(rng)):
        inset = (scene.shape[-1] - SIDE - kernel.shape[-1] + 1) // 2
        inner = scene[..., inset : scene.shape[-1] - inset, inset : scene.shape[-1] - inset]
        blurred = ext.blur_conv2d(inner.contiguous(), kernel, boundary="valid")
        noise = torch.from_numpy(rng.normal(size=blurred.shape)).float()
        found.append(stored(blurred + 10 ** rng.uniform(-3.2, -1.3) * noise, rng))
    return torch.cat(found)


def collect_statistics(data: Path, folder: Path, *, split: str, shards: int) -> Tensor:
    """Statistics ``[N,2,150]`` of N pairs, sharp and blurred; files that exist are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    images: list[tuple[Tensor, float]] = []
    found = []
    for shard in track(range(shards), f"collecting statistics ({split})"):
        path = folder / f"{split}-{shard:04d}.safetensors"
        if not path.exists():
            images = images or load_images(data, split)
            rng = np.random.default_rng([shard, split == "train", 6])
            crops = CropSampler(images, SIDE + max(SIZES) - 1, seed=9000 + shard)
            statistics = torch.stack([
                difference_statistics(sharp_and_blurred(crops, rng))
                for _ in range(PAIRS_PER_SHARD)
            ])  # fmt: skip
            partial = path.with_suffix(".partial")
            save_file({"statistics": statistics}, partial)
            partial.replace(path)
        found.append(load_file(path)["statistics"])
    return torch.cat(found)


def make_sharpness(data: Path, runs: Path, output: Path, *, shards: int, minutes: float) -> None:
    """Train (or go on training) the classifier and write it to ``output``.

    ``shards``: of 200 pairs each, whose statistics are collected first.
    """
    fetch(data, read_manifest())
    folder = runs / "statistics"
    seen = collect_statistics(data, folder, split="train", shards=shards)
    held_out = collect_statistics(data, folder, split="validation", shards=max(1, shards // 10))
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = SharpnessNet()
    network.mean.copy_(seen.flatten(0, 1).mean(0))
    network.std.copy_(seen.flatten(0, 1).std(0))

    def loss(model: nn.Module, step: int) -> Tensor:
        index = torch.randint(len(seen), (64,), generator=generator)
        noise = 0.05 * torch.randn(64, 2, seen.shape[-1], generator=generator)
        disturbed = seen[index] + noise * network.std
        return _loss(model(disturbed.flatten(0, 1)))

    def report(model: nn.Module) -> str:
        with torch.no_grad():
            found = model(held_out.flatten(0, 1))
        sharp, blurred = found[::2], found[1::2]
        right = torch.cat([sharp > 0, blurred < 0]).float().mean()
        return (
            f"held-out loss {float(_loss(found)):.4f}, right {float(right):.3f}, sharp ones above "
            f"99 of 100 blurred {float((sharp > blurred.quantile(0.99)).float().mean()):.3f}, "
            f"above all {float((sharp > blurred.max()).float().mean()):.3f}"
        )

    trained = train(
        "sharpness classifier",
        network,
        loss,
        TrainingPlan(minutes=minutes, learning_rate=1e-3, report_every=1000, weight_decay=0.05),
        runs / "sharpness.safetensors",
        resume=True,
        validate=report,
    )
    save_network(output, round_to_half(trained))
    print(f"wrote {output} ({output.stat().st_size / 1e3:.0f} kB)")


def _loss(odds: Tensor) -> Tensor:
    """Cross entropy of log-odds ``[2 N]``, of sharp and blurred ones in turn."""
    labels = torch.tensor([1.0, 0.0]).repeat(len(odds) // 2)
    return F.binary_cross_entropy_with_logits(odds, labels)
