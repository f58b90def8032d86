"""What EM asks of a forward model ``y = A_phi x + n`` whose parameters phi are unknown.

A model of one's own subclasses :class:`ForwardModel` and says three things: how an image becomes
an observation (:meth:`~ForwardModel.simulate`), what phi might be before anything is known
(:meth:`~ForwardModel.start_parameters`), and which phi explains a given image best
(:meth:`~ForwardModel.update`).  Adjoint, residual and proximal step follow from the first, by
automatic differentiation and conjugate gradients; a model that knows better overrides them.
``python/examples/own_operator.py`` is one of thirty lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class ForwardModel(ABC):
    """A linear operator with unknown parameters, for :func:`latentdem.invert`.

    Letters: N chains, C channels, ``H_c W_c`` the canvas that the unknown image lives on, ``h w``
    what :meth:`simulate` gives.

    Args:
        observation: y, ``[1,C,H,W]`` in [0, 1].
        noise_std: sigma, in the image's units.

    Attributes:
        canvas: ``(H_c, W_c)``; by default the observation's size.
        padded: ``[1,C,H_c,W_c]``: where the trajectory starts; by default the observation.
        target: ``[1,C,h,w]``: what :meth:`simulate` should give; by default the observation.
        mask: ``[1,1,h,w]``: where it counts; by default everywhere.
    """

    def __init__(self, observation: Tensor, *, noise_std: float) -> None:
        self.observation, self.noise_std = observation, noise_std
        self.canvas: tuple[int, int] = (observation.shape[-2], observation.shape[-1])
        self.padded = self.target = observation
        self.mask = observation.new_ones(1, 1, *self.canvas)

    # What a model must say --------------------------------------------------------------

    @abstractmethod
    def simulate(self, image: Tensor, parameters: Tensor) -> Tensor:
        """``A_phi x``: ``[N,C,h,w]`` of ``image [N,C,H_c,W_c]``, linear in it."""

    @abstractmethod
    def start_parameters(self) -> Tensor:
        """The first phi, from the observation alone."""

    @abstractmethod
    def update(self, image: Tensor, parameters: Tensor, settings: Any) -> Tensor:
        """M-step: the phi that explains ``image [1,C,H_c,W_c]``; ``parameters`` is the one before.

        ``settings`` is ``ProxSettings.m_step``, which a model is free to ignore.
        """

    # What follows from it ---------------------------------------------------------------

    @property
    def searches(self) -> bool:
        """Whether :meth:`start_parameters` chooses the best of several."""
        return False

    def crop(self, image: Tensor) -> Tensor:
        """The part of a canvas image that the user wants; by default all of it."""
        return image

    def adjoint(self, residual: Tensor, parameters: Tensor) -> Tensor:
        """``A_phi' r``: ``[N,C,H_c,W_c]`` of ``residual [N,C,h,w]``."""
        zero = residual.new_zeros(*residual.shape[:2], *self.canvas)
        with torch.enable_grad():
            image = zero.requires_grad_()
            (pulled,) = torch.autograd.grad(self.simulate(image, parameters), image, residual)
        return pulled

    def residual_variance(self, image: Tensor, parameters: Tensor) -> Tensor:
        """Mean squared residual over what was observed, of ``image [N,C,H_c,W_c]``: ``[]``."""
        misfit = self.mask * (self.simulate(image, parameters) - self.target)
        return misfit.square().sum() / (self.mask.sum() * misfit.shape[0] * misfit.shape[1])

    def proximal(
        self, estimate: Tensor, parameters: Tensor, *, ratio: float | Tensor, imputations: int = 3
    ) -> Tensor:
        """``argmin_x ||mask (A_phi x - y)||^2 / (2 s^2) + ||x - x_hat||^2 / (2 r^2)``.

        Args:
            estimate: x_hat, ``[N,C,H_c,W_c]``, N chains of one observation.
            parameters: phi.
            ratio: ``s^2 / r^2``, a number or ``[]`` on the device (which EM gives).
            imputations: effort; of models that impute what was not observed, their passes, and
                here, five conjugate gradient steps for each.
        """
        return self.solve(estimate, parameters, ratio=ratio, start=estimate, steps=5 * imputations)

    def power(self, parameters: Tensor) -> Tensor:
        """What ``A_phi' A_phi`` does to each frequency, roughly: a preconditioner.

        Broadcasts with the half spectrum ``[H_c,W_c//2+1]``; by default, knowing nothing, one.
        """
        return self.padded.new_ones(())

    def transfer(self, parameters: Tensor) -> Tensor | None:
        """Half spectrum ``[1,1,H_c,W_c//2+1]`` of an A_phi that is a circular convolution.

        None of any other.  With it :func:`latentdem.operators.hyper_laplacian.hyper_laplacian`
        takes less than half the time.
        """
        return None

    def sparse_estimate(self, parameters: Tensor, weight: float) -> Tensor | None:
        """``[1,C,H_c,W_c]`` by another prior, sparse gradients; None of models that have none.

        See :func:`latentdem.operators.hyper_laplacian.hyper_laplacian`, which takes any linear
        model.
        """
        return None

    def solve(
        self,
        estimate: Tensor,
        parameters: Tensor,
        *,
        ratio: float | Tensor,
        start: Tensor,
        steps: int,
    ) -> Tensor:
        """The proximal step by conjugate gradients from ``start``, each chain by itself."""

        def normal(x: Tensor) -> Tensor:
            return self.adjoint(self.mask * self.simulate(x, parameters), parameters) + ratio * x

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum((1, 2, 3), keepdim=True)

        wanted = self.mask * self.target.expand(len(estimate), -1, -1, -1)
        x = start
        residual = self.adjoint(wanted, parameters) + ratio * estimate - normal(x)
        direction, energy = residual, dot(residual, residual)
        for _ in range(steps):
            image = normal(direction)
            # A chain that has arrived stays where it is.
            length = energy / dot(direction, image).clamp_min(1e-30)
            x = x + length * direction
            residual = residual - length * image
            left = dot(residual, residual)
            direction = residual + left / energy.clamp_min(1e-30) * direction
            energy = left
        return x
