"""Training of the packaged objects prior: an autoencoder of views, then the denoiser.

The denoiser sees two views of one object: the given one, and the wanted one's latent under noise.
Its loss is that of Zero123, with v-prediction (Salimans and Ho 2022) as in the 2D prior; in a few
of the pairs the given view is left out, so that the model knows the unconditional case, too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdem.io import file_digest
from latentdem.operators.pose import relative_pose
from latentdem.priors.objects import (
    POSE_FEATURES,
    PROXIES,
    RAY_CHANNELS,
    CameraModel,
    ObjectsPrior,
    ViewEmbedder,
    ViewEmbedding,
    load_objects_prior,
    network_output,
    save_objects_prior,
)
from latentdem.training.common import TrainingPlan, round_to_half, train
from latentdem.training.diffusion import SCHEDULER
from latentdem.training.object_views import SIDE, draw_split
from latentdem.training.view_autoencoder import (
    LATENT_CHANNELS,
    encode_views,
    train_view_autoencoder,
)

TOKEN_WIDTH = 160
LATENT_SIDE = SIDE // 4
LEFT_OUT = 0.08
"""Share of the pairs whose given view is hidden."""

CAMERA_ERROR = (4.0, 0.0, 0.04)
"""Deviation of the given view's elevation, azimuth and radius as the model is told them."""

TARGETS = 3
"""Wanted views for each given one: its embedding is computed once for all."""

GIVEN_VIEWS = {"cpu": 8, "cuda": 384}
"""Given views in a step."""

TRAINED = ("denoiser", "embedder", "context")
"""What of a prior :class:`ConditionalDenoiser` holds."""

LEARNING_RATE = {"cpu": 6e-4, "cuda": 1.2e-3}
GOING_ON = 2 / 3
"""Of the learning rate, where trained weights are the start."""


class ConditionalDenoiser(nn.Module):
    """The three networks that are trained together; attributes as in :class:`ObjectsPrior`."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = UNet2DConditionModel(
            sample_size=LATENT_SIDE,
            in_channels=2 * LATENT_CHANNELS + len(PROXIES) * (LATENT_CHANNELS + 1) + RAY_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(96, 128, 176),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 3,
            up_block_types=("CrossAttnUpBlock2D",) * 3,
            cross_attention_dim=TOKEN_WIDTH,
            attention_head_dim=4,
            norm_num_groups=16,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=POSE_FEATURES,
        )
        self.embedder = ViewEmbedder(LATENT_CHANNELS, LATENT_SIDE, TOKEN_WIDTH, layers=3)
        self.context = nn.Linear(TOKEN_WIDTH + POSE_FEATURES, TOKEN_WIDTH)
        self.camera = CameraModel()


class PairSampler:
    """Random given views with ``TARGETS`` wanted views each, of the same object; on a device."""

    def __init__(self, path: Path, seed: int, device: torch.device | None = None) -> None:
        tensors = load_file(path, device=str(device or "cpu"))
        self.latents, self.poses = tensors["latents"], tensors["poses"]
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Start the random numbers anew."""
        self.generator = torch.Generator(self.poses.device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1) on the device."""
        return torch.rand(*shape, generator=self.generator, device=self.poses.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal random numbers on the device."""
        return torch.randn(*shape, generator=self.generator, device=self.poses.device)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel ``[c,1,1]``."""
        some = self.latents[:: max(1, len(self.latents) // 400)].double().flatten(0, 2)
        mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3))
        return mean.float()[:, None, None], std.float()[:, None, None]

    def batch(self, given: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents and poses of ``given`` views ``[B,...]`` and of wanted ``[B,TARGETS,...]``."""
        objects, kinds, views = self.latents.shape[:3]
        rows = (self.uniform(given, 1) * objects).long()
        kind = (self.uniform(given, 1) * kinds).long()
        columns = self.uniform(given, views).argsort(1)[:, : TARGETS + 1]
        latents, poses = self.latents[rows, kind, columns].float(), self.poses[rows, columns]
        sign = torch.stack((torch.ones_like(kind), 1 - 2 * (kind % 2), torch.ones_like(kind)), -1)
        poses = poses * sign  # a mirrored view is one from the other side
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
    own_camera = given_pose + torch.randn_like(given_pose) * given_pose.new_tensor(CAMERA_ERROR)
    view = ViewEmbedding(given, tokens, own_camera[:, 0], own_camera[:, 2])
    view = view[torch.arange(len(given), device=given.device).repeat_interleave(count)]
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
    low = given_pose.new_tensor([camera.elevation[0], camera.radius[0]])
    high = given_pose.new_tensor([camera.elevation[1], camera.radius[1]])
    truth = (given_pose[:, [0, 2]] - (low + high) / 2) / ((high - low) / 2)
    return loss, F.mse_loss(own, truth)


def train_denoiser(
    latents: Path,
    held_out: Path,
    checkpoint: Path,
    *,
    minutes: float,
    resume: bool,
    start: ObjectsPrior | None = None,
    device: torch.device | None = None,
) -> tuple[ConditionalDenoiser, Tensor, Tensor]:
    """Train on the encoded views; returns EMA weights and the latents' mean and deviation.

    With ``start`` the weights, mean and deviation are first those of that prior, whose
    autoencoder must have made the latents.
    """
    device = device or torch.device("cpu")
    torch.manual_seed(1)
    camera, scheduler = CameraModel(), DDPMScheduler(**SCHEDULER)
    # diffusers moves these to the device of what they are applied to at every call.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    sampler = PairSampler(latents, 31 + resume, device)
    test = PairSampler(held_out, 33, device)
    networks = ConditionalDenoiser()
    if start is None:
        mean, std = sampler.statistics()
    else:
        mean, std = start.latent_mean.to(device), start.latent_std.to(device)
        for part in TRAINED:
            getattr(networks, part).load_state_dict(getattr(start, part).state_dict())
    model: nn.Module = networks
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def standardise(x: Tensor) -> Tensor:
        return ((x - mean) / std).contiguous()

    def loss(model: nn.Module, step: int) -> Tensor:
        given, given_pose, wanted, wanted_pose = sampler.batch(GIVEN_VIEWS[device.type])
        count = wanted.shape[0] * wanted.shape[1]
        # Poses are decided at high noise; near t = 0 the latent itself says nearly all.
        share = sampler.uniform(count) ** 0.5
        velocity, own = pair_loss(
            cast(ConditionalDenoiser, model),
            standardise(given),
            given_pose,
            standardise(wanted),
            wanted_pose,
            (share * 1000).long().clamp(max=999),
            sampler.normal(count, *given.shape[1:]),
            sampler.uniform(count) < LEFT_OUT,
            scheduler,
        )
        return velocity + 0.3 * own

    def report(ema: nn.Module) -> str:
        test.seed(33)
        lines = []
        given, given_pose, wanted, wanted_pose = test.batch(96)
        count = wanted.shape[0] * wanted.shape[1]
        noise = test.normal(count, *given.shape[1:])
        for timestep in (200, 500, 800):
            values = []
            for hidden in (False, True):
                with torch.no_grad():
                    velocity, own = pair_loss(
                        cast(ConditionalDenoiser, ema), standardise(given), given_pose,
                        standardise(wanted), wanted_pose,
                        torch.full((count,), timestep, device=device), noise,
                        torch.full((count,), hidden, device=device), scheduler,
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
        minutes=minutes,
        learning_rate=LEARNING_RATE[device.type] * (1.0 if start is None else GOING_ON),
        ema_decay=0.998,
        checkpoint_seconds=240,
        device=device,
    )
    ema = train("denoiser", model, loss, plan, checkpoint, resume=resume, validate=report)
    return cast(ConditionalDenoiser, ema.cpu()), mean.cpu(), std.cpu()


def _trainable_prior(path: Path) -> ObjectsPrior:
    """A prior whose networks are those of :class:`ConditionalDenoiser`."""
    prior = load_objects_prior(path)
    fresh = ConditionalDenoiser()
    for part in TRAINED:
        ours, theirs = getattr(fresh, part).state_dict(), getattr(prior, part).state_dict()
        if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
            raise ValueError(f"{path}: its {part} is not of the size that is trained here")
    return prior


def make_objects_prior(
    data: Path,
    runs: Path,
    output: Path,
    *,
    autoencoder_minutes: float,
    denoiser_minutes: float,
    start: Path | None = None,
    device: torch.device | None = None,
) -> None:
    """Draw the views, train (or go on training) all networks, write the prior to ``output``.

    Checkpoints in ``runs`` make a killed run go on where it was; a finished stage is not trained
    again unless its minutes are raised.  ``start`` is an objects prior to go on from: its
    autoencoder stays as it is, its denoiser is trained further.

    Raises:
        FileNotFoundError: no file ``start``.
        ValueError: ``start`` is not an objects prior, or one of other networks than these.
    """
    device = device or torch.device("cpu")
    first = None if start is None else _trainable_prior(start)
    draw_split(data, "heldout")
    draw_split(data, "train")
    checkpoint = "denoiser.safetensors"
    if first is not None and start is not None:
        autoencoder = cast(AutoencoderKL, first.autoencoder)
        # A checkpoint belongs to its start: under another autoencoder its latents mean nothing.
        checkpoint = f"denoiser-from-{file_digest(start)[:12]}.safetensors"
    else:
        trained = train_view_autoencoder(
            data,
            runs / "view_autoencoder.safetensors",
            minutes=autoencoder_minutes,
            resume=True,
            device=device,
        )
        autoencoder = cast(AutoencoderKL, round_to_half(trained))
    on_gpu = device.type == "cuda"
    networks, mean, std = train_denoiser(
        encode_views(data, "train", autoencoder, runs, recolored=on_gpu, device=device),
        encode_views(data, "heldout", autoencoder, runs, device=device),
        runs / checkpoint,
        minutes=denoiser_minutes,
        resume=True,
        start=first,
        device=device,
    )
    write_prior(output, autoencoder.cpu(), networks, mean, std)


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
        name="latentdem objects 3",
    )
    save_objects_prior(output, prior, dict(scheduler.config))
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
