"""Blind super-resolution: ``y = S (k * x) + n``; S keeps every f-th pixel, k is unknown."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.operators.blur import BlurModel, EdgeStepSettings, clipped
from latentdem.operators.forward_model import ForwardModel

SCALES = (1, 2, 3, 4)


def upsample(image: Tensor, scale: int) -> Tensor:
    """``[B,C,f h,f w]`` of ``image [B,C,h,w]``, bicubic, the pictures' corners on one another."""
    if scale == 1:
        return image
    return F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)


class SuperResolutionModel(BlurModel):
    """Blur and downsampling of one photograph; phi is the kernel ``[1,1,k,k]`` in fine pixels.

    The coarse pixel i lies in the middle of the fine pixels f i ... f i + f - 1 (half a pixel off
    it where f is even).

    Args:
        observation: y, ``[1,C,h,w]`` in [0, 1].
        scale: f, at least 2.
        kernel_size: side of the kernel in fine pixels.
        noise_std: sigma, in the image's units.
        boundary: ``valid`` or ``circular``.
        kernel_prior: plug-and-play denoiser of the M-step, or none.

    >>> import torch
    >>> coarse = torch.rand(1, 3, 16, 16)
    >>> model = SuperResolutionModel(coarse, scale=2, kernel_size=9, noise_std=0.01)
    >>> model.crop(model.padded).shape
    torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self, observation: Tensor, *, scale: int, kernel_size: int, noise_std: float,
        boundary: str = "valid", kernel_prior: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            upsample(observation, scale),
            kernel_size=kernel_size,
            noise_std=noise_std,
            boundary=boundary,
            kernel_prior=kernel_prior,
            multiple=scale,
        )
        self.scale = scale
        self._offset = (scale - 1) // 2
        self.observation = observation
        sides = [side // scale for side in self.canvas]
        self.mask = observation.new_zeros(1, 1, *sides)
        self.target = observation.new_zeros(1, observation.shape[1], *sides)
        top, left = self.top // scale, self.left // scale
        height, width = observation.shape[-2:]
        area = (..., slice(top, top + height), slice(left, left + width))
        self.mask[area] = 1 - clipped(observation)
        self.target[area] = observation
        self._known = bool(self.mask.min() > 0)
        self._point = torch.zeros_like(self.mask)
        self._point[..., 0, 0] = 1

    # That of the fine picture's blur does not fit.
    residual_variance = ForwardModel.residual_variance

    def start_parameters(self) -> Tensor:
        """That of the enlarged picture, whose blur is the wanted one and the enlargement's."""
        fine = BlurModel(
            upsample(self.observation, self.scale),
            kernel_size=self.kernel_size,
            noise_std=self.noise_std,
            boundary=self.boundary,
            kernel_prior=self.kernel_prior,
        )
        return fine.start_parameters()

    def power(self, parameters: Tensor) -> Tensor:
        """``|K|^2 / f^2``: one in f^2 pixels is kept."""
        return super().power(parameters) / self.scale**2

    def simulate(self, image: Tensor, parameters: Tensor) -> Tensor:
        """``S (k * x)``: ``[N,C,H_c/f,W_c/f]`` of ``image [N,C,H_c,W_c]``."""
        shifted = image.roll((-self._offset, -self._offset), (-2, -1))
        return ext.blur_downsample2d(shifted, parameters, self.scale, boundary="circular")

    def adjoint(self, residual: Tensor, parameters: Tensor) -> Tensor:
        """``[N,C,H_c,W_c]`` of ``residual [N,C,H_c/f,W_c/f]``."""
        pulled = ext.blur_downsample2d_adjoint(
            residual, parameters, self.scale, boundary="circular", image_size=self.canvas
        )
        return pulled.roll((self._offset, self._offset), (-2, -1))

    def proximal(
        self, estimate: Tensor, parameters: Tensor, *, ratio: float | Tensor, imputations: int = 3
    ) -> Tensor:
        """``x = x_hat + A' (A A' + ratio)^-1 (y - A x_hat)`` with A = S K.

        ``A A'`` is a convolution of coarse images, so its inverse is a division of spectra (Zhao
        et al., "Fast single image super-resolution using a new analytical solution for l2-l2
        problems", IEEE TIP 2016).  Unobserved coarse pixels are imputed by the model itself.
        """
        size = (self.mask.shape[-2], self.mask.shape[-1])
        response = self.simulate(self.adjoint(self._point, parameters), parameters)
        # Symmetric, up to rounding: its spectrum is real.
        power = torch.fft.rfft2(response).real.clamp_min(0) + ratio
        predicted = self.simulate(estimate, parameters)
        x, simulated = estimate, predicted
        for done in range(1 if self._known else imputations):
            if done:
                simulated = self.simulate(x, parameters)
            wanted = torch.lerp(simulated, self.target.expand_as(simulated), self.mask)
            spectrum = torch.fft.rfft2(wanted - predicted) / power
            x = estimate + self.adjoint(torch.fft.irfft2(spectrum, s=size), parameters)
        return x

    def update(self, image: Tensor, parameters: Tensor, settings: EdgeStepSettings) -> Tensor:
        """M-step on salient edges, against the fine blurred image as far as it is known.

        That is ``k * x`` with the coarse residual, upsampled, added: the missing samples are
        imputed by the model, the observed ones (nearly) kept.
        """
        blurred = ext.blur_conv2d(image, parameters, boundary="circular")
        misfit = self.mask * (self.target - self.simulate(image, parameters))
        blurred = self.crop(blurred + upsample(misfit, self.scale))
        settings = self.after_search(settings)
        edges = self.edges(image, settings)
        fit = self.fit_edges(
            edges,
            parameters,
            weight=settings.kernel_weight,
            grey=blurred.mean(1, keepdim=True).contiguous(),
        )
        return self.settle(fit, settings)
