"""Blurs of known shape and unknown size: a lens out of focus, a Gaussian.

One number is sought instead of a kernel of hundreds, so that the M-step is a search along a line,
and little information suffices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import latentdem_ext as ext
from latentdem.metrics import maximum_normalized_correlation
from latentdem.operators.blur import BlurModel, EdgeStepSettings

FAMILIES = ("defocus", "gaussian")

CANDIDATES = 96
"""Sizes that the M-step compares, evenly spaced."""


def family_kernels(family: str, kernel_size: int, sizes: Tensor) -> Tensor:
    """Kernels ``[N,1,k,k]`` of the ``family`` for ``sizes [N]`` in pixels.

    A size is the radius of a disc (``defocus``) or a standard deviation (``gaussian``).
    """
    if family == "defocus":
        return ext.defocus_kernel(kernel_size, sizes)
    if family == "gaussian":
        return ext.gaussian_kernel(kernel_size, sizes)
    raise ValueError(f"family must be one of {', '.join(FAMILIES)}, found '{family}'")


def candidate_sizes(family: str, kernel_size: int) -> Tensor:
    """``[CANDIDATES]``: from a delta to what the support holds."""
    largest = kernel_size / 2 if family == "defocus" else kernel_size / 5
    return torch.linspace(0.3, max(largest - 0.01, 0.4), CANDIDATES)


class FamilyBlurModel(BlurModel):
    """Uniform blur by a kernel of one family; phi is the kernel ``[1,1,k,k]``.

    Args:
        observation: as for :class:`BlurModel`, like all other arguments.
        family: ``defocus`` or ``gaussian``.

    >>> import torch
    >>> observation = torch.rand(1, 3, 32, 32)
    >>> model = FamilyBlurModel(observation, kernel_size=9, noise_std=0.01, family="defocus")
    >>> model.kernels.shape
    torch.Size([96, 1, 9, 9])
    """

    def __init__(
        self, observation: Tensor, *, kernel_size: int, noise_std: float, family: str,
        boundary: str = "valid",
    ) -> None:  # fmt: skip
        super().__init__(
            observation, kernel_size=kernel_size, noise_std=noise_std, boundary=boundary
        )
        self.family = family
        self.sizes = candidate_sizes(family, kernel_size).to(observation)
        self.kernels = family_kernels(family, kernel_size, self.sizes).to(observation)
        spectrum = torch.fft.rfft2(self.kernels, s=(2 * kernel_size, 2 * kernel_size))
        lags = torch.fft.irfft2(spectrum.abs().square(), s=(2 * kernel_size, 2 * kernel_size))
        lags = lags.roll((kernel_size - 1, kernel_size - 1), (-2, -1))
        self._autocorrelations = lags[..., : 2 * kernel_size - 1, : 2 * kernel_size - 1]

    def start_parameters(self) -> Tensor:
        """The member that is most like the kernel of no particular shape that the edges tell."""
        free = super().start_parameters()
        similarity = maximum_normalized_correlation(self.kernels, free)
        return self.kernels[int(similarity.argmax())][None]

    def size_of(self, kernel: Tensor) -> float:
        """Radius or standard deviation, in pixels, of the member that ``kernel [1,1,k,k]`` is."""
        return float(self._size_of(kernel))

    def _size_of(self, kernel: Tensor) -> Tensor:
        difference = (self.kernels - kernel).square().sum((1, 2, 3))
        return self.sizes.gather(0, difference.argmin()[None])[0]

    def update(self, image: Tensor, parameters: Tensor, settings: EdgeStepSettings) -> Tensor:
        """M-step: the size that explains the observation's gradients by the image's edges.

        ``max_r <b, k_r>^2 / <k_r, A k_r>`` with the normal equations A and b: least squares with
        the edges' contrast left free, since smoothing them takes some of it.

        The size goes to the processor, where kernels are drawn, and the kernel back: with this
        model alone a step waits for its GPU.
        """
        size = (self.kernel_size, self.kernel_size)
        lags, cross = ext.kernel_map_statistics(
            self.crop(self.edges(image, settings)),
            self.grey,
            size,
            domain="gradient",
            window=self.window,
            prepared=self._prepared_grey,
        )
        energy = (lags * self._autocorrelations[:, 0]).sum((-2, -1))
        match = (cross * self.kernels[:, 0]).sum((-2, -1)).clamp_min(0)
        score = match.square() / energy.clamp_min(1e-12)
        best = _peak(self.sizes, score)
        found = torch.lerp(best, self._size_of(parameters), settings.momentum).cpu()
        return family_kernels(self.family, self.kernel_size, found[None]).to(parameters)


def _peak(places: Tensor, values: Tensor) -> Tensor:
    """Where the parabola through the largest of ``values [N]`` and its neighbours peaks."""
    best = values.argmax().clamp(1, len(values) - 2)
    around = best + torch.arange(-1, 2, device=values.device)
    left, middle, right = values.double().gather(0, around).unbind()
    bend = left - 2 * middle + right
    offset = torch.where(bend < 0, (left - right) / (2 * bend), torch.zeros_like(bend)).clamp(-1, 1)
    step = offset.to(places) * (places[1] - places[0])
    return F.relu(places.gather(0, best[None])[0] + step)
