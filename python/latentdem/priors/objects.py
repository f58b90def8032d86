"""Pose-conditioned latent diffusion priors of objects, with Zero123's interface.

``epsilon_theta(z_t; I, phi)`` (Liu et al., ICCV 2023): z_t is the noisy latent of the wanted view,
I a given view, phi the wanted pose relative to the given one.  The given view enters twice: its
latent beside z_t, and an embedding by cross-attention.  The packaged prior sees it a third time, as
it would look from the wanted pose if the object were a ball, and knows the rays along which the
wanted view looks: a small model that need not learn what a rotation is learns the rest sooner.
Views are square, on a white ground.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdem.devices import parse_dtype
from latentdem.operators.pose import camera_to_world
from latentdem.priors.latent import ASSETS, LatentPrior, _config
from latentdem.priors.weights import dtype_of, moved, read_weights

PACKAGED_OBJECTS = ASSETS / "objects.safetensors"
POSE_FEATURES = 4


@dataclass(frozen=True)
class CameraModel:
    """The cameras a prior was trained with: what its numbers mean in the world.

    Args:
        fov: full angle of view in degrees.
        elevation: range of the training cameras in degrees.
        radius: range of their distances; objects lie in a ball of radius ``extent``.
        extent: radius of that ball in world units; the world's cube is [-1, 1]^3.
    """

    fov: float = 40.0
    elevation: tuple[float, float] = (-10.0, 50.0)
    radius: tuple[float, float] = (2.2, 3.0)
    extent: float = 0.7

    @classmethod
    def from_json(cls, text: str) -> CameraModel:
        """The inverse of ``json.dumps(vars(camera))``."""
        stored = json.loads(text)
        return cls(
            fov=stored["fov"],
            elevation=tuple(stored["elevation"]),
            radius=tuple(stored["radius"]),
            extent=stored["extent"],
        )


def pose_features(pose: Tensor) -> Tensor:
    """Zero123's four numbers of a relative pose, ``[...,3] -> [...,4]``.

    Elevation in radians (upward), sine and cosine of the azimuth, radius.  (Zero123 itself counts
    the polar angle, downward: :func:`latentdem_ext.zero123_condition`.)
    """
    elevation, azimuth, radius = pose.unbind(-1)
    azimuth = torch.deg2rad(azimuth)
    return torch.stack((torch.deg2rad(elevation), azimuth.sin(), azimuth.cos(), radius), -1)


PROXIES = (0.25, 0.5)
"""Radii of the balls that stand in for the object, in world units."""

RAY_CHANNELS = 6


def _camera_rays(fov: float, side: int, like: Tensor) -> Tensor:
    """Unit directions ``[side*side,3]`` of the pixels' rays, OpenCV axes."""
    focal = 0.5 * side / math.tan(math.radians(fov / 2))
    axis = (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5 - side / 2) / focal
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return F.normalize(torch.stack((x, y, torch.ones_like(x)), -1).flatten(0, 1), dim=-1)


def target_rays(source: Tensor, target: Tensor, fov: float, side: int) -> Tensor:
    """The wanted view's rays as the given camera sees them: Plücker coordinates about the object.

    Direction d and moment ``o x d`` (Sitzmann et al., NeurIPS 2021), o the wanted camera's centre
    relative to the world's origin, both along the given camera's axes.

    Args:
        source: ``[B,3]``, poses of the given views; only differences of azimuths matter.
        target: ``[B,3]``.
        fov: full angle of view in degrees.
        side: of the latents.

    Returns:
        ``[B,6,side,side]``, differentiable in the poses.
    """
    to, back = camera_to_world(target), camera_to_world(source)
    turn = back[:, :3, :3].mT @ to[:, :3, :3]
    direction = _camera_rays(fov, side, target) @ turn.mT  # [B,s*s,3]
    origin = (back[:, :3, :3].mT @ to[:, :3, 3:]).mT
    moment = torch.linalg.cross(origin.expand_as(direction), direction)
    return torch.cat((direction, moment), -1).mT.unflatten(2, (side, side))


def warp_by_proxy(
    latents: Tensor, source: Tensor, target: Tensor, fov: float, proxies: tuple[float, ...]
) -> Tensor:
    """A view's latents carried to another camera over balls about the origin.

    Where a ray of the target camera meets the ball (or passes it most closely), the given latent
    seen there is taken, faded out where the ball turns away from the given camera.

    Args:
        latents: ``[B,c,s,s]`` of the given views.
        source: ``[B,3]``, their poses; the azimuth does not matter beside the target's.
        target: ``[B,3]``.
        fov: full angle of view in degrees.
        proxies: radii of K balls.

    Returns:
        ``[B,K*(c+1),s,s]``: for each ball the latents, and the cosine of the angle at which the
        given camera sees it.  Differentiable in latents and poses.
    """
    side = latents.shape[-1]
    focal = 0.5 * side / math.tan(math.radians(fov / 2))
    rays = _camera_rays(fov, side, target)
    to, back = camera_to_world(target), camera_to_world(source)
    direction = rays @ to[:, :3, :3].mT  # [B,s*s,3]
    origin, eye = to[:, None, :3, 3], back[:, None, :3, 3]
    nearest = -(origin * direction).sum(-1, keepdim=True)
    miss = origin.square().sum(-1, keepdim=True) - nearest.square()  # squared distance of the ray
    parts = []
    for radius in proxies:
        depth = nearest - (radius**2 - miss).clamp_min(1e-6).sqrt()
        point = origin + depth * direction
        toward = eye - point
        facing = (F.normalize(point, dim=-1) * F.normalize(toward, dim=-1)).sum(-1, keepdim=True)
        seen = -toward @ back[:, :3, :3]
        grid = seen[..., :2] / seen[..., 2:].clamp_min(1e-3) * (2 * focal / side)
        warped = F.grid_sample(
            latents, grid.unflatten(1, (side, side)), padding_mode="border", align_corners=False
        )
        facing = facing.mT.unflatten(2, (side, side))
        parts += [warped * torch.sigmoid(8 * facing), facing]
    return torch.cat(parts, 1)


class ViewEmbedder(nn.Module):
    """A small vision transformer on a view's latent: tokens for cross-attention.

    It also tells the view's own elevation and radius, which Zero123 leaves unknown and a world
    with an up direction needs.

    Args:
        channels: of the latent.
        side: of the latent, even.
        width: of the tokens.
        layers: of the transformer.
    """

    def __init__(self, channels: int, side: int, width: int, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.patch = nn.Conv2d(channels, width, 2, stride=2)
        count = (side // 2) ** 2
        self.position = nn.Parameter(0.02 * torch.randn(1, count + 1, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.camera = nn.Linear(width, 2)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """``[B,c,s,s] -> tokens [B,1+s*s/4,width], camera [B,2]``, the camera in training units."""
        tokens = self.patch(latents).flatten(2).transpose(1, 2)
        summary = torch.zeros_like(tokens[:, :1])
        tokens = self.norm(self.transformer(torch.cat((summary, tokens), 1) + self.position))
        return tokens, self.camera(tokens[:, 0])


@dataclass(frozen=True)
class ViewEmbedding:
    """What the denoiser needs of given views; batched, so that it can be indexed and repeated.

    Args:
        latents: ``[B,c,s,s]``.
        tokens: ``[B,L,width]``.
        elevation: ``[B]`` degrees, estimated from the view alone.
        radius: ``[B]`` world units, likewise.
    """

    latents: Tensor
    tokens: Tensor
    elevation: Tensor
    radius: Tensor

    def __getitem__(self, index: Any) -> ViewEmbedding:
        """The views at ``index`` (a tensor of indices repeats them)."""
        return ViewEmbedding(
            self.latents[index], self.tokens[index], self.elevation[index], self.radius[index]
        )

    def __len__(self) -> int:
        return len(self.latents)


def network_output(
    networks: Any, noisy: Tensor, timesteps: Tensor, given: ViewEmbedding, pose: Tensor
) -> Tensor:
    """What the denoiser says ``[B,c,s,s]``, in the terms of its prediction type.

    Args:
        networks: what has ``denoiser``, ``context`` and ``camera``: a prior, or one in training.
        noisy: ``[B,c,s,s]``.
        timesteps: ``[B]``.
        given: B given views.
        pose: ``[B,3]``, wanted minus given.
    """
    dtype = dtype_of(networks.denoiser)
    features = pose_features(pose)
    repeated = features[:, None].expand(-1, given.tokens.shape[1], -1)
    context = networks.context(torch.cat((given.tokens, repeated), -1).to(dtype))
    x = torch.cat((noisy, given.latents), 1)
    more = networks.denoiser.config.in_channels - x.shape[1]
    if more > 0:
        source = torch.stack((given.elevation, torch.zeros_like(given.elevation), given.radius), -1)
        fov = networks.camera.fov
        # Under autocast a camera in bfloat16 would be off by a fifth of a latent pixel.
        with torch.autocast(x.device.type, enabled=False):
            parts = [x, warp_by_proxy(given.latents, source, source + pose, fov, PROXIES)]
            if more > parts[1].shape[1]:
                parts.append(target_rays(source, source + pose, fov, x.shape[-1]))
        x = torch.cat(parts, 1)
    # Geometry in float32, whatever the network computes in.
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    told = {"class_labels": features.to(dtype)}
    return networks.denoiser(x, timesteps, context, **told).sample.float()


@dataclass
class ObjectsPrior:
    """A pose-conditioned latent diffusion model.

    Args:
        autoencoder: diffusers autoencoder, as in :class:`~latentdem.priors.LatentPrior`.
        denoiser: ``UNet2DConditionModel`` on ``2c`` channels (noisy latent, given view's latent),
            with the relative pose as projected class embedding and in its context; more channels
            are those of :func:`warp_by_proxy`, then those of :func:`target_rays`.
        embedder: the given view's tokens, a :class:`ViewEmbedder`.
        context: linear map of ``[token, pose features]`` to the context (Zero123's projection).
        alphas_cumprod: ``[T]``.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        latent_mean: ``[c,1,1]`` subtracted from latents.
        latent_std: ``[c,1,1]`` they are divided by.
        unshuffle: pixel-unshuffle factor in front of the autoencoder.
        image_size: side of the views in pixels.
        camera: of the training views.
        name: for reports.
    """

    autoencoder: Any
    denoiser: Any
    embedder: Any
    context: nn.Module
    alphas_cumprod: Tensor
    prediction_type: str
    latent_mean: Tensor
    latent_std: Tensor
    unshuffle: int = 2
    image_size: int = 64
    camera: CameraModel = field(default_factory=CameraModel)
    name: str = "custom"

    def __post_init__(self) -> None:
        # The image side of the model is the one of the 2D prior; its denoiser is not used.
        self._images = LatentPrior(
            autoencoder=self.autoencoder,
            denoiser=None,
            alphas_cumprod=self.alphas_cumprod,
            prediction_type=self.prediction_type,
            latent_mean=self.latent_mean,
            latent_std=self.latent_std,
            unshuffle=self.unshuffle,
            calibration_timesteps=torch.empty(0),
            calibration_rmse=torch.empty(0),
            multiple=8,
        )

    @property
    def timesteps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alphas_cumprod)

    @property
    def device(self) -> torch.device:
        """Where the networks are, and views, latents and poses must be."""
        return self.latent_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in; views, latents and poses are float32 all the same."""
        return dtype_of(self.denoiser)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> Self:
        """This prior with its networks on ``device`` in ``dtype``; itself if they are already.

        ``dtype``: float16, bfloat16 or float32, or ``fp16``, ``bf16``, ``fp32``.

        >>> load_objects_prior().to("cuda", "fp16")  # doctest: +SKIP
        """
        device = self.device if device is None else torch.empty(0, device=device).device
        dtype = parse_dtype(dtype) or self.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self
        networks = {part: moved(getattr(self, part), device, dtype) for part in _PARTS}
        constants = {
            name: getattr(self, name).to(device)
            for name in ("alphas_cumprod", "latent_mean", "latent_std")
        }
        return replace(self, **networks, **constants)

    def encode(self, views: Tensor) -> Tensor:
        """Mean latents ``[B,c,s,s]`` of ``views [B,3,S,S]`` in [0, 1]."""
        if views.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"views must be {self.image_size} x {self.image_size}, found {list(views.shape)}"
            )
        return self._images.encode(views)

    def decode(self, latents: Tensor) -> Tensor:
        """Views ``[B,3,S,S]``, nominally in [0, 1], not clamped."""
        return self._images.decode(latents, (self.image_size, self.image_size))

    def embed(self, views: Tensor) -> ViewEmbedding:
        """Encode given views ``[B,3,S,S]`` in [0, 1] once, for any number of predictions."""
        latents = self.encode(views)
        found = self.embedder(latents.to(dtype_of(self.embedder)))
        tokens, camera = (part.float() for part in found)
        (e0, e1), (r0, r1) = self.camera.elevation, self.camera.radius
        elevation = (e0 + e1) / 2 + (e1 - e0) / 2 * camera[:, 0]
        radius = (r0 + r1) / 2 + (r1 - r0) / 2 * camera[:, 1]
        return ViewEmbedding(latents, tokens, elevation.clamp(e0, e1), radius.clamp(r0, r1))

    def output(
        self, noisy: Tensor, timesteps: Tensor, given: ViewEmbedding, pose: Tensor
    ) -> Tensor:
        """What the denoiser says ``[B,c,s,s]``: :func:`network_output`."""
        return network_output(self, noisy, timesteps, given, pose)

    def predict(
        self, noisy: Tensor, timestep: Tensor | int, given: ViewEmbedding, pose: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(E[z_0 | z_t, I, phi], E[epsilon | z_t, I, phi])``, differentiable in all.

        Args:
            noisy: ``[B,c,s,s]``.
            timestep: one for all, or ``[B]``.
            given: B given views.
            pose: ``[B,3]``, wanted minus given (:func:`latentdem.operators.pose.relative_pose`).
        """
        t = torch.as_tensor(timestep, device=noisy.device).expand(len(noisy))
        abar = self.alphas_cumprod[t][:, None, None, None]
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        output = self.output(noisy, t, given, pose)
        if self.prediction_type == "v_prediction":
            return signal * noisy - noise * output, noise * noisy + signal * output
        if self.prediction_type == "epsilon":
            return (noisy - noise * output) / signal, output
        return output, (noisy - signal * output) / noise


_PARTS = ("autoencoder", "denoiser", "embedder", "context")


def save_objects_prior(path: Path, prior: ObjectsPrior, scheduler_config: dict[str, Any]) -> None:
    """Write ``prior``: float16 weights and all that is needed to build it, in one file."""
    tensors = {
        f"{part}.{key}": value.half().contiguous()
        for part in _PARTS
        for key, value in getattr(prior, part).state_dict().items()
    }
    tensors |= {"latent_mean": prior.latent_mean, "latent_std": prior.latent_std}
    metadata = {
        "kind": "objects",
        "name": prior.name,
        "unshuffle": str(prior.unshuffle),
        "image_size": str(prior.image_size),
        "autoencoder": json.dumps(dict(prior.autoencoder.config)),
        "denoiser": json.dumps(dict(prior.denoiser.config)),
        "scheduler": json.dumps(scheduler_config),
        "embedder_layers": str(prior.embedder.layers),
        "camera": json.dumps(vars(prior.camera)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


def load_objects_prior(path: Path | str | None = None, **options: Any) -> ObjectsPrior:
    """Load the packaged objects prior, one of ``latentdem train-objects-prior``, or Zero123.

    Reads safetensors only; needs no network but for a hub id.

    Args:
        path: by default the packaged prior; a file; a folder in a diffusers layout of Zero123 or
            Stable Zero123, or its hub id.
        options: of :func:`latentdem.priors.zero123.load_zero123_prior`, for those: ``stable``,
            ``dtype``.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not an objects prior.
    """
    if path is not None and not Path(path).is_file():
        from latentdem.priors.diffusers_folder import is_hub_id

        if Path(path).is_dir() or is_hub_id(str(path)):
            from latentdem.priors.zero123 import load_zero123_prior

            return load_zero123_prior(path, **options)
    if options:
        raise ValueError(f"{', '.join(options)}: only for Zero123; name its folder or hub id")
    path = PACKAGED_OBJECTS if path is None else Path(path)
    metadata, tensors = read_weights(path, "train-objects-prior")
    if metadata.get("kind") != "objects":
        raise ValueError(f"{path} is a safetensors file, but not an objects prior of latentdem")
    scheduler = DDIMScheduler(**_config(metadata["scheduler"]))
    camera = CameraModel.from_json(metadata["camera"])
    channels, _, width = (tensors["embedder.patch.weight"].shape[i] for i in (1, 2, 0))
    side = 2 * round((tensors["embedder.position"].shape[1] - 1) ** 0.5)
    features = tensors["context.weight"].shape
    modules: dict[str, Any] = {
        "autoencoder": AutoencoderKL(**_config(metadata["autoencoder"])),
        "denoiser": UNet2DConditionModel(**_config(metadata["denoiser"])),
        "embedder": ViewEmbedder(channels, side, width, int(metadata["embedder_layers"])),
        "context": nn.Linear(features[1], features[0]),
    }
    for part, module in modules.items():
        prefix = f"{part}."
        module.load_state_dict(
            {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        )
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return ObjectsPrior(
        **modules,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        latent_mean=tensors["latent_mean"],
        latent_std=tensors["latent_std"],
        unshuffle=int(metadata["unshuffle"]),
        image_size=int(metadata["image_size"]),
        camera=camera,
        name=metadata["name"],
    )
