"""What the diffusion baselines share: their noise and their first kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem.operators.blur import BlurModel
from latentdem.operators.initialization import estimate_kernel

FIRST_KERNELS = ("box", "edges")


def random_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape of ``like``; drawn on the CPU, the same everywhere."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def first_kernel(model: BlurModel, name: str, known: Tensor | None = None) -> Tensor:
    """The kernel ``[1,1,k,k]`` that EM starts from, or the known one.

    Args:
        model: the observation.
        name: ``box`` (5 x 5 pixels) or ``edges`` (that of ``l0 + kernel prior``).
        known: taken instead.

    >>> model = BlurModel(torch.rand(1, 3, 16, 16), kernel_size=5, noise_std=0.01)
    >>> first_kernel(model, "box").shape
    torch.Size([1, 1, 5, 5])
    """
    if known is not None:
        return known
    if name == "box":
        return model.initial_kernel()
    if name == "edges":
        return estimate_kernel(
            model.observation,
            model.kernel_size,
            boundary=model.boundary,
            kernel_prior=model.kernel_prior,
        )
    raise ValueError(f"first_kernel must be one of {', '.join(FIRST_KERNELS)}, found '{name}'")
