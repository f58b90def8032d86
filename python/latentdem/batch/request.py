"""What is asked for one image, and its digest: equal digests mean equal pictures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import latentdem_ext as ext
from latentdem.batch.inputs import SEEDS, Item
from latentdem.devices import AUTO, dtype_name, fastest_dtype, parse_dtype
from latentdem.em.models import ModelOptions
from latentdem.em.options import check_options, solver_settings
from latentdem.io import InputError, file_digest
from latentdem.priors import load_prior
from latentdem.priors.conditioning import check_guidance
from latentdem.priors.kernel import PACKAGED as PACKAGED_KERNEL
from latentdem.priors.latent import PACKAGED
from latentdem.priors.sharpness import PACKAGED as PACKAGED_SHARPNESS
from latentdem.priors.weights import folder_digest, weights_digest

PRIOR_OPTIONS = ("prompt", "negative_prompt", "guidance", "fast_decoder")


@dataclass(frozen=True)
class Options:
    """Options of :func:`latentdem.deblur` for all images; a manifest's row overrides three.

    Args:
        kernel_size: odd side of the kernel in pixels; None: by the image's size.
        noise_std: in [0, 1] units; None: estimated.
        blur: as in ``deblur``, like ``scale`` and ``grid``.
        scale: of blind super-resolution.
        grid: rows and columns of a varying blur.
        method: ``prox`` or ``paper``.
        steps: of the trajectory; None: the method's own.
        quality: as in ``deblur``.
        seed: of every image: results depend on no neighbour.
        boundary: ``valid``, ``auto`` or ``circular``.
        tile: side of tiles in pixels; None: never.
        assume_blurred: deblur what looks sharp, too.
        linear_light: as in ``deblur``.
        tiling: of the autoencoder, as in ``deblur``.
        prior: file, folder or hub id; None: the packaged one.
        prompt: for priors in diffusers' layout, as in ``load_prior``; so are those that follow.
        negative_prompt: None: the model's own default.
        guidance: None: 1, none.
        fast_decoder: folder or hub id; None: the prior's own.
        dtype: of the networks; None: float16 on CUDA, else the prior's own.  ``auto``: see
            :meth:`settled`.

    Raises:
        ValueError: an option that no image can be deblurred with.
    """

    kernel_size: int | None = None
    noise_std: float | None = None
    blur: str = "motion"
    scale: int = 1
    grid: tuple[int, int] = (1, 1)
    method: str = "prox"
    steps: int | None = None
    quality: str = "standard"
    seed: int = 0
    boundary: str = "auto"
    tile: int | None = 640
    assume_blurred: bool = False
    linear_light: bool = False
    tiling: bool = False
    prior: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance: float | None = None
    fast_decoder: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        size = 1 if self.kernel_size is None else self.kernel_size
        check_options(size, self.method, self.boundary, self.noise_std, self.tile)
        solver_settings(self.method, self.steps, quality=self.quality)
        if self.dtype != AUTO:
            parse_dtype(self.dtype)
        model = ModelOptions(self.blur, self.scale, self.grid, self.linear_light)
        model.check_method(self.method)
        if not -SEEDS <= self.seed < SEEDS:
            raise InputError(f"seed must fit in 64 bits, found {self.seed}")
        own = self.prior_options()
        if own and (self.prior is None or Path(self.prior).is_file()):
            raise InputError(
                f"{', '.join(own)}: only for priors in diffusers' layout; name a folder or a hub "
                "id (--prior)"
            )
        if self.guidance is not None:
            check_guidance(self.guidance)

    def settled(self, device: str) -> Options:
        """These options with ``auto`` decided, by the machine that asks and for all that compute.

        On CPUs bfloat16 if this one has instructions for it; workers on other machines follow, so
        that a picture does not depend on who restored it.
        """
        if self.dtype != AUTO:
            return self
        own = None if device.startswith("cuda") else fastest_dtype(torch.device("cpu"))
        return replace(self, dtype=None if own is None else dtype_name(own))

    def prior_options(self) -> dict[str, Any]:
        """What :func:`latentdem.load_prior` is told beside the prior: what is not None."""
        options = {name: getattr(self, name) for name in PRIOR_OPTIONS}
        return {name: value for name, value in options.items() if value is not None}


class Requests:
    """Requests of a run: its options, the weights of its priors and the version.

    Args:
        options: for all images.
        device: a GPU computes in float16, so its results are others than a CPU's.
    """

    def __init__(self, options: Options, device: str) -> None:
        own = options.prior_options()
        if options.fast_decoder is not None:
            own["fast_decoder"] = decoder_digest(options.fast_decoder)
        # Only what was given: requests without these options stay what they were.
        plain = {k: v for k, v in asdict(options).items() if k not in PRIOR_OPTIONS}
        for name in ("dtype", "linear_light", "quality", "tiling"):
            if plain[name] == getattr(Options, name):
                del plain[name]
        self._common = (
            plain
            | own
            | {
                "prior": prior_digest(options.prior),
                "kernel_prior": prior_digest(str(PACKAGED_KERNEL)),
                "sharpness": prior_digest(str(PACKAGED_SHARPNESS)),
                "device": device.split(":")[0],
                "version": str(ext.build_info()["version"]),
            }
        )

    def options(self, item: Item) -> dict[str, Any]:
        """All that the result depends on but the image itself."""
        own = {
            name: getattr(item, name)
            for name in ("kernel_size", "noise_std", "seed")
            if getattr(item, name) is not None
        }
        return self._common | own

    def request(self, item: Item, content: bytes) -> dict[str, Any]:
        """The options, and the SHA-256 of the image file."""
        return self.options(item) | {"input_sha256": hashlib.sha256(content).hexdigest()}


def digest(request: dict[str, Any]) -> str:
    """SHA-256 of a request, as hex digits."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def prior_digest(prior: str | None) -> str:
    """SHA-256 of a prior's weights: of its file, of its folder's files, or as loaded from a hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be used.
    """
    path = PACKAGED if prior is None else Path(prior)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        return folder_digest(path)
    loaded = load_prior(prior)
    return weights_digest(loaded.autoencoder) + weights_digest(loaded.denoiser)


def decoder_digest(source: str) -> str:
    """SHA-256 of a fast decoder: of its folder's files, or as loaded from a hub.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be used.
    """
    if Path(source).is_dir():
        return folder_digest(Path(source))
    from latentdem.priors.diffusers_folder import read_fast_decoder

    return weights_digest(read_fast_decoder(source))
