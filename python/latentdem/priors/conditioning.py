"""What a denoiser is told beside the noisy latents: a text, its opposite, the picture's size.

Conditionings are keyword arguments of the denoiser, for a batch of one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Conditioning = dict[str, Any]


def cast_floats(
    value: Any, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Tensors in nested dictionaries on ``device``, those of floats in ``dtype``."""
    if isinstance(value, dict):
        return {k: cast_floats(part, device=device, dtype=dtype) for k, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def expand(value: Any, count: int) -> Any:
    """Conditioning of one, in nested dictionaries too, for a batch of ``count``."""
    if isinstance(value, dict):
        return {key: expand(part, count) for key, part in value.items()}
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1:
        return value.expand(count, *value.shape[1:])
    return value


def joined(first: Any, second: Any) -> Any:
    """Two conditionings with the same keys, one behind the other in the batch."""
    if isinstance(first, dict):
        return {key: joined(part, second[key]) for key, part in first.items()}
    return torch.cat([first, second]) if isinstance(first, Tensor) else first


def flattened(value: Conditioning, name: str = "") -> dict[str, Tensor]:
    """The tensors in nested dictionaries, by dotted names."""
    tensors: dict[str, Tensor] = {}
    for key, part in value.items():
        if isinstance(part, dict):
            tensors |= flattened(part, f"{name}{key}.")
        elif isinstance(part, Tensor):
            tensors[f"{name}{key}"] = part
    return tensors


def check_guidance(guidance: float) -> float:
    """The scale of classifier-free guidance, if it is one.

    Raises:
        ValueError: below 1, or not finite; diffusers' 0 for "none" is 1 here.
    """
    if not (math.isfinite(guidance) and guidance >= 1):
        raise ValueError(f"guidance must be at least 1 (1: none), found {guidance}")
    return float(guidance)


def guidance_embedding(guidance: float, width: int) -> Tensor:
    """``[1,width]``: the guidance scale as latent consistency models read it.

    Sines and cosines of 1000 (w - 1), as diffusers' pipelines embed it (``timestep_cond``).

    >>> guidance_embedding(1.0, 4)
    tensor([[0., 0., 1., 1.]])
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor([guidance - 1]) * 1000.0 * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()])[None]
    return torch.nn.functional.pad(embedding, (0, width - 2 * half))


def text_conditioning(
    pipeline: Any, prompt: str | None, negative_prompt: str | None, guidance: float
) -> tuple[Conditioning, Conditioning]:
    """What ``pipeline`` would tell its UNet of ``prompt``, and of ``negative_prompt``.

    Args:
        pipeline: of diffusers, with its text encoders (of none: two empty conditionings).
        prompt: what the pictures show; None or empty: anything.
        negative_prompt: what they don't; None is diffusers' default: the empty text, or for models
            with ``force_zeros_for_empty_prompt`` (Stable Diffusion XL) zeros.
        guidance: scale w.

    Raises:
        ValueError: the model cannot take what is given.
    """
    kind = type(pipeline).__name__
    given = {"prompt": prompt, "negative_prompt": negative_prompt}
    asked = [name for name, text in given.items() if text]
    asked += ["guidance"] if guidance != 1 else []
    width = getattr(pipeline.unet.config, "time_cond_proj_dim", None)
    if not has_text(pipeline):
        if asked:
            raise ValueError(f"{kind} takes no text, found {' and '.join(asked)}: leave it out")
        return {}, {}
    if width is not None and negative_prompt:
        raise ValueError(
            f"this {kind} reads the guidance scale itself and takes no negative prompt: leave that "
            "out"
        )
    if negative_prompt is not None and width is None and guidance == 1:
        raise ValueError("a negative prompt does nothing at guidance 1: pass guidance, 5 say")
    found = pipeline.encode_prompt(
        prompt=prompt or "",
        negative_prompt=negative_prompt,
        device=torch.device("cpu"),
        num_images_per_prompt=1,
        do_classifier_free_guidance=guidance != 1 and width is None,
    )
    shared: Conditioning = {}
    if width is not None:
        shared["timestep_cond"] = guidance_embedding(guidance, width)
    sizes = _size_conditioning(pipeline)

    def told(embedding: Tensor | None, pooled: Tensor | None) -> Conditioning:
        if embedding is None:
            return {}
        added = {} if sizes is None else {"text_embeds": pooled, "time_ids": sizes}
        extra = {"added_cond_kwargs": added} if added else {}
        return {"encoder_hidden_states": embedding} | extra | shared

    pooled, negative_pooled = found[2:] if len(found) == 4 else (None, None)
    return told(found[0], pooled), told(found[1], negative_pooled)


def has_text(pipeline: Any) -> bool:
    """Whether a pipeline has a text encoder (the refiner of SDXL has only the second)."""
    return any(getattr(pipeline, f"text_encoder{n}", None) is not None for n in ("", "_2"))


def _size_conditioning(pipeline: Any) -> Tensor | None:
    """SDXL's six numbers ``[1,6]``: original size, top left corner of the crop, wanted size.

    The model's own full size, uncropped: what a large sharp photograph had in training.  The size
    of the picture at hand would tell of a small one that it was enlarged, so is less sharp.
    """
    config = pipeline.unet.config
    if getattr(config, "addition_embed_type", None) != "text_time":
        return None
    if pipeline.config.get("requires_aesthetics_score", False):
        raise ValueError(
            f"{type(pipeline).__name__} is a refiner, which goes on from another model's latents; "
            "take the base model"
        )
    side = float((config.sample_size or 128) * pipeline.vae_scale_factor)
    return torch.tensor([[side, side, 0.0, 0.0, side, side]])
