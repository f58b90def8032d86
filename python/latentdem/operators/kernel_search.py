"""The first kernel, chosen among several by the picture that it makes.

Estimates from edges end in different valleys, and nothing leads from one to the next: EM from a
wrong one stays wrong.  So several are made, each is refined by alternating a deconvolution under
sparse gradients with the M-step (EM with a simpler prior), and the best one's picture tells it: a
wrong kernel rings, which makes more gradients and exceeds the range that a picture has.

Of large kernels this is done on smaller pictures first, where it costs little, and with more of
them: their estimates are worse, so that there is a longer way to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.operators.blur import BlurModel, EdgeStepSettings, above
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian, weight_at
from latentdem.operators.initialization import (
    EDGE_WEIGHT,
    ITERATIONS,
    estimate_kernel,
    resize,
)
from latentdem.priors.kernel import SymmetricKernelPrior


@dataclass(frozen=True)
class Start:
    """Arguments of :func:`latentdem.operators.initialization.estimate_kernel`."""

    edge_weight: float = EDGE_WEIGHT
    answered: int | None = None


STARTS = (
    Start(),
    Start(answered=2),
    Start(answered=ITERATIONS),
    Start(edge_weight=2 * EDGE_WEIGHT, answered=2),
)
MORE_STARTS = (
    Start(edge_weight=4 * EDGE_WEIGHT, answered=2),
    Start(edge_weight=EDGE_WEIGHT / 2, answered=2),
    Start(edge_weight=4 * EDGE_WEIGHT, answered=ITERATIONS),
    Start(edge_weight=EDGE_WEIGHT / 2, answered=ITERATIONS),
)
"""Of large kernels, on a smaller picture, where they cost little."""
REFINEMENTS = 8
"""M-steps on the sparse deconvolution of each ..."""
KEPT, KEPT_AFTER = 3, 2
"""... but of no more than so many, the best ones, after the second.

A start in the right valley may be far from its ground, where its picture still rings more than that
of a wrong kernel.  On 24 validation pairs of 25 pixels, sparse deconvolutions by the best of four
have 28.16 dB after four M-steps of ``STEP``, 28.60 after eight and 28.67 after twelve; after eight
that overshoot (``LONG_STEP``) 28.72, 28.71 if three are kept after the second, 28.31 if two are
kept after the first, as used to be with four M-steps of ``STEP`` (28.17).
"""
SPARSE_WEIGHT = 5e-4
"""Of the deconvolution, at a noise of 0.01."""
OVERSHOOT_WEIGHT = 300.0
"""Of the mean distance from [0, 1], beside the logarithm of the gradients' l1 by l2 norm.

On 24 validation pairs of 25 and 14 of 15 pixels, deconvolutions by the four kernels gain 5.86 and
6.55 dB on average, those by the best 6.80 and 6.96.  This chooses 6.75 and 6.87 (weights of 30 to
1000: 6.74 to 6.77 and 6.86 to 6.87); l1 by l2 alone 6.65 and 6.87, distance alone 5.96 and 6.88, as
does the residual; the sum of |gradients|^0.67 5.99 and 6.23.  One wrong choice costs up to 10 dB.
"""
STEP = EdgeStepSettings(momentum=0.3, denoiser_share=0.6, floor=0.1)
"""Three more of these on 24 validation pairs of 25 pixels: sparse deconvolutions of 27.97 dB; by
the prior's answer alone without a floor 27.87.  Edges of half and twice the weight: 27.72 and 27.79
dB; several kinds together: no better.  In the search itself 27.84 dB become 27.91.

What is left is bias, not too few steps: begun at the true kernels of ten validation pairs, eight
steps lose 1.0 dB.  So do steps on pictures of half and twice the sparse weight and on those of the
diffusion model (0.8 to 1.1), and least squares on all gradients with the Gaussian posterior's
covariance (0.8 to 1.3), of which one step loses 0.1 dB where one of these loses 0.7 (six pairs).
To measure the bias on a blurred copy of the restored picture and subtract it gains 0.5 dB with the
true picture in its place, nothing with the restored one.  A network of 1.1 M parameters, trained
through the least squares to draw their edges and choose where (3256 states of 348 blurs), raises
their MNC on 46 validation states from 0.800 to 0.818, begun at the truth from 0.897 to 0.949; but
with the kernel prior's answers, which know the biases of these edges, the search then ends at an
MNC of 0.907 where it has 0.926 (nine pairs)."""


LONG_STEP = replace(STEP, momentum=-0.4)
"""Goes beyond the M-step's answer, as steps become short on the way down a valley.

A momentum of -0.8 gains no more in eight M-steps (28.68 dB) and loses afterwards."""


@dataclass(frozen=True)
class Round:
    """A deconvolution and the M-step on it.

    Args:
        sparse_weight: of the deconvolution, in units of ``SPARSE_WEIGHT``.
        step: of the M-step.
    """

    sparse_weight: float
    step: EdgeStepSettings


_MOBILE = replace(STEP, momentum=0.2, floor=0.05)


def _annealed(first: float, rounds: int) -> tuple[Round, ...]:
    """From salient edges alone, ``first`` times the weight, to those of ``STEP``."""
    weights = [STEP.edge_weight * first ** (1 - r / (rounds - 1)) for r in range(rounds)]
    return tuple(Round(2.0, replace(_MOBILE, edge_weight=weight)) for weight in weights)


LARGE_KERNEL = 45
"""Kernels above this size in pixels are searched for on smaller pictures first.

On 16 validation pairs of 65 pixels the sparse deconvolutions by the kernels that are found so have
18.7 dB, by a search on the picture itself 18.2, by an estimate alone 17.7.  Begun on half the size
it makes no difference at 45 pixels (21.8 dB) and loses 0.4 dB at 37.
"""
COARSE_SCALE = 0.4
COARSE = (*_annealed(6.0, 5), Round(1.0, STEP))
"""Rounds on a picture of so much of the size: edges are annealed, as the estimates are worse ...

Kernels of 25 pixels want no annealing: it loses 0.1 to 0.3 dB."""
COARSE_KEPT, COARSE_KEPT_AFTER = 4, 3
MIDDLE_SCALE = 0.5
MIDDLE = (Round(1.0, _MOBILE), Round(1.0, STEP))
MIDDLE_KEPT = 3
"""... then those of the best so many at half the size, where pictures tell kernels apart ..."""
FINE = (Round(1.0, _MOBILE), Round(1.0, _MOBILE), Round(1.0, STEP))
FINE_KEPT = 2
"""... and of the best so many on the picture itself."""


def ringing(image: Tensor) -> Tensor:
    """How much ``image [1,1,H,W]`` looks like the picture of a wrong kernel: ``[]``, best is least.

    Logarithm of the l1 by the l2 norm of the gradients, which blur and ringing alike raise
    (Krishnan, Tay and Fergus, "Blind Deconvolution Using a Normalized Sparsity Measure", CVPR
    2011), plus ``OVERSHOOT_WEIGHT`` times the mean distance of the values from [0, 1].

    >>> step = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).expand(1, 1, 6, 6)
    >>> ringing(step) < ringing(step + 0.1 * torch.tensor([0.0, 1.0, -1.0, 1.0, -1.0, 0.0]))
    tensor(True)
    """
    down, right = (
        difference.abs().sum() / difference.square().sum().sqrt().clamp_min(1e-12)
        for difference in (image.diff(dim=-2), image.diff(dim=-1))
    )
    overshoot = (image - image.clamp(0, 1)).abs().mean()
    return (down + right + 1e-12).log() + OVERSHOOT_WEIGHT * overshoot


def sparse(model: BlurModel, kernel: Tensor, weight: float = 1.0) -> Tensor:
    """Deconvolution by ``kernel`` under sparse gradients, on the canvas of a grey ``model``.

    ``weight``: of the gradients, in units of ``SPARSE_WEIGHT``.
    """
    weight *= weight_at(SPARSE_WEIGHT, model.noise_std)
    return hyper_laplacian(model, kernel, HyperLaplacianSettings(weight=weight))


def refine(model: BlurModel, kernel: Tensor, image: Tensor, step: EdgeStepSettings) -> Tensor:
    """The M-step on ``image``, a deconvolution by ``kernel [1,1,k,k]``: the next kernel."""
    fit = model.fit_edges(model.edges(image, step), kernel, weight=step.kernel_weight)
    return model.settle(fit, step)


def _best_first(model: BlurModel, images: list[Tensor]) -> list[int]:
    """Indices of ``images`` on the canvas by their :func:`ringing`."""
    return torch.stack([ringing(model.crop(image)) for image in images]).argsort().tolist()


def _refine_all(
    model: BlurModel,
    kernels: list[Tensor],
    rounds: Sequence[Round],
    *,
    kept: int | None = None,
    kept_after: int = 0,
    recenter: bool = True,
) -> list[Tensor]:
    """``kernels`` refined by ``rounds``; no more than ``kept`` after ``kept_after`` of them.

    ``recenter``: after each of them, so that a stroke which grows is not cut by its frame.
    """
    for done, each in enumerate(rounds):
        images = [sparse(model, kernel, each.sparse_weight) for kernel in kernels]
        if kept is not None and done == kept_after:
            best = _best_first(model, images)[:kept]
            kernels, images = [kernels[i] for i in best], [images[i] for i in best]
        kernels = [
            refine(model, kernel, image, each.step)
            for image, kernel in zip(images, kernels, strict=True)
        ]
        if recenter:
            kernels = [ext.recenter_kernel(kernel, subpixel=False) for kernel in kernels]
    return kernels


def _by_picture(model: BlurModel, kernels: list[Tensor]) -> list[Tensor]:
    """``kernels``, that of the best picture first."""
    return [kernels[i] for i in _best_first(model, [sparse(model, kernel) for kernel in kernels])]


@torch.no_grad()
def search_kernel(
    observation: Tensor,
    kernel_size: int,
    *,
    noise_std: float,
    boundary: str = "valid",
    kernel_prior: nn.Module,
    also: Sequence[Tensor] = (),
) -> Tensor:
    """The best of several first kernels, refined; of large ones on smaller pictures first.

    Args:
        observation: ``[1,C,H,W]`` in [0, 1].
        kernel_size: odd side k.
        noise_std: sigma, in the image's units.
        boundary: ``valid`` or ``circular``.
        kernel_prior: what answers the M-steps.
        also: further first kernels ``[1,1,k,k]`` to try.

    Returns:
        ``[1,1,k,k]``, non-negative, summing to one, nothing below a tenth of its peak.

    >>> from latentdem.priors import load_kernel_prior
    >>> photo, prior = torch.rand(1, 3, 32, 32), load_kernel_prior()
    >>> search_kernel(photo, 9, noise_std=0.01, kernel_prior=prior).shape
    torch.Size([1, 1, 9, 9])
    """
    model = BlurModel(
        observation.mean(1, keepdim=True),
        kernel_size=kernel_size,
        noise_std=noise_std,
        boundary=boundary,
        kernel_prior=SymmetricKernelPrior(kernel_prior),
    )
    if kernel_size > LARGE_KERNEL:
        return _search_coarse_to_fine(model, also)
    kernels = _refine_all(
        model,
        _estimates(model, STARTS) + list(also),
        [Round(1.0, LONG_STEP)] * REFINEMENTS,
        kept=KEPT,
        kept_after=KEPT_AFTER,
        recenter=False,
    )
    return above(_by_picture(model, kernels)[0], STEP.floor)


def _search_coarse_to_fine(model: BlurModel, also: Sequence[Tensor]) -> Tensor:
    """The large kernel ``[1,1,k,k]`` of a grey ``model``: on smaller pictures, then on its own."""
    coarse, middle = _smaller(model, COARSE_SCALE), _smaller(model, MIDDLE_SCALE)
    kernels = _estimates(coarse, STARTS + MORE_STARTS)
    kernels += [_resized(kernel, coarse.kernel_size) for kernel in also]
    kernels = _refine_all(coarse, kernels, COARSE, kept=COARSE_KEPT, kept_after=COARSE_KEPT_AFTER)
    kernels = _enlarged(_by_picture(coarse, kernels)[:MIDDLE_KEPT], middle.kernel_size)
    kernels = _refine_all(middle, kernels, MIDDLE)
    kernels = _enlarged(_by_picture(middle, kernels)[:FINE_KEPT], model.kernel_size)
    # Smaller pictures may have lost what makes the difference.
    kernels += _estimates(model, STARTS[:1])
    kernels = _refine_all(model, kernels, FINE)
    return ext.recenter_kernel(above(_by_picture(model, kernels)[0], STEP.floor), subpixel=False)


def _estimates(model: BlurModel, starts: Sequence[Start]) -> list[Tensor]:
    """First kernels ``[1,1,k,k]`` of ``model``, one for each of ``starts``."""
    return [
        estimate_kernel(
            model.observation,
            model.kernel_size,
            boundary=model.boundary,
            kernel_prior=model.kernel_prior,
            edge_weight=start.edge_weight,
            answered=start.answered,
        )
        for start in starts
    ]


def _smaller(model: BlurModel, scale: float) -> BlurModel:
    """``model`` of a picture and kernels of about ``scale`` of the size."""
    side = 2 * round((scale * model.kernel_size - 1) / 2) + 1
    scale = side / model.kernel_size
    height, width = (max(side, round(scale * length)) for length in model.extent)
    return BlurModel(
        resize(model.observation, (height, width)),
        kernel_size=side,
        # Pixels that are means of several have less noise.
        noise_std=scale * model.noise_std,
        boundary=model.boundary,
        kernel_prior=model.kernel_prior,
    )


def _enlarged(kernels: Sequence[Tensor], side: int) -> list[Tensor]:
    """``kernels`` without their haze, on the finer grid of ``side`` pixels."""
    return [_resized(above(kernel, STEP.floor), side) for kernel in kernels]


def _resized(kernel: Tensor, side: int) -> Tensor:
    """``kernel [1,1,k,k]`` on another grid ``[1,1,side,side]``, summing to one."""
    kernel = resize(kernel, (side, side)).clamp_min(0)
    return kernel / kernel.sum()
