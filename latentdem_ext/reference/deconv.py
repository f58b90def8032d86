"""Deconvolution in plain torch; see :mod:`latentdem_ext.ops.deconv` for shapes and rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdem_ext.reference.blur import blur_conv2d, blur_conv2d_adjoint


def _transfer(kernel: Tensor, height: int, width: int) -> Tensor:
    """Half spectrum of the kernel on a periodic canvas, its centre at the origin."""
    kh, kw = kernel.shape[-2:]
    grid = F.pad(kernel, (0, width - kw, 0, height - kh))
    return torch.fft.rfft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))


def wiener_deconv2d(
    image_hat: Tensor,
    observation: Tensor,
    kernel: Tensor,
    ratio: float | Tensor,
    *,
    mask: Tensor | None = None,
    passes: int = 1,
) -> Tensor:
    """Closed form of every pass, in Fourier space."""
    size = (image_hat.shape[-2], image_hat.shape[-1])
    weight = torch.as_tensor(ratio, dtype=image_hat.dtype)
    if weight.dim() == 1:
        weight = weight.reshape(-1, 1, 1, 1)
    transfer = _transfer(kernel, *size)
    gain = transfer.conj() / (transfer.abs().square() + weight)
    prediction = torch.fft.irfft2(transfer * torch.fft.rfft2(image_hat), s=size)
    seen = torch.ones_like(image_hat[:1, :1]) if mask is None else mask
    change = torch.zeros_like(image_hat)
    for _ in range(passes):
        echo = torch.fft.irfft2(transfer * torch.fft.rfft2(change), s=size)
        misfit = seen * (observation - prediction) + (1 - seen) * echo
        change = torch.fft.irfft2(gain * torch.fft.rfft2(misfit), s=size)
    return image_hat + change


def _curvature(image: Tensor, eps: float) -> Tensor:
    """``div(grad u / |grad u|)``: forward differences, zero across the border."""
    down = F.pad(image.diff(dim=-2), (0, 0, 0, 1))
    right = F.pad(image.diff(dim=-1), (0, 1, 0, 0))
    norm = (down.square() + right.square() + eps).sqrt()
    down, right = down / norm, right / norm
    return (
        down - F.pad(down[..., :-1, :], (0, 0, 1, 0)) + right - F.pad(right[..., :-1], (1, 0, 0, 0))
    )


def richardson_lucy(
    observation: Tensor,
    kernel: Tensor,
    *,
    iterations: int,
    initial: Tensor | None = None,
    boundary: str = "circular",
    mask: Tensor | None = None,
    total_variation: float = 0.0,
    eps: float = 1e-7,
) -> Tensor:
    """``u <- u K'(m y / K u) / (K' m (1 - tv div(grad u / |grad u|)))``."""
    seen = torch.ones_like(observation) if mask is None else mask.expand_as(observation)
    height, width = observation.shape[-2:]
    if boundary == "valid":
        height, width = height + kernel.shape[-2] - 1, width + kernel.shape[-1] - 1
    if initial is None:
        level = (seen * observation).sum((-2, -1), keepdim=True) / seen.sum((-2, -1), keepdim=True)
        initial = level.clamp_min(eps).expand(*observation.shape[:2], height, width)

    def adjoint(residual: Tensor) -> Tensor:
        return blur_conv2d_adjoint(residual, kernel, boundary=boundary, image_size=(height, width))

    image, weight = initial.clone(), adjoint(seen)
    for _ in range(iterations):
        prediction = blur_conv2d(image, kernel, boundary=boundary).clamp_min(eps)
        correction = adjoint(seen * observation / prediction).clamp_min(0)
        factor = torch.where(weight > 1e-2, correction / weight, torch.ones_like(weight))
        shrink = 1 - total_variation * _curvature(image, eps) if total_variation > 0 else 1.0
        image = image * factor / shrink
    return image
