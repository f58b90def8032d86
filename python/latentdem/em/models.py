"""The forward models that ``deblur`` knows, by their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdem.io import InputError
from latentdem.operators.blur import BlurModel
from latentdem.operators.blur_families import FAMILIES, FamilyBlurModel
from latentdem.operators.forward_model import ForwardModel
from latentdem.operators.linear_light import LinearLightModel, to_light
from latentdem.operators.super_resolution import SCALES, SuperResolutionModel
from latentdem.operators.varying import VaryingBlurModel
from latentdem.priors.kernel import KernelDenoiserNet

BLURS = ("motion", *FAMILIES)


@dataclass(frozen=True)
class ModelOptions:
    """Which forward model, of those that ``deblur`` describes.

    Raises:
        InputError: an unknown blur, scale or grid, or a combination that there is no model for.
    """

    blur: str = "motion"
    scale: int = 1
    grid: tuple[int, int] = (1, 1)
    linear_light: bool = False

    def __post_init__(self) -> None:
        if self.blur not in BLURS:
            raise InputError(f"blur must be one of {', '.join(BLURS)}, found '{self.blur}'")
        if self.scale not in SCALES:
            raise InputError(
                f"scale must be one of {', '.join(map(str, SCALES))}, found {self.scale}"
            )
        if min(self.grid) < 1:
            raise InputError(f"grid must be positive, found {self.grid[0]} x {self.grid[1]}")
        chosen = [self.blur != "motion", self.scale > 1, self.varies]
        if sum(chosen) > 1:
            raise InputError(
                "blur, scale and grid cannot be combined: one of a blur's family, "
                "super-resolution, or a blur that varies over the photograph"
            )

    @property
    def varies(self) -> bool:
        """Whether the blur differs over the photograph."""
        return self.grid != (1, 1)

    @property
    def patches(self) -> int:
        """Number P of kernels."""
        return self.grid[0] * self.grid[1]

    @property
    def plain(self) -> bool:
        """Whether it is one kernel of any shape."""
        return self == ModelOptions()

    @property
    def searches_size(self) -> bool:
        """Whether a kernel's size is found by itself: of motion, at the photograph's scale."""
        return self.blur == "motion" and self.scale == 1

    def largest_kernel_size(self, height: int, width: int) -> int:
        """Odd size that the search does not exceed: 65, a third of a side, or a patch."""
        patch = min(height // self.grid[0], width // self.grid[1])
        side = min(65, min(height, width) // 3, patch)
        return max(1, side - (1 - side % 2))

    def check_method(self, method: str) -> None:
        """Refuse ``paper`` for any but the plain model.

        Raises:
            InputError: it is another.
        """
        if method == "paper" and self.linear_light:
            raise InputError("method 'paper' knows no linear light: use method 'prox'")
        if method == "paper" and not self.plain:
            raise InputError("method 'paper' knows one kernel of any shape only: use method 'prox'")

    def default_kernel_size(self, height: int, width: int) -> int:
        """An odd tenth of the shorter side, from 9 to 35 pixels: room for a visible blur.

        For super-resolution five coarse pixels to each side.
        """
        side = min(height // self.grid[0], width // self.grid[1]) * self.scale
        size = min(max(side // 10, 9), 35) if self.scale == 1 else 10 * self.scale
        return min(size // 2 * 2 + 1, side - (1 - side % 2))

    def light(self, image: Tensor) -> Tensor:
        """The values of ``image`` that blur adds up: display values, or with ``linear_light``."""
        return to_light(image) if self.linear_light else image

    def build(
        self,
        observation: Tensor,
        *,
        kernel_size: int,
        noise_std: float,
        boundary: str,
        kernel_prior: KernelDenoiserNet | None,
    ) -> ForwardModel:
        """The model of ``observation [1,3,H,W]``."""
        values = self.light(observation)
        common: dict[str, Any] = {
            "kernel_size": kernel_size,
            "noise_std": noise_std,
            "boundary": boundary,
        }
        model: BlurModel
        if self.blur != "motion":
            model = FamilyBlurModel(values, family=self.blur, **common)
        elif self.scale > 1:
            model = SuperResolutionModel(
                values, scale=self.scale, kernel_prior=kernel_prior, **common
            )
        elif self.varies:
            model = VaryingBlurModel(values, grid=self.grid, kernel_prior=kernel_prior, **common)
        else:
            model = BlurModel(values, kernel_prior=kernel_prior, **common)
        if self.linear_light:
            return LinearLightModel(model, observation, noise_std=noise_std)
        return model

    def check_kernel(self, kernel: Any) -> Tensor:
        """A known kernel ``[1,P,k,k]`` (P = 1 without a grid), each plane summing to one.

        Raises:
            InputError: another shape, or values that no blur has.
        """
        kernel = torch.as_tensor(kernel, dtype=torch.float32)
        patches = self.patches
        side = kernel.shape[-1] if kernel.dim() > 1 else 0
        if kernel.dim() < 2 or kernel.shape[-2] != side:
            raise InputError(f"kernel must be square, found {tuple(kernel.shape[-2:])}")
        if kernel.numel() != patches * side**2:
            raise InputError(
                f"kernel must have shape {[1, patches, side, side]}, found {list(kernel.shape)}"
            )
        kernel = kernel.reshape(1, patches, side, side)
        sums = kernel.sum((-2, -1), keepdim=True)
        if not torch.isfinite(kernel).all() or float(kernel.min()) < 0 or float(sums.min()) <= 0:
            raise InputError("kernel must be finite, non-negative and not all zero")
        return kernel / sums
