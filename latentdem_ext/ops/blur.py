"""Blur by true convolution, its adjoint, its data term and the gradients of that.

Letters: B batch, C channels, H W image, kh kw kernel, H' W' blurred image.

All operators take float32 and float64; float16 and bfloat16 images are accumulated in
float32.  Images, observations and masks of any strides are read where they lie, without a copy
(except for a dtype to be converted; small kernels need an image that is extended first).  Results
of image size have the memory format of the first argument, as those of ``conv2d`` would:
channels last if it is dense in that format, else contiguous.  The kernel's centre is at
``(kh // 2, kw // 2)``, and a kernel is never larger than the image.  Boundaries: ``circular``,
``reflect``, ``replicate`` and ``zero`` keep H and W; ``valid`` gives ``H - kh + 1`` and
``W - kw + 1``.

Convolution, adjoint and kernel adjoint are each other's derivatives, so gradients of any
order run through native operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdem_ext.ops._transforms import call, differentiable, empty_in_format

_ops = torch.ops.latentdem


def blur_conv2d(image: Tensor, kernel: Tensor, *, boundary: str = "circular") -> Tensor:
    """Convolve every image with its kernel: ``out[p] = sum_i kernel[i] image[p + centre - i]``.

    Args:
        image: ``[B,C,H,W]``.
        kernel: ``[B|1,C|1,kh,kw]``, shared along dimensions of size one.
        boundary: see the module's text.

    Returns:
        ``[B,C,H',W']`` in the dtype of ``image``; differentiable in both inputs, twice.

    Raises:
        ValueError: wrong rank or batch, empty kernel, kernel larger than the image,
            unknown boundary.
        TypeError: unsupported dtype.

    >>> import torch, latentdem_ext
    >>> image = torch.rand(1, 3, 32, 32)
    >>> delta = torch.zeros(1, 1, 5, 5)
    >>> delta[..., 2, 2] = 1
    >>> torch.allclose(latentdem_ext.blur_conv2d(image, delta), image, atol=1e-6)
    True
    """
    return call(_ops.blur_conv2d.default, image, kernel, boundary)


def blur_conv2d_adjoint(
    residual: Tensor,
    kernel: Tensor,
    *,
    boundary: str = "circular",
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """Apply the exact adjoint of :func:`blur_conv2d` in the image.

    Args:
        residual: ``[B,C,H',W']``.
        kernel: ``[B|1,C|1,kh,kw]``.
        boundary: see the module's text.
        image_size: ``(H, W)``; by default what the residual's size implies.

    Returns:
        ``[B,C,H,W]`` such that ``<blur(x), r> = <x, adjoint(r)>``.

    Raises:
        ValueError: as :func:`blur_conv2d`, or ``image_size`` contradicts ``residual``.
    """
    if image_size is None:
        grow = (kernel.shape[-2] - 1, kernel.shape[-1] - 1) if boundary == "valid" else (0, 0)
        image_size = (residual.shape[-2] + grow[0], residual.shape[-1] + grow[1])
    return call(_ops.blur_conv2d_adjoint.default, residual, kernel, boundary, list(image_size))


def blur_data_term(
    image: Tensor,
    kernel: Tensor,
    observation: Tensor,
    *,
    boundary: str = "circular",
    mask: Tensor | None = None,
) -> Tensor:
    """Half the masked squared error of each image: ``0.5 sum mask (kernel * image - y)^2``.

    Args:
        image: ``[B,C,H,W]``.
        kernel: ``[B|1,C|1,kh,kw]``.
        observation: y, ``[B,C,H',W']``.
        boundary: see the module's text.
        mask: weights ``[B|1,C|1,H',W']``, or none.

    Returns:
        ``[B]``, float32 or float64; differentiable in all tensors, twice.  An image's value
        never depends on its batch mates.
    """
    return call(_ops.blur_data_term.default, image, kernel, observation, mask, boundary)


def blur_gradients(
    image: Tensor,
    kernel: Tensor,
    observation: Tensor,
    *,
    boundary: str = "circular",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`blur_data_term` and both its gradients, in one fused pass, no autograd.

    Returns:
        ``loss [B]``, ``grad_image [B,C,H,W]`` and ``grad_kernel`` in the kernel's shape (the
        gradients of ``loss.sum()``).
    """
    tensors = (None if t is None else t.detach() for t in (image, kernel, observation, mask))
    return _ops.blur_gradients.default(*tensors, boundary)


# Fake kernels ---------------------------------------------------------------------------


def _output_shape(image: Any, kernel: Any, boundary: str) -> list[Any]:
    batch, channels, height, width = image
    if boundary == "valid":
        height, width = height - kernel[2] + 1, width - kernel[3] + 1
    return [batch, channels, height, width]


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("latentdem::blur_conv2d")
def _(image: Tensor, kernel: Tensor, boundary: str) -> Tensor:
    return empty_in_format(image, _output_shape(image.shape, kernel.shape, boundary))


@torch.library.register_fake("latentdem::blur_conv2d_adjoint")
def _(residual: Tensor, kernel: Tensor, boundary: str, image_size: list[int]) -> Tensor:
    return empty_in_format(residual, [*residual.shape[:2], *image_size])


@torch.library.register_fake("latentdem::blur_conv2d_kernel")
def _(image: Tensor, residual: Tensor, boundary: str, kernel_size: list[int]) -> Tensor:
    return image.new_empty(kernel_size)


@torch.library.register_fake("latentdem::blur_data_term")
def _(
    image: Tensor, kernel: Tensor, observation: Tensor, mask: Tensor | None, boundary: str
) -> Tensor:
    return image.new_empty([image.shape[0]], dtype=_compute_dtype(image, kernel))


@torch.library.register_fake("latentdem::blur_gradients")
def _(
    image: Tensor, kernel: Tensor, observation: Tensor, mask: Tensor | None, boundary: str
) -> tuple[Tensor, Tensor, Tensor]:
    loss = image.new_empty([image.shape[0]], dtype=_compute_dtype(image, kernel))
    return loss, empty_in_format(image, image.shape), kernel.new_empty(kernel.shape)


# Autograd -------------------------------------------------------------------------------
# Each context keeps only the tensors that the requested gradients read.


def _save(ctx: Any, **tensors: Tensor | None) -> None:
    ctx.names = list(tensors)
    ctx.save_for_backward(*tensors.values())


def _saved(ctx: Any) -> dict[str, Tensor]:
    return dict(zip(ctx.names, ctx.saved_tensors, strict=True))


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, kernel, ctx.boundary = inputs
    ctx.image_size, ctx.kernel_size = image.shape[2:], kernel.shape
    _save(
        ctx,
        kernel=kernel if ctx.needs_input_grad[0] else None,
        image=image if ctx.needs_input_grad[1] else None,
    )


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = _saved(ctx)
    grad_image = grad_kernel = None
    if ctx.needs_input_grad[0]:
        grad_image = call(
            _ops.blur_conv2d_adjoint.default, grad, saved["kernel"], ctx.boundary, ctx.image_size
        )
    if ctx.needs_input_grad[1]:
        grad_kernel = call(
            _ops.blur_conv2d_kernel.default, saved["image"], grad, ctx.boundary, ctx.kernel_size
        )
    return grad_image, grad_kernel, None


def _adjoint_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    residual, kernel, ctx.boundary, _ = inputs
    ctx.kernel_size = kernel.shape
    _save(
        ctx,
        kernel=kernel if ctx.needs_input_grad[0] else None,
        residual=residual if ctx.needs_input_grad[1] else None,
    )


def _adjoint_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # <adjoint(r, k), g> = <r, conv(g, k)>
    saved = _saved(ctx)
    grad_residual = grad_kernel = None
    if ctx.needs_input_grad[0]:
        grad_residual = call(_ops.blur_conv2d.default, grad, saved["kernel"], ctx.boundary)
    if ctx.needs_input_grad[1]:
        grad_kernel = call(
            _ops.blur_conv2d_kernel.default, grad, saved["residual"], ctx.boundary, ctx.kernel_size
        )
    return grad_residual, grad_kernel, None, None


def _kernel_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, residual, ctx.boundary, _ = inputs
    ctx.image_size = image.shape[2:]
    _save(
        ctx,
        residual=residual if ctx.needs_input_grad[0] else None,
        image=image if ctx.needs_input_grad[1] else None,
    )


def _kernel_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # <kernel(x, r), h> = <conv(x, h), r>
    saved = _saved(ctx)
    grad_image = grad_residual = None
    if ctx.needs_input_grad[0]:
        grad_image = call(
            _ops.blur_conv2d_adjoint.default, saved["residual"], grad, ctx.boundary, ctx.image_size
        )
    if ctx.needs_input_grad[1]:
        grad_residual = call(_ops.blur_conv2d.default, saved["image"], grad, ctx.boundary)
    return grad_image, grad_residual, None, None


def _data_term_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, kernel, observation, mask, ctx.boundary = inputs
    ctx.dtypes = (image.dtype, kernel.dtype, observation.dtype)
    _save(ctx, image=image, kernel=kernel, observation=observation, mask=mask)


def _data_term_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = _saved(ctx)
    image, kernel, mask = saved["image"], saved["kernel"], saved["mask"]
    need_image, need_kernel, need_observation, need_mask = ctx.needs_input_grad[:4]
    dtype = grad.dtype
    difference = (
        call(_ops.blur_conv2d.default, image.to(dtype), kernel, ctx.boundary) - saved["observation"]
    )
    scale = grad.reshape(-1, 1, 1, 1)
    residual = scale * difference if mask is None else scale * mask * difference
    grads: list[Tensor | None] = [None, None, None, None]
    if need_image:
        grads[0] = call(
            _ops.blur_conv2d_adjoint.default, residual, kernel, ctx.boundary, image.shape[2:]
        ).to(ctx.dtypes[0])
    if need_kernel:
        grads[1] = call(
            _ops.blur_conv2d_kernel.default, image.to(dtype), residual, ctx.boundary, kernel.shape
        ).to(ctx.dtypes[1])
    if need_observation:
        grads[2] = (-residual).to(ctx.dtypes[2])
    if need_mask:
        grads[3] = (0.5 * scale * difference.square()).sum_to_size(mask.shape).to(mask.dtype)
    return *grads, None


differentiable("blur_conv2d", _conv_backward, _conv_setup)
differentiable("blur_conv2d_adjoint", _adjoint_backward, _adjoint_setup)
differentiable("blur_conv2d_kernel", _kernel_backward, _kernel_setup)
differentiable("blur_data_term", _data_term_backward, _data_term_setup)
