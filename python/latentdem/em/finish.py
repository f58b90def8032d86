"""The last step of ``prox``: what the diffusion model says, and what another prior says."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem.em.settings import ProxSettings
from latentdem.operators.edges import smooth_total_variation
from latentdem.operators.forward_model import ForwardModel
from latentdem.operators.hyper_laplacian import weight_at


def finish(
    model: ForwardModel, image: Tensor, parameters: Tensor, settings: ProxSettings
) -> Tensor:
    """The result on the canvas, ``[1,3,H_c,W_c]``.

    Total variation takes what the inverse of the blur amplified; the mean with a deconvolution
    under sparse gradients follows, where the model has one.

    Args:
        model: the observation.
        image: the chains' mean x*, ``[1,3,H_c,W_c]``.
        parameters: phi.
        settings: shares and weights.
    """
    if settings.total_variation > 0:
        image = smooth_total_variation(image, settings.total_variation)
    if settings.sparse_share > 0:
        weight = weight_at(settings.sparse_weight, model.noise_std)
        sparse = model.sparse_estimate(parameters, weight)
        if sparse is not None:
            image = torch.lerp(image, sparse, settings.sparse_share)
    return image
