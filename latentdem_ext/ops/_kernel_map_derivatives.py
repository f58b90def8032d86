"""Derivatives of the kernel estimate: of its normal equations, of their solution, of both.

Letters as in :mod:`latentdem_ext.ops.kernel_map`; u and v are the fields of image and observation,
what is correlated: ``window * image``, or that of both forward differences.  With the lags
``a[d] = sum_p u[p] u[p + d]`` and ``b[d] = sum_p u[p] v[p + d]`` and their gradients g and h,

    du = (g + flip g) * u + h correlated with v,        dv = h * u.

The solution is differentiated where it solves its equations (the implicit function theorem):
with ``(A + alpha I) w = dk``, again by conjugate gradients, ``db = w``, ``dz = alpha w`` and
``da[d] = - sum_p k[p] w[p + d]``.  Everything here is plain torch and these operators, so that it
can be differentiated again and runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdem_ext.ops._transforms import call, differentiable

_ops = torch.ops.latentdem


def _lines(image: Tensor, domain: str) -> Tensor:
    """What is weighted and correlated: ``image [B,C,H,W]`` or its differences ``[B,2C,H,W]``."""
    if domain == "image":
        return image
    return torch.cat([image.roll(-1, -2) - image, image.roll(-1, -1) - image], 1)


def _lines_adjoint(fields: Tensor, domain: str) -> Tensor:
    if domain == "image":
        return fields
    down, right = fields.chunk(2, 1)
    return down.roll(1, -2) - down + right.roll(1, -1) - right


def _transfer(lags: Tensor, centre: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Half spectrum ``[B,1,N,M//2+1]`` of ``lags [B,h,w]``, at most twice the ``grid`` (N, M).

    Lags beyond the grid come in again at its other side.
    """
    n, m = grid
    taps = F.pad(lags, (0, 2 * m - lags.shape[-1], 0, 2 * n - lags.shape[-2]))
    taps = taps.roll((-centre[0], -centre[1]), (-2, -1))
    folded = taps[..., :n, :] + taps[..., n:, :]
    return torch.fft.rfft2(folded[..., :m] + folded[..., m:])[:, None]


def _zeros(tensors: Iterable[Tensor | None], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of nothing: transforms take no empty batch."""
    return tuple(
        torch.zeros_like(t) if need and t is not None else None
        for t, need in zip(tensors, needs, strict=True)
    )


def _statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    image, observation, window, size, ctx.domain, ctx.variance, _ = inputs
    ctx.kernel_size = (size[0], size[1])
    ctx.save_for_backward(image, observation, window)


def _statistics_backward(ctx: Any, grad_lags: Tensor, grad_cross: Tensor) -> tuple[Any, ...]:
    image, observation, window = ctx.saved_tensors
    if image.numel() == 0:
        return *_zeros(ctx.saved_tensors, ctx.needs_input_grad[:3]), None, None, None, None
    dtype, (kh, kw), domain = grad_lags.dtype, ctx.kernel_size, ctx.domain
    weight = None if window is None else window.to(dtype)
    x, y = (_lines(t.to(dtype), domain) for t in (image, observation))
    height, width = image.shape[-2:]
    # Without a window the correlations wrap round; with one nothing may.
    grid = (height, width) if weight is None else (height + kh - 1, width + kw - 1)
    u, v = (torch.fft.rfft2(t if weight is None else t * weight, s=grid) for t in (x, y))
    auto = _transfer(grad_lags + grad_lags.flip((-2, -1)), (kh - 1, kw - 1), grid)
    cross = _transfer(grad_cross, (kh // 2, kw // 2), grid)

    def fields(spectrum: Tensor) -> Tensor:
        return torch.fft.irfft2(spectrum, s=grid)[..., :height, :width]

    def pull_back(grad: Tensor, like: Tensor) -> Tensor:
        return _lines_adjoint(grad if weight is None else grad * weight, domain).to(like.dtype)

    need_image, need_observation, need_window = ctx.needs_input_grad[:3]
    grads: list[Tensor | None] = [None, None, None]
    grad_u = fields(u * auto + v * cross.conj()) if need_image or need_window else None
    grad_v = fields(u * cross) if need_observation or need_window else None
    if need_image and grad_u is not None:
        grads[0] = pull_back(grad_u, image)
    if need_observation and grad_v is not None:
        grads[1] = pull_back(grad_v, observation)
    if grad_u is not None and grad_v is not None and weight is not None and need_window:
        from latentdem_ext.reference.kernel_map import _noise_lags

        noise = (grad_lags * _noise_lags(kh, kw, domain, grad_lags)).sum((-2, -1))
        power = 2 * ctx.variance * image.shape[1] * noise.reshape(-1, 1, 1, 1) * weight
        found = (x * grad_u + y * grad_v).sum(1, keepdim=True) + power
        grads[2] = found.sum_to_size(window.shape).to(window.dtype)
    return *grads, None, None, None, None


def _solve_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lags, cross, target, _, ctx.alpha, ctx.steps = inputs
    ctx.dtypes = (lags.dtype, cross.dtype, target.dtype)
    ctx.save_for_backward(lags, output)


def _solve_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    lags, solution = ctx.saved_tensors
    if solution.numel() == 0:
        return *_zeros((lags, solution, solution), ctx.needs_input_grad[:3]), None, None, None
    zero = torch.zeros_like(grad)
    w = call(_ops.kernel_map_solve.default, lags, grad, zero, zero, ctx.alpha, ctx.steps)
    need_lags, need_cross, need_target = ctx.needs_input_grad[:3]
    grad_lags = grad_cross = grad_target = None
    if need_lags:
        kh, kw = solution.shape[-2:]
        grid = (2 * kh - 1, 2 * kw - 1)
        spectrum = torch.fft.rfft2(solution, s=grid).conj() * torch.fft.rfft2(w, s=grid)
        found = torch.fft.irfft2(spectrum, s=grid).roll((kh - 1, kw - 1), (-2, -1))
        # Lags come in pairs of equal ones, and share what a pair has.
        grad_lags = (-0.5 * (found + found.flip((-2, -1)))).to(ctx.dtypes[0])
    if need_cross:
        grad_cross = w.to(ctx.dtypes[1])
    if need_target:
        grad_target = (ctx.alpha * w).to(ctx.dtypes[2])
    return grad_lags, grad_cross, grad_target, None, None, None


def normalize(kernel: Tensor, fallback: Tensor) -> Tensor:
    """``max(kernel, 0)`` over its sum; ``fallback`` where nothing is left."""
    positive = kernel.clamp_min(0)
    total = positive.sum((-2, -1), keepdim=True)
    nothing = total == 0
    # Not by zero, even where it is not taken: the gradient would not be a number.
    return torch.where(nothing, fallback, positive / torch.where(nothing, 1.0, total))


def alternate(
    lags: Tensor,
    cross: Tensor,
    kernel: Tensor,
    prior: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    iterations: int,
    steps: int,
) -> Tensor:
    """Least squares on the support and the ``prior``, in turn: the last estimate ``[B,1,kh,kw]``.

    Args:
        lags: of A, ``[B,2kh-1,2kw-1]``.
        cross: b, ``[B,kh,kw]``.
        kernel: start and first z, ``[B,1,kh,kw]``.
        prior: from an estimate to the next z.
        alpha: weight of z.
        iterations: how often.
        steps: conjugate gradient steps of each.
    """
    estimate = split = kernel
    for done in range(iterations):
        if done:
            split = prior(estimate)
        solution = call(
            _ops.kernel_map_solve.default, lags, cross, split[:, 0], estimate[:, 0], alpha, steps
        )
        estimate = normalize(solution[:, None], split.to(solution.dtype))
    return estimate


def _update_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[4:13]
    ctx.save_for_backward(*inputs[:4])


def _update_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By doing it again in steps that have derivatives."""
    # Priors and the solve on the whole grid are no more than a few operations of torch.
    from latentdem_ext.reference import kernel_map as reference

    sigma, penalty, strength, iterations, prior, domain, exact, variance, steps = ctx.settings
    *tensors, window = ctx.saved_tensors
    if tensors[0].numel() == 0:
        return *_zeros(ctx.saved_tensors, ctx.needs_input_grad[:4]), *[None] * 10
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def again(
        image: Tensor, observation: Tensor, kernel: Tensor, window: Tensor | None = None
    ) -> Tensor:
        weight = None if window is None else window.to(dtype)
        image, observation, k = image.to(dtype), observation.to(dtype), kernel.to(dtype)
        if not exact:
            found = reference.kernel_map_update(
                image, observation, k, noise_std=sigma, penalty=penalty, regularization=strength,
                iterations=iterations, prior=prior, domain=domain, support_exact=False,
                window=weight, image_variance=variance,
            )  # fmt: skip
            return found.to(kernel.dtype)
        lags, cross = call(
            _ops.kernel_map_statistics.default, image, observation, weight,
            list(kernel.shape[-2:]), domain, variance, None,
        )  # fmt: skip
        found = alternate(
            lags,
            cross,
            k,
            lambda estimate: reference._prior_step(estimate, prior, strength, penalty),
            alpha=sigma**2 * penalty,
            iterations=iterations,
            steps=steps,
        )
        return found.to(kernel.dtype)

    given = tensors if window is None else [*tensors, window]
    found = list(torch.func.vjp(again, *given)[1](grad))
    found += [None] * (4 - len(found))
    return *found, *[None] * 10


def register() -> None:
    """Make the operators differentiable; their fake kernels must be there."""
    differentiable("kernel_map_statistics", _statistics_backward, _statistics_setup)
    differentiable("kernel_map_solve", _solve_backward, _solve_setup)
    differentiable("kernel_map_update", _update_backward, _update_setup)
