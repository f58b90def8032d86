"""The two training commands: data, loops, calibration, safetensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from latentdem.priors.kernel import KernelDenoiserNet
from latentdem.priors.latent import LatentPrior, load_prior, network_multiple, save_prior
from latentdem.priors.weights import save_network
from latentdem.training.answers import collect_answers
from latentdem.training.autoencoder import (
    mean_psnr,
    noisy_psnr,
    train_autoencoder,
    validation_images,
)
from latentdem.training.common import choose_device, round_to_half
from latentdem.training.data import fetch, read_manifest
from latentdem.training.diffusion import CLASSES, SCHEDULER, train_diffusion
from latentdem.training.kernel_denoiser import train_kernel_prior


def make_prior(
    data: Path,
    runs: Path,
    output: Path,
    *,
    autoencoder_minutes: float,
    diffusion_minutes: float,
    device: torch.device | None = None,
) -> None:
    """Train (or go on training) both networks and write the prior to ``output``.

    Checkpoints in ``runs`` make a killed run go on where it was; a finished stage is not
    trained again unless its minutes are raised.  ``device``: where to train, by default on a GPU
    if there is one; calibration is on the CPU, where the prior is mostly used.
    """
    fetch(data, read_manifest())
    device = choose_device() if device is None else device
    checkpoint = runs / "autoencoder.safetensors"
    trained = train_autoencoder(
        data, checkpoint, minutes=autoencoder_minutes, resume=True, device=device
    )
    autoencoder = cast(AutoencoderKL, round_to_half(trained))
    denoiser, mean, std = train_diffusion(
        data,
        autoencoder,
        runs / "diffusion.safetensors",
        minutes=diffusion_minutes,
        resume=True,
        device=device,
    )
    write_prior(data, output, autoencoder, denoiser, mean, std)


def write_prior(
    data: Path,
    output: Path,
    autoencoder: AutoencoderKL,
    denoiser: nn.Module,
    mean: Tensor,
    std: Tensor,
) -> LatentPrior:
    """Calibrate trained networks on the validation photographs in ``data`` and write a prior.

    ``mean`` and ``std`` are those of the latents, ``[c]``.  The weights are rounded to half
    precision first, so that the figures are those of the file.
    """
    autoencoder = cast(AutoencoderKL, round_to_half(autoencoder).cpu())
    unet = cast(UNet2DModel, round_to_half(denoiser).cpu())
    scheduler = DDIMScheduler(**SCHEDULER)
    held_out = validation_images(data)
    prior = LatentPrior(
        autoencoder=autoencoder,
        denoiser=unet,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        latent_mean=mean[:, None, None],
        latent_std=std[:, None, None],
        unshuffle=2,
        calibration_timesteps=torch.empty(0),
        calibration_rmse=torch.empty(0),
        multiple=network_multiple(autoencoder, unet, 2),
        classes=CLASSES,
        name="latentdem natural images 2",
    )
    prior.calibrate([(image + 1) / 2 for image in held_out])
    save_prior(
        output,
        prior,
        autoencoder_config=dict(autoencoder.config),
        denoiser_config=dict(unet.config),
        scheduler_config=dict(scheduler.config),
    )
    print(
        f"held-out round trip {mean_psnr(autoencoder, held_out):.2f} dB, "
        f"with noise in the latents {noisy_psnr(autoencoder, held_out):.2f} dB"
    )
    for timestep, rmse in zip(prior.calibration_timesteps, prior.calibration_rmse, strict=True):
        print(f"t = {int(timestep):4d}  pixel RMSE {float(rmse):.4f}")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
    return prior


def _mean_weights(first: nn.Module, second: nn.Module) -> nn.Module:
    mean = copy.deepcopy(first)
    other = second.state_dict()
    mean.load_state_dict({k: (v + other[k]) / 2 for k, v in first.state_dict().items()})
    return mean


def make_kernel_prior(
    data: Path,
    runs: Path,
    output: Path,
    *,
    minutes: float,
    shards: int,
    refine_minutes: float,
    prior: LatentPrior | None = None,
    start: KernelDenoiserNet | None = None,
) -> None:
    """Train (or go on training) the kernel prior and write it to ``output``.

    In three stages, each resumable: on synthetic damage; collecting the evidence of the method's
    own steps on training photographs, with that first network and ``prior``; on both.  With
    ``start``, a trained network, the first stage is left out, the evidence is what *it* meets, and
    the result is the mean of its weights and the new ones, which does better than either (Wortsman
    et al., "Model soups", ICML 2022).
    """
    fetch(data, read_manifest())
    if start is None:
        checkpoint = runs / "kernel.safetensors"
        trained = train_kernel_prior(data, checkpoint, minutes=minutes, resume=True)
        first = cast(KernelDenoiserNet, round_to_half(trained))
    else:
        trained = first = start
    if shards > 0:
        answers = runs / "answers"
        prior = load_prior() if prior is None else prior
        collect_answers(data, answers, prior, first, split="train", shards=shards)
        held_out = max(1, shards // 12)
        collect_answers(data, answers, prior, first, split="validation", shards=held_out)
        trained = train_kernel_prior(
            data,
            runs / "kernel_refined.safetensors",
            minutes=refine_minutes,
            resume=True,
            start=first,
            answers=answers,
        )
    if start is not None and trained is not start:
        trained = _mean_weights(start, trained)
    save_network(output, trained)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")
