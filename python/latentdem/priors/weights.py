"""Files of weights, and their digests."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdem.io import file_digest

Network = TypeVar("Network", bound=nn.Module)


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


def save_network(path: Path, network: nn.Module) -> None:
    """Write a small network's weights as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path)


def load_network(network: Network, path: Path, command: str, what: str) -> Network:
    """``network`` with the weights of :func:`save_network`; ``command`` would train some.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}; train one with: latentdem {command}")
    try:
        network.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except Exception as error:
        raise ValueError(f"{path} is not a {what} of latentdem: {error}") from error
    return network.eval().requires_grad_(False)


def moved(module: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """A copy of ``module`` on ``device`` in ``dtype``: packaged networks are shared.

    As :meth:`torch.nn.Module.to` does it: that of diffusers' networks warns of every cast, also
    where no part of the network needs its own precision.
    """
    return nn.Module.to(copy.deepcopy(module), device, dtype)


def dtype_of(module: nn.Module) -> torch.dtype:
    """What a network's weights are in."""
    return next(module.parameters()).dtype


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a network's weights and their names."""
    return tensors_digest(model.state_dict())


def folder_digest(folder: Path) -> str:
    """SHA-256 of the weights and configurations in a folder of diffusers' layout."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json", ".txt"))
    names = "".join(f"{f.relative_to(folder)} {file_digest(f)}\n" for f in files)
    return hashlib.sha256(names.encode()).hexdigest()


def source_digest(source: Path) -> str:
    """SHA-256 of a prior's file or folder; of anything else, such as a hub's id, its name.

    What is missing is reported where it is loaded, with what to do about it.
    """
    if source.is_file():
        return file_digest(source)
    return folder_digest(source) if source.is_dir() else str(source)


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode())
        # As bytes: NumPy knows no bfloat16.
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
