"""A first kernel from the observation alone: coarse to fine, with the L0 gradient prior.

EM then starts near a kernel and not at a delta, where a diffusion prior, which likes smooth
pictures, would keep it.  Half a second for 256 x 256 pixels.  Of several,
:mod:`latentdem.operators.kernel_search` chooses the best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdem.operators.blur import BlurModel, align
from latentdem.operators.edges import l0_deconvolution

ITERATIONS = 5
"""Alternations of image and kernel at each scale."""
EDGE_WEIGHT = 2e-2
"""First lambda of the L0 prior; it falls by a tenth at each alternation, not below 1e-4."""
KERNEL_WEIGHT = 2.0
"""Weight of the kernel's squared norm, in squared grey values summed over the image."""
DENOISER_SHARE = 0.5
"""Share of the kernel prior's answer at the end of each scale, of kernels that are not large."""
FRAME_MASS = 0.05
"""A kernel with more than this share of its mass at its frame's border wants a larger one.

On validation photographs kernels that fit have up to 0.049, larger ones 0.053 to 0.18.  Faint
specks far out grow with the frame, so that one twice too large is worse than a tight one.
"""
LARGE = 35
"""Kernels above this size in pixels are what the kernel prior says, wholly and at each alternation.

On sixteen validation pairs of 65 and 45 pixels MNC rises from 0.58 and 0.69 to 0.76 and 0.75: least
squares alone lose a long stroke at a coarse scale, where nothing finds it again.
"""
SMALLEST_DENOISED = 9
"""Kernels below this size have too few pixels to have a shape."""


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """``image [B,C,H,W]`` at another size, without aliases."""
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)


def kernel_sizes(size: int) -> list[int]:
    """Odd kernel sizes from coarse to fine, each about 1.4 times the one before.

    >>> kernel_sizes(25)
    [3, 5, 7, 9, 13, 19, 25]
    """
    sizes = [size]
    while sizes[0] > 3:
        sizes.insert(0, max(3, min(sizes[0] - 2, round(sizes[0] / 2**0.5) // 2 * 2 + 1)))
    return sizes


def _two_pixels(size: int) -> Tensor:
    """A start that breaks the symmetry of a delta: two pixels in a row."""
    kernel = torch.zeros(1, 1, size, size)
    kernel[..., size // 2, max(0, size // 2 - 1) : size // 2 + 1] = 1
    return kernel / kernel.sum()


@torch.no_grad()
def estimate_kernel(
    observation: Tensor,
    kernel_size: int,
    *,
    boundary: str = "valid",
    kernel_prior: nn.Module | None = None,
    edge_weight: float = EDGE_WEIGHT,
    answered: int | None = None,
) -> Tensor:
    """First estimate of the blur kernel.

    Args:
        observation: ``[1,C,H,W]`` in [0, 1].
        kernel_size: odd side k.
        boundary: ``valid`` or ``circular``.
        kernel_prior: denoiser that each scale's kernel is mixed with, or none.
        edge_weight: first lambda of the L0 prior.
        answered: alternations of each scale, its last ones, that the kernel prior answers wholly.
            By default all of large kernels, and of others its end alone, to half.

    Returns:
        ``[1,1,k,k]``, non-negative, summing to one.
    """
    grey = observation.mean(1, keepdim=True)
    weight = edge_weight
    if answered is None and kernel_size > LARGE:
        answered = ITERATIONS
    sizes = kernel_sizes(kernel_size)
    kernel = _two_pixels(sizes[0]).to(observation)
    for size in sizes:
        scale = size / kernel_size
        height, width = (max(size, round(side * scale)) for side in grey.shape[-2:])
        small = resize(grey, (height, width)) if scale < 1 else grey
        model = BlurModel(
            small, kernel_size=size, noise_std=0.01, boundary=boundary, kernel_prior=kernel_prior
        )
        kernel = resize(kernel, (size, size)).clamp_min(0)
        kernel = kernel / kernel.sum()
        for done in range(ITERATIONS):
            image = l0_deconvolution(model.padded, kernel, weight=weight)
            fit = model.fit_edges(image, kernel, weight=KERNEL_WEIGHT)
            kernel = fit.kernel
            if size >= SMALLEST_DENOISED and ITERATIONS - done <= (answered or 0):
                kernel = align(model.answer(fit, 1.0), kernel)
            weight = max(weight / 1.1, 1e-4)
        if answered is None and size >= SMALLEST_DENOISED:
            kernel = align(model.answer(fit, DENOISER_SHARE), kernel)
    return kernel


def touches_frame(kernel: Tensor) -> bool:
    """Whether more than ``FRAME_MASS`` of ``kernel [1,1,k,k]`` lies in a twelfth at its border."""
    side = kernel.shape[-1]
    ring = max(1, side // 12)
    inside = float(kernel[..., ring : side - ring, ring : side - ring].sum())
    return 1 - inside / float(kernel.sum()) > FRAME_MASS


def find_kernel(
    observation: Tensor,
    *,
    smallest: int,
    largest: int,
    boundary: str = "valid",
    kernel_prior: nn.Module | None = None,
) -> Tensor:
    """First estimate of a kernel of unknown size: as large as it takes not to touch its frame.

    Args:
        observation: ``[1,C,H,W]`` in [0, 1].
        smallest: odd side that is tried first.
        largest: odd side that is not exceeded.
        boundary: ``valid`` or ``circular``.
        kernel_prior: as for :func:`estimate_kernel`.

    Returns:
        ``[1,1,k,k]``, k odd, between the two.
    """
    size = smallest
    while True:
        kernel = estimate_kernel(observation, size, boundary=boundary, kernel_prior=kernel_prior)
        if size >= largest or not touches_frame(kernel):
            return kernel
        size = min(largest, round(1.4 * size) // 2 * 2 + 1)
