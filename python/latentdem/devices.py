"""Devices by name."""

from __future__ import annotations

import torch


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
