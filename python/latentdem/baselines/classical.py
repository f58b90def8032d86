"""Deblurring without a diffusion prior: a kernel from edges, then a deconvolution with it.

The kernel is that of :func:`latentdem.operators.initialization.estimate_kernel`, the L0 gradient
prior of Xu, Zheng and Jia (CVPR 2013) in the optimisation of Pan, Hu, Su and Yang (CVPR 2014),
coarse to fine.  The deconvolutions are the Wiener filter, Richardson and Lucy's iteration, and the
hyper-Laplacian prior of Krishnan and Fergus (NIPS 2009).  With ``search`` the kernel is the first
one of ``prox`` (:mod:`latentdem.operators.kernel_search`): our method without its diffusion model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import latentdem_ext as ext
from latentdem.em.steps import EMState
from latentdem.operators.blur import BlurModel
from latentdem.operators.differences import laplacian
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian
from latentdem.operators.initialization import estimate_kernel

DECONVOLUTIONS = ("hyper-laplacian", "wiener", "richardson-lucy")


@dataclass(frozen=True)
class ClassicalSettings:
    """Settings of :func:`run_classical`.

    Chosen with the kernel of ``l0`` on the photographs and kernels of
    :class:`~latentdem.operators.hyper_laplacian.HyperLaplacianSettings` (input 17.9 dB).  Wiener:
    ratios of 0.003 to 0.3 with floors of 1e-4 and 1e-3, 1 to 30 passes: 19.0 to 20.9
    dB.  Richardson and Lucy: 10 to 80 iterations, total variation 0 to 0.03: 20.2 to 21.5 dB.
    """

    deconvolution: str = "hyper-laplacian"
    """``hyper-laplacian``, ``wiener`` or ``richardson-lucy``."""
    search: bool = False
    """The best of several kernels, if the model has a kernel prior."""
    hyper_laplacian: HyperLaplacianSettings = field(default_factory=HyperLaplacianSettings)
    wiener_ratio: float = 0.03
    """Noise over signal where the squared gradient filter is one."""
    wiener_floor: float = 1e-3
    """Noise over signal of the mean."""
    wiener_passes: int = 10
    """Imputations of what the mask hides."""
    lucy_iterations: int = 40
    lucy_total_variation: float = 0.01
    """See :func:`latentdem_ext.richardson_lucy`."""

    def __post_init__(self) -> None:
        if self.deconvolution not in DECONVOLUTIONS:
            raise ValueError(
                f"deconvolution must be one of {', '.join(DECONVOLUTIONS)}, "
                f"found '{self.deconvolution}'"
            )


@torch.no_grad()
def run_classical(
    model: BlurModel, settings: ClassicalSettings, *, kernel: Tensor | None = None
) -> EMState:
    """The kernel from the observation's edges, with ``model.kernel_prior`` if there is one.

    Args:
        model: the observation.
        settings: which deconvolution, and its weights.
        kernel: ``[1,1,k,k]`` if it is known.

    Returns:
        The image on the canvas and the kernel; no network evaluation but of the kernel prior's.
    """
    state = EMState(model.padded, model.initial_kernel())
    with state.phase("first_kernel"):
        if kernel is None and settings.search:
            kernel = model.start_parameters()
        elif kernel is None:
            kernel = estimate_kernel(
                model.observation,
                model.kernel_size,
                boundary=model.boundary,
                kernel_prior=model.kernel_prior,
            )
        state.kernel = kernel
    with state.phase("deconvolution"):
        if settings.deconvolution == "wiener":
            state.image = wiener(model, kernel, settings)
        elif settings.deconvolution == "richardson-lucy":
            state.image = lucy(model, kernel, settings)
        else:
            state.image = hyper_laplacian(model, kernel, settings.hyper_laplacian)
    return state


def wiener(model: BlurModel, kernel: Tensor, settings: ClassicalSettings) -> Tensor:
    """Wiener filter with the spectrum of natural images, 1 / frequency^2; ``[1,C,H_c,W_c]``.

    ``s^2 / r^2`` is ``wiener_floor + wiener_ratio |D|^2``, D the gradient: noise over signal grows
    with the squared frequency.  What the mask hides is imputed by the model's own prediction.
    """
    power = laplacian(model.canvas, model.padded)
    ratio = (settings.wiener_floor + settings.wiener_ratio * power)[None, None]
    return ext.wiener_deconv2d(
        model.observation.mean((-2, -1), keepdim=True).expand_as(model.padded).contiguous(),
        model.padded,
        kernel,
        ratio,
        mask=model.mask,
        passes=settings.wiener_passes,
    )


def lucy(model: BlurModel, kernel: Tensor, settings: ClassicalSettings) -> Tensor:
    """Richardson and Lucy's iteration under the mask, from the padded observation."""
    return ext.richardson_lucy(
        (model.mask * model.padded).clamp_min(0),
        kernel,
        iterations=settings.lucy_iterations,
        initial=model.padded.clamp_min(1e-3),
        mask=model.mask,
        total_variation=settings.lucy_total_variation,
    )
