"""Devices and number formats by name."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""What networks can compute in, by name."""


def find_dtype(name: torch.dtype | str) -> torch.dtype:
    """The number format called ``name``: ``fp16``, ``bf16`` or ``fp32``, or one of torch's three.

    Raises:
        ValueError: another one.

    >>> find_dtype("fp16")
    torch.float16
    """
    found = DTYPES.get(name) if isinstance(name, str) else name
    if found is None or found not in DTYPES.values():
        raise ValueError(
            f"dtype must be {', '.join(DTYPES)} or torch's own of these, found {name!r}"
        )
    return found


def find_device(name: torch.device | str, purpose: str) -> torch.device:
    """The device called ``name``.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` ...
        purpose: what runs on cpu and cuda, for the message.

    Raises:
        ValueError: it is not here, or of another type.

    >>> find_device("cpu", "training runs")
    device(type='cpu')
    """
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{name}' cannot be used: {reason}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{name}' cannot be used: {purpose} on cpu and cuda")
    return device
