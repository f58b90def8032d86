"""The field of :func:`latentdem.reconstruct`: fitted, and judged, against the given views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from latentdem.em.denoising_score import DenoisingScore
from latentdem.em.novel_views import SampledViews
from latentdem.em.poses import radius_limits
from latentdem.em.reconstruct_settings import ReconstructSettings
from latentdem.operators.field import FieldFit, fit_field
from latentdem.operators.pose import relative_pose
from latentdem.operators.radiance_field import RadianceField
from latentdem.views import Views

_NOT_WHITE = 0.06  # of a sampled view's pixel, from the white ground


def object_masks(views: Tensor) -> Tensor:
    """``[N,1,S,S]``: what is not white in sampled ``views [N,3,S,S]``, holes filled."""
    coloured = (1 - views.amin(1)) > _NOT_WHITE
    filled = [ndimage.binary_fill_holes(mask) for mask in coloured.cpu().numpy()]
    return torch.from_numpy(np.stack(filled))[:, None].to(views)


def fit_object(
    loaded: Views,
    sampled: SampledViews,
    targets: Tensor,
    score: DenoisingScore,
    options: ReconstructSettings,
    last: FieldFit | None,
    free: Tensor,
    seed: int,
    callback: Callable[[int, int], None],
) -> FieldFit:
    """A field through the given views (weight one) and the sampled ones, and the given poses.

    Args:
        free: ``[K,3]``, the coordinates of the given views' poses that may move.
    """
    count, novel = len(loaded), len(targets)
    camera = score.prior.camera
    again = options.iterations // 3 if bool(free.any()) else 0
    total = options.iterations + again

    def fit(
        poses: Tensor, refine: Tensor, start: RadianceField | None, steps: int, done: int
    ) -> FieldFit:
        return fit_field(
            torch.cat((loaded.images, sampled.views)),
            torch.cat((poses, targets)),
            fov=camera.fov,
            masks=torch.cat((loaded.masks, object_masks(sampled.views))),
            weights=torch.cat((torch.ones(count), torch.full((novel,), options.novel_weight))),
            refine=torch.cat((refine, torch.zeros(novel, 3, dtype=torch.bool))),
            start=start,
            resolution=options.resolution,
            iterations=steps,
            samples_per_ray=options.samples_per_ray,
            seed=seed,
            radius_range=radius_limits(camera.radius),
            progress=lambda step, _: callback(done + step, total),
        )

    start = None if last is None else last.field
    found = fit(sampled.poses, free, start, options.iterations, 0)
    if not again:
        return found
    moved = found.poses[:count]
    poses = believable_poses(score, sampled.poses, moved, options.rendering_slack)
    if torch.equal(poses, moved):
        return found
    return fit(poses, torch.zeros_like(free), found.field, again, options.iterations)


def believable_poses(score: DenoisingScore, before: Tensor, after: Tensor, slack: float) -> Tensor:
    """As far from ``before`` to ``after`` ``[K,3]`` as the prior allows.

    A field painted over sampled views can pull a camera away from the truth; the views must not
    become less likely by more than ``slack`` nats (over the temperature).
    """
    shares = before.new_tensor([1.0, 0.5, 0.25, 0.0])[:, None, None]
    path = before + shares * relative_pose(before, after)
    losses = score.joint(path)
    allowed = losses <= losses[-1] + slack
    return after if bool(allowed[0]) else path[int(allowed.int().argmax())]


def contradictions(
    names: list[str], residual: Tensor, evidence: Tensor, options: ReconstructSettings
) -> list[str]:
    """One line for each view that does not belong to the others.

    Either the object does not look like it (``residual [K]`` far above the others'), or no other
    view tells more about it than the prior knows without any (``evidence [K,K]``).
    """
    lines = []
    mutual = (evidence + evidence.T) / 2
    for k, name in enumerate(names):
        if len(names) < 2:
            break
        others = torch.cat((residual[:k], residual[k + 1 :]))
        usual, found = float(others.median()), float(residual[k])
        if found > max(options.residual_floor, options.contradiction * usual):
            lines.append(
                f"{name} contradicts the others: the object differs from it by {found:.3f}, from "
                f"them by {usual:.3f}; its pose may be wrong, or it shows another object"
            )
        elif len(names) == 2 and k == 1:
            continue  # said of the first already
        elif float(torch.cat((mutual[k, :k], mutual[k, k + 1 :])).max()) < options.least_evidence:
            rest = names[1] if len(names) == 2 else "the other views"
            lines.append(
                f"{name} and {rest} hardly explain each other (residual {found:.3f}): they may "
                "show different objects, or sides without overlap; poses are not to be trusted"
            )
    return lines


def uncertain_views(names: list[str], uncertainty: Tensor, least: float = 45.0) -> list[str]:
    """One line for each view whose azimuth is undecided by ``least`` degrees or more.

    Args:
        names: of the K views.
        uncertainty: ``[K]``, standard deviation of the azimuth in degrees.
        least: from where a pose is worth a warning.
    """
    return [
        f"{name}: its azimuth is uncertain by {spread:.0f} degrees; it may show another object, or "
        "one that looks alike from several sides. A picture from between the two helps"
        for name, spread in zip(names, uncertainty.tolist(), strict=True)
        if spread >= least
    ]
