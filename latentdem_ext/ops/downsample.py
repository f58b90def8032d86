"""Blur followed by downsampling, the forward model of super-resolution, and its adjoint.

Letters as in :mod:`latentdem_ext.ops.blur`; f factor, h w = ceil(H'/f), ceil(W'/f).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdem_ext.ops._transforms import call, differentiable

_ops = torch.ops.latentdem


def blur_downsample2d(
    image: Tensor, kernel: Tensor, factor: int, *, boundary: str = "circular"
) -> Tensor:
    """Keep rows and columns 0, f, 2f ... of ``kernel * image``.

    Kernels of up to ``9 f^2`` taps convolve directly and only compute what is kept; larger ones
    blur spectrally.

    Args:
        image: ``[B,C,H,W]``.
        kernel: ``[B|1,C|1,kh,kw]``.
        factor: f, at least 1.
        boundary: as for :func:`latentdem_ext.blur_conv2d`.

    Returns:
        ``[B,C,h,w]`` in the dtype of ``image``; differentiable in both inputs, twice.

    Raises:
        ValueError: as :func:`latentdem_ext.blur_conv2d`, or ``factor`` < 1.
        TypeError: unsupported dtype.

    >>> import torch, latentdem_ext as ext
    >>> ext.blur_downsample2d(torch.rand(1, 3, 32, 30), torch.rand(1, 1, 5, 5), 4).shape
    torch.Size([1, 3, 8, 8])
    """
    return call(_ops.blur_downsample2d.default, image, kernel, boundary, factor)


def blur_downsample2d_adjoint(
    residual: Tensor,
    kernel: Tensor,
    factor: int,
    *,
    boundary: str = "circular",
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """Apply the exact adjoint of :func:`blur_downsample2d` in the image.

    Args:
        residual: ``[B,C,h,w]``.
        kernel: ``[B|1,C|1,kh,kw]``.
        factor: f.
        boundary: as there.
        image_size: ``(H, W)``; by default f times the residual's size, plus the kernel's size
            less one if the boundary is ``valid``.

    Returns:
        ``[B,C,H,W]`` such that ``<A x, r> = <x, adjoint(r)>``.

    Raises:
        ValueError: as :func:`blur_downsample2d`, or ``image_size`` contradicts ``residual``.
    """
    if image_size is None:
        grow = (kernel.shape[-2] - 1, kernel.shape[-1] - 1) if boundary == "valid" else (0, 0)
        image_size = (
            residual.shape[-2] * factor + grow[0],
            residual.shape[-1] * factor + grow[1],
        )
    return call(
        _ops.blur_downsample2d_adjoint.default, residual, kernel, boundary, factor, list(image_size)
    )


def _blurred_size(image_size: Any, kernel_size: Any, boundary: str) -> tuple[Any, Any]:
    height, width = image_size
    if boundary == "valid":
        return height - kernel_size[2] + 1, width - kernel_size[3] + 1
    return height, width


@torch.library.register_fake("latentdem::blur_downsample2d")
def _(image: Tensor, kernel: Tensor, boundary: str, factor: int) -> Tensor:
    height, width = _blurred_size(image.shape[2:], kernel.shape, boundary)
    small = [(height + factor - 1) // factor, (width + factor - 1) // factor]
    return image.new_empty([*image.shape[:2], *small])


@torch.library.register_fake("latentdem::blur_downsample2d_adjoint")
def _(
    residual: Tensor, kernel: Tensor, boundary: str, factor: int, image_size: list[int]
) -> Tensor:
    return residual.new_empty([*residual.shape[:2], *image_size])


def _spread(small: Tensor, factor: int, size: tuple[Any, Any]) -> Tensor:
    """Zeros but for every factor-th pixel."""
    full = small.new_zeros([*small.shape[:2], *size])
    full[..., ::factor, ::factor] = small
    return full


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, kernel, ctx.boundary, ctx.factor = inputs
    ctx.image_size, ctx.kernel_size = image.shape[2:], kernel.shape
    need_image, need_kernel = ctx.needs_input_grad[:2]
    ctx.save_for_backward(image if need_kernel else None, kernel if need_image else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    image, kernel = ctx.saved_tensors
    grad_image = grad_kernel = None
    if ctx.needs_input_grad[0]:
        grad_image = call(
            _ops.blur_downsample2d_adjoint.default,
            grad,
            kernel,
            ctx.boundary,
            ctx.factor,
            ctx.image_size,
        )
    if ctx.needs_input_grad[1]:
        size = _blurred_size(ctx.image_size, ctx.kernel_size, ctx.boundary)
        spread = _spread(grad, ctx.factor, size)
        grad_kernel = call(
            _ops.blur_conv2d_kernel.default, image, spread, ctx.boundary, ctx.kernel_size
        )
    return grad_image, grad_kernel, None, None


def _adjoint_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, kernel, ctx.boundary, ctx.factor, ctx.image_size = inputs
    ctx.kernel_size = kernel.shape
    need_residual, need_kernel = ctx.needs_input_grad[:2]
    ctx.save_for_backward(residual if need_kernel else None, kernel if need_residual else None)


def _adjoint_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # <adjoint(r, k), g> = <r, forward(g, k)>
    residual, kernel = ctx.saved_tensors
    grad_residual = grad_kernel = None
    if ctx.needs_input_grad[0]:
        grad_residual = call(_ops.blur_downsample2d.default, grad, kernel, ctx.boundary, ctx.factor)
    if ctx.needs_input_grad[1]:
        size = _blurred_size(ctx.image_size, ctx.kernel_size, ctx.boundary)
        spread = _spread(residual, ctx.factor, size)
        grad_kernel = call(
            _ops.blur_conv2d_kernel.default, grad, spread, ctx.boundary, ctx.kernel_size
        )
    return grad_residual, grad_kernel, None, None, None


differentiable("blur_downsample2d", _backward, _setup)
differentiable("blur_downsample2d_adjoint", _adjoint_backward, _adjoint_setup)
