"""What a folder in diffusers' layout holds, from its configurations and its files' headers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from latentdem.priors.diffusers_folder import check_folder, is_zero123, only_variant


def describe_folder(folder: Path) -> list[str]:
    """Lines on a pipeline's folder: its kind, networks, schedule, text, guidance.

    Reads no weights, only their shapes and formats.

    Raises:
        FileNotFoundError: no ``model_index.json``.
        ValueError: weights that are pickles, or files that cannot be read.
    """
    check_folder(folder)
    index = _read(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    lines = [f"{'folder':24} {folder.name}", f"{'pipeline':24} {kind}"]
    for name, value in index.items():
        if not isinstance(value, list) or not value[-1]:
            continue
        weights = _weights(folder / name)
        if weights:
            lines.append(f"{name:24} {value[-1]}, {weights}")
    scheduler = _read(folder / "scheduler" / "scheduler_config.json")
    unet = _read(folder / "unet" / "config.json")
    autoencoder = _read(folder / "vae" / "config.json") or _read(folder / "vqvae" / "config.json")
    encoders = [n for n in ("text_encoder", "text_encoder_2") if any((folder / n).glob("*"))]
    facts = {
        "scheduler": scheduler.get("_class_name"),
        "prediction type": scheduler.get("prediction_type"),
        "training timesteps": scheduler.get("num_train_timesteps"),
        "zero terminal SNR": "yes" if scheduler.get("rescale_betas_zero_snr") else None,
        "latent channels": autoencoder.get("latent_channels"),
        "scaling factor": autoencoder.get("scaling_factor"),
        "denoiser's input": f"{unet.get('in_channels')} channels",
        "text": {0: "none", 1: "one encoder", 2: "two encoders"}[len(encoders)],
        "guidance": _guidance(folder, encoders, unet),
        "in float16": _upcast(kind, autoencoder),
    }
    return lines + [f"{name:24} {value}" for name, value in facts.items() if value is not None]


def _guidance(folder: Path, encoders: list[str], unet: dict[str, Any]) -> str:
    if is_zero123(folder):
        return "of the given view (SamplerSettings)"
    if not encoders:
        return "none: the model takes no text"
    if unet.get("time_cond_proj_dim") is not None:
        return "read by the network (latent consistency), no negative prompt"
    return "1 (none) or more, at twice the cost"


def _upcast(kind: str, autoencoder: dict[str, Any]) -> str | None:
    if "StableDiffusionXL" in kind and autoencoder.get("force_upcast", True):
        return "the autoencoder stays in float32"
    return None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _weights(folder: Path) -> str:
    """Parameters and formats of the files that would be read; empty without any."""
    variant = only_variant(folder)
    count, formats = 0, set()
    for file in sorted(folder.glob("*.safetensors")):
        if variant is None and ".fp16" in file.name:
            continue
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    tensor = handle.get_slice(key)
                    count += math.prod(tensor.get_shape())
                    formats.add(tensor.get_dtype())
        except Exception as error:
            raise ValueError(f"{file} is not a safetensors file: {error}") from error
    return f"{count:,} parameters, {'/'.join(sorted(formats))}" if count else ""
