"""The autoencoder of views: its training, and the latents that the denoiser learns from."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdem.priors.latent import weights_digest
from latentdem.training.autoencoder import autoencoder_loss, build_autoencoder, mean_psnr
from latentdem.training.common import TrainingPlan, train
from latentdem.training.object_views import on_white, read_shards

LATENT_CHANNELS = 8

VIEWS_A_STEP = {"cpu": 12, "cuda": 512}

RECOLORED = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
"""Orders of the colours in which every view is learnt on a GPU, each also mirrored.  A CPU takes
the first alone: encoding the others would cost it more time than it has for training."""

ENCODED_AT_ONCE = {"cpu": 256, "cuda": 4096}


def build_view_autoencoder() -> AutoencoderKL:
    """The architecture of the photographs' one, with fresh weights (1.5 M parameters)."""
    return build_autoencoder(LATENT_CHANNELS, (64, 96))


class ViewSampler:
    """Random whole views ``[B,3,64,64]`` in [-1, 1], on a device."""

    def __init__(
        self, folder: Path, split: str, seed: int, device: torch.device | None = None
    ) -> None:
        device = device or torch.device("cpu")
        shards = [shard["images"].flatten(0, 1) for _, shard in read_shards(folder, split)]
        self.images = torch.cat(shards).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def batch(self, count: int) -> Tensor:
        """``count`` of them, some mirrored, their colours in any order."""
        device = self.images.device

        def draw(limit: int, *shape: int) -> Tensor:
            return torch.randint(limit, shape, generator=self.generator, device=device)

        x = on_white(self.images[draw(len(self.images), count)]) * 2 - 1
        x = torch.where(draw(2, count, 1, 1, 1) == 0, x, x.flip(-1))
        orders = torch.tensor(list(permutations(range(3))), device=device)[draw(6, count)]
        x = x.gather(1, orders[:, :, None, None].expand_as(x))
        return x.contiguous(memory_format=torch.channels_last)


def train_view_autoencoder(
    folder: Path,
    checkpoint: Path,
    *,
    minutes: float,
    resume: bool,
    device: torch.device | None = None,
) -> AutoencoderKL:
    """Train the autoencoder of views; returns EMA weights."""
    device = device or torch.device("cpu")
    torch.manual_seed(0)
    sampler = ViewSampler(folder, "train", 41 + resume, device)
    held_out = list(ViewSampler(folder, "heldout", 43, device).batch(100).split(1))
    model: nn.Module = build_view_autoencoder()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    count = VIEWS_A_STEP[device.type]

    def loss(model: nn.Module, step: int) -> Tensor:
        return autoencoder_loss(model, sampler.batch(count))

    def report(ema: nn.Module) -> str:
        return f"held-out PSNR {mean_psnr(ema, held_out):.2f} dB"

    plan = TrainingPlan(minutes=minutes, learning_rate=1e-3, ema_decay=0.998, device=device)
    ema = train("view autoencoder", model, loss, plan, checkpoint, resume=resume, validate=report)
    return cast(AutoencoderKL, ema.cpu())


def encode_views(
    folder: Path,
    split: str,
    autoencoder: AutoencoderKL,
    cache: Path,
    *,
    recolored: bool = False,
    device: torch.device | None = None,
) -> Path:
    """Mean latents ``[O,A,V,c,16,16]`` float16 and poses ``[O,V,3]`` of a split.

    A is one, or six with ``recolored``: of every order of :data:`RECOLORED` the views as they are,
    then mirrored (their azimuths change sign).  Made once for an autoencoder: one that was trained
    on encodes anew.
    """
    device = device or torch.device("cpu")
    path = cache / f"latents-{split}.safetensors"
    made_by = {"autoencoder": weights_digest(autoencoder), "recolored": str(recolored)}
    if path.exists():
        with safe_open(path, framework="pt") as handle:
            if handle.metadata() == made_by:
                return path
    autoencoder = autoencoder.to(device)
    latents, poses = [], []
    for _, shard in track(read_shards(folder, split), f"encoding {split} views", total=None):
        images = on_white(shard["images"].to(device))  # [O,V,3,64,64]
        kinds = [images]
        if recolored:
            turned = [images[:, :, list(order)] for order in RECOLORED]
            kinds = [kind for view in turned for kind in (view, view.flip(-1))]
        x = torch.stack(kinds, 1)
        shape = x.shape[:3]
        parts = []
        for chunk in x.flatten(0, 2).split(ENCODED_AT_ONCE[device.type]):
            chunk = F.pixel_unshuffle(chunk * 2 - 1, 2).contiguous(
                memory_format=torch.channels_last
            )
            with torch.no_grad():
                parts.append(autoencoder.encode(chunk).latent_dist.mode().half())
        latents.append(torch.cat(parts).unflatten(0, shape).contiguous().cpu())
        poses.append(shard["poses"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"latents": torch.cat(latents), "poses": torch.cat(poses)}, partial, made_by)
    partial.replace(path)
    return path
