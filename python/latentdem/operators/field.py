"""Fitting radiance fields to views, and cameras to radiance fields, through ``volume_render``.

Letters: N views, s their side, R the grid's side.  Poses as in :mod:`latentdem.operators.pose`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdem.operators.pose import wrap_pose
from latentdem.operators.radiance_field import RadianceField

EXTENT = 0.75  # of a fitted field: the ball of radius 0.7 that holds the object, and a margin


@dataclass(frozen=True)
class FieldFit:
    """What :func:`fit_field` found.

    Args:
        field: the field.
        poses: ``[N,3]``, refined where asked for.
        residual: ``[N]``, root mean square error of each view's rendering at its pose: a view
            that contradicts the others stands out.
    """

    field: RadianceField
    poses: Tensor
    residual: Tensor


# The grid's variables -----------------------------------------------------------------------

_DENSITY_UNIT = 60.0  # of the softplus, in 1 / extent
_START = -4.0  # of its argument: about one per extent, half transparent
_RATES = (0.3, 0.1)  # of density's and colour's variables


class _Grid:
    """Unconstrained variables of a field: density is a softplus, colour a sigmoid."""

    def __init__(self, density: Tensor, color: Tensor, extent: float) -> None:
        self.extent = extent
        self.density = density.detach().requires_grad_()
        self.color = color.detach().requires_grad_()
        self.kept = torch.ones_like(density)

    @classmethod
    def empty(cls, side: int, extent: float, like: Tensor) -> _Grid:
        density = like.new_full((1, side, side, side), _START)
        return cls(density, like.new_zeros(3, side, side, side), extent)

    @classmethod
    def of(cls, field: RadianceField, side: int) -> _Grid:
        value = _resample(field.density, side) * (field.extent / _DENSITY_UNIT)
        color = torch.logit(_resample(field.color, side), eps=1e-3)
        # Inverse softplus, no farther down than a fit can climb back.
        return cls(torch.log(torch.expm1(value.clamp(min=1e-3))), color, field.extent)

    def finer(self, side: int) -> _Grid:
        return _Grid(_resample(self.density, side), _resample(self.color, side), self.extent)

    def field(self) -> RadianceField:
        density = F.softplus(self.density) * (_DENSITY_UNIT / self.extent) * self.kept
        return RadianceField(density, self.color.sigmoid(), self.extent)

    @torch.no_grad()
    def skip_empty(self) -> None:
        """Set to zero what is transparent with all its neighbours; the renderer passes over it."""
        self.kept.fill_(1)
        field = self.field()
        alpha = 1 - torch.exp(-field.density * field.voxel)
        self.kept.copy_(F.max_pool3d(alpha[None], 3, stride=1, padding=1)[0] > 0.01)

    def roughness(self) -> Tensor:
        """Total variation of density's and colour's variables, the mean over the grid."""
        total = self.density.new_zeros(())
        for grid, weight in ((F.softplus(self.density), 1.0), (self.color.sigmoid(), 1.0)):
            for axis in (1, 2, 3):
                total = total + weight * grid.diff(dim=axis).abs().mean()
        return total


def _resample(grid: Tensor, side: int) -> Tensor:
    if grid.shape[1:] == (side, side, side):
        return grid.detach()
    size = (side, side, side)
    return F.interpolate(grid.detach()[None], size, mode="trilinear", align_corners=True)[0]


# Poses --------------------------------------------------------------------------------------

# A step of one changes the picture about as much in each: degrees, degrees, world units.
_POSE_UNIT = (1.0, 1.0, 0.03)


class _Poses:
    """Poses as variables of an optimiser, of which some coordinates are free."""

    def __init__(
        self, poses: Tensor, refine: Tensor | None, radius_range: tuple[float, float]
    ) -> None:
        self.unit = torch.tensor(_POSE_UNIT).to(poses)
        self.range = radius_range
        free = torch.zeros(len(poses), dtype=torch.bool) if refine is None else refine
        if free.shape not in ((len(poses),), (len(poses), 3)):
            raise ValueError(
                f"refine must have shape [N] or [N,3] with N = {len(poses)}, found "
                f"{list(free.shape)}"
            )
        free = free.to(device=poses.device, dtype=torch.bool)
        self.free = (free[:, None] if free.dim() == 1 else free).expand(len(poses), 3)
        inside = wrap_pose(poses.detach(), radius=radius_range)
        self.start = torch.where(self.free, inside, poses.detach())
        self.variable = (self.start / self.unit).requires_grad_()

    def value(self) -> Tensor:
        return torch.where(self.free, self.variable * self.unit, self.start)

    def jump(
        self, field: RadianceField, views: Tensor, *, masks: Tensor | None, **settings: Any
    ) -> None:
        """Bring the free poses to ``field`` as it stands; see :func:`refine_poses`."""
        moved = torch.nonzero(self.free.any(1))[:, 0]
        if len(moved):
            found, _ = refine_poses(
                field,
                views[moved],
                self.start[moved],
                refine=self.free[moved],
                masks=None if masks is None else masks[moved],
                radius_range=self.range,
                **settings,
            )
            with torch.no_grad():
                self.variable[moved] = found / self.unit

    @torch.no_grad()
    def wrap(self) -> None:
        wrapped = wrap_pose(self.variable * self.unit, radius=self.range)
        self.variable.copy_(torch.where(self.free, wrapped, self.start) / self.unit)


def _check_views(views: Tensor, poses: Tensor, masks: Tensor | None) -> None:
    if views.dim() != 4 or views.shape[1] != 3 or views.shape[2] != views.shape[3]:
        raise ValueError(f"views must have shape [N,3,s,s], found {list(views.shape)}")
    if not len(views):
        raise ValueError("views must hold at least one view, found none")
    if poses.shape != (len(views), 3):
        raise ValueError(
            f"poses must have shape [N,3] with N = {len(views)}, found {list(poses.shape)}"
        )
    if masks is not None and masks.shape != (len(views), 1, *views.shape[2:]):
        raise ValueError(
            f"masks must have shape [N,1,s,s] like the views {list(views.shape)}, found "
            f"{list(masks.shape)}"
        )


def _errors(
    color: Tensor, opacity: Tensor, views: Tensor, masks: Tensor | None, mask_weight: float
) -> Tensor:
    """Mean squared error ``[N]`` of colours, and of opacity against the masks."""
    error = (color - views).square().mean((1, 2, 3))
    if masks is None:
        return error
    return error + mask_weight * (opacity - masks).square().mean((1, 2, 3))


def _coarser(image: Tensor, factor: int) -> Tensor:
    return F.avg_pool2d(image, factor, ceil_mode=True, count_include_pad=False)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of views without end: every view once before any comes again."""
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        if len(waiting) < size:
            waiting = torch.cat((waiting, torch.randperm(count, generator=generator)))
        yield waiting[:size]
        waiting = waiting[size:]


def fit_field(
    views: Tensor,
    poses: Tensor,
    *,
    fov: float,
    masks: Tensor | None = None,
    weights: Tensor | None = None,
    refine: Tensor | None = None,
    start: RadianceField | None = None,
    resolution: int = 48,
    iterations: int = 200,
    samples_per_ray: int = 64,
    seed: int = 0,
    radius_range: tuple[float, float] = (2.2, 3.0),
    background: float = 1.0,
    views_per_step: int = 3,
    smoothness: float = 0.002,
    mask_weight: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> FieldFit:
    """Fit a radiance field to views by gradient descent through ``volume_render``.

    Minimises over the grid, and over the free poses, ::

        sum_n weight_n (mean (render(field, pose_n) - view_n)^2
                        + mask_weight mean (opacity(field, pose_n) - mask_n)^2)
        + smoothness TV(field) + emptiness mean(density)

    with Adam on random minibatches of views.  The first third of the steps is taken on a grid of
    half the side, with a weight on emptiness that falls to zero, so that space that no view asks
    for stays clear.  Then the free poses are brought to that field by :func:`refine_poses`, and
    move on with it from there.  Cells that have become transparent are skipped.

    Args:
        views: ``[N,3,s,s]`` in [0, 1].
        poses: ``[N,3]``, of which the free ones are a start.
        fov: full angle of view in degrees.
        masks: ``[N,1,s,s]``, what opacity should be.
        weights: ``[N]``, not negative; how far a view is believed.  All one by default.
        refine: ``[N]`` whose poses are free, or ``[N,3]`` which of their coordinates.
        start: a field to go on from, instead of an empty one; the coarse steps are left out.
        resolution: R.
        iterations: steps in all.
        samples_per_ray: see :meth:`RadianceField.render`.
        seed: of the minibatches.
        radius_range: of the free poses.
        background: grey value behind the object.
        views_per_step: size of a minibatch.
        smoothness: weight of total variation.
        mask_weight: weight of the masks.
        progress: called with steps done and steps in all.

    Raises:
        ValueError: shapes that do not match, or sizes that are not positive.
    """
    _check_views(views, poses, masks)
    if resolution < 2 or iterations < 1:
        raise ValueError(
            f"resolution must be at least 2 and iterations at least 1, found {resolution} and "
            f"{iterations}"
        )
    count = len(views)
    trust = torch.ones(count) if weights is None else weights
    if trust.shape != (count,) or bool((trust < 0).any()) or not float(trust.sum()) > 0:
        raise ValueError("weights must be [N], not negative, and not all zero")
    trust = (trust / trust.mean()).to(views)
    moving = _Poses(poses.to(views), refine, radius_range)
    coarse = 0 if start is not None else iterations // 3
    if start is not None:
        grid = _Grid.of(start, resolution)
    else:
        grid = _Grid.empty(max(2, resolution // 2) if coarse else resolution, EXTENT, views)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(count, min(views_per_step, count), generator)
    optimizer = _grid_optimizer(grid)
    pose_optimizer = torch.optim.Adam([moving.variable], lr=0.5, betas=(0.8, 0.99))
    for step in range(iterations):
        if coarse and step == coarse:
            moving.jump(
                grid.field(), views, fov=fov, masks=masks, background=background, iterations=20
            )
            grid = grid.finer(resolution)
            optimizer = _grid_optimizer(grid)
        if step >= coarse and (step - coarse) % 20 == 0:
            grid.skip_empty()
        left = 1 - step / iterations
        for group, rate in zip(optimizer.param_groups, _RATES):
            group["lr"] = rate * (0.1 + 0.9 * left)
        pose_optimizer.param_groups[0]["lr"] = 0.5 * left
        chosen = next(batches).to(views.device)
        field = grid.field()
        color, opacity, _ = field.render(
            (moving.value() if step >= coarse else moving.start)[chosen],
            fov=fov,
            image_size=views.shape[-1],
            samples_per_ray=samples_per_ray,
            background=background,
        )
        mask = None if masks is None else masks.to(views)[chosen]
        loss = (trust[chosen] * _errors(color, opacity, views[chosen], mask, mask_weight)).mean()
        loss = loss + smoothness * grid.roughness()
        if step < coarse:
            loss = loss + 0.01 * (1 - step / coarse) * F.softplus(grid.density).mean()
        optimizer.zero_grad(set_to_none=True)
        pose_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if moving.variable.grad is not None:
            pose_optimizer.step()
            moving.wrap()
        if progress is not None:
            progress(step + 1, iterations)
    with torch.no_grad():
        grid.skip_empty()
        fitted = grid.field()
        found = moving.value()
        color, _, _ = fitted.render(
            found, fov=fov, image_size=views.shape[-1], background=background
        )
        residual = (color - views).square().mean((1, 2, 3)).sqrt()
    return FieldFit(fitted, found.detach(), residual)


def _grid_optimizer(grid: _Grid) -> torch.optim.Optimizer:
    groups = [{"params": [grid.density]}, {"params": [grid.color]}]
    return torch.optim.Adam(groups, lr=_RATES[0], betas=(0.9, 0.99))


def refine_poses(
    field: RadianceField,
    views: Tensor,
    poses: Tensor,
    *,
    fov: float,
    refine: Tensor | None = None,
    masks: Tensor | None = None,
    iterations: int = 60,
    samples_per_ray: int = 64,
    learning_rate: float = 2.0,
    radius_range: tuple[float, float] = (2.2, 3.0),
    background: float = 1.0,
    mask_weight: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Move cameras until the field looks like their views; the field stays as it is.

    Adam on the pose gradient of ``volume_render``.  Errors are compared at full, half, quarter
    and eighth size together: the coarse ones reach far, the fine ones are exact.  Views do not
    influence each other.  Of all its steps, each view keeps the best.

    Args:
        field: the field.
        views: ``[N,3,s,s]`` in [0, 1].
        poses: ``[N,3]``, the start.
        fov: full angle of view in degrees.
        refine: ``[N]`` or ``[N,3]``, what may move; everything by default.
        masks: ``[N,1,s,s]``, compared with opacity.
        iterations: steps.
        samples_per_ray: see :meth:`RadianceField.render`.
        learning_rate: first steps in degrees; it falls to zero along half a cosine.
        radius_range: of the poses.
        background: grey value behind the object.
        mask_weight: weight of the masks.

    Returns:
        Poses ``[N,3]`` and the residual ``[N]``, root mean square error of the colours there.
    """
    _check_views(views, poses, masks)
    if refine is None:
        refine = torch.ones(len(views), dtype=torch.bool)
    moving = _Poses(poses.to(views), refine, radius_range)
    optimizer = torch.optim.Adam([moving.variable], lr=learning_rate, betas=(0.8, 0.99))
    still = RadianceField(field.density.detach(), field.color.detach(), field.extent)
    best, best_loss = moving.start, torch.full_like(views[:, 0, 0, 0], torch.inf)
    best_residual = best_loss
    for step in range(iterations + 1):
        color, opacity, _ = still.render(
            moving.value(),
            fov=fov,
            image_size=views.shape[-1],
            samples_per_ray=samples_per_ray,
            background=background,
        )
        losses = torch.zeros_like(best_loss)
        for factor in (1, 2, 4, 8):
            if factor <= views.shape[-1]:
                mask = None if masks is None else _coarser(masks.to(views), factor)
                losses = losses + _errors(
                    _coarser(color, factor),
                    _coarser(opacity, factor),
                    _coarser(views, factor),
                    mask,
                    mask_weight,
                )
        with torch.no_grad():
            better = losses < best_loss
            residual = (color - views).square().mean((1, 2, 3)).sqrt()
            best = torch.where(better[:, None], moving.value(), best)
            best_residual = torch.where(better, residual, best_residual)
            best_loss = torch.where(better, losses, best_loss)
        if step == iterations:
            break
        optimizer.param_groups[0]["lr"] = (
            learning_rate * (1 + math.cos(math.pi * step / iterations)) / 2
        )
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        moving.wrap()
    return best.detach(), best_residual.detach()
