"""``invert``: the same EM with a forward model of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdem.em.settings import ProxSettings
from latentdem.em.steps import EMState, StepCallback, run_prox
from latentdem.operators.forward_model import ForwardModel
from latentdem.priors.latent import LatentPrior, load_prior


def invert(
    model: ForwardModel,
    *,
    prior: LatentPrior | None = None,
    parameters: Tensor | None = None,
    settings: ProxSettings | None = None,
    seed: int = 0,
    progress: StepCallback | None = None,
) -> EMState:
    """Recover the image and the parameters of a forward model from its observation.

    Args:
        model: the operator, with its observation of three channels.
        prior: latent diffusion prior, on the observation's device; by default the packaged one.
        parameters: phi, if it is known; only the image is sought then.
        settings: of the method ``prox``.
        seed: of all random numbers; the same seed gives the same result.
        progress: called with a :class:`StepReport` at every step.

    Returns:
        ``image [1,3,H,W]`` (what the model crops; not clamped), ``kernel`` (phi), ``history``,
        counts and seconds.

    Raises:
        ValueError: the canvas has not three channels.

    >>> state = invert(model)  # doctest: +SKIP
    >>> state.image, state.kernel  # doctest: +SKIP
    """
    if model.padded.dim() != 4 or model.padded.shape[:2] != (1, 3):
        raise ValueError(
            f"the model's canvas must be [1,3,H,W] (repeat a grey image), found shape "
            f"{list(model.padded.shape)}"
        )
    state = run_prox(
        prior or load_prior(),
        model,
        settings or ProxSettings(),
        torch.Generator().manual_seed(seed),
        kernel=parameters,
        callback=progress,
    )
    state.image = model.crop(state.image)
    return state
