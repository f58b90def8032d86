"""Files of weights, and their digests."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def read_weights(
    path: Path, command: str, what: str = "prior"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and float32 tensors of a safetensors file; ``command`` would make one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not safetensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}; train one with: latentdem {command}")
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
            return handle.metadata() or {}, tensors
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a network's weights and their names."""
    return tensors_digest(model.state_dict())


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        # As bytes: NumPy knows no bfloat16.
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
