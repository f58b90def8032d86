"""The last step of ``prox``: one image from the chains, another prior and the observation."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem.em.settings import ProxSettings
from latentdem.operators.edges import smooth_total_variation
from latentdem.operators.forward_model import ForwardModel
from latentdem.priors.finishing import Candidates, FinishingNet

LEAST_NOISE = 0.005
"""Of the sparse deconvolution: below it the kernel's error is the larger one."""
DETAIL_ERROR = 0.05
"""r of the proximal step that keeps all that the data say."""


def finish(
    model: ForwardModel,
    images: Tensor,
    parameters: Tensor,
    settings: ProxSettings,
    network: FinishingNet | None = None,
) -> Tensor:
    """The result on the canvas, ``[1,3,H_c,W_c]``.

    Total variation takes what the inverse of the blur amplified; the mean with a deconvolution
    under sparse gradients follows, where the model has one, and the network's correction of that.

    Args:
        model: the observation.
        images: x* of the chains, ``[N,3,H_c,W_c]``.
        parameters: phi.
        settings: shares and weights.
        network: of the correction, or none.
    """
    estimate = images.mean(0, keepdim=True)
    base = estimate
    if settings.total_variation > 0:
        base = smooth_total_variation(estimate, settings.total_variation)
    if settings.sparse_share == 0:
        return base
    noise = max(model.noise_std, LEAST_NOISE)
    sparse = model.sparse_estimate(parameters, settings.sparse_weight * (noise / 0.01) ** 2)
    if sparse is None:
        return base
    base = torch.lerp(base, sparse, settings.sparse_share)
    if network is None:
        return base
    detail = model.proximal(base, parameters, ratio=(noise / DETAIL_ERROR) ** 2)
    deviation = images.std(0, correction=0, keepdim=True).mean(1, keepdim=True)
    candidates = Candidates(
        base, estimate, sparse, detail, model.padded, deviation, model.noise_std
    )
    return network(candidates.stack())
