"""The denoising loss as a likelihood of poses, with its normal equations.

By the evidence bound of a diffusion model,
``log p(z_j | I_i, phi) >= const - 1/2 int |epsilon_theta(z_t; I_i, phi) - epsilon|^2 dlambda``
with lambda the log signal-to-noise ratio.  With the same noise for all poses its differences tell
which pose explains view j from view i.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentdem.em.reconstruct_settings import PoseSettings
from latentdem.operators.pose import relative_pose
from latentdem.priors.objects import ObjectsPrior, ViewEmbedding

# Finite differences: elevation and azimuth in degrees, radius in world units. A secant over two
# degrees is also a smoother slope than the derivative of a network at a point.
PROBES = (2.0, 2.0, 0.05)
KNOWN_STD = 0.1  # degrees: an elevation that the caller gave
_CHUNK = 32  # of the network's batch: larger ones leave the cache and are slower


@torch.no_grad()
def predict_in_chunks(
    prior: ObjectsPrior,
    noisy: Tensor,
    timesteps: Tensor,
    given: ViewEmbedding,
    source: Tensor,
    target: Tensor,
) -> Tensor:
    """``E[epsilon] [B,c,s,s]`` of views at ``target``, given B views at ``source`` ``[B,3]``.

    The given views' own elevations and radii are those of ``source``, not the embedder's.
    """
    relative = relative_pose(source, target)
    parts = []
    for part in torch.arange(len(noisy), device=noisy.device).split(_CHUNK):
        views = replace(given[part], elevation=source[part, 0], radius=source[part, 2])
        parts.append(prior.predict(noisy[part], timesteps[part], views, relative[part])[1])
    return torch.cat(parts)


def without_view(given: ViewEmbedding) -> ViewEmbedding:
    """Nothing given: what the prior saw in training when the given view was left out.

    Its predictions, at a relative pose of zero, are the unconditional ones.
    """
    return replace(
        given, latents=torch.zeros_like(given.latents), tokens=torch.zeros_like(given.tokens)
    )


@dataclass
class NormalEquations:
    """Quadratic model ``1/2 d' A d + g' d`` of a loss of K poses: ``A [3K,3K]``, ``g [3K]``."""

    matrix: Tensor
    gradient: Tensor

    @classmethod
    def zero(cls, views: int, like: Tensor) -> NormalEquations:
        """No loss."""
        return cls(like.new_zeros(3 * views, 3 * views), like.new_zeros(3 * views))

    def add_pair(self, source: int, target: int, jacobian: Tensor, residual: Tensor) -> None:
        """Add ``1/2 |residual|^2``, ``jacobian [6,D]`` in the poses of source, then target."""
        index = torch.tensor([3 * v + k for v in (source, target) for k in range(3)])
        self.matrix[index[:, None], index] += jacobian @ jacobian.T
        self.gradient[index] += jacobian @ residual

    def add_view(self, view: int, jacobian: Tensor, residual: Tensor) -> None:
        """Add ``1/2 |residual|^2`` with slopes ``jacobian [3,D]`` in the pose of ``view``."""
        part = slice(3 * view, 3 * view + 3)
        self.matrix[part, part] += jacobian @ jacobian.T
        self.gradient[part] += jacobian @ residual


class DenoisingScore:
    """Negative log-likelihood of the poses of K given views, all pairs in both directions.

    Args:
        prior: conditioned on a given view and a relative pose.
        given: the K views, embedded.
        settings: levels, draws and temperature.
        seed: of the noise, which is the same for every view, pose and call.
        elevation: of the first view in degrees, if it is known.
    """

    def __init__(
        self,
        prior: ObjectsPrior,
        given: ViewEmbedding,
        settings: PoseSettings,
        seed: int,
        *,
        elevation: float | None = None,
    ) -> None:
        self.prior, self.given, self.settings, self.seed = prior, given, settings, seed
        self.elevation_std = torch.full_like(given.elevation, settings.elevation_std)
        if elevation is not None:
            self.given = replace(given, elevation=given.elevation.clone())
            self.given.elevation[0] = elevation
            self.elevation_std[0] = KNOWN_STD
        latents = given.latents
        generator = torch.Generator().manual_seed(seed)
        count = len(settings.levels) * settings.noises
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)
        self.noise = noise.to(latents)
        levels = torch.tensor(settings.levels).sort().values
        timesteps = (levels * (prior.timesteps - 1)).round().long()
        self.timesteps = timesteps.repeat_interleave(settings.noises).to(latents.device)
        abar = prior.alphas_cumprod.to(latents)[self.timesteps][:, None, None, None]
        self.noisy = abar.sqrt() * latents[:, None] + (1 - abar).sqrt() * self.noise
        self.scale = self._weights(prior.alphas_cumprod[timesteps]).to(latents).sqrt()
        self._counter = [0]  # a list, so that copies count together

    def _weights(self, abar: Tensor) -> Tensor:
        """``[L]`` quadrature of dlambda, over the draws and the temperature."""
        log_snr = torch.log(abar / (1 - abar))
        if len(log_snr) == 1:
            share = torch.ones_like(log_snr)
        else:
            edges = (log_snr[1:] + log_snr[:-1]) / 2
            edges = torch.cat((2 * log_snr[:1] - edges[:1], edges, 2 * log_snr[-1:] - edges[-1:]))
            share = edges[:-1] - edges[1:]
        share = share.repeat_interleave(self.settings.noises) / self.settings.noises
        return share / self.settings.temperature

    def at_levels(self, levels: tuple[float, ...]) -> DenoisingScore:
        """The same likelihood by other noise levels, counting its evaluations with this one's."""
        other = DenoisingScore(
            self.prior, self.given, replace(self.settings, levels=levels), self.seed
        )
        other.elevation_std, other._counter = self.elevation_std, self._counter
        return other

    def by_level(self) -> list[DenoisingScore]:
        """One score for each noise level, the noisiest first, whose losses add up to this one's."""
        draws = self.settings.noises
        parts = []
        for first in reversed(range(0, len(self.timesteps), draws)):
            part = copy.copy(self)
            level = slice(first, first + draws)
            part.timesteps, part.scale = self.timesteps[level], self.scale[level]
            part.noise, part.noisy = self.noise[level], self.noisy[:, level]
            parts.append(part)
        return parts

    @property
    def evaluations(self) -> int:
        """Of the network, so far."""
        return self._counter[0]

    def pairs(self) -> list[tuple[int, int]]:
        """Ordered pairs (given view, explained view)."""
        count = len(self.given)
        return [(i, j) for i in range(count) for j in range(count) if i != j]

    def residuals(
        self, source: Tensor, target: Tensor, source_pose: Tensor, target_pose: Tensor
    ) -> Tensor:
        """Weighted residuals ``[B,L,c*s*s]`` of views ``target [B]`` given views ``source [B]``.

        ``source_pose`` and ``target_pose`` are ``[B,3]``.
        """
        batch, levels = len(source), len(self.timesteps)
        epsilon = predict_in_chunks(
            self.prior,
            self.noisy[target].flatten(0, 1),
            self.timesteps.repeat(batch),
            self.given[source.repeat_interleave(levels)],
            source_pose.repeat_interleave(levels, 0),
            target_pose.repeat_interleave(levels, 0),
        )
        self._counter[0] += batch * levels
        errors = (epsilon.unflatten(0, (batch, levels)) - self.noise).flatten(2)
        return errors * self.scale[:, None]

    def losses(
        self, source: Tensor, target: Tensor, source_pose: Tensor, target_pose: Tensor
    ) -> Tensor:
        """``[B]``: -log p(view target | view source, poses), up to a constant."""
        residuals = self.residuals(source, target, source_pose, target_pose)
        return 0.5 * residuals.square().sum((1, 2))

    def evidence(self, poses: Tensor) -> Tensor:
        """``[K,K]``: by how many nats view i at ``poses [K,3]`` explains view j, zero for i = j.

        The difference of log p(view j | view i, pose) and log p(view j): what two views of one
        object tell about each other, and two of different objects don't.
        """
        views = len(poses)
        table = poses.new_zeros(views, views)
        if views < 2:
            return table
        source, target = torch.tensor(self.pairs(), device=poses.device).unbind(1)
        each = torch.arange(views, device=poses.device)
        alone = self._unconditional().losses(each, each, poses, poses)
        table[source, target] = alone[target] - self.losses(
            source, target, poses[source], poses[target]
        )
        return table

    def _unconditional(self) -> DenoisingScore:
        """The same noise and weights, without given views."""
        other = copy.copy(self)
        other.given = without_view(self.given)
        return other

    def joint(self, poses: Tensor) -> Tensor:
        """``[M]``: the loss of M hypotheses ``poses [M,K,3]``, all ordered pairs and the prior."""
        pairs = torch.tensor(self.pairs(), device=poses.device)
        source, target = pairs.repeat(len(poses), 1).unbind(1)
        ends = (poses[:, pairs[:, k]].flatten(0, 1) for k in (0, 1))
        losses = self.losses(source, target, *ends)
        return losses.unflatten(0, (len(poses), -1)).sum(1) + self.prior_loss(poses)

    def prior_loss(self, poses: Tensor) -> Tensor:
        """``[...]``: Gaussian priors of ``poses [...,K,3]`` around what the embedder sees."""
        elevation = (poses[..., 0] - self.given.elevation) / self.elevation_std
        radius = (poses[..., 2] - self.given.radius) / self.settings.radius_std
        return 0.5 * (elevation.square() + radius.square()).sum(-1)

    def linearize(self, poses: Tensor) -> tuple[Tensor, list[NormalEquations]]:
        """Losses ``[M]`` at ``poses [M,K,3]`` and the normal equations of each hypothesis."""
        hypotheses, views = poses.shape[:2]
        pairs = self.pairs()
        index = torch.tensor(pairs, device=poses.device)
        # Where it is, the target's three probes, the source's elevation and radius; turning the
        # source is turning the target back.
        zero, steps = poses.new_zeros(1, 3), torch.diag(poses.new_tensor(PROBES))
        moves = (
            torch.cat((zero, zero.expand(3, 3), steps[::2])),
            torch.cat((zero, steps, zero.expand(2, 3))),
        )
        ends = [
            (poses[:, index[:, k]][:, :, None] + moves[k]).flatten(0, 2) for k in (0, 1)
        ]  # [M*P*6,3]
        source, target = (index[:, k].repeat(hypotheses).repeat_interleave(6) for k in (0, 1))
        residuals = self.residuals(source, target, *ends).flatten(1)
        residuals = residuals.unflatten(0, (hypotheses, len(pairs), 6))
        losses = 0.5 * residuals[:, :, 0].square().sum((1, 2)) + self.prior_loss(poses)
        widths = poses.new_tensor([*PROBES, *PROBES[::2]])[:, None]
        equations = []
        for m in range(hypotheses):
            system = NormalEquations.zero(views, poses)
            for p, (i, j) in enumerate(pairs):
                here = residuals[m, p, 0]
                e, a, r, source_e, source_r = (residuals[m, p, 1:] - here) / widths
                system.add_pair(i, j, torch.stack((source_e, -a, source_r, e, a, r)), here)
            self.add_prior(system, poses[m])
            equations.append(system)
        return losses, equations

    def add_prior(self, system: NormalEquations, poses: Tensor) -> None:
        """Add :meth:`prior_loss` of ``poses [K,3]`` to the normal equations."""
        radius_std = torch.full_like(poses[:, 2], self.settings.radius_std)
        for k, value, std in (
            (0, poses[:, 0] - self.given.elevation, self.elevation_std),
            (2, poses[:, 2] - self.given.radius, radius_std),
        ):
            system.matrix.diagonal()[k::3].add_(std**-2)
            system.gradient[k::3] += value / std**2
