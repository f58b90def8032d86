"""Priors from diffusers' own folders or hub ids: Stable Diffusion, latent diffusion.

Read as diffusers reads them, from safetensors only: a pickle can run code when it is opened.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import Tensor

from latentdem.devices import parse_dtype
from latentdem.priors.calibration import dead_leaves
from latentdem.priors.conditioning import (
    cast_floats,
    check_guidance,
    has_text,
    text_conditioning,
)
from latentdem.priors.latent import LatentPrior

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARTS = ("vae", "vqvae", "unet", "text_encoder", "text_encoder_2", "image_encoder")
PROJECTIONS = ("cc_projection", "clip_camera_projection")
"""Folders of what mixes view and pose in Zero123, one in each of its layouts."""
TINY_CLASS = "AutoencoderTiny"


def is_hub_id(source: str) -> bool:
    """Whether ``source`` is an ``owner/name``, and not the path of a prior of this package.

    >>> is_hub_id("owner/name"), is_hub_id("runs/natural.safetensors")
    (True, False)
    """
    return _HUB_ID.fullmatch(source) is not None and not source.endswith(".safetensors")


def load_diffusers_prior(
    source: str | Path,
    *,
    prompt: str = "",
    negative_prompt: str | None = None,
    guidance: float = 1.0,
    fast_decoder: str | Path | None = None,
    images: Tensor | None = None,
    dtype: torch.dtype | str = torch.float32,
) -> LatentPrior:
    """A latent diffusion pipeline that diffusers can read, as a prior.

    StableDiffusionPipeline 1.x and 2.x (epsilon and v-prediction), StableDiffusionXLPipeline,
    their distilled forms (SD-Turbo, LatentConsistencyModelPipeline), and LDMPipeline
    (unconditional, with a vector-quantised autoencoder).  The schedule's ``alphas_cumprod`` is all
    that is taken of a scheduler: its way of choosing steps is the sampler's, not the model's.

    Args:
        source: folder in diffusers' layout (with ``model_index.json``), or a hub id.
        prompt: what the pictures show, for models that take text; needs ``transformers``.
        negative_prompt: what they don't; by default the empty text, or with
            ``force_zeros_for_empty_prompt`` (SDXL) zeros, as in diffusers.
        guidance: scale w of classifier-free guidance, at least 1 (none): the network's output is
            ``o_negative + w (o - o_negative)``, at twice the cost.  Latent consistency models
            read w themselves, at no cost.
        fast_decoder: folder or hub id of an ``AutoencoderTiny`` of the same latents, which decodes
            in place of the pipeline's autoencoder: in the E-step, and with gradients in the data
            term of ``paper``.  Encoding stays with the pipeline's, whose latents the denoiser
            knows: in ``z_0 + E(x*) - E(D(z_0))`` both terms have the same encoder, so where x* is
            D(z_0) nothing moves, whatever the decoder lost.
        images: a few sharp pictures ``[B,3,H,W]`` in [0, 1] like those to be restored, to calibrate
            r_t on; by default :func:`~latentdem.priors.calibration.dead_leaves`.
        dtype: of the weights: ``fp16``, ``bf16``, ``fp32`` or torch's own; r_t is calibrated in
            it, too.  In fp16 the autoencoder of SDXL stays in float32 where its configuration says
            that it overflows (``force_upcast``), as in diffusers.

    Raises:
        FileNotFoundError: no such folder, or none of diffusers' layout.
        ValueError: weights that are pickles, a pipeline of another kind, or an option that the
            model does not take; a line that says what to do.

    >>> prior = load_diffusers_prior("stable-diffusion-v1-5", dtype="fp16")  # doctest: +SKIP
    """
    dtype, guidance = parse_dtype(dtype), check_guidance(guidance)
    folder = Path(source)
    local = folder.is_dir()
    if local:
        check_folder(folder)
        if is_zero123(folder):
            raise ValueError(
                f"{source} is Zero123, a prior of objects: load_objects_prior reads it "
                "(latentdem reconstruct --prior)"
            )
    elif not is_hub_id(str(source)):
        raise FileNotFoundError(f"{source}: no such folder, and no hub id (owner/name)")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(source),
            use_safetensors=True,
            local_files_only=local,
            variant=only_variant(folder / "unet"),
        )
    except (OSError, ImportError, AttributeError) as error:
        raise ValueError(f"{source}: {_reason(error)}") from error
    autoencoder, denoiser = _networks(source, pipeline)
    upcast = is_xl(pipeline) and bool(getattr(autoencoder.config, "force_upcast", False))
    keep = upcast and dtype == torch.float16
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    side = factor * int(getattr(denoiser.config, "sample_size", None) or 32)
    with torch.no_grad():
        told, negative = text_conditioning(pipeline, prompt, negative_prompt, guidance)
        decoder = None
        if fast_decoder is not None:
            decoder = _cast(load_fast_decoder(fast_decoder, autoencoder), dtype)
        return LatentPrior.from_diffusers(
            autoencoder if keep else _cast(autoencoder, dtype),
            _cast(denoiser, dtype),
            pipeline.scheduler,
            images=dead_leaves(2, min(side, 256)) if images is None else images,
            conditioning=cast_floats(told, dtype=dtype),
            negative_conditioning=cast_floats(negative, dtype=dtype),
            # Without a negative conditioning the network has read the scale, or there is none.
            guidance=guidance if negative else 1.0,
            decoder=decoder,
            upcast_autoencoder=upcast,
            name=f"{folder.name} ({type(pipeline).__name__})",
        )


def _cast(module: Any, dtype: torch.dtype) -> Any:
    # diffusers warns of every cast, also of one to what the module has.
    return module if module.dtype == dtype else module.to(dtype)


def load_fast_decoder(source: str | Path, autoencoder: Any) -> AutoencoderTiny:
    """:func:`read_fast_decoder`, if it fits.

    Args:
        source: a folder (with ``config.json``), or ``owner/name``.
        autoencoder: the one whose latents it must decode, to as large a picture.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a pickle, or not an AutoencoderTiny of such latents.

    >>> tiny = load_fast_decoder("taesd", pipeline.vae)  # doctest: +SKIP
    """
    tiny = read_fast_decoder(source)
    found, wanted = (
        (net.config.latent_channels, 2 ** (len(net.config.block_out_channels) - 1))
        for net in (tiny, autoencoder)
    )
    if found != wanted:
        raise ValueError(
            f"{source} decodes {found[0]} channels to {found[1]} times the side, the prior's "
            f"autoencoder {wanted[0]} to {wanted[1]}: take the one made for its model"
        )
    return tiny


def read_fast_decoder(source: str | Path) -> AutoencoderTiny:
    """The ``AutoencoderTiny`` in a folder of diffusers' layout or behind a hub id.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a pickle, or another network.
    """
    folder = Path(source)
    local = folder.is_dir()
    if local:
        check_pickles(folder)
    elif not is_hub_id(str(source)):
        raise FileNotFoundError(f"{source}: no such folder, and no hub id (owner/name)")
    try:
        config = AutoencoderTiny.load_config(str(source), local_files_only=local)
        kind = config.get("_class_name")
        if kind != TINY_CLASS:
            raise ValueError(f"{source} is no {TINY_CLASS} (TAESD) but {kind}: no fast decoder")
        return AutoencoderTiny.from_pretrained(
            str(source), use_safetensors=True, local_files_only=local, variant=only_variant(folder)
        )
    except (OSError, ImportError, AttributeError) as error:
        raise ValueError(f"{source}: {_reason(error)}") from error


def check_folder(folder: Path) -> None:
    """Whether diffusers has saved ``folder``, in safetensors.

    Raises:
        FileNotFoundError: no ``model_index.json``.
        ValueError: pickles; the line that converts them.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: not a folder that diffusers has saved"
        )
    for part in _PARTS:
        check_pickles(folder / part)


def _reason(error: Exception) -> str:
    """One line of why diffusers could not load something."""
    if find_spec("transformers") is None and not isinstance(error, OSError):
        return "models that take text need transformers: pip install 'latentdem[text]'"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_zero123(folder: Path) -> bool:
    """Whether it is one of Zero123's layouts."""
    return any((folder / part).is_dir() for part in PROJECTIONS)


def check_pickles(folder: Path) -> None:
    """Raise ValueError if the weights in ``folder`` are pickles only."""
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.ckpt")])
    if pickles and not any(folder.glob("*.safetensors")):
        file = pickles[0]
        raise ValueError(
            f"{file} is a pickle, which can run code when it is opened; if you trust where it "
            'is from, convert it: python -c "import sys, torch; from safetensors.torch import '
            'save_file; save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
            f"{file} {file.with_suffix('.safetensors')}"
        )


def only_variant(folder: Path) -> str | None:
    """``fp16`` if there are weights of that variant in ``folder`` and no others."""
    files = list(folder.glob("*.safetensors"))
    return "fp16" if files and all(".fp16" in file.name for file in files) else None


def is_xl(pipeline: Any) -> bool:
    """Whether it is one of Stable Diffusion XL's pipelines, which heed ``force_upcast``."""
    return "StableDiffusionXL" in type(pipeline).__name__


def _networks(source: str | Path, pipeline: Any) -> tuple[Any, Any]:
    """Autoencoder and denoiser of a pipeline.

    Raises:
        ValueError: it has not the parts of a prior, or the denoiser wants other inputs.
    """
    kind, scheduler = type(pipeline).__name__, getattr(pipeline, "scheduler", None)
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    denoiser = getattr(pipeline, "unet", None)
    if autoencoder is None or denoiser is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{source} is a {kind}; a prior needs an autoencoder, a UNet and a "
            "schedule with alphas_cumprod (StableDiffusionPipeline, LDMPipeline, ...)"
        )
    wanted, latents = denoiser.config.in_channels, autoencoder.config.latent_channels
    if wanted != latents:
        raise ValueError(
            f"{source} is a {kind} whose UNet takes {wanted} channels where latents have "
            f"{latents}: for inpainting, upscaling or editing; take the base model"
        )
    if hasattr(denoiser.config, "cross_attention_dim") and not has_text(pipeline):
        raise ValueError(
            f"{source} is a {kind} whose UNet wants a text, but that has no text_encoder"
        )
    return autoencoder, denoiser
