"""The blur forward model: ``y = k * x + n`` on a canvas, its proximal step and its M-step.

A photograph knows nothing of what lies beyond its border, yet every pixel near the border was
blurred from there.  With the ``valid`` boundary the unknown image therefore lives on a canvas
that is larger than the observation by the kernel's size on each side, and only the observed
part enters the likelihood.  With ``circular`` the canvas is the observation itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.operators.edges import l0_deconvolution, transfer_function
from latentdem.operators.forward_model import ForwardModel
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings, hyper_laplacian
from latentdem.priors.kernel import (
    THRESHOLD,
    kernel_evidence,
    solve_kernel,
)

BOUNDARIES = ("auto", "valid", "circular")


def _canvas_side(side: int, multiple: int = 1) -> int:
    """Next multiple of 16 with small prime factors: good for networks and for FFTs."""
    stride = math.lcm(16, multiple)
    side += -side % stride
    while True:
        rest = side // stride
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return side
        side += stride


CLIPPED_SHARE = 0.2
"""Where more of a picture is white it is white paper, and no light that was too bright.

On six validation photographs, overexposed before they were blurred, masking gained 0 to 0.7 dB
where up to 0.11 was white, and lost 1 and 6 dB where half of it was.
"""


def clipped(image: Tensor) -> Tensor:
    """Mask ``[1,1,H,W]`` of the clipped highlights of ``image [1,C,H,W]``: no blur explains them.

    None are found where a larger share than ``CLIPPED_SHARE`` is white, or values exceed one.
    """
    brightest = image.amax(1, keepdim=True)
    white = (brightest >= 1 - 0.5 / 255).to(image)
    if float(brightest.max()) > 1 or float(white.mean()) > CLIPPED_SHARE:
        return torch.zeros_like(white)
    return white


@dataclass(frozen=True)
class EdgeStepSettings:
    """The M-step of ``prox``: least squares on the salient edges of the image."""

    edge_weight: float = 0.015
    """lambda of the L0 smoothing that picks the edges (see ``operators/edges.py``)."""
    kernel_weight: float = 6.0
    """Weight of the kernel's squared norm, in squared grey values summed over the image."""
    denoiser_share: float = 1.0
    """Share of the kernel prior's answer in the new kernel."""
    momentum: float = 0.5
    """Share of the kernel before; negative to overshoot."""
    floor: float = 0.0
    """Kernel values below this share of the peak are set to zero."""
    searched_floor: float = 0.1
    searched_denoiser_share: float = 0.6
    searched_momentum: float = 0.9
    """These three where the first kernel was chosen among several, so that less is left to find.

    A mean of answers has a haze, which hardly shows in MNC and costs the picture: of 12 validation
    pairs of 25 pixels, sparse deconvolutions by their first kernels gain 6.39 dB with it, and 6.66,
    6.80 and 6.72 with floors of 0.05, 0.1 and 0.15.  The whole method with one chain gains 7.13 dB
    by the three with a momentum of 0.8, 7.14 with one of 0.5, 6.70 with a share of 1 and no floor.
    After the longer search, eleven pairs have 0.06 dB more with 0.9 than with 0.8."""


@dataclass(frozen=True)
class MStepSettings:
    """The M-step of ``paper``: all gradients, with the image's uncertainty, then a prior."""

    iterations: int = 10
    """Half-quadratic iterations, each pulled towards the one before."""
    noise_weight: float = 30.0
    """alpha in units of the noise energy, sigma^2 times the number of pixels."""
    energy_weight: float = 1e-3
    """alpha in units of the image's gradient energy."""
    denoiser_share: float = 0.5
    """Share of the kernel prior's answer in the new kernel."""


@dataclass(frozen=True)
class KernelFit:
    """Least squares of one M-step.

    Args:
        kernel: ``[1,1,k,k]``, non-negative, thresholded, centred, summing to one.
        before: the kernel that the image was restored with, in the image's place.
        lags: autocorrelation of the edges, ``[1,2k-1,2k-1]``.
        cross: their correlation with the observation's gradients, ``[1,k,k]``.
    """

    kernel: Tensor
    before: Tensor
    lags: Tensor
    cross: Tensor

    def evidence(self) -> Tensor:
        """See :func:`latentdem.priors.kernel.kernel_evidence`."""
        return kernel_evidence(self.lags, self.cross, self.before)


class BlurModel(ForwardModel):
    """Uniform blur of one photograph by a kernel of any shape: phi is ``[1,1,k,k]``.

    Args:
        observation: y, ``[1,C,H,W]`` in [0, 1].
        kernel_size: side k of the kernel in pixels.
        noise_std: sigma, in the image's units.
        boundary: ``valid`` or ``circular``.
        kernel_prior: plug-and-play denoiser of the M-step, or none.
        multiple: of the canvas' sides and of where the observation lies on it.
    """

    def __init__(
        self,
        observation: Tensor,
        *,
        kernel_size: int,
        noise_std: float,
        boundary: str = "valid",
        kernel_prior: nn.Module | None = None,
        multiple: int = 1,
    ) -> None:
        super().__init__(observation, noise_std=noise_std)
        self.grey = observation.mean(1, keepdim=True)
        self.kernel_size = kernel_size
        self.boundary = boundary
        self.kernel_prior = kernel_prior
        height, width = self.extent = (observation.shape[-2], observation.shape[-1])
        if boundary == "valid":
            canvas = [_canvas_side(side + 2 * kernel_size, multiple) for side in (height, width)]
            self.top, self.left = (
                (c - side) // 2 // multiple * multiple
                for c, side in zip(canvas, (height, width), strict=True)
            )
        else:
            canvas, self.top, self.left = [height, width], 0, 0
        self.canvas = (canvas[0], canvas[1])
        self.mask = observation.new_zeros(1, 1, *self.canvas)
        usable = 1 - clipped(observation)
        self.crop(self.mask).copy_(usable)
        # Tensor and flag, so that the E-step asks the device for nothing.
        self._values = (usable.sum() * observation.shape[1]).clamp_min(1)
        self._known = bool((self.mask > 0).all())
        self.padded = self.target = self._pad(observation)
        self.window = self._window(height, width) if boundary == "valid" else None
        if float(usable.min()) < 1:
            self.window = usable if self.window is None else self.window * usable

    # Geometry ---------------------------------------------------------------------------

    def _pad(self, image: Tensor) -> Tensor:
        """Extend to the canvas by reflection, as often as it takes."""
        height, width = image.shape[-2:]
        below = self.canvas[0] - height - self.top
        right = self.canvas[1] - width - self.left
        rows = _mirror(height, self.top, below)
        columns = _mirror(width, self.left, right)
        return image[..., rows, :][..., columns]

    def _window(self, height: int, width: int) -> Tensor:
        """Cosine window that falls to zero at the border over half a kernel."""

        def ramp(side: int) -> Tensor:
            length = max(1, min(self.kernel_size // 2 + 1, side // 4))
            distance = torch.arange(side, dtype=torch.float32) + 0.5
            distance = torch.minimum(distance, distance.flip(0))
            return 0.5 - 0.5 * torch.cos(math.pi * (distance / length).clamp_max(1))

        return torch.outer(ramp(height), ramp(width))[None, None].to(self.observation)

    def crop(self, image: Tensor) -> Tensor:
        """View of the part of a canvas image ``[1,C,H_c,W_c]`` under the observation."""
        height, width = self.extent
        return image[..., self.top : self.top + height, self.left : self.left + width]

    @cached_property
    def _prepared_grey(self) -> Tensor:
        """The transforms of the grey observation that every M-step on edges needs."""
        size = (self.kernel_size, self.kernel_size)
        return ext.kernel_map_prepare(self.grey, size, domain="gradient", window=self.window)

    # Forward model ----------------------------------------------------------------------

    def simulate(self, image: Tensor, kernel: Tensor) -> Tensor:
        """``k * x`` on the canvas ``[1,C,H_c,W_c]``; circular, which the margin makes harmless."""
        return ext.blur_conv2d(image, kernel, boundary="circular")

    def adjoint(self, residual: Tensor, parameters: Tensor) -> Tensor:
        """``k`` correlated with r."""
        return ext.blur_conv2d_adjoint(residual, parameters, boundary="circular")

    def residual_variance(self, image: Tensor, parameters: Tensor) -> Tensor:
        """Mean squared residual over the observed pixels of ``image [N,C,H_c,W_c]``: ``[]``."""
        target = self.padded.expand(len(image), -1, -1, -1)
        loss = ext.blur_data_term(image, parameters, target, boundary="circular", mask=self.mask)
        return 2 * loss.mean() / self._values

    def initial_kernel(self) -> Tensor:
        """A 5 x 5 box: a start that neither a delta nor a full box is."""
        kernel = self.observation.new_zeros(1, 1, self.kernel_size, self.kernel_size)
        centre, reach = self.kernel_size // 2, min(2, self.kernel_size // 2)
        inside = slice(centre - reach, min(centre + reach + 1, self.kernel_size))
        kernel[..., inside, inside] = 1
        return kernel / kernel.sum()

    # E-step -----------------------------------------------------------------------------

    def proximal(
        self, estimate: Tensor, kernel: Tensor, *, ratio: float | Tensor, imputations: int = 3
    ) -> Tensor:
        """``argmin_x ||k * x - y||^2 / (2 s^2) + ||x - x_hat||^2 / (2 r^2)``, in Fourier space.

        ``X = X_hat + conj(K) (Y - K X_hat) / (|K|^2 + s^2 / r^2)``.  What the observation does
        not show is missing data: it is imputed by the model's own prediction, as EM does.

        Args:
            estimate: x_hat, ``[N,C,H_c,W_c]``, N chains of one observation.
            kernel: ``[1,1,k,k]``.
            ratio: ``s^2 / r^2``, a number or ``[]`` on the device.
            imputations: passes; one suffices where nothing is missing.
        """
        return ext.wiener_deconv2d(
            estimate,
            self.padded,
            kernel,
            ratio,
            mask=None if self._known else self.mask,
            passes=1 if self._known else imputations,
        )

    def power(self, parameters: Tensor) -> Tensor:
        """``|K|^2``; of several kernels their mean."""
        spectra = transfer_function(parameters.transpose(0, 1), self.canvas)
        return spectra.abs().square().mean((0, 1))

    def transfer(self, parameters: Tensor) -> Tensor | None:
        """The kernel's; none of a class that blurs otherwise."""
        if type(self).simulate is not BlurModel.simulate:
            return None
        return transfer_function(parameters, self.canvas)

    def sparse_estimate(self, parameters: Tensor, weight: float) -> Tensor | None:
        """Deconvolution under a hyper-Laplacian prior of the gradients."""
        return hyper_laplacian(self, parameters, HyperLaplacianSettings(weight=weight))

    # M-step -----------------------------------------------------------------------------

    @property
    def searches(self) -> bool:
        """With a kernel prior, which answers the search's M-steps."""
        return self.kernel_prior is not None

    def start_parameters(self) -> Tensor:
        """First kernel ``[1,1,k,k]``, from the observation's edges, coarse to fine.

        With a kernel prior the best of several.
        """
        # They run models of this class on smaller pictures.
        from latentdem.operators.initialization import estimate_kernel
        from latentdem.operators.kernel_search import search_kernel

        if self.searches:
            assert self.kernel_prior is not None
            return search_kernel(
                self.observation,
                self.kernel_size,
                noise_std=self.noise_std,
                boundary=self.boundary,
                kernel_prior=self.kernel_prior,
            )
        return estimate_kernel(
            self.observation,
            self.kernel_size,
            boundary=self.boundary,
            kernel_prior=self.kernel_prior,
        )

    def edges(self, image: Tensor, settings: EdgeStepSettings) -> Tensor:
        """Salient edges ``[1,1,H_c,W_c]`` of ``image [1,C,H_c,W_c]``.

        A kernel fitted to all gradients also explains the ringing that the last, wrong kernel
        left in the image; edges that survive L0 smoothing are those of the scene.
        """
        return l0_deconvolution(image.mean(1, keepdim=True), None, weight=settings.edge_weight)

    def fit_edges(
        self, image: Tensor, before: Tensor, *, weight: float, grey: Tensor | None = None,
        window: Tensor | None = None,
    ) -> KernelFit:  # fmt: skip
        """Kernel that maps the gradients of ``image [1,1,H_c,W_c]`` to the observation's.

        ``argmin_k ||grad x * k - grad y||^2 + weight ||k||^2`` on the support, under the window;
        then clamped, thresholded, centred.  ``before`` stays if nothing is left.  ``grey`` and
        ``window``: another observation, another window than the model's own.
        """
        own = grey is None and window is None
        size = (before.shape[-2], before.shape[-1])
        lags, cross = ext.kernel_map_statistics(
            self.crop(image),
            self.grey if grey is None else grey,
            size,
            domain="gradient",
            window=self.window if window is None else window,
            prepared=self._prepared_grey if own else None,
        )
        found = solve_kernel(lags, cross, weight).clamp_min(0)
        # Chosen on the device: to ask which it is would mean waiting for it.
        total = found.sum()
        some = total > 0
        kernel = torch.where(some, _tidy(torch.where(some, found / total, before)), before)
        return KernelFit(kernel, before, lags, cross)

    def update(self, image: Tensor, parameters: Tensor, settings: EdgeStepSettings) -> Tensor:
        """M-step on the salient edges of the current image ``[1,C,H_c,W_c]``."""
        settings = self.after_search(settings)
        fit = self.fit_edges(self.edges(image, settings), parameters, weight=settings.kernel_weight)
        return self.settle(fit, settings)

    def after_search(self, settings: EdgeStepSettings) -> EdgeStepSettings:
        """``settings``, those of after a search in the others' place if there was one."""
        if not self.searches:
            return settings
        return replace(
            settings,
            floor=settings.searched_floor,
            denoiser_share=settings.searched_denoiser_share,
            momentum=settings.searched_momentum,
        )

    def settle(self, fit: KernelFit, settings: EdgeStepSettings) -> Tensor:
        """The kernel prior's answer to ``fit``, averaged with the kernel before, in its place."""
        found = align(self.answer(fit, settings.denoiser_share), fit.before)
        return above(torch.lerp(found, fit.before, settings.momentum), settings.floor)

    def answer(self, fit: KernelFit, share: float) -> Tensor:
        """The fitted kernel, or where there is a kernel prior, its answer to the given share."""
        if self.kernel_prior is None or share == 0:
            return fit.kernel
        answer = self.kernel_prior(fit.kernel, fit.evidence())
        return answer if share == 1 else torch.lerp(align(fit.kernel, answer), answer, share)

    def m_step(
        self, image: Tensor, kernel: Tensor, *, image_std: float, settings: MStepSettings
    ) -> Tensor:
        """MAP estimate of the kernel from the current image ``[1,C,H_c,W_c]``.

        Args:
            image: x_hat on the canvas.
            kernel: the kernel before.
            image_std: r_t, standard deviation of the error of ``image``.
            settings: see :class:`MStepSettings`.
        """
        x = self.crop(image)
        down, right = x.diff(dim=-2)[..., :-1], x.diff(dim=-1)[..., :-1, :]
        weight = 1.0 if self.window is None else self.window[..., :-1, :-1]
        energy = float(((down * weight).square() + (right * weight).square()).sum())
        pixels = x.shape[-1] * x.shape[-2] if self.window is None else self.window.square().sum()
        alpha = (
            settings.noise_weight * float(pixels) * self.noise_std**2
            + settings.energy_weight * energy
        )
        estimate = ext.kernel_map_update(
            x,
            self.observation,
            kernel,
            noise_std=self.noise_std,
            penalty=alpha / self.noise_std**2,
            regularization=0.0,
            iterations=settings.iterations,
            prior="none",
            domain="gradient",
            window=self.window,
            image_variance=image_std**2,
        )
        return self.mix(_tidy(estimate), settings.denoiser_share)

    def mix(self, kernel: Tensor, share: float) -> Tensor:
        """The kernel, or where there is a kernel prior, its answer to the given share."""
        if self.kernel_prior is None or share == 0:
            return kernel
        return torch.lerp(kernel, self.kernel_prior(kernel), share)


def above(kernel: Tensor, floor: float) -> Tensor:
    """``kernel [1,1,k,k]`` without what is below a share of its peak, summing to one."""
    lowest = floor * kernel.amax((-2, -1), keepdim=True)
    kernel = torch.where(kernel >= lowest, kernel, torch.zeros_like(kernel))
    return kernel / kernel.sum()


def _tidy(kernel: Tensor) -> Tensor:
    """Drop what is below the threshold, centre to the nearest pixel, sum to one."""
    return ext.recenter_kernel(above(kernel, THRESHOLD), subpixel=False)


def align(kernel: Tensor, reference: Tensor) -> Tensor:
    """``kernel [1,1,k,k]`` moved by whole pixels to where it agrees best with ``reference``.

    Image and kernel may drift in opposite directions; two kernels are averaged in one place.
    """
    side = kernel.shape[-1]
    size = (2 * side, 2 * side)  # lags of both signs without wrapping round
    spectrum = torch.fft.rfft2(reference, s=size) * torch.fft.rfft2(kernel, s=size).conj()
    best = torch.fft.irfft2(spectrum, s=size).flatten().argmax()
    grid = kernel.new_zeros(1, 1, 3 * side, 3 * side)
    grid[..., side : 2 * side, side : 2 * side] = kernel
    place = torch.arange(side, 2 * side, device=kernel.device)
    for dim, lag in ((-2, best // (2 * side)), (-1, best % (2 * side))):
        # By index and not by roll(), which wants to know how far.
        grid = grid.index_select(dim, place - ((lag + side) % (2 * side) - side))
    return grid / grid.sum()


def _mirror(side: int, before: int, after: int) -> Tensor:
    """Indices of a whole-sample symmetric extension of any length."""
    if side == 1:
        return torch.zeros(before + side + after, dtype=torch.long)
    period = 2 * (side - 1)
    index = torch.arange(-before, side + after) % period
    return torch.where(index < side, index, period - index)
