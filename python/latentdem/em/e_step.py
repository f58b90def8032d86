"""The E-step of ``prox`` as a function of tensors: several photographs in one network call.

Nothing here looks at a value, so that nothing waits for the device and all of it compiles into one
graph.  What changes from step to step (timestep, noise levels, kernels) are tensors: one graph
serves all steps, and all photographs of one size.

Letters: P photographs, N chains of each, S steps, ``H W`` the canvas, ``c h w`` a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from latentdem.em.settings import ProxSettings
from latentdem.operators.forward_model import ForwardModel
from latentdem.priors.latent import LatentPrior

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
"""Of :func:`torch.compile`; the last two replay CUDA graphs."""

GRAPHS = 64
"""Sizes of canvas and kernel that one process compiles graphs for; torch's own limit is 8."""

Phase = Callable[[str], AbstractContextManager[None]]
"""Books the time of a phase by its name."""


@dataclass(frozen=True)
class Levels:
    """The noise levels of a trajectory.

    Args:
        timesteps: t of each step, ``[S]``.
        numbers: ``[S,5]`` float32: sqrt(abar), sqrt(1 - abar), both of the next level, and r_t.
    """

    timesteps: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, prior: LatentPrior, schedule: Sequence[int], error_scale: float) -> Levels:
        """On the prior's device; the only upload, before the first step."""
        abars = [float(prior.alphas_cumprod[t]) for t in schedule]
        pairs = [(abar**0.5, (1 - abar) ** 0.5) for abar in abars]
        pairs.append((1.0, 0.0))  # after the last step: nothing reads what is made of it
        rows = [
            (*pairs[step], *pairs[step + 1], error_scale * prior.error_std(timestep))
            for step, timestep in enumerate(schedule)
        ]
        return cls(
            torch.tensor(schedule, device=prior.device), torch.tensor(rows, device=prior.device)
        )


@dataclass(frozen=True)
class EStep:
    """What a step gives.

    Args:
        images: the mean over the chains of x*, ``[1,3,H,W]`` for each photograph.
        variances: mean squared residual of each, ``[]``.
        latents: ``[P N,c,h,w]`` of the next level.
    """

    images: list[Tensor]
    variances: list[Tensor]
    latents: Tensor


def restore(
    prior: LatentPrior, z: Tensor, timestep: Tensor, level: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``z_0 [P N,c,h,w]`` and ``x_hat = D(z_0) [P N,3,H,W]`` of ``z`` at ``timestep []``."""
    z0, _ = prior.predict_at(z, timestep, level[0], level[1])
    return z0, prior.decode(z0, size)


def fit(
    model: ForwardModel,
    estimate: Tensor,
    parameters: Tensor,
    noise_variance: Tensor,
    level: Tensor,
    settings: ProxSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """x* ``[N,3,H,W]``, its mean ``[1,3,H,W]`` and that one's mean squared residual ``[]``.

    ``x* = prox of the data term at x_hat`` with ``s^2 / r_t^2``; s^2 is the noise's variance ``[]``
    and a share of the excess residual.
    """
    excess = (model.residual_variance(estimate, parameters) - noise_variance).clamp_min(0)
    s2 = noise_variance + settings.excess_weight * excess
    images = model.proximal(
        estimate, parameters, ratio=s2 / level[4].square(), imputations=settings.imputations
    )
    image = images.mean(0, keepdim=True)
    return images, image, model.residual_variance(image, parameters)


def fit_each(
    models: Sequence[ForwardModel],
    estimate: Tensor,
    parameters: Sequence[Tensor],
    noise_variances: Tensor,
    level: Tensor,
    settings: ProxSettings,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """:func:`fit` of every photograph, from all chains' ``x_hat [P N,3,H,W]``."""
    return [
        fit(model, part, phi, noise_variances[index], level, settings)
        for index, (model, part, phi) in enumerate(
            zip(models, estimate.split(settings.chains), parameters, strict=True)
        )
    ]


def advance(
    prior: LatentPrior,
    z: Tensor,
    z0: Tensor,
    images: Tensor,
    estimate: Tensor,
    fresh: Tensor,
    level: Tensor,
    share: float,
) -> Tensor:
    """z of the next level, ``[P N,c,h,w]``: ``z* = z_0 + E(x*) - E(x_hat)``, noised again.

    ``fresh``: new noise like ``z``, of which the given ``share`` is taken.
    """
    pictures = torch.cat([images, estimate])
    if pictures.device.type == "cpu" and not torch.compiler.is_compiling():
        # One by one, which bounds the memory of the full-resolution layers and is no slower.
        change = torch.cat([prior.encode(x[None]) for x in pictures])
    else:
        change = prior.encode(pictures)
    target = z0 + change[: len(z0)] - change[len(z0) :]
    predicted = (z - level[0] * target) / level[1]
    noise = (1 - share) ** 0.5 * predicted + share**0.5 * fresh
    return level[2] * target + level[3] * noise


def e_step(
    prior: LatentPrior,
    models: Sequence[ForwardModel],
    z: Tensor,
    fresh: Tensor,
    parameters: Sequence[Tensor],
    noise_variances: Tensor,
    timestep: Tensor,
    level: Tensor,
    settings: ProxSettings,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The whole E-step: what :class:`EStep` holds.  Pure, for :func:`compiled`."""
    z0, estimate = restore(prior, z, timestep, level, models[0].canvas)
    fitted = fit_each(models, estimate, parameters, noise_variances, level, settings)
    images = torch.cat([each[0] for each in fitted])
    latents = advance(prior, z, z0, images, estimate, fresh, level, settings.fresh_noise)
    return [each[1] for each in fitted], [each[2] for each in fitted], latents


@lru_cache
def compiled(mode: str) -> Callable[..., tuple[list[Tensor], list[Tensor], Tensor]]:
    """:func:`e_step` under :func:`torch.compile`, as one graph without breaks.

    One for the process, so that photographs of a size that was met before compile nothing.
    """
    return torch.compile(e_step, fullgraph=True, dynamic=False, mode=mode)


def step_compiled(mode: str, *arguments: object) -> EStep:
    """One step by :func:`compiled`; arguments as for :func:`e_step`.

    Raises:
        ValueError: the forward model or the prior does what no graph holds.
    """
    torch.compiler.cudagraph_mark_step_begin()
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            images, variances, latents = compiled(mode)(*arguments)
    except (
        torch._dynamo.exc.TorchDynamoException,
        torch._dynamo.exc.FailOnRecompileLimitHit,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"this E-step cannot be compiled: {reason}") from error
    if latents.device.type == "cuda" and mode != "default":
        # A CUDA graph's next replay writes where its last outputs are.
        images, variances = [x.clone() for x in images], [x.clone() for x in variances]
        latents = latents.clone()
    return EStep(images, variances, latents)


def step_eagerly(
    phase: Phase,
    last: bool,
    prior: LatentPrior,
    models: Sequence[ForwardModel],
    z: Tensor,
    fresh: Tensor,
    parameters: Sequence[Tensor],
    noise_variances: Tensor,
    timestep: Tensor,
    level: Tensor,
    settings: ProxSettings,
) -> EStep:
    """:func:`e_step` with its phases booked; the ``last`` one needs no encoder."""
    with phase("prior"):
        z0, estimate = restore(prior, z, timestep, level, models[0].canvas)
    with phase("e_step"):
        fitted = fit_each(models, estimate, parameters, noise_variances, level, settings)
    if not last:
        with phase("encoder"):
            images = torch.cat([each[0] for each in fitted])
            z = advance(prior, z, z0, images, estimate, fresh, level, settings.fresh_noise)
    return EStep([each[1] for each in fitted], [each[2] for each in fitted], z)
