"""Blur in linear light: a shutter adds light, and files hold it through the sRGB curve.

``y = e(A_phi d(x)) + n``, d the decoding of display values into light and e its inverse; A is any
of the other models.  Prior, noise and result are in display values, A's share is in light.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentdem.operators.blur import BlurModel
from latentdem.operators.forward_model import ForwardModel

TOE = 0.04045
"""Display values below this one are proportional to the light, by ``TOE_SLOPE`` (IEC 61966-2-1)."""
TOE_SLOPE = 1 / 12.92


def to_light(image: Tensor) -> Tensor:
    """Light of display values, both one at white; the toe goes on below zero.

    >>> import torch
    >>> to_light(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.2140, 1.0000])
    """
    above = ((image.clamp_min(TOE) + 0.055) / 1.055).pow(2.4)
    return torch.where(image > TOE, above, image * TOE_SLOPE)


def to_display(light: Tensor) -> Tensor:
    """The inverse of :func:`to_light`, for every value: what is below zero is neither lost nor
    amplified more than black is."""
    above = 1.055 * light.clamp_min(TOE * TOE_SLOPE).pow(1 / 2.4) - 0.055
    return torch.where(light > TOE * TOE_SLOPE, above, light / TOE_SLOPE)


def slope(image: Tensor) -> Tensor:
    """Derivative of :func:`to_light`, between that of black and that of white."""
    image = image.clamp(0, 1)
    above = 2.4 / 1.055 * ((image.clamp_min(TOE) + 0.055) / 1.055).pow(1.4)
    return torch.where(image > TOE, above, torch.full_like(image, TOE_SLOPE))


class LinearLightModel(ForwardModel):
    """Another forward model, seen through the display curve.

    Noise and the prior's errors are even in display values, so that in light both go with the
    curve's slope, which is 29 times as steep at white as at black: without these weights the
    shadows drown in the lights' noise.

    Args:
        model: of the observation's light, ``to_light(y)``.
        observation: y, ``[1,C,H,W]`` in display values.
        noise_std: sigma, in display values.

    >>> import torch
    >>> y = torch.rand(1, 3, 32, 32)
    >>> inner = BlurModel(to_light(y), kernel_size=5, noise_std=0.01)
    >>> model = LinearLightModel(inner, y, noise_std=0.01)
    >>> bool(torch.allclose(model.crop(model.padded), y, atol=1e-5))
    True
    """

    def __init__(self, model: BlurModel, observation: Tensor, *, noise_std: float) -> None:
        super().__init__(observation, noise_std=noise_std)
        self.model = model
        self.kernel_size = model.kernel_size
        self.canvas, self.mask = model.canvas, model.mask
        self.padded, self.target = to_display(model.padded), to_display(model.target)
        self.weight = 1 / slope(self.target)
        self.contrast = float(slope(observation).square().mean())
        """Squared contrast of light where that of display values is one, on average."""

    def crop(self, image: Tensor) -> Tensor:
        """The part of a canvas image that the user wants."""
        return self.model.crop(image)

    def simulate(self, image: Tensor, parameters: Tensor) -> Tensor:
        """``e(A_phi d(x))``: ``[N,C,h,w]`` of ``image [N,C,H_c,W_c]``; not linear in it."""
        return to_display(self.model.simulate(to_light(image), parameters))

    def adjoint(self, residual: Tensor, parameters: Tensor) -> Tensor:
        """That of ``A_phi``: residual and result are light."""
        return self.model.adjoint(residual, parameters)

    def proximal(
        self, estimate: Tensor, parameters: Tensor, *, ratio: float | Tensor, imputations: int = 3
    ) -> Tensor:
        """``e(u_hat + D v)``, ``u_hat = d(x_hat)``, D and W the slopes of d at x_hat and at y:

        ``argmin_v ||mask W^-1 (A_phi (u_hat + D v) - d(y))||^2 / (2 s^2) + ||v||^2 / (2 r^2)``,
        the first step of Gauss and Newton, by conjugate gradients.
        """
        light = to_light(estimate)
        rest = self.model.target - self.model.simulate(light, parameters)
        tangent = _Tangent(self.model, rest, before=slope(estimate), after=self.weight)
        zero = torch.zeros_like(estimate)
        step = tangent.proximal(zero, parameters, ratio=ratio, imputations=imputations)
        return to_display(light + tangent.before * step)

    @property
    def searches(self) -> bool:
        """As the model in light."""
        return self.model.searches

    def start_parameters(self) -> Tensor:
        """That of the model in light."""
        return self.model.start_parameters()

    def update(self, image: Tensor, parameters: Tensor, settings: Any) -> Tensor:
        """M-step in light, its weights in units of light's contrast."""
        own = replace(
            settings,
            edge_weight=settings.edge_weight * self.contrast,
            kernel_weight=settings.kernel_weight * self.contrast,
        )
        return self.model.update(to_light(image), parameters, own)


class _Tangent(ForwardModel):
    """``after A_phi before``: a model between two diagonal matrices, for its proximal step.

    Args:
        model: A_phi.
        rest: what it should give, ``[N,C,h,w]``, a row for each chain.
        before: ``[N,C,H_c,W_c]``.
        after: ``[1,C,h,w]``.
    """

    def __init__(self, model: BlurModel, rest: Tensor, *, before: Tensor, after: Tensor) -> None:
        self.model, self.before, self.after = model, before, after
        self.canvas, self.mask, self.target = model.canvas, model.mask, after * rest

    def simulate(self, image: Tensor, parameters: Tensor) -> Tensor:
        return self.after * self.model.simulate(self.before * image, parameters)

    def adjoint(self, residual: Tensor, parameters: Tensor) -> Tensor:
        return self.before * self.model.adjoint(self.after * residual, parameters)

    def start_parameters(self) -> Tensor:
        raise NotImplementedError

    def update(self, image: Tensor, parameters: Tensor, settings: Any) -> Tensor:
        raise NotImplementedError
