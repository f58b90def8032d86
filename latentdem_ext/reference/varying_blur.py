"""Spatially varying blur in plain torch; shapes and rules in ``latentdem_ext.ops.varying_blur``."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem_ext.reference.blur import blur_conv2d


def varying_blur2d(
    image: Tensor, kernels: Tensor, weights: Tensor, *, boundary: str = "circular"
) -> Tensor:
    """``sum_p k_p * (w_p x)``, one full convolution after the other."""
    taps = kernels if kernels.dim() == 4 else kernels[None]
    pieces = [
        blur_conv2d(image * weight, taps[:, p : p + 1], boundary=boundary)
        for p, weight in enumerate(weights)
    ]
    return torch.stack(pieces).sum(0)


def varying_blur2d_adjoint(
    residual: Tensor, kernels: Tensor, weights: Tensor, *, boundary: str = "circular"
) -> Tensor:
    """The vector-Jacobian product of :func:`varying_blur2d`."""
    probe = residual.new_zeros(*residual.shape[:2], *weights.shape[1:])
    product = torch.func.vjp(
        lambda x: varying_blur2d(x, kernels, weights, boundary=boundary), probe
    )[1]
    return product(residual)[0]


def varying_blur_gradients(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    observation: Tensor,
    *,
    mask: Tensor | None = None,
    boundary: str = "circular",
) -> tuple[Tensor, Tensor, Tensor]:
    """Half the masked squared error and its gradients by autograd."""
    with torch.enable_grad():
        x = image.detach().requires_grad_()
        k = kernels.detach().requires_grad_()
        squared = (varying_blur2d(x, k, weights, boundary=boundary) - observation).square()
        loss = 0.5 * (squared if mask is None else mask * squared).sum((1, 2, 3))
        grad_image, grad_kernels = torch.autograd.grad(loss.sum(), (x, k))
    return loss.detach(), grad_image, grad_kernels
