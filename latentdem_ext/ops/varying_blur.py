"""Spatially varying blur: interpolated kernels, the adjoint and the gradients.

Model: ``y = sum_p k_p * (w_p x)`` with weights that sum to one in every pixel.  A scene point is
weighted first and convolved then, so that it spreads by the mixture of kernels that belongs to
where *it* lies: every column of the blur is a point response, and light is conserved if the
kernels sum to one.  (The other order, ``w_p (k_p * x)``, mixes by where the light *arrives*; up
to the flip of the kernels that is the adjoint of this one.)  Source: Nagy and O'Leary 1998,
"Restoring images degraded by spatially variant blur".

Letters: P patches; the others as in :mod:`latentdem_ext.ops.blur`.  A patch costs transforms of
the bounding box of its weights plus the kernel, not of the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdem_ext.ops._transforms import call, differentiable

_ops = torch.ops.latentdem


def varying_blur2d(
    image: Tensor, kernels: Tensor, weights: Tensor, *, boundary: str = "circular"
) -> Tensor:
    """Return ``sum_p k_p * (w_p x)``.

    Args:
        image: x, ``[B,C,H,W]``.
        kernels: ``[P,kh,kw]``, or ``[B|1,P,kh,kw]`` for kernels of each image.
        weights: ``[P,H,W]``, for instance from :func:`blend_windows`; the fewer of them are
            nonzero, the faster.
        boundary: as for :func:`latentdem_ext.blur_conv2d`, applied to ``w_p x``.

    Returns:
        ``[B,C,H',W']`` in the dtype of ``image``; differentiable in image and kernels, twice.

    Raises:
        ValueError: shapes that do not match, kernels larger than the image, unknown boundary,
            or weights that require a gradient (they are taken as constant).
        TypeError: unsupported dtype.

    >>> import torch, latentdem_ext as ext
    >>> image, kernels = torch.rand(1, 3, 32, 32), torch.rand(4, 5, 5)
    >>> weights = ext.blend_windows(32, 32, rows=2, columns=2, overlap=8)
    >>> ext.varying_blur2d(image, kernels, weights).shape
    torch.Size([1, 3, 32, 32])
    """
    _check_constant(weights)
    return call(_ops.varying_blur2d.default, image, _batched(kernels), weights, boundary)


def varying_blur2d_adjoint(
    residual: Tensor, kernels: Tensor, weights: Tensor, *, boundary: str = "circular"
) -> Tensor:
    """Apply the exact adjoint of :func:`varying_blur2d` in the image.

    Args:
        residual: ``[B,C,H',W']``.
        kernels: ``[P,kh,kw]`` or ``[B|1,P,kh,kw]``.
        weights: ``[P,H,W]``.
        boundary: as there.

    Returns:
        ``[B,C,H,W]`` such that ``<blur(x), r> = <x, adjoint(r)>``.

    Raises:
        ValueError: as :func:`varying_blur2d`, or ``residual`` has not the blurred image's shape.
    """
    _check_constant(weights)
    return call(_ops.varying_blur2d_adjoint.default, residual, _batched(kernels), weights, boundary)


def varying_blur_gradients(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    observation: Tensor,
    *,
    mask: Tensor | None = None,
    boundary: str = "circular",
) -> tuple[Tensor, Tensor, Tensor]:
    """Half the masked squared error with its gradients in image and kernels, in one pass.

    ``loss = 0.5 sum mask (sum_p k_p * (w_p x) - y)^2`` for each image; no autograd.  The
    patches' spectra are computed once.

    Args:
        image: x, ``[B,C,H,W]``.
        kernels: ``[P,kh,kw]`` or ``[B|1,P,kh,kw]``.
        weights: ``[P,H,W]``.
        observation: y, ``[B,C,H',W']``.
        mask: weights ``[B|1,C|1,H',W']``, or none.
        boundary: as for :func:`varying_blur2d`.

    Returns:
        ``loss [B]``, ``grad_image [B,C,H,W]`` and ``grad_kernels`` in the shape of ``kernels``
        (the gradients of ``loss.sum()``).
    """
    tensors = (image, _batched(kernels), weights, observation, mask)
    loss, grad_image, grad_kernels = _ops.varying_blur_gradients.default(
        *(None if t is None else t.detach() for t in tensors), boundary
    )
    return loss, grad_image, grad_kernels.reshape(kernels.shape)


def blend_windows(
    height: int,
    width: int,
    rows: int,
    columns: int,
    overlap: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Weights of ``rows x columns`` equal patches that cross-fade and sum to one everywhere.

    The image is divided evenly; across each inner border the weight falls linearly over
    ``overlap`` pixels, and it is the product of a row and a column profile, so that kernels are
    interpolated bilinearly there.

    Args:
        height: H of the image.
        width: W of the image.
        rows: patches from top to bottom.
        columns: patches from left to right.
        overlap: width of the cross-fade in pixels, at most the smallest patch; 0 is a hard
            border.
        dtype: of the result.
        device: of the result.

    Returns:
        ``[rows*columns,H,W]``, patches in row-major order.

    Raises:
        ValueError: fewer pixels than patches, or an overlap out of range.

    >>> bool((blend_windows(40, 30, 3, 2, 6).sum(0) - 1).abs().max() < 1e-6)
    True
    """
    vertical = _profiles("height", height, "rows", rows, overlap)
    horizontal = _profiles("width", width, "columns", columns, overlap)
    weights = vertical[:, None, :, None] * horizontal[None, :, None, :]
    return weights.reshape(rows * columns, height, width).to(dtype=dtype, device=device)


def _profiles(size_name: str, size: int, name: str, count: int, overlap: int) -> Tensor:
    """``[count,size]`` float64, columns summing to one."""
    if count < 1 or count > size:
        raise ValueError(f"{name} must be between 1 and {size_name} ({size}), found {count}")
    if overlap < 0 or (count > 1 and overlap > size // count):
        raise ValueError(
            f"overlap must be between 0 and the smallest patch ({size // count} pixels for "
            f"{count} {name}), found {overlap}"
        )
    centre = torch.arange(size, dtype=torch.float64) + 0.5
    border = torch.arange(1, count, dtype=torch.float64) * size / count
    # The share of what lies beyond each inner border, from 0 to 1.
    beyond = ((centre - border[:, None]) / max(overlap, 1e-9) + 0.5).clamp(0, 1)
    one, zero = torch.ones(1, size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)
    return torch.cat([one, beyond]) - torch.cat([beyond, zero])


def _batched(kernels: Tensor) -> Tensor:
    return kernels[None] if kernels.dim() == 3 else kernels


def _check_constant(weights: Tensor) -> None:
    if weights.requires_grad:
        raise ValueError("weights must not require a gradient: they are taken as constant")


# Fake kernels ---------------------------------------------------------------------------


def _output_shape(image: Any, kernels: Any, boundary: str) -> list[Any]:
    batch, channels, height, width = image
    if boundary == "valid":
        height, width = height - kernels[2] + 1, width - kernels[3] + 1
    return [batch, channels, height, width]


@torch.library.register_fake("latentdem::varying_blur2d")
def _(image: Tensor, kernels: Tensor, weights: Tensor, boundary: str) -> Tensor:
    return image.new_empty(_output_shape(image.shape, kernels.shape, boundary))


@torch.library.register_fake("latentdem::varying_blur2d_adjoint")
def _(residual: Tensor, kernels: Tensor, weights: Tensor, boundary: str) -> Tensor:
    return residual.new_empty([*residual.shape[:2], *weights.shape[1:]])


@torch.library.register_fake("latentdem::varying_blur2d_kernels")
def _(
    image: Tensor, residual: Tensor, weights: Tensor, boundary: str, kernels_size: list[int]
) -> Tensor:
    return image.new_empty(kernels_size)


@torch.library.register_fake("latentdem::varying_blur_gradients")
def _(
    image: Tensor,
    kernels: Tensor,
    weights: Tensor,
    observation: Tensor,
    mask: Tensor | None,
    boundary: str,
) -> tuple[Tensor, Tensor, Tensor]:
    double = torch.float64 in (image.dtype, kernels.dtype)
    loss = image.new_empty([image.shape[0]], dtype=torch.float64 if double else torch.float32)
    return loss, image.new_empty(image.shape), kernels.new_empty(kernels.shape)


# Autograd: forward, adjoint and transpose in the kernels are each other's derivatives ------


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, kernels, weights, ctx.boundary = inputs
    ctx.kernels_size = kernels.shape
    need_image, need_kernels = ctx.needs_input_grad[:2]
    ctx.save_for_backward(image if need_kernels else None, kernels if need_image else None, weights)


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    image, kernels, weights = ctx.saved_tensors
    grad_image = grad_kernels = None
    if ctx.needs_input_grad[0]:
        grad_image = call(_ops.varying_blur2d_adjoint.default, grad, kernels, weights, ctx.boundary)
    if ctx.needs_input_grad[1]:
        grad_kernels = call(
            _ops.varying_blur2d_kernels.default,
            image,
            grad,
            weights,
            ctx.boundary,
            ctx.kernels_size,
        )
    return grad_image, grad_kernels, None, None


def _adjoint_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, kernels, weights, ctx.boundary = inputs
    ctx.kernels_size = kernels.shape
    need_residual, need_kernels = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        residual if need_kernels else None, kernels if need_residual else None, weights
    )


def _adjoint_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # <adjoint(r, k), g> = <r, forward(g, k)>
    residual, kernels, weights = ctx.saved_tensors
    grad_residual = grad_kernels = None
    if ctx.needs_input_grad[0]:
        grad_residual = call(_ops.varying_blur2d.default, grad, kernels, weights, ctx.boundary)
    if ctx.needs_input_grad[1]:
        grad_kernels = call(
            _ops.varying_blur2d_kernels.default,
            grad,
            residual,
            weights,
            ctx.boundary,
            ctx.kernels_size,
        )
    return grad_residual, grad_kernels, None, None


def _kernels_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, residual, weights, ctx.boundary, _ = inputs
    need_image, need_residual = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        image if need_residual else None, residual if need_image else None, weights
    )


def _kernels_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # <kernels(x, r), h> = <forward(x, h), r>
    image, residual, weights = ctx.saved_tensors
    grad_image = grad_residual = None
    if ctx.needs_input_grad[0]:
        grad_image = call(
            _ops.varying_blur2d_adjoint.default, residual, grad, weights, ctx.boundary
        )
    if ctx.needs_input_grad[1]:
        grad_residual = call(_ops.varying_blur2d.default, image, grad, weights, ctx.boundary)
    return grad_image, grad_residual, None, None, None


differentiable("varying_blur2d", _forward_backward, _forward_setup)
differentiable("varying_blur2d_adjoint", _adjoint_backward, _adjoint_setup)
differentiable("varying_blur2d_kernels", _kernels_backward, _kernels_setup)
