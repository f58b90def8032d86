"""Edges kept, ripples not: the L0 prior that the kernel is fitted under, and total variation.

Source: the unnatural L0 representation of Xu, Zheng and Jia (CVPR 2013), with the optimisation of
Pan, Hu, Su and Yang (CVPR 2014).  A picture of few, strong edges is a poor photograph, but its
edges are in the right places, and it has none of the ringing and none of the noise that a
restored image carries; a kernel fitted to that would explain them too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from latentdem.operators.differences import differences, divergence, laplacian


def transfer_function(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Half spectrum ``[1,1,H,W//2+1]`` of ``kernel [1,1,kh,kw]``, its centre at the origin."""
    kh, kw = kernel.shape[-2:]
    grid = F.pad(kernel, (0, size[1] - kw, 0, size[0] - kh))
    return torch.fft.rfft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))


def l0_deconvolution(
    blurred: Tensor, kernel: Tensor | None, *, weight: float, beta_max: float = 1e5
) -> Tensor:
    """``argmin_x ||k * x - y||^2 + weight ||grad x||_0`` by half-quadratic splitting.

    Args:
        blurred: y, ``[1,1,H,W]``, periodic.
        kernel: ``[1,1,k,k]``, or none to smooth without deblurring.
        weight: lambda; an edge is kept if its squared height exceeds ``weight / beta``.
        beta_max: the splitting weight doubles from ``2 weight`` to this value.
    """
    size = (blurred.shape[-2], blurred.shape[-1])
    data = torch.fft.rfft2(blurred)
    power: Tensor | float = 1.0
    if kernel is not None:
        transfer = transfer_function(kernel, size)
        data, power = transfer.conj() * data, transfer.abs().square()
    roughness = laplacian(size, blurred)
    x, beta = blurred, 2 * weight
    while beta < beta_max:
        down, right = differences(x)
        keep = (down.square() + right.square() >= weight / beta).to(x.dtype)
        kept = divergence([down * keep, right * keep])
        spectrum = (data + beta * torch.fft.rfft2(kept)) / (power + beta * roughness)
        x = torch.fft.irfft2(spectrum, s=size)
        beta *= 2
    return x


def smooth_total_variation(image: Tensor, weight: float) -> Tensor:
    """``argmin_x ||x - image||^2 / 2 + weight ||grad x||_1``, each channel by itself.

    Source: Rudin, Osher and Fatemi (1992), solved by scikit-image with Chambolle's method (2004).

    Args:
        image: ``[B,C,H,W]`` in [0, 1].
        weight: in the image's units: ripples of a lower height and one pixel's width go.
    """
    smooth = [
        denoise_tv_chambolle(each.double().cpu().numpy(), weight=weight, channel_axis=0)
        for each in image
    ]
    return torch.stack([torch.from_numpy(each) for each in smooth]).to(image)
