"""The first kernels of a blur that varies: one for each patch, and where they lie to each other.

A kernel moved one way and its patch moved the other way give the same observation.  A single blur
may keep that freedom, since it moves the picture as a whole; patches may not, since they would tear
it.  Where two of them are cross-faded both show the same scene, which tells how far they are off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentdem.operators.blur import BlurModel, align
from latentdem.operators.kernel_search import STEP, search_kernel, sparse
from latentdem.priors.kernel import SymmetricKernelPrior

if TYPE_CHECKING:
    from latentdem.operators.varying import VaryingBlurModel

SHOWN = 0.15
"""A patch's kernel is sought where the patch weighs more than this.

Six validation photographs, 2 x 2 kernels of 17 pixels, placed and refined: 25.2 dB where it weighs
half (cells without their neighbours'), 25.6 dB with an eighth more on each side.
"""
REFINEMENTS = 4
"""Of all kernels together, before EM."""
REACH = 3
"""Displacements of neighbours that are sought, in whole pixels to either side."""
STIFFNESS = 1e-3
"""Pull towards staying, as a share of what the best known pair of neighbours weighs."""


def displacement(moved: Tensor, still: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """How far ``moved`` lies from ``still``: pixels ``(dy, dx) [2]``, their information ``[2,2]``.

    Whole pixels by the least squared difference of gradients, then Gauss-Newton on the pictures.

    Args:
        moved: ``[1,1,H,W]``.
        still: the same scene, ``[1,1,H,W]``.
        weight: of each pixel, ``[1,1,H,W]``.

    >>> scene = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    >>> middle = torch.zeros(1, 1, 24, 24)
    >>> middle[..., 6:18, 6:18] = 1
    >>> [round(float(d), 3) for d in displacement(scene.roll((2, -1), (-2, -1)), scene, middle)[0]]
    [2.0, -1.0]
    """
    size = (moved.shape[-2], moved.shape[-1])
    down, right = (still.roll(-1, dim) - still for dim in (-2, -1))
    errors = {}
    for dy in range(-REACH, REACH + 1):
        for dx in range(-REACH, REACH + 1):
            back = moved.roll((-dy, -dx), (-2, -1))
            error = (back.roll(-1, -2) - back - down).square()
            error += (back.roll(-1, -1) - back - right).square()
            errors[dy, dx] = float((weight * error).sum())
    best = moved.new_tensor(min(errors, key=lambda shift: errors[shift]))
    information = torch.zeros(2, 2, device=moved.device, dtype=moved.dtype)
    spectrum = torch.fft.rfft2(moved)
    for _ in range(5):
        back = torch.fft.irfft2(spectrum * _phase(size, -best), s=size)
        slopes = torch.stack(
            [(back.roll(-1, dim) - back.roll(1, dim)).flatten() / 2 for dim in (-2, -1)]
        )
        weighted = slopes * weight.flatten()
        information = weighted @ slopes.T
        ridge = (1e-6 * information.trace() + 1e-12) * torch.eye(2).to(information)
        step = torch.linalg.solve(information + ridge, weighted @ (back - still).flatten())
        best = best - step.clamp(-0.5, 0.5)
    return best, information


def _phase(size: tuple[int, int], shift: Tensor) -> Tensor:
    """What moves a picture by ``shift [2]``, on its half spectrum."""
    rows = torch.fft.fftfreq(size[0], device=shift.device)[:, None]
    columns = torch.fft.rfftfreq(size[1], device=shift.device)[None, :]
    return torch.exp(-2j * torch.pi * (rows * shift[0] + columns * shift[1]))


def shift_kernel(kernel: Tensor, shift: Tensor) -> Tensor:
    """``kernel [1,1,k,k]`` moved by ``(dy, dx) [2]`` pixels, fractions too, in its frame.

    >>> dot = torch.zeros(1, 1, 5, 5)
    >>> dot[..., 2, 2] = 1
    >>> int(shift_kernel(dot, torch.tensor([1.0, 0.0])).argmax())
    17
    """
    side = kernel.shape[-1]
    padded = (2 * side, 2 * side)  # or what leaves on one side comes in on the other
    spectrum = torch.fft.rfft2(kernel, s=padded) * _phase(padded, shift)
    moved = torch.fft.irfft2(spectrum, s=padded)[..., :side, :side].clamp_min(0)
    return moved / moved.sum().clamp_min(1e-12)


def place(model: VaryingBlurModel, kernels: Tensor) -> Tensor:
    """``kernels [1,P,k,k]`` moved so that neighbouring patches show one scene.

    Each patch is deconvolved by its own kernel; the displacements of neighbours where they are
    cross-faded give each patch's own by least squares, weighted by how well they are known.
    """
    count, columns = kernels.shape[1], model.grid[1]
    windows = [model.crop(weight)[None, None] for weight in model.weights]
    pictures = []
    for number, window in enumerate(windows):
        area = model.area(number, 0.0)
        patch = BlurModel(
            model.grey[area].contiguous(), kernel_size=kernels.shape[-1], noise_std=model.noise_std
        )
        picture = torch.zeros_like(window)
        picture[area] = patch.crop(sparse(patch, kernels[:, number : number + 1]))
        pictures.append(picture)
    inner = torch.zeros_like(windows[0])
    inner[..., REACH:-REACH, REACH:-REACH] = 1  # beyond it a shift would wrap round
    system, right = kernels.new_zeros(2 * count, 2 * count), kernels.new_zeros(2 * count)
    largest = 0.0
    for first in range(count):
        below = [first + columns] if first + columns < count else []
        beside = [first + 1] if (first + 1) % columns else []
        for second in beside + below:
            weight = windows[first] * windows[second] * inner
            found, information = displacement(pictures[second], pictures[first], weight)
            a, b = (slice(2 * i, 2 * i + 2) for i in (first, second))
            for own, other, sign in ((a, b, -1), (b, a, 1)):
                system[own, own] += information
                system[own, other] -= information
                right[own] += sign * information @ found
            largest = max(largest, float(information.trace()))
    pull = STIFFNESS * largest + 1e-12
    shifts = torch.linalg.solve(system + pull * torch.eye(2 * count).to(system), right)
    return torch.cat(
        [
            shift_kernel(kernel[None, None], shift)
            for kernel, shift in zip(kernels[0], shifts.view(count, 2), strict=True)
        ],
        1,
    )


@torch.no_grad()
def search_kernels(model: VaryingBlurModel, whole: Tensor) -> Tensor:
    """First kernels ``[1,P,k,k]`` of all patches.

    The best of several for each patch by itself; placed; refined together by EM with sparse
    gradients in the prior's place; placed again.

    Args:
        model: with a kernel prior.
        whole: kernel ``[1,1,k,k]`` of the photograph as if it did not vary, which each patch tries,
            too: it may show little.
    """
    from latentdem.operators.varying import VaryingBlurModel

    assert model.kernel_prior is not None
    found = []
    for number in range(len(model.weights)):
        kernel = search_kernel(
            model.observation[model.area(number, SHOWN)].contiguous(),
            model.kernel_size,
            noise_std=model.noise_std,
            kernel_prior=model.kernel_prior,
            also=[whole],
        )
        found.append(align(kernel, whole))
    kernels = place(model, torch.cat(found, 1))
    grey = VaryingBlurModel(
        model.grey,
        grid=model.grid,
        kernel_size=model.kernel_size,
        noise_std=model.noise_std,
        boundary=model.boundary,
        kernel_prior=SymmetricKernelPrior(model.kernel_prior),
    )
    # Its M-steps are those of after a search, but slow only where EM has many of them.
    quick = replace(STEP, searched_momentum=STEP.momentum)
    for _ in range(REFINEMENTS):
        kernels = grey.update(sparse(grey, kernels), kernels, quick)
    return place(model, kernels)
