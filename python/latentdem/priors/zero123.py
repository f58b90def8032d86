"""Zero123 and Stable Zero123 in diffusers' layouts, as objects priors.

There are two, with the same parts but for the projection that mixes the given view's CLIP embedding
with the pose: ``cc_projection`` (weights ``projection.*``, of diffusers' community pipeline
``pipeline_zero1to3``) and ``clip_camera_projection`` (``proj.*``, DreamGaussian's).  Both come with
pipeline classes of their own; the parts are read here one by one, so that no code from a folder or
a hub runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdem.devices import parse_dtype
from latentdem.priors.diffusers_folder import (
    PROJECTIONS,
    check_folder,
    check_pickles,
    is_hub_id,
    only_variant,
)
from latentdem.priors.latent import PREDICTION_TYPES, latent_scaling
from latentdem.priors.objects import POSE_FEATURES, CameraModel, ObjectsPrior, ViewEmbedding
from latentdem.priors.weights import dtype_of

_LINEAR = dict(zip(PROJECTIONS, ("projection", "proj"), strict=True))
"""Name of the projection's linear map."""

CAMERA = CameraModel(fov=49.1, elevation=(-80.0, 80.0), radius=(1.5, 2.2), extent=0.87)
"""Of Zero123's renderings: objects in a cube of side 1, a 35 mm lens before 32 mm of sensor.

Stable Zero123's cameras are not published; they are taken to be the same.
"""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Zero123Prior(ObjectsPrior):
    """Zero123 (Liu et al., ICCV 2023) as published.

    ``embedder`` is a ``CLIPVisionModelWithProjection``, ``context`` the linear map of embedding and
    pose, ``denoiser`` a UNet on noisy and given latents.

    Args:
        stable: Stable Zero123: its fourth number is the given view's polar angle, where Zero123's
            is the difference of the radii.
        default_elevation: of given views in degrees: neither model tells it from the picture.
    """

    stable: bool = False
    default_elevation: float = 15.0

    def embed(self, views: Tensor) -> ViewEmbedding:
        """Latents and CLIP's embedding ``[B,1,width]`` of given views ``[B,3,S,S]`` in [0, 1].

        Elevation and radius are not estimated: ``default_elevation``, and the middle of the range.
        """
        side = self.embedder.config.image_size
        # As Zero123 was trained; CLIP's own preprocessing filters before it shrinks.
        small = F.interpolate(views, (side, side), mode="bicubic", align_corners=True)
        mean, std = (small.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        pixels = ((small - mean) / std).to(dtype_of(self.embedder))
        tokens = self.embedder(pixels).image_embeds.float()
        latents = self.encode(views)
        elevation = latents.new_full((len(views),), self.default_elevation)
        radius = latents.new_full((len(views),), sum(self.camera.radius) / 2)
        return ViewEmbedding(latents, tokens[:, None], elevation, radius)

    def output(
        self, noisy: Tensor, timesteps: Tensor, given: ViewEmbedding, pose: Tensor
    ) -> Tensor:
        """What the UNet says ``[B,c,s,s]``, given views and poses relative to theirs."""
        features = zero123_features(pose, given.elevation if self.stable else None)
        dtype = dtype_of(self.denoiser)
        context = self.context(torch.cat((given.tokens, features[:, None]), -1).to(dtype))
        # No view: zeros after the projection, too, which has a bias and reads the pose.
        told = given.tokens.flatten(1).any(1).to(dtype)
        # The given view's latents enter unscaled, as the autoencoder has them.
        beside = given.latents * self.latent_std + self.latent_mean
        x = torch.cat((noisy, beside), 1).to(dtype).contiguous(memory_format=torch.channels_last)
        return self.denoiser(x, timesteps, context * told[:, None, None]).sample.float()


def zero123_features(pose: Tensor, elevation: Tensor | None = None) -> Tensor:
    """Zero123's four numbers of relative poses ``[...,3]``, or Stable Zero123's, ``[...,4]``.

    Difference of the polar angles (downward) in radians, sine and cosine of the azimuth, and the
    difference of the radii, or with ``elevation [...]`` in degrees of the given views their polar
    angles.  Sources: Zero123's ``get_T``, threestudio's ``stable_zero123_guidance.get_cond``.

    >>> zero123_features(torch.tensor([0.0, 90.0, 0.5])).round(decimals=2).tolist()
    [-0.0, 1.0, -0.0, 0.5]
    """
    up, azimuth, radius = pose.unbind(-1)
    azimuth = torch.deg2rad(azimuth)
    last = radius if elevation is None else torch.deg2rad(90 - elevation)
    return torch.stack((-torch.deg2rad(up), azimuth.sin(), azimuth.cos(), last), -1)


def load_zero123_prior(
    source: str | Path,
    *,
    stable: bool | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> Zero123Prior:
    """Zero123 or Stable Zero123 from a folder in a diffusers layout, or from a hub.

    Needs ``transformers`` (extra ``text``).  A hub's safetensors and configurations are fetched
    and nothing else.

    Args:
        source: folder with ``vae``, ``image_encoder``, ``unet``, ``scheduler`` and
            ``cc_projection`` or ``clip_camera_projection``; or ``owner/name``.
        stable: whether it is Stable Zero123, which its files do not tell; by default if "stable" is
            in its name.
        dtype: of the networks: ``fp16``, ``bf16``, ``fp32`` or torch's own.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: pickles, or parts that are missing or of another shape.

    >>> prior = load_zero123_prior("stable-zero123", dtype="fp16")  # doctest: +SKIP
    """
    dtype = parse_dtype(dtype)
    folder = Path(source)
    name = folder.name
    if not folder.is_dir():
        if not is_hub_id(str(source)):
            raise FileNotFoundError(f"{source}: no such folder, and no hub id (owner/name)")
        folder = _fetch(str(source))
    check_folder(folder)
    linear = _projection(folder)
    try:
        from transformers import CLIPVisionModelWithProjection
    except ImportError as error:
        raise ValueError(
            f"{source}: Zero123 needs transformers: pip install 'latentdem[text]'"
        ) from error
    try:
        networks: dict[str, Any] = {
            part: kind.from_pretrained(
                str(folder / part),
                use_safetensors=True,
                local_files_only=True,
                variant=only_variant(folder / part),
            )
            for part, kind in (
                ("vae", AutoencoderKL),
                ("unet", UNet2DConditionModel),
                ("image_encoder", CLIPVisionModelWithProjection),
            )
        }
        # Any scheduler's configuration tells the noise levels.
        scheduler = DDIMScheduler.from_pretrained(str(folder / "scheduler"), local_files_only=True)
    except OSError as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error
    autoencoder, denoiser = networks["vae"], networks["unet"]
    channels, latents = denoiser.config.in_channels, autoencoder.config.latent_channels
    width = networks["image_encoder"].config.projection_dim
    if channels != 2 * latents or linear.in_features != width + POSE_FEATURES:
        raise ValueError(
            f"{source} is no Zero123: its UNet takes {channels} channels where latents have "
            f"{latents}, its projection {linear.in_features} numbers where CLIP gives {width}"
        )
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"{source}: unknown prediction type {scheduler.config.prediction_type}")
    for module in (*networks.values(), linear):
        module.eval().requires_grad_(False)
        if dtype_of(module) != dtype:  # diffusers warns of casts that do nothing
            module.to(dtype)
    mean, std = latent_scaling(autoencoder)
    is_stable = "stable" in name.lower() if stable is None else stable
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return Zero123Prior(
        autoencoder=autoencoder,
        denoiser=denoiser,
        embedder=networks["image_encoder"],
        context=linear,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        latent_mean=mean,
        latent_std=std,
        unshuffle=1,
        image_size=factor * int(denoiser.config.sample_size),
        camera=CAMERA,
        name=f"{name} ({'Stable ' if is_stable else ''}Zero123)",
        stable=is_stable,
    )


def _projection(folder: Path) -> nn.Linear:
    """The linear map of CLIP's embedding and the pose."""
    for part, name in _LINEAR.items():
        check_pickles(folder / part)
        files = sorted((folder / part).glob("*.safetensors"), key=lambda f: len(f.name))
        if not files:
            continue
        try:
            weights = load_file(files[0])
            weight, bias = (weights[f"{name}.{key}"].float() for key in ("weight", "bias"))
        except Exception as error:
            raise ValueError(f"{files[0]} holds no {name}.weight and bias: {error}") from error
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        return linear
    raise ValueError(
        f"{folder} is no Zero123: it has no {' or '.join(PROJECTIONS)}; load_prior reads models of "
        "photographs"
    )


def _fetch(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Not the pipeline's own code, which such repositories bring, and no pickles.
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error
