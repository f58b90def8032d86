"""Blur followed by downsampling in plain torch; rules in ``latentdem_ext.ops.downsample``."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem_ext.reference.blur import blur_conv2d


def blur_downsample2d(
    image: Tensor, kernel: Tensor, factor: int, *, boundary: str = "circular"
) -> Tensor:
    """Every ``factor``-th row and column of the blurred image."""
    return blur_conv2d(image, kernel, boundary=boundary)[..., ::factor, ::factor]


def blur_downsample2d_adjoint(
    residual: Tensor,
    kernel: Tensor,
    factor: int,
    *,
    boundary: str = "circular",
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """The vector-Jacobian product of :func:`blur_downsample2d`."""
    if image_size is None:
        grow = (kernel.shape[-2] - 1, kernel.shape[-1] - 1) if boundary == "valid" else (0, 0)
        image_size = (
            residual.shape[-2] * factor + grow[0],
            residual.shape[-1] * factor + grow[1],
        )
    probe = residual.new_zeros(*residual.shape[:2], *image_size)
    product = torch.func.vjp(
        lambda x: blur_downsample2d(x, kernel, factor, boundary=boundary), probe
    )[1]
    return product(residual)[0]
