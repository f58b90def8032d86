"""Non-blind inversion with a hyper-Laplacian prior, nothing being known beyond the border.

``argmin_x 1/2 ||M (A_phi x - y)||^2 + w sum_c sum_d |D_d x_c|^a``, D the two forward differences,
M the mask of the observed pixels, a = 2/3; A_phi is any linear forward model, blur in the first
place.  Source: Krishnan and Fergus, "Fast Image Deconvolution using Hyper-Laplacian Priors", NIPS
2009: half-quadratic splitting of the gradients with a weight beta that grows by 2 sqrt(2) from 1 to
256, one w- and one x-step at each (their algorithm 1; their lambda is our 1 / w).

Where this differs: their border is periodic and tapered, so that their x-step is one division in
Fourier space; here the mask makes it a linear system, which a few conjugate gradient steps with
that division as preconditioner solve, on half spectra where the model is a convolution.  Their
w-step takes a table or the roots of a polynomial, ours a closed form for a = 2/3 and Newton's
method for any other a in (0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdem.operators.differences import differences, divergence, laplacian
from latentdem.operators.forward_model import ForwardModel


@dataclass(frozen=True)
class HyperLaplacianSettings:
    """Settings of :func:`hyper_laplacian`.

    Chosen on four validation photographs (building, butterfly, squirrel and scene text of
    opencv-doc), 192 x 192 pixels, two 25-pixel kernels each, noise 0.01, input 17.9 dB.  Weights
    of 2e-5 to 4e-3 were tried: with the true kernel 5e-4 is best (27.0 dB; 2e-4 and 1e-3 lose 1.3
    and 0.7 dB), with that of ``l0`` 2e-3 to 4e-3 (21.6 to 21.7 dB; 5e-4 loses 0.9 dB), with the
    kernel prior's 2e-3 (21.6 dB).  At 5e-4, exponents of 0.5 and 0.8, twice the alternations, more
    solver steps and a larger last beta move these by less than 0.4 dB, and total variation (an
    exponent of 1) costs 0.5 to 0.9 dB; at 3e-3 with estimated kernels all that is within 0.2 dB.
    """

    weight: float = 3e-3
    """w, for images in [0, 1]; Krishnan and Fergus's lambda of 2000 is 1 / 2000."""
    exponent: float = 2 / 3
    """a, in (0, 1]; one is total variation."""
    beta_first: float = 1.0
    beta_last: float = 256.0
    beta_factor: float = 2 * 2**0.5
    """beta, in units in which w is one: the schedule of Krishnan and Fergus."""
    alternations: int = 1
    """w- and x-steps at each beta."""
    solver_steps: int = 8
    """Conjugate gradient steps of an x-step."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be positive, found {self.weight}")
        if not 0 < self.exponent <= 1:
            raise ValueError(f"exponent must lie in (0, 1], found {self.exponent}")


LEAST_NOISE = 0.005
"""Below it the kernel's error is the larger one."""


def weight_at(weight: float, noise_std: float) -> float:
    """The prior's weight at a noise of ``noise_std``, where it is ``weight`` at 0.01.

    >>> weight_at(1.0, 0.02), weight_at(1.0, 0.0)
    (4.0, 0.25)
    """
    return weight * (max(noise_std, LEAST_NOISE) / 0.01) ** 2


Progress = Callable[[float, float], None]
"""Called after each alternation with beta and the split objective at that beta."""


def hyper_laplacian(
    model: ForwardModel,
    kernel: Tensor,
    settings: HyperLaplacianSettings,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """The restored image on the canvas, ``[1,C,H_c,W_c]``.

    Args:
        model: the observation, its canvas and mask; linear.
        kernel: phi, of a blur ``[1,1,k,k]``, non-negative, summing to one.
        settings: weights and iterations.
        progress: see :data:`Progress`; the values fall as long as beta stays.

    >>> import torch
    >>> from latentdem.operators.blur import BlurModel
    >>> model = BlurModel(torch.rand(1, 3, 32, 32), kernel_size=5, noise_std=0.01)
    >>> kernel = torch.full((1, 1, 5, 5), 1 / 25)
    >>> image = hyper_laplacian(model, kernel, HyperLaplacianSettings())
    >>> model.crop(image).shape
    torch.Size([1, 3, 32, 32])
    """
    transfer = model.transfer(kernel)
    # What is unknown: the picture, or its coefficients.
    domain = _Pictures(model, kernel) if transfer is None else _Coefficients(model, transfer)
    x = model.padded.clone()
    unknown = domain.analyse(x)
    beta = settings.beta_first
    while beta <= settings.beta_last * (1 + 1e-9):
        coupling = settings.weight * beta
        for _ in range(settings.alternations):
            w = [_shrink(d, beta, settings.exponent) for d in differences(x)]
            unknown = _conjugate_gradients(
                *domain.system(coupling),
                domain.right + coupling * domain.analyse(divergence(w)),
                unknown,
                settings.solver_steps,
            )
            x = domain.synthesise(unknown)
            if progress is not None:
                progress(beta, _split_objective(model, kernel, x, w, beta, settings))
        beta *= settings.beta_factor
    return x


def objective(
    model: ForwardModel, kernel: Tensor, image: Tensor, settings: HyperLaplacianSettings
) -> float:
    """What is minimised, of ``image [1,C,H_c,W_c]``; without splitting."""
    prior = sum(float(d.abs().pow(settings.exponent).sum()) for d in differences(image))
    return _data(model, kernel, image) + settings.weight * prior


def _split_objective(
    model: ForwardModel,
    kernel: Tensor,
    image: Tensor,
    w: list[Tensor],
    beta: float,
    settings: HyperLaplacianSettings,
) -> float:
    prior = sum(float(d.abs().pow(settings.exponent).sum()) for d in w)
    gap = sum(float((d - g).square().sum()) for d, g in zip(w, differences(image), strict=True))
    return _data(model, kernel, image) + settings.weight * (prior + 0.5 * beta * gap)


def _data(model: ForwardModel, kernel: Tensor, image: Tensor) -> float:
    return 0.5 * float(model.residual_variance(image, kernel)) * model.observation.numel()


Linear = Callable[[Tensor], Tensor]


class _Pictures:
    """The x-step's linear system of any linear model, on pictures ``[1,C,H_c,W_c]``."""

    def __init__(self, model: ForwardModel, kernel: Tensor) -> None:
        self._model, self._kernel = model, kernel
        self._power, self._laplacian = model.power(kernel), laplacian(model.canvas, model.padded)
        self.right = model.adjoint(model.mask * model.target, kernel)

    def analyse(self, picture: Tensor) -> Tensor:
        """What is unknown, of ``picture [1,C,H_c,W_c]``: itself."""
        return picture

    def synthesise(self, unknown: Tensor) -> Tensor:
        """The picture again."""
        return unknown

    def system(self, coupling: float) -> tuple[Linear, Linear]:
        """``A' M A + coupling D' D``, and nearly its inverse."""
        model, kernel = self._model, self._kernel
        denominator = self._power + coupling * self._laplacian

        def system(v: Tensor) -> Tensor:
            blurred = model.mask * model.simulate(v, kernel)
            return model.adjoint(blurred, kernel) + coupling * divergence(differences(v))

        def precondition(v: Tensor) -> Tensor:
            return torch.fft.irfft2(torch.fft.rfft2(v) / denominator, s=model.canvas)

        return system, precondition


class _Coefficients:
    """The same where A is a circular convolution: on half spectra ``[1,C,H_c,W_c//2+1,2]``.

    There all but the mask is diagonal, so that a step takes two transforms where pictures take six
    and those of the kernel.  Coefficients that stand for two, as those of real pictures do but for
    the first column and an even width's last, have sqrt(2) times their value: products of vectors
    are then those of the pictures, times a constant.
    """

    def __init__(self, model: ForwardModel, transfer: Tensor) -> None:
        self._size, self._mask = model.canvas, model.mask
        width = model.canvas[1]
        self._scale = transfer.real.new_full((width // 2 + 1,), 2**0.5)
        self._scale[:1].fill_(1)
        if width % 2 == 0:
            self._scale[-1:].fill_(1)
        self._blur, self._adjoint = transfer / self._scale, transfer.conj() * self._scale
        # A product with a real tensor of the same layout is faster than with half as many values.
        self._power = _twice(transfer.real.square() + transfer.imag.square())
        self._laplacian = _twice(laplacian(model.canvas, model.padded))
        self.right = self._pulled(model.target)

    def analyse(self, picture: Tensor) -> Tensor:
        """Coefficients ``[1,C,H_c,W_c//2+1,2]`` of ``picture [1,C,H_c,W_c]``."""
        return torch.view_as_real(torch.fft.rfft2(picture) * self._scale)

    def synthesise(self, unknown: Tensor) -> Tensor:
        """The picture again."""
        return torch.fft.irfft2(torch.view_as_complex(unknown) / self._scale, s=self._size)

    def _pulled(self, blurred: Tensor) -> Tensor:
        """``A' M v``."""
        return torch.view_as_real(self._adjoint * torch.fft.rfft2(self._mask * blurred))

    def system(self, coupling: float) -> tuple[Linear, Linear]:
        """``A' M A + coupling D' D``, and nearly its inverse."""
        ridge = coupling * self._laplacian
        inverse = 1 / (self._power + ridge)

        def system(v: Tensor) -> Tensor:
            spectrum = self._blur * torch.view_as_complex(v)
            return self._pulled(torch.fft.irfft2(spectrum, s=self._size)).addcmul(ridge, v)

        return system, lambda v: inverse * v


def _twice(value: Tensor) -> Tensor:
    """``value [...]`` for real and for imaginary parts: ``[...,2]``."""
    return value[..., None].expand(*value.shape, 2).contiguous()


def _shrink(v: Tensor, beta: float, exponent: float) -> Tensor:
    """``argmin_w |w|^a + beta / 2 (w - v)^2``, elementwise.

    The minimum is zero or the larger root of ``a w^(a - 1) + beta (w - |v|) = 0``; Newton's method
    comes down to that root from |v|, where there is one.  For a = 1 and 2/3 it has a closed form.
    """
    size = v.abs()
    if exponent == 1:
        return v.sign() * (size - 1 / beta).clamp_min(0)
    if exponent == 2 / 3:
        return v.sign() * _shrink_two_thirds(size, beta)
    a = exponent
    # Below this value the derivative falls: no root to be found there.
    lowest = (a * (1 - a) / beta) ** (1 / (2 - a))
    w = size.clamp_min(lowest)
    for _ in range(6):
        slope = beta - a * (1 - a) * w.pow(a - 2)
        w = w - (a * w.pow(a - 1) + beta * (w - size)) / slope.clamp_min(1e-3 * beta)
        w = w.clamp_min(lowest).minimum(size.clamp_min(lowest))
    better = w.pow(a) + 0.5 * beta * (w - size).square() < 0.5 * beta * size.square()
    return torch.where(better, v.sign() * w, torch.zeros_like(v))


def _shrink_two_thirds(size: Tensor, beta: float) -> Tensor:
    """The same of ``size`` = ``|v|`` for a = 2/3, where u = w^(1/3) is a root of a quartic.

    Source: Cao, Sun and Xu, "Fast image deconvolution using closed-form thresholding formulas of
    Lq (q = 1/2, 2/3) regularization", JVCIR 2013; their lambda is 2 / beta, and their hyperbolic
    cosine of a third of an argument is a cube root.
    """
    weight = 2 / beta
    # Not below one, where nothing is left anyway.
    t = (27 / 16 * weight**-1.5 * size.square()).clamp_min(1)
    root = (t + (t.square() - 1).sqrt()).pow(1 / 3)
    square = (root + 1 / root) * (2 / 3 * weight**0.5)
    edge = square.sqrt()
    u = 0.5 * (edge + (2 * size / edge - square).clamp_min(0).sqrt())
    return torch.where(size > 2 / 3 * (3 * weight**3) ** 0.25, u * u * u, 0.0)


def _conjugate_gradients(
    system: Linear,
    precondition: Linear,
    target: Tensor,
    start: Tensor,
    steps: int,
) -> Tensor:
    """Preconditioned conjugate gradients for one positive definite system, from ``start``."""
    x = start
    residual = target - system(x)
    scaled = precondition(residual)
    direction = scaled
    energy = (residual * scaled).sum()
    # Where the preconditioner is nearly the inverse, what is left after a step or two is rounding,
    # and its quotients are of zero by zero. Chosen on the device, which to ask would mean to wait.
    least = 1e-14 * energy
    for _ in range(steps):
        left = energy > least
        image = system(direction)
        step = torch.where(left, energy / (direction * image).sum(), 0.0)
        x = x + step * direction
        residual = residual - step * image
        scaled = precondition(residual)
        fresh = (residual * scaled).sum()
        direction = scaled + torch.where(left, fresh / energy, 0.0) * direction
        energy = fresh
    return x
