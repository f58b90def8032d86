"""Blur operators in plain torch; see :mod:`latentdem_ext.ops.blur` for shapes and rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _extend(image: Tensor, kernel: Tensor, boundary: str) -> Tensor:
    """Pad so that a valid convolution keeps the size, with the centre at (kh//2, kw//2)."""
    if boundary == "valid":
        return image
    kh, kw = kernel.shape[-2:]
    pad = (kw - 1 - kw // 2, kw // 2, kh - 1 - kh // 2, kh // 2)
    mode = "constant" if boundary == "zero" else boundary
    return F.pad(image, pad, mode=mode)


def blur_conv2d(image: Tensor, kernel: Tensor, *, boundary: str = "circular") -> Tensor:
    """True convolution by a grouped ``conv2d`` with the flipped kernel."""
    batch, channels = image.shape[:2]
    planes = _extend(image, kernel, boundary)
    weight = kernel.expand(batch, channels, *kernel.shape[2:]).flip(-2, -1)
    out = F.conv2d(
        planes.reshape(1, batch * channels, *planes.shape[2:]),
        weight.reshape(batch * channels, 1, *weight.shape[2:]),
        groups=batch * channels,
    )
    return out.reshape(batch, channels, *out.shape[2:])


def blur_conv2d_adjoint(
    residual: Tensor,
    kernel: Tensor,
    *,
    boundary: str = "circular",
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """The vector-Jacobian product of :func:`blur_conv2d`."""
    if image_size is None:
        grow = (kernel.shape[-2] - 1, kernel.shape[-1] - 1) if boundary == "valid" else (0, 0)
        image_size = (residual.shape[-2] + grow[0], residual.shape[-1] + grow[1])
    probe = residual.new_zeros(*residual.shape[:2], *image_size)
    product = torch.func.vjp(lambda x: blur_conv2d(x, kernel, boundary=boundary), probe)[1]
    return product(residual)[0]


def blur_data_term(
    image: Tensor,
    kernel: Tensor,
    observation: Tensor,
    *,
    boundary: str = "circular",
    mask: Tensor | None = None,
) -> Tensor:
    """``0.5 sum mask (k * x - y)^2`` of each image."""
    squared = (blur_conv2d(image, kernel, boundary=boundary) - observation).square()
    weighted = squared if mask is None else mask * squared
    return 0.5 * weighted.sum((1, 2, 3))


def blur_gradients(
    image: Tensor,
    kernel: Tensor,
    observation: Tensor,
    *,
    boundary: str = "circular",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The data term and its gradients by autograd."""
    with torch.enable_grad():
        x = image.detach().requires_grad_()
        k = kernel.detach().requires_grad_()
        loss = blur_data_term(x, k, observation, boundary=boundary, mask=mask)
        grad_image, grad_kernel = torch.autograd.grad(loss.sum(), (x, k))
    return loss.detach(), grad_image, grad_kernel
