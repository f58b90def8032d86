"""Priors from diffusers' own folders or hub ids: Stable Diffusion, latent diffusion.

Read as diffusers reads them, from safetensors only: a pickle can run code when it is opened.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from latentdem.priors.calibration import dead_leaves
from latentdem.priors.latent import LatentPrior, cast_floats

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARTS = ("vae", "vqvae", "unet", "text_encoder")


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
    images: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> LatentPrior:
    """A latent diffusion pipeline that diffusers can read, as a prior.

    StableDiffusionPipeline 1.x and 2.x (epsilon and v-prediction), and LDMPipeline (unconditional,
    with a vector-quantised autoencoder).

    Args:
        source: folder in diffusers' layout (with ``model_index.json``), or a hub id.
        prompt: what the pictures show, for models that take text; needs ``transformers``.
        images: a few sharp pictures ``[B,3,H,W]`` in [0, 1] like those to be restored, to calibrate
            r_t on; by default :func:`~latentdem.priors.calibration.dead_leaves`.
        dtype: of the weights; r_t is calibrated in it, too.

    Raises:
        FileNotFoundError: no such folder, or none of diffusers' layout.
        ValueError: weights that are pickles, or a pipeline of another kind; a line that says what
            to do.

    >>> prior = load_diffusers_prior("stable-diffusion-v1-5", dtype=torch.float16)  # doctest: +SKIP
    """
    folder = Path(source)
    local = folder.is_dir()
    if local:
        _check_folder(folder)
    elif not is_hub_id(str(source)):
        raise FileNotFoundError(f"{source}: no such folder, and no hub id (owner/name)")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(source), use_safetensors=True, local_files_only=local
        )
    except (OSError, ImportError, AttributeError) as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from error
    autoencoder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    denoiser, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if autoencoder is None or denoiser is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{source} is a {type(pipeline).__name__}; a prior needs an autoencoder, a UNet and a "
            "schedule with alphas_cumprod (StableDiffusionPipeline, LDMPipeline, ...)"
        )
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    side = factor * int(getattr(denoiser.config, "sample_size", None) or 32)
    with torch.no_grad():
        conditioning = _text_conditioning(pipeline, prompt)
        return LatentPrior.from_diffusers(
            autoencoder.to(dtype),
            denoiser.to(dtype),
            scheduler,
            images=dead_leaves(2, min(side, 256)) if images is None else images,
            conditioning=cast_floats(conditioning, dtype=dtype),
            name=f"{folder.name} ({type(pipeline).__name__})",
        )


def _check_folder(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json: not a folder that diffusers has saved"
        )
    for part in _PARTS:
        pickles = sorted([*(folder / part).glob("*.bin"), *(folder / part).glob("*.ckpt")])
        if pickles and not any((folder / part).glob("*.safetensors")):
            file = pickles[0]
            raise ValueError(
                f"{file} is a pickle, which can run code when it is opened; if you trust where it "
                'is from, convert it: python -c "import sys, torch; from safetensors.torch import '
                'save_file; save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" '
                f"{file} {file.with_suffix('.safetensors')}"
            )


def _text_conditioning(pipeline: Any, prompt: str) -> dict[str, Any]:
    """The denoiser's keyword arguments for ``prompt``; batches of one, to be expanded."""
    if getattr(pipeline, "text_encoder", None) is None:
        if prompt:
            raise ValueError(f"{type(pipeline).__name__} takes no text, found a prompt")
        return {}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        raise ValueError(f"{type(pipeline).__name__}: two text encoders are not supported yet")
    embedding, _ = pipeline.encode_prompt(
        prompt, torch.device("cpu"), 1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embedding}
