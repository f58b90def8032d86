"""MAP estimation of blur kernels, and the projections that go with it.

Model: ``y = k * x + n``, ``n ~ N(0, sigma^2)``; half-quadratic splitting alternates

    k <- argmin ||k * x - y||^2 / (2 sigma^2) + beta / 2 ||k - z||^2     (least squares)
    k <- max(k, 0) / sum
    z <- argmin lambda phi(z) + beta / 2 ||z - k||^2                     (prior)

with ``alpha = sigma^2 beta`` the weight of z in the normal equations (A + alpha I) k = b +
alpha z, where A holds the autocorrelation of x and b its cross-correlation with y.  Letters:
B batch, C channels, H W image, kh kw kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdem_ext.ops import _kernel_map_derivatives as derivatives
from latentdem_ext.ops._transforms import call, differentiable

_ops = torch.ops.latentdem

KernelDenoiser = Callable[[Tensor, float], Tensor]
"""Plug-and-play prior: ``(kernel [B,1,kh,kw], noise_std) -> kernel``."""


def kernel_map_update(
    image: Tensor,
    observation: Tensor,
    kernel: Tensor,
    *,
    noise_std: float,
    penalty: float,
    regularization: float,
    iterations: int,
    prior: str | KernelDenoiser = "l1",
    domain: str = "image",
    support_exact: bool = True,
    window: Tensor | None = None,
    image_variance: float = 0.0,
    solver_steps: int = 6,
    prepared: Tensor | None = None,
) -> Tensor:
    """Half-quadratic-splitting MAP estimate of each image's blur kernel.

    Args:
        image: current estimate x of the sharp image, ``[B,C,H,W]``.
        observation: y, ``[B,C,H,W]``, aligned with ``image``.
        kernel: start and first z, ``[B,1,kh,kw]``.
        noise_std: sigma, in the image's units.
        penalty: beta.
        regularization: lambda, the weight of the prior.
        iterations: alternations of the two steps.
        prior: ``"none"``, ``"l1"`` (``z = max(k - lambda / beta, 0)``), ``"l2"``
            (``z = beta k / (2 lambda + beta)``), or a denoiser called as
            ``prior(kernel, sqrt(lambda / beta))``.
        domain: ``"image"``, or ``"gradient"`` for both forward differences of every channel.
        support_exact: solve the least squares on the kernel's support, by ``solver_steps``
            warm-started conjugate gradient steps on FFTs of about twice the kernel size.
            ``False`` solves on the whole image grid and crops, as the published code does.
        window: weights ``[B|1,1,H,W]`` of the image and the observation (their derivatives in
            the gradient domain); with a window the correlations do not wrap round, without
            one the blur is circular.
        image_variance: posterior variance of each pixel of ``image``; it adds the expected
            power of that error to A, which keeps the estimate from overfitting it.
        solver_steps: see ``support_exact``.
        prepared: what :func:`kernel_map_prepare` made of the observation and this window, kernel
            size and domain; saves its transforms in a loop over images (``support_exact`` only).

    Returns:
        ``[B,1,kh,kw]``, non-negative, summing to one.  Channels are pooled into one system;
        batch mates do not influence each other.  Differentiable in the four tensors: each least
        squares where it solves its equations (see :func:`kernel_map_solve`), so with
        ``support_exact`` as well as ``solver_steps`` reach that, and the same with a denoiser
        that is differentiable.

    Raises:
        ValueError: shapes that disagree, kernel larger than the image, a parameter out of its
            range; the message names it.

    >>> import torch, latentdem_ext as ext
    >>> x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> k = torch.zeros(1, 1, 5, 5); k[..., 1, :3] = 1 / 3
    >>> y = ext.blur_conv2d(x, k)
    >>> start = torch.full_like(k, 1 / 25)
    >>> found = ext.kernel_map_update(x, y, start, noise_std=0.01, penalty=1e3,
    ...                               regularization=0.0, iterations=5, prior="none")
    >>> bool((found - k).abs().max() < 1e-2)
    True
    """
    if not callable(prior):
        return call(
            _ops.kernel_map_update.default,
            image,
            observation,
            kernel,
            window,
            noise_std,
            penalty,
            regularization,
            iterations,
            prior,
            domain,
            support_exact,
            image_variance,
            solver_steps,
            prepared,
        )
    if iterations <= 0:
        raise ValueError(f"iterations must be positive, found {iterations}")
    strength = (regularization / penalty) ** 0.5
    if not support_exact:
        estimate = split = kernel
        for done in range(iterations):
            if done:
                split = prior(estimate, strength)
            estimate = call(
                _ops.kernel_map_update.default,
                image, observation, split, window, noise_std, penalty, 0.0, 1, "none", domain,
                False, image_variance, solver_steps, None,
            )  # fmt: skip
        return estimate
    lags, rhs = kernel_map_statistics(
        image,
        observation,
        (kernel.shape[-2], kernel.shape[-1]),
        domain=domain,
        window=window,
        image_variance=image_variance,
        prepared=prepared,
    )
    return derivatives.alternate(
        lags,
        rhs,
        kernel,
        lambda estimate: prior(estimate, strength),
        alpha=noise_std**2 * penalty,
        iterations=iterations,
        steps=solver_steps,
    )


def kernel_map_statistics(
    image: Tensor,
    observation: Tensor,
    kernel_size: tuple[int, int],
    *,
    domain: str = "image",
    window: Tensor | None = None,
    image_variance: float = 0.0,
    prepared: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normal equations of the least-squares step, for a loop of one's own.

    Returns:
        Autocorrelation lags ``[B,2kh-1,2kw-1]`` (lag zero in the middle, the expected power of
        ``image_variance`` included) and cross-correlation ``[B,kh,kw]``; arguments as in
        :func:`kernel_map_update`.  Differentiable in image, observation and window, twice.
    """
    return call(
        _ops.kernel_map_statistics.default,
        image,
        observation,
        window,
        list(kernel_size),
        domain,
        image_variance,
        prepared,
    )


def kernel_map_prepare(
    observation: Tensor,
    kernel_size: tuple[int, int],
    *,
    domain: str = "image",
    window: Tensor | None = None,
) -> Tensor:
    """Transform an observation once for many calls of :func:`kernel_map_update`.

    Args:
        observation: y, ``[B,C,H,W]``.
        kernel_size: ``(kh, kw)`` of the kernels to come.
        domain: as for :func:`kernel_map_update`.
        window: as there.

    Returns:
        An opaque tensor for the argument ``prepared``, about twice the size of the observation's
        fields, and for derivatives a constant: they go through the observation, which is given
        with it; empty on the CPU where the observation is periodic and its sides are no good
        transform sizes.

    >>> import torch, latentdem_ext as ext
    >>> x, y = torch.rand(2, 1, 3, 64, 64)
    >>> options = {"domain": "gradient"}
    >>> prepared = ext.kernel_map_prepare(y, (9, 9), **options)
    >>> lags, rhs = ext.kernel_map_statistics(x, y, (9, 9), prepared=prepared, **options)
    >>> torch.allclose(rhs, ext.kernel_map_statistics(x, y, (9, 9), **options)[1], rtol=1e-4)
    True
    """
    window = None if window is None else window.detach()
    return _ops.kernel_map_prepare.default(observation.detach(), window, list(kernel_size), domain)


def kernel_map_solve(
    autocorrelation: Tensor,
    crosscorrelation: Tensor,
    target: Tensor,
    start: Tensor,
    *,
    alpha: float,
    steps: int,
) -> Tensor:
    """Solve ``(A + alpha I) k = b + alpha target`` on the support, from ``start``.

    Args:
        autocorrelation: lags of A, ``[B,2kh-1,2kw-1]``, from :func:`kernel_map_statistics`.
        crosscorrelation: b, ``[B,kh,kw]``.
        target: z, ``[B,kh,kw]``.
        start: first iterate, ``[B,kh,kw]``.
        alpha: weight of the target.
        steps: conjugate gradient steps.

    Returns:
        ``[B,kh,kw]``; may be negative.  Differentiable twice in the first three, as the exact
        solution, on which the start has no say; the derivative takes as many steps of its own, and
        of either too few make it an approximation.

    A kernel network can be trained through it:

    >>> import torch, latentdem_ext as ext
    >>> x = torch.rand(1, 1, 24, 24, requires_grad=True)
    >>> lags, rhs = ext.kernel_map_statistics(x, torch.rand(1, 1, 24, 24), (5, 5))
    >>> zero = torch.zeros(1, 5, 5)
    >>> ext.kernel_map_solve(lags, rhs, zero, zero, alpha=1.0, steps=25).square().sum().backward()
    >>> x.grad.shape
    torch.Size([1, 1, 24, 24])
    """
    return call(
        _ops.kernel_map_solve.default,
        autocorrelation,
        crosscorrelation,
        target,
        start,
        alpha,
        steps,
    )


def project_simplex(kernel: Tensor) -> Tensor:
    """Euclidean projection of each plane of ``[...,kh,kw]`` onto ``{k >= 0, sum k = 1}``.

    Differentiable almost everywhere.  Source: Held, Wolfe and Crowder 1974 (sort-based).
    """
    return call(_ops.project_simplex.default, kernel)


def recenter_kernel(kernel: Tensor, *, subpixel: bool = True) -> Tensor:
    """Shift each plane of ``[...,kh,kw]`` so that its centre of mass is at (kh//2, kw//2).

    The shift is bilinear, or with ``subpixel=False`` to the nearest pixel, so a non-negative
    kernel stays non-negative; what leaves the support is lost and the sum restored.  A plane
    whose centre of mass does not exist or lies out of the frame (no mass, mixed signs, a value
    that is not finite) is returned as it is.
    Differentiable (the nearest-pixel shift is taken as constant).
    """
    return call(_ops.recenter_kernel.default, kernel, subpixel)


# Fake kernels and autograd --------------------------------------------------------------


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("latentdem::kernel_map_statistics")
def _(
    image: Tensor,
    observation: Tensor,
    window: Tensor | None,
    kernel_size: list[int],
    domain: str,
    image_variance: float,
    prepared: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(image, observation)
    kh, kw = kernel_size
    lags = image.new_empty([image.shape[0], 2 * kh - 1, 2 * kw - 1], dtype=dtype)
    return lags, image.new_empty([image.shape[0], kh, kw], dtype=dtype)


@torch.library.register_fake("latentdem::kernel_map_prepare")
def _(observation: Tensor, window: Tensor | None, kernel_size: list[int], domain: str) -> Tensor:
    fields = observation.shape[1] * (2 if domain == "gradient" else 1)
    values = torch.library.get_ctx().new_dynamic_size()
    dtype = _compute_dtype(observation)
    return observation.new_empty([observation.shape[0], fields, values], dtype=dtype)


@torch.library.register_fake("latentdem::kernel_map_solve")
def _(
    autocorrelation: Tensor,
    crosscorrelation: Tensor,
    target: Tensor,
    start: Tensor,
    alpha: float,
    steps: int,
) -> Tensor:
    dtype = _compute_dtype(crosscorrelation, autocorrelation)
    return crosscorrelation.new_empty(crosscorrelation.shape, dtype=dtype)


@torch.library.register_fake("latentdem::kernel_map_update")
def _(image: Tensor, observation: Tensor, kernel: Tensor, *settings: Any) -> Tensor:
    return kernel.new_empty(kernel.shape)


@torch.library.register_fake("latentdem::project_simplex")
def _(kernel: Tensor) -> Tensor:
    return kernel.new_empty(kernel.shape)


@torch.library.register_fake("latentdem::recenter_kernel")
def _(kernel: Tensor, subpixel: bool) -> Tensor:
    return kernel.new_empty(kernel.shape)


def _simplex_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _simplex_backward(ctx: Any, grad: Tensor) -> Tensor:
    # On the active set the projection is the identity minus its mean.
    (output,) = ctx.saved_tensors
    active = (output > 0).to(grad.dtype)
    count = active.sum((-2, -1), keepdim=True).clamp_min(1)
    return active * (grad - (active * grad).sum((-2, -1), keepdim=True) / count)


def _recenter_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    kernel, ctx.subpixel = inputs
    ctx.save_for_backward(kernel)


def _recenter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    # The reference is differentiable and runs on planes of kernel size: not worth a kernel.
    from latentdem_ext.reference.kernel_map import recenter_kernel as reference

    (kernel,) = ctx.saved_tensors
    pull_back = torch.func.vjp(lambda k: reference(k, subpixel=ctx.subpixel), kernel)[1]
    return pull_back(grad)[0], None


derivatives.register()
differentiable("project_simplex", _simplex_backward, _simplex_setup)
differentiable("recenter_kernel", _recenter_backward, _recenter_setup)
