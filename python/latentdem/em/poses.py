"""Relative poses of K views from the prior alone: a grid of angles, then Gauss-Newton.

The loss of a pose has many valleys, so the search starts from a grid of azimuths and elevations;
all pairs of views count, in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentdem.em.denoising_score import KNOWN_STD, DenoisingScore, NormalEquations
from latentdem.em.reconstruct_settings import PoseSettings
from latentdem.operators.pose import wrap_degrees, wrap_pose

_BEAM = 256  # partial hypotheses kept while views join one by one
_PART = 96  # poses of the grid between two calls of the callback
_STEP_LIMIT = (10.0, 15.0, 0.2)  # of one Gauss-Newton step: elevation, azimuth, radius
_MAX_ELEVATION = 80.0  # near a pole the azimuth means nothing

Callback = Callable[[int, int], None]


@dataclass(frozen=True)
class PoseGrid:
    """Losses of all pairs of K views over azimuths and elevations.

    Args:
        azimuths: ``[A]`` degrees.
        elevations: ``[K,E]`` degrees, of each view.
        pairs: ``[K,K,E,E,A]``: entry (i, j, e, f, a) with i < j is the loss of azimuth(j) -
            azimuth(i) = azimuths[a] at the elevations e of view i and f of view j, both directions
            added; (j, i) is zero.
        single: ``[K,E]``: the prior loss of the elevations.
    """

    azimuths: Tensor
    elevations: Tensor
    pairs: Tensor
    single: Tensor

    def to(self, device: torch.device | str) -> PoseGrid:
        """The same losses on another device."""
        return PoseGrid(
            self.azimuths.to(device),
            self.elevations.to(device),
            self.pairs.to(device),
            self.single.to(device),
        )


@dataclass(frozen=True)
class PoseEstimate:
    """Poses of K views and how sure they are.

    Args:
        poses: ``[K,3]``; the first azimuth is zero.
        uncertainty: ``[K]`` standard deviation of the azimuth in degrees, over the modes too.
        std: ``[K,3]`` standard deviations within the best mode.
        margin: by how many nats (over the temperature) the best mode beats the second; infinite
            with one mode.
        loss: of the best mode.
        modes: ``[M,K,3]`` refined hypotheses, best first.
        mode_losses: ``[M]``.
        grid: where the search started; ``None`` from a random start.
    """

    poses: Tensor
    uncertainty: Tensor
    std: Tensor
    margin: float
    loss: float
    modes: Tensor
    mode_losses: Tensor
    grid: PoseGrid | None = None

    def to(self, device: torch.device | str) -> PoseEstimate:
        """The same estimate on another device."""
        tensors = ("poses", "uncertainty", "std", "modes", "mode_losses")
        return replace(
            self,
            **{name: getattr(self, name).to(device) for name in tensors},
            grid=None if self.grid is None else self.grid.to(device),
        )


def radius_limits(camera_radius: tuple[float, float]) -> tuple[float, float]:
    """The training range, a quarter of its width wider on both sides."""
    low, high = camera_radius
    return low - (high - low) / 4, high + (high - low) / 4


def initial_poses(score: DenoisingScore, azimuths: Tensor) -> Tensor:
    """``[...,K,3]``: the embedder's elevations and radii with ``azimuths [...,K]``."""
    given = score.given
    elevation = given.elevation.expand(azimuths.shape)
    radius = given.radius.expand(azimuths.shape)
    return torch.stack((elevation, wrap_degrees(azimuths), radius), -1)


def _shrinking(points: int, settings: PoseSettings) -> list[int]:
    """How many of a pair's grid points each noise level sees."""
    return [
        max(1, math.ceil(points * settings.grid_kept**k)) for k in range(len(settings.grid_levels))
    ]


def score_grid(score: DenoisingScore, callback: Callback | None = None) -> PoseGrid:
    """Losses of every pair of views over the grid, at the embedder's radii.

    The embedder sees an elevation only roughly, so each view's is tried above and below, too.
    All points are scored at the noisiest level, at each further one the best of them.
    """
    settings, given = score.settings, score.given
    levels = score.at_levels(settings.grid_levels).by_level()
    azimuths = torch.arange(round(360 / settings.azimuth_step)).to(given.latents)
    azimuths = azimuths * settings.azimuth_step
    # Within the range that the prior knows; what lies beyond becomes the border.
    low, high = score.prior.camera.elevation
    offsets = azimuths.new_tensor((0.0, *settings.elevation_offsets))
    inside = (given.elevation[:, None] + offsets).clamp(low, high)
    free = (score.elevation_std > KNOWN_STD)[:, None] & (offsets != 0)
    elevations = torch.where(free, inside, given.elevation[:, None])
    views, tried, count = len(given), len(offsets), len(azimuths)
    losses = given.latents.new_zeros(views, views, tried, tried, count)
    # Elevations that coincide at the border are computed once.
    distinct = [heights.unique(return_inverse=True) for heights in elevations]
    pairs = [(i, j) for i in range(views) for j in range(i + 1, views)]
    points = {(i, j): len(distinct[i][0]) * len(distinct[j][0]) * count for i, j in pairs}
    numbers = [number for pair in pairs for number in _shrinking(points[pair], settings)]
    done, total = 0, sum(math.ceil(number / _PART) for number in numbers)
    for i, j in pairs:
        e, f, a = torch.meshgrid(distinct[i][0], distinct[j][0], azimuths, indexing="ij")
        near, far = (
            torch.stack((height, azimuth, given.radius[k].expand(a.shape)), -1).flatten(0, 2)
            for k, height, azimuth in ((i, e, torch.zeros_like(a)), (j, f, a))
        )
        table = near.new_zeros(len(near))
        for level, number in zip(levels, _shrinking(len(near), settings), strict=True):
            kept = table.argsort(stable=True)[:number]
            found = []
            for part in kept.split(_PART):
                source = torch.full_like(part, i)
                target = torch.full_like(part, j)
                there = level.losses(source, target, near[part], far[part])
                found.append(there + level.losses(target, source, far[part], near[part]))
                done += 1
                if callback is not None:
                    callback(done, total)
            # What was dropped is taken to be as bad as the worst of what was kept.
            added = torch.cat(found)
            table = table + added.max()
            table[kept] += added - added.max()
        (first, where_first), (second, where_second) = distinct[i], distinct[j]
        table = table.unflatten(0, (len(first), len(second), count))
        losses[i, j] = table[where_first][:, where_second]
    single = 0.5 * ((elevations - given.elevation[:, None]) / score.elevation_std[:, None]) ** 2
    return PoseGrid(azimuths, elevations, losses, single)


def settle_elevations(score: DenoisingScore, poses: Tensor) -> Tensor:
    """Try other elevations for each view of M hypotheses ``poses [M,K,3]``, view after view.

    The embedder sees an elevation only roughly, and Gauss-Newton does not reach far.
    """
    offsets = poses.new_tensor((0.0, *score.settings.elevation_offsets))
    low, high = score.prior.camera.elevation
    for k in reversed(range(poses.shape[1])):
        trials = poses[:, None].repeat(1, len(offsets), 1, 1)  # [M,E,K,3]
        # Within the range that the prior knows; what lies beyond becomes the border.
        trials[:, 1:, k, 0] = (trials[:, 1:, k, 0] + offsets[1:]).clamp(low, high)
        losses = score.joint(trials.flatten(0, 1)).unflatten(0, trials.shape[:2])
        poses = trials[torch.arange(len(poses)), losses.argmin(1)]
    return poses


def combine(grid: PoseGrid, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Poses of all views from the pairs' losses, by beam search, view after view.

    Exact for two views; for three while a pair's grid has at most 256 points, as by default.

    Args:
        grid: of K views.
        radii: ``[K]``.

    Returns:
        Hypotheses ``[B,K,3]``, best first (the first azimuth is zero: the gauge), and their losses
        ``[B]``.
    """
    views, tried, count = len(grid.elevations), grid.elevations.shape[1], len(grid.azimuths)
    device = grid.azimuths.device
    heights = torch.arange(tried, device=device)[:, None]  # [B,1]: indices of the views so far
    turns = torch.zeros_like(heights)
    losses = grid.single[0].clone()
    points = torch.arange(tried * count, device=device)
    height, turn = points // count, points % count
    for j in range(1, views):
        added = grid.single[j][height].expand(len(heights), -1).clone()
        for i in range(j):
            difference = (turn - turns[:, i, None]) % count
            added += grid.pairs[i, j][heights[:, i, None], height, difference]
        total = (losses[:, None] + added).flatten()
        order = total.argsort(stable=True)[:_BEAM]
        row, point = order // len(points), order % len(points)
        heights = torch.cat((heights[row], height[point, None]), 1)
        turns = torch.cat((turns[row], turn[point, None]), 1)
        losses = total[order]
    elevations = grid.elevations[torch.arange(views, device=device), heights]
    azimuths = wrap_degrees(grid.azimuths[turns])
    return torch.stack((elevations, azimuths, radii.expand_as(azimuths)), -1), losses


def separated(azimuths: Tensor, losses: Tensor, modes: int, separation: float) -> list[int]:
    """Indices of the best ``modes`` of ``azimuths [B,K]`` (ordered by loss) that lie apart.

    Two hypotheses lie apart if some view's azimuths differ by at least ``separation`` degrees.
    """
    kept: list[int] = []
    for b in losses.argsort(stable=True).tolist():
        gaps = [float(wrap_degrees(azimuths[b] - azimuths[k]).abs().max()) for k in kept]
        if all(gap >= separation for gap in gaps):
            kept.append(b)
        if len(kept) == modes:
            break
    return kept


def solve_step(system: NormalEquations, damping: float) -> Tensor:
    """``[K,3]``: the damped Gauss-Newton step, first azimuth fixed, held to a trust region."""
    matrix = system.matrix.clone()
    matrix.diagonal().mul_(1 + damping)
    gradient = system.gradient.clone()
    matrix[1], matrix[:, 1], gradient[1] = 0, 0, 0  # the gauge
    # A floor below which a coordinate is not observed: its step stays near zero.
    matrix.diagonal().add_(1e-6)
    step = -torch.linalg.solve(matrix, gradient).reshape(-1, 3)
    limit = step.new_tensor(_STEP_LIMIT)
    # One factor for all, so that the direction stays one of descent.
    factor = (limit / step.abs().clamp_min(1e-12)).amin().clamp(max=1.0)
    return factor * step


def refine(
    score: DenoisingScore, poses: Tensor, callback: Callback | None = None
) -> tuple[Tensor, Tensor, list[NormalEquations]]:
    """Levenberg-Marquardt on M hypotheses ``poses [M,K,3]`` at once.

    Those that have fallen behind the best by more than ``give_up`` stay where they are.

    Returns:
        Poses ``[M,K,3]``, losses ``[M]`` (never above those at the start), and the normal
        equations at the end.
    """
    settings, limits = score.settings, radius_limits(score.prior.camera.radius)
    damping = [0.1] * len(poses)
    poses = poses.clone()
    losses, systems = score.linearize(poses)
    for iteration in range(settings.iterations):
        alive = torch.nonzero(losses <= losses.min() + settings.give_up)[:, 0]
        steps = torch.stack([solve_step(systems[m], damping[m]) for m in alive.tolist()])
        trial = wrap_pose(poses[alive] + steps, elevation=_MAX_ELEVATION, radius=limits)
        trial_losses, trial_systems = score.linearize(trial)
        for k, m in enumerate(alive.tolist()):
            if trial_losses[k] < losses[m]:
                poses[m], losses[m], systems[m] = trial[k], trial_losses[k], trial_systems[k]
                damping[m] = max(damping[m] / 5, 1e-3)
            else:
                damping[m] *= 10
        if callback is not None:
            callback(iteration + 1, settings.iterations)
    return poses, losses, systems


def standard_deviations(system: NormalEquations) -> Tensor:
    """``[K,3]`` from the inverse of the curvature; zero for the gauge, capped at a uniform law."""
    free = [k for k in range(len(system.matrix)) if k != 1]
    matrix = system.matrix[free][:, free]
    matrix.diagonal().add_(1e-6)
    variance = system.gradient.new_zeros(len(system.matrix))
    variance[free] = torch.linalg.inv(matrix).diagonal().clamp_min(0)
    std = variance.sqrt().reshape(-1, 3)
    return torch.minimum(std, std.new_tensor([90.0, 104.0, 1.0]))


def estimate_poses(
    score: DenoisingScore,
    *,
    start: str = "grid",
    seed: int = 0,
    callback: Callable[[str, int, int], None] | None = None,
) -> PoseEstimate:
    """Poses of all views of ``score`` by grid (or from one random azimuth a view) and refinement.

    ``callback(phase, done, total)`` is called within the grid and after each iteration.

    >>> estimate = estimate_poses(DenoisingScore(prior, given, settings, 0))  # doctest: +SKIP
    >>> estimate.poses[1], estimate.margin  # doctest: +SKIP
    """

    def on(phase: str) -> Callback | None:
        return None if callback is None else lambda done, total: callback(phase, done, total)

    settings = score.settings
    grid = None
    if start == "grid":
        grid = score_grid(score, on("grid"))
        first, losses = combine(grid, score.given.radius)
        first = first[separated(first[..., 1], losses, settings.modes, settings.separation)]
    else:
        generator = torch.Generator().manual_seed(seed)
        angles = 360 * torch.rand(1, len(score.given), generator=generator).to(
            score.given.elevation
        )
        angles[:, 0] = 0
        first = settle_elevations(score, initial_poses(score, angles))
    modes, mode_losses, systems = refine(score, first, on("refinement"))
    # Two that have run into the same valley are one mode.
    order = separated(modes[..., 1], mode_losses, len(modes), settings.separation / 2)
    modes, mode_losses = modes[order], mode_losses[order]
    std = standard_deviations(systems[order[0]])
    return PoseEstimate(
        poses=modes[0],
        uncertainty=azimuth_uncertainty(modes, mode_losses, std),
        std=std,
        margin=float(mode_losses[1] - mode_losses[0]) if len(modes) > 1 else float("inf"),
        loss=float(mode_losses[0]),
        modes=modes,
        mode_losses=mode_losses,
        grid=grid,
    )


def azimuth_uncertainty(modes: Tensor, losses: Tensor, std: Tensor) -> Tensor:
    """``[K]`` degrees: spread within the best of ``modes [M,K,3]`` and between them."""
    shares = torch.softmax(-losses, 0)
    gaps = wrap_degrees(modes[..., 1] - modes[0, :, 1])
    return ((shares[:, None] * gaps.square()).sum(0) + std[:, 1].square()).sqrt()
