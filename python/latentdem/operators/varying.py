"""Blur that varies over the photograph: a grid of kernels, cross-faded between their patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.operators.blur import BlurModel, EdgeStepSettings
from latentdem.operators.forward_model import ForwardModel


class VaryingBlurModel(BlurModel):
    """``y = sum_p k_p * (w_p x) + n`` on R x C patches; phi is ``[1,P,k,k]``, row by row.

    Args:
        observation: y, ``[1,C,H,W]`` in [0, 1].
        grid: ``(R, C)``, P = R C.
        kernel_size: side k of the kernels in pixels.
        noise_std: sigma, in the image's units.
        boundary: ``valid`` or ``circular``.
        kernel_prior: plug-and-play denoiser of the M-step, or none.

    Raises:
        ValueError: patches smaller than the kernel.
    """

    def __init__(
        self, observation: Tensor, *, grid: tuple[int, int], kernel_size: int, noise_std: float,
        boundary: str = "valid", kernel_prior: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            observation,
            kernel_size=kernel_size,
            noise_std=noise_std,
            boundary=boundary,
            kernel_prior=kernel_prior,
        )
        height, width = observation.shape[-2:]
        rows, columns = grid
        patch = min(height // rows, width // columns)
        if patch < kernel_size:
            raise ValueError(
                f"grid {rows} x {columns} makes patches of {patch} pixels, fewer than the kernel's "
                f"{kernel_size}: take a coarser grid"
            )
        self.grid = grid
        inside = ext.blend_windows(height, width, rows, columns, patch // 2)
        # On the margin a patch goes on as it ends.
        bottom, right = (c - s for c, s in zip(self.canvas, (height + self.top, width + self.left)))
        index = [
            torch.arange(-before, side + after).clamp(0, side - 1)
            for before, side, after in ((self.top, height, bottom), (self.left, width, right))
        ]
        self.weights = inside[:, index[0]][:, :, index[1]].to(observation)
        windows = [self.crop(weight) for weight in self.weights]
        if self.window is not None:
            windows = [window * self.window[0, 0] for window in windows]
        squares = torch.stack([window.square().sum() for window in windows])
        self._shares = (squares / self.grey.numel()).tolist()

    # That of a uniform blur does not fit.
    residual_variance = ForwardModel.residual_variance

    def simulate(self, image: Tensor, parameters: Tensor) -> Tensor:
        """``sum_p k_p * (w_p x)`` on the canvas."""
        return ext.varying_blur2d(image, parameters[0], self.weights, boundary="circular")

    def adjoint(self, residual: Tensor, parameters: Tensor) -> Tensor:
        """``sum_p w_p (k_p correlated with r)``."""
        return ext.varying_blur2d_adjoint(
            residual, parameters[0], self.weights, boundary="circular"
        )

    def area(self, patch: int, least: float) -> tuple[slice, ...]:
        """Index of the rectangle of the observation in which a patch weighs more than ``least``."""
        inside = self.crop(self.weights[patch]) > least
        rows, columns = (inside.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
        return (
            slice(None),
            slice(None),
            slice(rows[0], rows[-1] + 1),
            slice(columns[0], columns[-1] + 1),
        )

    def start_parameters(self) -> Tensor:
        """Of each patch the best of several if there is a search, else one kernel for all."""
        # It runs models of this class.
        from latentdem.operators.varying_search import search_kernels

        whole = super().start_parameters()
        if self.searches:
            return search_kernels(self, whole)
        return whole.expand(-1, len(self.weights), -1, -1).contiguous()

    def proximal(
        self, estimate: Tensor, parameters: Tensor, *, ratio: float | Tensor, imputations: int = 3
    ) -> Tensor:
        """Conjugate gradients, started where every patch is deblurred by its own kernel alone."""
        start = torch.zeros_like(estimate)
        for weight, kernel in zip(self.weights, parameters[0]):
            start += weight * super().proximal(
                estimate, kernel[None, None], ratio=ratio, imputations=1
            )
        return self.solve(estimate, parameters, ratio=ratio, start=start, steps=2 * imputations)

    def update(self, image: Tensor, parameters: Tensor, settings: EdgeStepSettings) -> Tensor:
        """M-step of one patch after the other, against what the others leave of the observation.

        Less is known of a patch, so its kernel's norm weighs less.
        """
        settings = self.after_search(settings)
        edges = self.edges(image, settings)
        grey = image.mean(1, keepdim=True)
        kernels = list(parameters[0, :, None, None])
        blurred = [self._patch(grey, *pair) for pair in zip(self.weights, kernels, strict=True)]
        for patch, (weight, share) in enumerate(zip(self.weights, self._shares, strict=True)):
            others = torch.stack(blurred).sum(0) - blurred[patch]
            fit = self.fit_edges(
                weight * edges,
                kernels[patch],
                weight=share * settings.kernel_weight,
                grey=(self.grey - self.crop(others)).contiguous(),
            )
            kernels[patch] = self.settle(fit, settings)
            blurred[patch] = self._patch(grey, weight, kernels[patch])
        return torch.cat(kernels, 1)

    def _patch(self, image: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
        """``k_p * (w_p x)`` on the canvas."""
        return ext.blur_conv2d(weight * image, kernel, boundary="circular")
