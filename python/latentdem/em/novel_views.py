"""The fused E-step: novel views of one object from all its given views.

One latent a target pose.  At every noise level each given view i predicts the noise from its own
relative pose; the predictions are averaged with weights that sum to one.  Within the trajectory
the M-step moves the given views' poses, one pose a view for all targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentdem.em.denoising_score import (
    PROBES,
    DenoisingScore,
    predict_in_chunks,
    without_view,
)
from latentdem.em.poses import _MAX_ELEVATION, radius_limits, solve_step
from latentdem.em.reconstruct_settings import SamplerSettings
from latentdem.em.schedules import descending, takes_gradient
from latentdem.operators.pose import camera_to_world, wrap_pose
from latentdem.priors.objects import ObjectsPrior, ViewEmbedding

Callback = Callable[[int, int], None]


@dataclass
class SampledViews:
    """What :func:`sample_views` leaves.

    Args:
        latents: ``[N,c,s,s]``.
        views: ``[N,3,S,S]`` in [0, 1].
        poses: ``[K,3]`` of the given views, moved by the M-step.
        disagreement: ``[K]``: root mean square difference of a view's predicted noise from the
            fused one, averaged over the trajectory.
        history: one dictionary a step.
        evaluations: of the network.
    """

    latents: Tensor
    views: Tensor
    poses: Tensor
    disagreement: Tensor
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: int = 0


def ring_poses(poses: Tensor, count: int, spread: float, elevation: tuple[float, float]) -> Tensor:
    """``[N,3]`` target poses around the object, equally spaced in azimuth.

    Their elevation is the mean of the given ``poses [K,3]``, alternately ``spread`` degrees above
    and below, within the prior's range ``elevation``; their radius is the given views' mean.
    """
    azimuth = torch.arange(count).to(poses) * (360 / count)
    sign = 1 - 2 * (torch.arange(count).to(poses) % 2)
    heights = (poses[:, 0].mean() + spread * sign).clamp(*elevation)
    radius = poses[:, 2].mean().expand(count)
    return wrap_pose(torch.stack((heights, azimuth, radius), -1), radius=(0.0, float("inf")))


def view_angles(targets: Tensor, poses: Tensor) -> Tensor:
    """``[N,K]``: degrees between the directions of ``targets [N,3]`` and ``poses [K,3]``."""
    a, b = (camera_to_world(p)[:, :3, 2] for p in (targets, poses))
    return torch.rad2deg(torch.acos((a @ b.T).clamp(-1, 1)))


def fusion_weights(
    noise_variance: float, pose_variance: Tensor, own_variance: Tensor | None = None
) -> Tensor:
    """Weights of the given views' predictions, ``[N,K]`` or ``[K]``, summing to one.

    The inverse-variance weights ``w_i = (1 / v_i) / sum_j (1 / v_j)`` of predictions with
    variances ``v_i = beta + nu_i^2 + own_i``.  With nu_1 = 0, one nu for all others and no own
    variance they are the published ``(beta + nu^2) / (n beta + nu^2)`` for the first view and
    ``beta / (n beta + nu^2)`` for the others.

    Args:
        noise_variance: beta, of the noise level.
        pose_variance: nu^2 ``[K]``, from the uncertainty of each view's pose; zero for the first.
        own_variance: ``[N,K]``, of view i's prediction of target n, from their distance.

    >>> fusion_weights(0.5, torch.tensor([0.0, 0.5])).tolist()
    [0.6666666865348816, 0.3333333432674408]
    """
    variance = noise_variance + pose_variance
    if own_variance is not None:
        variance = variance + own_variance
    # Over the smallest one, so that nothing overflows as beta goes to zero.
    smallest = variance.amin(-1, keepdim=True).clamp_min(1e-12)
    inverse = smallest / variance.clamp_min(1e-12)
    return inverse / inverse.sum(-1, keepdim=True)


def _variances(
    settings: SamplerSettings, targets: Tensor, poses: Tensor, uncertainty: Tensor
) -> tuple[Tensor, Tensor]:
    """``nu^2 [K]`` of fully noisy latents, and the own variance ``[N,K]``."""
    pose = (settings.pose_std * uncertainty / 30).square()
    pose = pose - pose.amin()  # the gauge view leads, or the surest one
    own = (settings.angle_std * view_angles(targets, poses) / 90).square()
    return pose, own


def _own_noise(latents_shape: torch.Size, count: int, seed: int) -> Tensor:
    """``[N,c,s,s]``: target n's noise does not depend on how many others there are."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + n) for n in range(count)]
    return torch.stack([torch.randn(latents_shape, generator=g) for g in generators])


@torch.no_grad()
def sample_views(
    prior: ObjectsPrior,
    given: ViewEmbedding,
    poses: Tensor,
    targets: Tensor,
    *,
    settings: SamplerSettings | None = None,
    uncertainty: Tensor | None = None,
    score: DenoisingScore | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    callback: Callback | None = None,
) -> SampledViews:
    """Sample N target views given K views, DDIM (eta = 0), and move the K poses.

    Args:
        prior: the diffusion model.
        given: the K views; one is allowed (Zero123's way).
        poses: ``[K,3]``.
        targets: ``[N,3]``.
        settings: steps, weights, M-step.
        uncertainty: ``[K]`` degrees of azimuth, for nu; zero by default.
        score: the direct term of the M-step; without it the poses stay as they are.
        start: latents ``[N,c,s,s]`` to start from at the noise level ``settings.restart``;
            pure noise by default.
        seed: of the noise; target n's noise depends on n and the seed alone.
        callback: ``callback(done, steps)``.

    >>> found = sample_views(prior, prior.embed(view), pose, targets)  # doctest: +SKIP
    """
    settings = settings or SamplerSettings()
    count, views = len(targets), len(given)
    poses = poses.clone()
    uncertainty = poses.new_zeros(views) if uncertainty is None else uncertainty
    alphas = prior.alphas_cumprod.to(poses)
    z = _own_noise(given.latents.shape[1:], count, seed).to(given.latents)
    first, steps = prior.timesteps - 1, settings.steps
    if start is not None:
        first = round(settings.restart * first)
        steps = max(1, round(settings.restart * steps))
        z = alphas[first].sqrt() * start + (1 - alphas[first]).sqrt() * z
    schedule = descending(first, steps)
    result = SampledViews(z, z, poses, poses.new_zeros(views))
    index = torch.arange(views, device=poses.device).repeat(count)
    goals = targets.repeat_interleave(views, 0)
    for step, timestep in enumerate(schedule):
        abar = alphas[timestep]
        timesteps = torch.full((count * views,), timestep, device=poses.device)
        noisy = z.repeat_interleave(views, 0)

        def predict(moved: Tensor, noisy: Tensor = noisy, t: Tensor = timesteps) -> Tensor:
            epsilon = predict_in_chunks(prior, noisy, t, given[index], moved[index], goals)
            return epsilon.unflatten(0, (count, views))

        epsilon = predict(poses)  # [N,K,c,s,s]
        nu, own = _variances(settings, targets, poses, uncertainty)
        level = float(1 - abar)
        weights = fusion_weights(level, level * nu, level * own)  # [N,K]
        fused = (weights[..., None, None, None] * epsilon).sum(1)
        spread = (epsilon - fused[:, None]).square().mean((0, 2, 3, 4)).sqrt()
        result.disagreement += spread / len(schedule)
        result.evaluations += count * views
        turned = 0.0
        active = takes_gradient(step, len(schedule), every=settings.every, last=settings.last)
        if score is not None and views > 1 and active:
            moved = _m_step(score, settings, predict, poses, epsilon, fused)
            result.evaluations += 3 * count * views
            turned = float((moved - poses)[:, 1].abs().max())
            poses = moved
        if settings.guidance != 1:
            nothing = without_view(given)[index[:1].expand(count)]
            still = poses[:1].expand(count, 3)
            free = predict_in_chunks(prior, z, timesteps[:count], nothing, still, still)
            result.evaluations += count
            fused = free + settings.guidance * (fused - free)
        z0 = (z - (1 - abar).sqrt() * fused) / abar.sqrt()
        if step + 1 < len(schedule):
            after = alphas[schedule[step + 1]]
            z = after.sqrt() * z0 + (1 - after).sqrt() * fused
        else:
            z = z0
        result.history.append(
            {
                "timestep": timestep,
                "first_weight": float(weights[:, 0].mean()),
                "disagreement": float(spread.max()),
                "turned": turned,
            }
        )
        if callback is not None:
            callback(step + 1, len(schedule))
    result.latents, result.poses = z, poses
    result.views = torch.cat([prior.decode(part) for part in z.split(8)]).clamp(0, 1)
    return result


def _m_step(
    score: DenoisingScore,
    settings: SamplerSettings,
    predict: Callable[[Tensor], Tensor],
    poses: Tensor,
    epsilon: Tensor,
    fused: Tensor,
) -> Tensor:
    """One damped Gauss-Newton step on all poses.

    The loss, in noise units (``|epsilon_i - epsilon_fused|^2`` is SNR times the denoised
    latents' ``|z^(i) - z_fused|^2``, which makes lambda and delta independent of the level)::

        lambda |eps_i - eps_fused|^2 + delta |eps_i - eps_1|^2 + direct loss of the given views
    """
    _, (system,) = score.linearize(poses[None])
    count, views = epsilon.shape[:2]
    slopes = []
    for k, width in enumerate(PROBES):
        probe = torch.zeros_like(poses)
        probe[:, k] = width
        slopes.append((predict(poses + probe) - epsilon) / width)
    jacobian = torch.stack(slopes)  # [3,N,K,c,s,s]
    scale = 1 / (count * score.settings.temperature)
    for weight, residual in (
        (settings.agreement, epsilon - fused[:, None]),
        (settings.anchor, epsilon - epsilon[:, :1]),
    ):
        for i in range(views):
            part = jacobian[:, :, i].flatten(1)
            factor = (scale * weight) ** 0.5
            system.add_view(i, factor * part, factor * residual[:, i].flatten())
    moved = poses + solve_step(system, 0.3)
    limits = radius_limits(score.prior.camera.radius)
    return wrap_pose(moved, elevation=_MAX_ELEVATION, radius=limits)
