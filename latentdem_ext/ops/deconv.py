"""Deconvolution with a known kernel: the proximal (Wiener) step and Richardson-Lucy.

Letters as in :mod:`latentdem_ext.ops.blur`: B batch, C channels, H W image, kh kw kernel,
H' W' blurred image; the kernel's centre is at ``(kh // 2, kw // 2)``.  float32 and float64;
half precision is computed in float32.  Images of any strides are read where they lie, without a
copy (the Wiener step's gradients, and canvases of odd height or with a prime factor above 7, make
one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdem_ext.ops._transforms import call, differentiable, empty_in_format

_ops = torch.ops.latentdem


def wiener_deconv2d(
    image_hat: Tensor,
    observation: Tensor,
    kernel: Tensor,
    ratio: float | Tensor,
    *,
    mask: Tensor | None = None,
    passes: int = 1,
) -> Tensor:
    """Minimise ``||k * x - y||^2 / (2 s^2) + ||x - x_hat||^2 / (2 r^2)`` on a periodic canvas.

    In Fourier space ``X = X_hat + conj(K) (Y - K X_hat) / (|K|^2 + s^2 / r^2)``: the proximal
    step of EM, and for ``x_hat = 0`` the Wiener filter.  Under a mask the rest of y is missing
    data, imputed by the model's own prediction as EM does: each pass after the first replaces
    the misfit there by ``k * (x - x_hat)`` of the pass before.

    Args:
        image_hat: x_hat, ``[B,C,H,W]``.
        observation: y, ``[B|1,C,H,W]``.
        kernel: ``[B|1,C|1,kh,kw]``.
        ratio: ``s^2 / r^2`` > 0: a number, one per image ``[B]``, or one per frequency
            ``[B|1,C|1,H,W//2+1]`` in the layout of ``torch.fft.rfft2``.
        mask: ``[B|1,1,H,W]``, one where y was observed, or none if it is everywhere.
        passes: imputations; without a mask they change nothing and only one is done.

    Returns:
        x, ``[B,C,H,W]`` in the dtype and memory format of ``image_hat``.  Differentiable in the
        first three and in a tensor ``ratio``; second derivatives run through plain torch.  The
        mask is taken as constant.

    Raises:
        ValueError: wrong shapes, empty kernel or one larger than the image, ``passes`` < 1, a
            ``ratio`` number that is not positive (tensors are not read).
        TypeError: unsupported dtype.

    >>> import torch, latentdem_ext as ext
    >>> x, kernel = torch.rand(1, 3, 32, 32), torch.full((1, 1, 5, 5), 1 / 25)
    >>> y = ext.blur_conv2d(x, kernel)
    >>> torch.allclose(ext.wiener_deconv2d(x, y, kernel, 0.1), x, atol=1e-5)
    True
    """
    if not isinstance(ratio, Tensor):
        if not ratio > 0:
            raise ValueError(f"ratio must be positive, found {ratio}")
        dtype = _compute_dtype(image_hat, kernel)
        ratio = image_hat.new_full((), ratio, dtype=dtype)
    if mask is not None and mask.requires_grad:
        raise ValueError("mask must not require a gradient: the operator takes it as constant")
    return call(_ops.wiener_deconv2d.default, image_hat, observation, kernel, ratio, mask, passes)


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
    """Maximise the Poisson likelihood of ``y`` over non-negative images, from ``initial``.

    ``u <- u K'(m y / K u) / (K' m)``, K' being the adjoint of the blur K and m the mask; the
    likelihood never falls.  Sources: Richardson 1972, Lucy 1974; with ``total_variation`` the
    denominator gains ``1 - tv div(grad u / |grad u|)`` (Dey et al. 2006).  With a circular
    boundary and a kernel that sums to one, every iterate has the sum of y.  Pixels that the
    observation barely sees (``K' m`` below 1e-2) keep their initial value.

    Args:
        observation: y >= 0, ``[B,C,H',W']``.
        kernel: ``[B|1,C|1,kh,kw]``, non-negative, summing to one.
        iterations: number of updates.
        initial: u >= 0, ``[B,C,H,W]``; by default the mean of the observed y everywhere.
        boundary: as for :func:`latentdem_ext.blur_conv2d`; with ``valid`` the image is larger
            than y by kh - 1 and kw - 1.
        mask: m, weights ``[B|1,C|1,H',W']`` >= 0, or none.
        total_variation: weight in [0, 0.25]; some thousandths are usual.
        eps: floor of ``K u`` and of the squared gradient.

    Returns:
        u, ``[B,C,H,W]`` in the dtype of ``observation``, contiguous.  Not differentiable.

    Raises:
        ValueError: wrong shapes, options out of range, or a gradient is asked; on a CPU also
            negative values (on a GPU they are not looked for, which would mean waiting for it).
        TypeError: unsupported dtype.

    >>> import torch, latentdem_ext as ext
    >>> y, kernel = torch.rand(1, 1, 32, 32), torch.full((1, 1, 3, 3), 1 / 9)
    >>> u = ext.richardson_lucy(y, kernel, iterations=5)
    >>> bool(u.min() >= 0), bool((u.sum() / y.sum() - 1).abs() < 1e-5)
    (True, True)
    """
    if torch.is_grad_enabled():
        for name, tensor in (("observation", observation), ("kernel", kernel)):
            if tensor.requires_grad:
                raise ValueError(f"{name} must not require a gradient: there is none; detach it")
    if not observation.is_floating_point():
        raise TypeError(
            f"observation must be float32, float64, float16 or bfloat16, found {observation.dtype}"
        )
    if observation.dim() != 4:
        raise ValueError(
            f"observation must have shape [B,C,H',W'], found {tuple(observation.shape)}"
        )
    if initial is None:
        initial = _flat_start(observation, kernel, boundary, mask, eps)
    return _ops.richardson_lucy.default(
        observation, kernel, initial, mask, boundary, iterations, total_variation, eps
    )


def _flat_start(
    observation: Tensor, kernel: Tensor, boundary: str, mask: Tensor | None, eps: float
) -> Tensor:
    height, width = observation.shape[-2:]
    if boundary == "valid":
        height, width = height + kernel.shape[-2] - 1, width + kernel.shape[-1] - 1
    if mask is None:
        level = observation.mean((-2, -1), keepdim=True)
    else:
        total = (mask * observation).sum((-2, -1), keepdim=True)
        level = total / mask.sum((-2, -1), keepdim=True)
    return level.clamp_min(eps).expand(*observation.shape[:2], height, width).to(observation.dtype)


# Fake kernels and autograd --------------------------------------------------------------


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("latentdem::wiener_deconv2d")
def _(
    image_hat: Tensor,
    observation: Tensor,
    kernel: Tensor,
    ratio: Tensor,
    mask: Tensor | None,
    passes: int,
) -> Tensor:
    return empty_in_format(image_hat, image_hat.shape)


@torch.library.register_fake("latentdem::wiener_deconv2d_backward")
def _(
    grad: Tensor,
    image_hat: Tensor,
    observation: Tensor,
    kernel: Tensor,
    ratio: Tensor,
    mask: Tensor | None,
    passes: int,
    need_observation: bool,
    need_kernel: bool,
    need_ratio: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(image_hat, kernel)

    def empty(needed: bool, shape: Any) -> Tensor:
        return image_hat.new_empty(shape if needed else [0], dtype=dtype)

    batch, channels, height, width = image_hat.shape
    return (
        empty(True, image_hat.shape),
        empty(need_observation, image_hat.shape),
        empty(need_kernel, kernel.shape),
        empty(need_ratio, [batch, channels, height, width // 2 + 1]),
    )


@torch.library.register_fake("latentdem::richardson_lucy")
def _(observation: Tensor, kernel: Tensor, initial: Tensor, *settings: Any) -> Tensor:
    return initial.new_empty(initial.shape)


def _wiener_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image_hat, observation, kernel, ratio, mask, ctx.passes = inputs
    ctx.save_for_backward(image_hat, observation, kernel, ratio, mask)


def _wiener_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    image_hat, observation, kernel, ratio, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # set by the caller's create_graph
        return *_wiener_differentiable(ctx.saved_tensors, ctx.passes, needs, grad), None, None
    grads = _ops.wiener_deconv2d_backward(
        grad, image_hat, observation, kernel, ratio, mask, ctx.passes, *needs[1:]
    )
    grad_image = grads[0].to(image_hat.dtype) if needs[0] else None
    grad_observation = grad_kernel = grad_ratio = None
    if needs[1]:
        grad_observation = grads[1].sum_to_size(observation.shape).to(observation.dtype)
    if needs[2]:
        grad_kernel = grads[2].to(kernel.dtype)
    if needs[3]:
        per_bin = grads[3] if ratio.dim() == 4 else grads[3].sum((1, 2, 3))
        grad_ratio = per_bin.sum_to_size(ratio.shape).to(ratio.dtype)
    return grad_image, grad_observation, grad_kernel, grad_ratio, None, None


def _wiener_differentiable(
    tensors: tuple[Tensor, ...], passes: int, needs: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """The same gradients through the reference, so that they have gradients themselves."""
    from latentdem_ext.reference.deconv import wiener_deconv2d as reference

    inputs, mask = list(tensors[:4]), tensors[4]
    wanted = [i for i, need in enumerate(needs) if need]

    def again(*changed: Tensor) -> Tensor:
        given = [t.detach() for t in inputs]
        for i, tensor in zip(wanted, changed, strict=True):
            given[i] = tensor
        return reference(*given, mask=mask, passes=passes)

    # Of this step alone: where the kernel was made from the image, torch.autograd.grad would add
    # what the image does through it, which autograd adds by itself.
    found = iter(torch.func.vjp(again, *(inputs[i] for i in wanted))[1](grad))
    return [next(found) if need else None for need in needs]


differentiable("wiener_deconv2d", _wiener_backward, _wiener_setup)
