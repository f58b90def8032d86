"""Latent diffusion priors: an autoencoder, a denoiser and its noise schedule.

Everything the EM driver asks of a prior is in :class:`LatentPrior`; anything made of diffusers
classes fits, see :meth:`LatentPrior.from_diffusers`.  Images are in [0, 1] outside and in
[-1, 1] only between these lines and the networks.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from latentdem.devices import parse_dtype
from latentdem.priors.conditioning import (
    Conditioning,
    cast_floats,
    check_guidance,
    expand,
    flattened,
    joined,
)
from latentdem.priors.weights import (
    dtype_of,
    moved,
    read_weights,
    tensors_digest,
    weights_digest,
)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PACKAGED = ASSETS / "natural.safetensors"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
NO_SIGNAL = 1e-7
"""Latents with less than this ``abar_t`` are noise alone (diffusers' Euler has 2^-24 for zero)."""

TILE = 512
"""Least side, in pixels, of the tiles of an autoencoder that works in tiles."""


@dataclass
class LatentPrior:
    """A latent diffusion model, with latents standardised to about unit variance.

    Args:
        autoencoder: diffusers autoencoder with ``encode(x).latent_dist`` and ``decode(z).sample``.
        denoiser: diffusers UNet, ``denoiser(z, t).sample``.
        alphas_cumprod: ``abar_t`` of every training timestep, ``[T]``.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.
        latent_mean: ``[c,1,1]`` subtracted from latents.
        latent_std: ``[c,1,1]`` they are divided by.
        unshuffle: pixel-unshuffle factor in front of the autoencoder, 1 for none.
        calibration_timesteps: where ``calibration_rmse`` was measured, ``[N]`` ascending.
        calibration_rmse: pixel RMSE (images in [0, 1]) of ``D(E[z_0 | z_t])``, ``[N]``.
        multiple: image sides are padded to a multiple of this many pixels.
        conditioning: extra keyword arguments of the denoiser (a prompt's embedding, say).
        classes: names of the denoiser's labels, the one that is asked for by default first
            (the packaged prior has ``sharp``, ``blurred``, ``unknown``); empty: it has none.
        name: for reports.
        negative_conditioning: what guidance leads away from, with the keys of ``conditioning``.
        guidance: scale w of classifier-free guidance (Ho and Salimans 2022): the denoiser's output
            is ``o_negative + w (o - o_negative)``, both from one call.  1: none.
        decoder: autoencoder whose decoder takes the place of ``autoencoder``'s, say an
            ``AutoencoderTiny``; on the latents that diffusers scales, as ``from_diffusers`` has.
        upcast_autoencoder: ``autoencoder`` overflows in float16 and stays in float32 there.
        slicing: pictures pass the autoencoder one by one, see :meth:`economical`.
    """

    autoencoder: Any
    denoiser: Any
    alphas_cumprod: Tensor
    prediction_type: str
    latent_mean: Tensor
    latent_std: Tensor
    unshuffle: int
    calibration_timesteps: Tensor
    calibration_rmse: Tensor
    multiple: int = 16
    conditioning: Conditioning = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    name: str = "custom"
    negative_conditioning: Conditioning = field(default_factory=dict)
    guidance: float = 1.0
    decoder: Any = None
    upcast_autoencoder: bool = False
    slicing: bool = False

    @property
    def timesteps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alphas_cumprod)

    @property
    def device(self) -> torch.device:
        """Where the networks are, and images and latents must be."""
        return next(self.autoencoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoiser computes in; images and latents are float32 all the same.

        The autoencoder has the same unless ``upcast_autoencoder``.
        """
        return dtype_of(self.autoencoder if self.denoiser is None else self.denoiser)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> LatentPrior:
        """This prior with its networks on ``device`` in ``dtype``; itself if they are already.

        ``dtype``: float16, bfloat16 or float32, or ``fp16``, ``bf16``, ``fp32``.

        >>> load_prior().to("cuda", "fp16")  # doctest: +SKIP
        """
        device = self.device if device is None else torch.empty(0, device=device).device
        dtype = parse_dtype(dtype) or self.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self

        denoiser, decoder = (
            None if network is None else moved(network, device, dtype)
            for network in (self.denoiser, self.decoder)
        )
        return replace(
            self,
            autoencoder=moved(self.autoencoder, device, self._autoencoder_dtype(dtype)),
            denoiser=denoiser,
            decoder=decoder,
            latent_mean=self.latent_mean.to(device),
            latent_std=self.latent_std.to(device),
            conditioning=cast_floats(self.conditioning, device=device, dtype=dtype),
            negative_conditioning=cast_floats(
                self.negative_conditioning, device=device, dtype=dtype
            ),
        )

    def _autoencoder_dtype(self, dtype: torch.dtype) -> torch.dtype:
        overflows = self.upcast_autoencoder and dtype == torch.float16
        return torch.float32 if overflows else dtype

    def economical(self, *, slicing: bool = True, tiling: bool = False) -> LatentPrior:
        """This prior with an autoencoder that takes less memory; the weights are shared.

        Args:
            slicing: pictures pass the autoencoder one by one.
            tiling: in overlapping tiles of :data:`TILE` pixels, by diffusers' ``enable_tiling``;
                the cross-fade between them changes the pictures a little.

        Raises:
            ValueError: the autoencoder has no ``enable_tiling``.

        >>> load_prior().economical().slicing
        True
        """
        autoencoder = self.autoencoder
        if tiling:
            if not hasattr(autoencoder, "enable_tiling"):
                kind = type(autoencoder).__name__
                raise ValueError(f"the prior's autoencoder ({kind}) does not work in tiles")
            autoencoder = copy.copy(autoencoder)
            autoencoder.enable_tiling()
            # By default tiles are as large as what the autoencoder was trained on, perhaps tiny.
            side = getattr(autoencoder, "tile_sample_min_size", None)
            if side is not None and side < TILE // self.unshuffle:
                scale = TILE // self.unshuffle / side
                autoencoder.tile_sample_min_size = TILE // self.unshuffle
                autoencoder.tile_latent_min_size = round(scale * autoencoder.tile_latent_min_size)
        return replace(self, autoencoder=autoencoder, slicing=slicing)

    def encode(self, image: Tensor) -> Tensor:
        """Mean latents of ``image [B,3,H,W]`` in [0, 1] (values outside are allowed)."""
        if self.slicing and len(image) > 1:
            return torch.cat([self.encode(x[None]) for x in image])
        pad = [-side % self.multiple for side in image.shape[-2:]]
        # Replication works for any amount of padding, reflection only below the image's size.
        padded = F.pad(image, (0, pad[1], 0, pad[0]), mode="replicate") if any(pad) else image
        x = padded * 2 - 1
        if self.unshuffle > 1:
            x = F.pixel_unshuffle(x, self.unshuffle)
        found = self.autoencoder.encode(
            x.to(dtype_of(self.autoencoder)).contiguous(memory_format=torch.channels_last)
        )
        # Vector-quantised and tiny autoencoders have latents and no distribution of them.
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return (latents.float() - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Image ``[B,3,H,W]`` of ``size`` (H, W); nominally in [0, 1], not clamped."""
        if self.slicing and len(latents) > 1:
            return torch.cat([self.decode(z[None], size) for z in latents])
        decoder, mean, std = self.autoencoder, self.latent_mean, self.latent_std
        if self.decoder is not None:
            decoder = self.decoder
            mean, std = (part.to(latents) for part in latent_scaling(decoder))
        z = (latents * std + mean).to(dtype_of(decoder))
        x = decoder.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()
        if self.unshuffle > 1:
            x = F.pixel_shuffle(x, self.unshuffle)
        return (x[..., : size[0], : size[1]] + 1) / 2

    def _condition(self, label: str | None, noisy: Tensor) -> Conditioning:
        """Keyword arguments of the denoiser for ``label`` (a name in ``classes``)."""
        if label is None and not self.classes:
            return dict(expand(self.conditioning, len(noisy)))
        if label is not None and label not in self.classes:
            known = ", ".join(self.classes) or "none"
            raise ValueError(f"label {label!r} is not one of the prior's: {known}")
        index = 0 if label is None else self.classes.index(label)
        labels = torch.full((len(noisy),), index, device=noisy.device)
        return {**expand(self.conditioning, len(noisy)), "class_labels": labels}

    def _output(self, noisy: Tensor, timestep: int | Tensor, label: str | None) -> Tensor:
        """What the denoiser says ``[B,c,h,w]``, in the terms of its prediction type."""
        x = noisy.to(self.dtype).contiguous(memory_format=torch.channels_last)
        told = self._condition(label, noisy)
        if self.guidance == 1:
            return self.denoiser(x, timestep, **told).sample.float()
        negative = told | expand(self.negative_conditioning, len(noisy))
        both = self.denoiser(torch.cat([x, x]), timestep, **joined(negative, told))
        free, guided = both.sample.float().chunk(2)
        return free + self.guidance * (guided - free)

    def predict(
        self, noisy: Tensor, timestep: int, label: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(E[z_0 | z_t], E[epsilon | z_t])`` of latents at ``timestep``.

        Args:
            noisy: ``[B,c,h,w]``.
            timestep: of all of them.
            label: one of ``classes``, by default the first; a prior without classes takes none.

        Raises:
            ValueError: the prior has no such label.
        """
        abar = float(self.alphas_cumprod[timestep])
        return self.predict_at(noisy, timestep, abar**0.5, (1 - abar) ** 0.5, label)

    def predict_at(
        self,
        noisy: Tensor,
        timestep: int | Tensor,
        signal: float | Tensor,
        noise: float | Tensor,
        label: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`predict` with ``sqrt(abar_t)`` and ``sqrt(1 - abar_t)`` at hand.

        As tensors ``[]`` on the latents' device, like ``timestep``, they are not looked at: nothing
        waits for a GPU, and one compiled graph serves all timesteps.
        """
        output = self._output(noisy, timestep, label)
        if self.prediction_type == "v_prediction":
            return signal * noisy - noise * output, noise * noisy + signal * output
        if self.prediction_type == "epsilon":
            # Without a signal z_t is epsilon, of which no z_0 can be had: zero is the mean of all
            # latents, here with a gradient, which is zero, too.
            if isinstance(signal, Tensor):
                silent = signal.square() < NO_SIGNAL
                start = (noisy - noise * output) / torch.where(silent, 1.0, signal)
                return torch.where(silent, 0 * noisy, start), torch.where(silent, noisy, output)
            if signal**2 < NO_SIGNAL:
                return 0 * noisy, noisy
            return (noisy - noise * output) / signal, output
        return output, (noisy - signal * output) / noise

    def error_std(self, timestep: float) -> float:
        """r_t: measured pixel RMSE of the decoded estimate at ``timestep``, interpolated."""
        t, r = self.calibration_timesteps, self.calibration_rmse
        index = int(torch.searchsorted(t, float(timestep)).clamp(1, len(t) - 1))
        share = (timestep - float(t[index - 1])) / float(t[index] - t[index - 1])
        share = min(max(share, 0.0), 1.0)
        return float(torch.lerp(r[index - 1], r[index], share))

    def digests(self) -> list[str]:
        """SHA-256 of all that its answers depend on: its networks, and what they are told."""
        networks = (self.autoencoder, self.denoiser, self.decoder)
        found = [weights_digest(network) for network in networks if network is not None]
        if self.conditioning or self.guidance != 1:
            told = flattened({"+": self.conditioning, "-": self.negative_conditioning})
            found.append(tensors_digest(told | {"guidance": torch.tensor([self.guidance])}))
        return found

    @classmethod
    def from_diffusers(
        cls,
        autoencoder: Any,
        denoiser: Any,
        scheduler: Any,
        *,
        images: Tensor,
        conditioning: Conditioning | None = None,
        name: str = "custom",
        negative_conditioning: Conditioning | None = None,
        guidance: float = 1.0,
        decoder: Any = None,
        upcast_autoencoder: bool = False,
    ) -> LatentPrior:
        """Wrap a user's own model, for example Stable Diffusion's parts.

        Args:
            autoencoder: ``AutoencoderKL`` or one with its interface.
            denoiser: ``UNet2DModel`` or ``UNet2DConditionModel``.
            scheduler: any diffusers scheduler with ``alphas_cumprod``.
            images: a few sharp pictures ``[B,3,H,W]`` in [0, 1], to calibrate r_t on; decoded by
                ``decoder`` if there is one.
            conditioning: for a conditional UNet, ``{"encoder_hidden_states": embedding}``.
            name: for reports.
            negative_conditioning: as in :class:`LatentPrior`, like all that follow.
            guidance: 1 for none.
            decoder: None for ``autoencoder``'s own.
            upcast_autoencoder: overflows in float16.

        Raises:
            ValueError: guidance below 1, or the schedule's prediction type is not known.
        """
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"prediction type must be one of {known}, found {prediction_type}")
        mean, std = latent_scaling(autoencoder)
        device = next(autoencoder.parameters()).device
        prior = cls(
            autoencoder=autoencoder.eval().requires_grad_(False),
            denoiser=denoiser.eval().requires_grad_(False),
            alphas_cumprod=scheduler.alphas_cumprod,
            prediction_type=prediction_type,
            latent_mean=mean.to(device),
            latent_std=std.to(device),
            unshuffle=1,
            calibration_timesteps=torch.empty(0),
            calibration_rmse=torch.empty(0),
            multiple=factor * 8,
            conditioning=conditioning or {},
            name=name,
            negative_conditioning=negative_conditioning or {},
            guidance=check_guidance(guidance),
            decoder=None if decoder is None else decoder.eval().requires_grad_(False),
            upcast_autoencoder=upcast_autoencoder,
        )
        prior.calibrate(images)
        return prior

    @torch.no_grad()
    def calibrate(self, images: Tensor | list[Tensor], *, seed: int = 0) -> None:
        """Measure r_t on sharp images in [0, 1]: noise their latents, denoise, decode, compare."""
        batch = list(images) if isinstance(images, Tensor) else images
        batch = [image if image.dim() == 4 else image[None] for image in batch]
        batch = [image.to(self.device) for image in batch]
        grid = [int(f * (self.timesteps - 1)) for f in (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)]
        errors = []
        for timestep in grid:
            generator = torch.Generator().manual_seed(seed)
            abar = float(self.alphas_cumprod[timestep])
            total = 0.0
            for image in batch:
                latents = self.encode(image)
                noise = torch.randn(latents.shape, generator=generator).to(latents)
                noisy = abar**0.5 * latents + (1 - abar) ** 0.5 * noise
                estimate, _ = self.predict(noisy, timestep)
                size = (image.shape[-2], image.shape[-1])
                total += float((self.decode(estimate, size) - image).square().mean())
            errors.append((total / len(batch)) ** 0.5)
        self.calibration_timesteps = torch.tensor(grid, dtype=torch.float32)
        self.calibration_rmse = torch.tensor(errors, dtype=torch.float32)


def save_prior(
    path: Path,
    prior: LatentPrior,
    *,
    autoencoder_config: dict[str, Any],
    denoiser_config: dict[str, Any],
    scheduler_config: dict[str, Any],
) -> None:
    """Write a packaged prior: float16 weights, architecture and calibration in one file."""
    tensors = {f"autoencoder.{k}": v.half() for k, v in prior.autoencoder.state_dict().items()}
    tensors |= {f"denoiser.{k}": v.half() for k, v in prior.denoiser.state_dict().items()}
    for name in ("latent_mean", "latent_std", "calibration_timesteps", "calibration_rmse"):
        tensors[name] = getattr(prior, name).float()
    metadata = {
        "name": prior.name,
        "unshuffle": str(prior.unshuffle),
        "classes": json.dumps(prior.classes),
        "autoencoder": json.dumps(autoencoder_config),
        "denoiser": json.dumps(denoiser_config),
        "scheduler": json.dumps(scheduler_config),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
    partial.replace(path)


def latent_scaling(autoencoder: Any) -> tuple[Tensor, Tensor]:
    """``(mean, std)``, each ``[c|1,1,1]``: diffusers' scaled latents are (latents - mean) / std.

    From ``shift_factor`` and ``scaling_factor``, or ``latents_mean`` and ``latents_std``, of an
    autoencoder's configuration.
    """
    config = autoencoder.config
    scale = float(getattr(config, "scaling_factor", None) or 1.0)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        mean, std = [float(getattr(config, "shift_factor", None) or 0.0)], [1.0]
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None] / scale


def _config(text: str) -> dict[str, Any]:
    """Constructor arguments; diffusers' private entries (``_class_name`` ...) are left out."""
    return {k: v for k, v in json.loads(text).items() if not k.startswith("_")}


def network_multiple(autoencoder: AutoencoderKL, denoiser: UNet2DModel, unshuffle: int) -> int:
    """The pixels that image sides must be a multiple of, for both networks to halve evenly."""
    halvings = sum(len(net.config.block_out_channels) - 1 for net in (autoencoder, denoiser))
    return unshuffle * 2**halvings


def load_prior(path: Path | str | None = None, **options: Any) -> LatentPrior:
    """Load the packaged natural-image prior, a file of ``latentdem train-prior``, or your own.

    Reads safetensors only; needs no network but for a hub id.

    Args:
        path: by default the packaged prior; a file; a folder in diffusers' layout or a hub id,
            as :func:`latentdem.priors.diffusers_folder.load_diffusers_prior` takes them.
        options: of that function: ``dtype`` for any prior; for folders and hub ids ``prompt``,
            ``negative_prompt``, ``guidance``, ``fast_decoder``, ``images``.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not a prior, a pickle, or options that the model does not take.

    >>> load_prior().name
    'latentdem natural images 2'
    >>> load_prior(dtype="bf16").dtype
    torch.bfloat16
    """
    if path is not None and not Path(path).is_file():
        from latentdem.priors.diffusers_folder import is_hub_id, load_diffusers_prior

        if Path(path).is_dir() or is_hub_id(str(path)):
            return load_diffusers_prior(path, **options)
    dtype = options.pop("dtype", None)
    if options:
        raise ValueError(
            f"{', '.join(options)}: only for priors in diffusers' layout; name a folder or a hub "
            "id (--prior)"
        )
    path = PACKAGED if path is None else Path(path)
    metadata, tensors = read_weights(path, "train-prior")
    if "autoencoder" not in metadata or "denoiser" not in metadata:
        raise ValueError(f"{path} is a safetensors file, but not a prior of latentdem")
    autoencoder = AutoencoderKL(**_config(metadata["autoencoder"]))
    denoiser = UNet2DModel(**_config(metadata["denoiser"]))
    scheduler = DDIMScheduler(**_config(metadata["scheduler"]))
    for module, prefix in ((autoencoder, "autoencoder."), (denoiser, "denoiser.")):
        weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(weights)
        module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return LatentPrior(
        autoencoder=autoencoder,
        denoiser=denoiser,
        alphas_cumprod=scheduler.alphas_cumprod,
        prediction_type=scheduler.config.prediction_type,
        latent_mean=tensors["latent_mean"],
        latent_std=tensors["latent_std"],
        unshuffle=int(metadata["unshuffle"]),
        calibration_timesteps=tensors["calibration_timesteps"],
        calibration_rmse=tensors["calibration_rmse"],
        multiple=network_multiple(autoencoder, denoiser, int(metadata["unshuffle"])),
        classes=tuple(json.loads(metadata.get("classes", "[]"))),
        name=metadata["name"],
    ).to(dtype=dtype)
