"""The first kernel, chosen among several by the picture that it makes.

Estimates from edges end in different valleys, and nothing leads from one to the next: EM from a
wrong one stays wrong.  So several are made, each is refined by alternating a deconvolution under
sparse gradients with the M-step (EM with a simpler prior), and the best one's picture tells it: a
wrong kernel rings, which makes more gradients and exceeds the range that a picture has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentdem.operators.blur import BlurModel, EdgeStepSettings, above
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian, weight_at
from latentdem.operators.initialization import EDGE_WEIGHT, ITERATIONS, estimate_kernel
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
REFINEMENTS = 4
"""M-steps on the sparse deconvolution of each ..."""
KEPT, KEPT_AFTER = 2, 1
"""... but of no more than so many, the best ones, after the first: a quarter faster, no worse."""
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
dB; several kinds together: no better.  In the search itself 27.84 dB become 27.91."""


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


def sparse(model: BlurModel, kernel: Tensor) -> Tensor:
    """Deconvolution by ``kernel`` under sparse gradients, on the canvas of a grey ``model``."""
    weight = weight_at(SPARSE_WEIGHT, model.noise_std)
    return hyper_laplacian(model, kernel, HyperLaplacianSettings(weight=weight))


def refine(model: BlurModel, kernel: Tensor, image: Tensor, step: EdgeStepSettings) -> Tensor:
    """The M-step on ``image``, a deconvolution by ``kernel [1,1,k,k]``: the next kernel."""
    fit = model.fit_edges(model.edges(image, step), kernel, weight=step.kernel_weight)
    return model.settle(fit, step)


def _best_first(model: BlurModel, images: list[Tensor]) -> list[int]:
    """Indices of ``images`` on the canvas by their :func:`ringing`."""
    return torch.stack([ringing(model.crop(image)) for image in images]).argsort().tolist()


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
    """The best of several first kernels, refined.

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
    prior = SymmetricKernelPrior(kernel_prior)
    model = BlurModel(
        observation.mean(1, keepdim=True),
        kernel_size=kernel_size,
        noise_std=noise_std,
        boundary=boundary,
        kernel_prior=prior,
    )
    kernels = [
        estimate_kernel(
            observation,
            kernel_size,
            boundary=boundary,
            kernel_prior=prior,
            edge_weight=start.edge_weight,
            answered=start.answered,
        )
        for start in STARTS
    ] + list(also)
    for done in range(REFINEMENTS):
        images = [sparse(model, kernel) for kernel in kernels]
        if done == KEPT_AFTER:
            kept = _best_first(model, images)[:KEPT]
            kernels, images = [kernels[i] for i in kept], [images[i] for i in kept]
        kernels = [
            refine(model, kernel, image, STEP)
            for image, kernel in zip(images, kernels, strict=True)
        ]
    best = _best_first(model, [sparse(model, kernel) for kernel in kernels])[0]
    return above(kernels[best], STEP.floor)
