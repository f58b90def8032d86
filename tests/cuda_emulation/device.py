"""A device in the emulator's place, for the same tests: ``LATENTDEM_EMULATION_DEVICE=cuda``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import latentdem_ext  # noqa: F401  makes the operators known


def moved(value: Any, device: str) -> Any:
    """Tensors, also those in lists and tuples, on ``device``; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


class Operators:
    """``torch.ops.latentdem`` for tensors of the CPU: there and back, as the emulator takes them.

    Without autograd, which the emulated operators do not have either.
    """

    def __init__(self, device: str) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.latentdem, name)

        def call(*values: Any) -> Any:
            with torch.no_grad():
                return moved(operator(*moved(values, self._device)), "cpu")

        return call


class OnDevice:
    """As :class:`cuda_emulation.build.Emulated`; the order of threads is the hardware's."""

    ordered = False

    def __init__(self, device: str) -> None:
        self.operators = Operators(device)

    def seed(self, value: int) -> None:
        """Nothing: no seed rules the hardware."""
