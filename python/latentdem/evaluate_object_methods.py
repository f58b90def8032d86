"""The rows of the objects suite: one function each, from a case to poses and a field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentdem.em.options import placement
from latentdem.operators.radiance_field import RadianceField
from latentdem.priors.objects import ObjectsPrior, load_objects_prior
from latentdem.training.object_views import on_white
from latentdem.training.pose_free import load_pose_free

if TYPE_CHECKING:
    from latentdem.em.poses import PoseEstimate
    from latentdem.em.reconstruct_result import ReconstructResult
    from latentdem.em.reconstruct_settings import ReconstructSettings

ROWS = (
    "one view",
    "feed-forward",
    "random start",
    "grid",
    "grid + EM",
    "grid + EM + rendering",
    "true poses",
)


@dataclass(frozen=True)
class Case:
    """Views of one held-out object; azimuths count from the first input view.

    Args:
        name: of the object.
        seed: chose the views, and seeds the method.
        inputs: ``[K,4,s,s]`` RGBA uint8.
        poses: ``[K,3]`` of the inputs, known to the row ``true poses`` alone.
        unseen: ``[M,4,s,s]`` RGBA uint8.
        unseen_poses: ``[M,3]``.
        surface: ``[P,3]`` points on the object, turned like the poses; empty if not known.
    """

    name: str
    seed: int
    inputs: Tensor
    poses: Tensor
    unseen: Tensor
    unseen_poses: Tensor
    surface: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a case.

    Args:
        poses: ``[k,3]``, k = K, or 1 where only the first view was used.
        field: the object.
        novel: draws views ``[N,3,s,s]`` at poses ``[N,3]`` other than by the field (the diffusion
            model's own samples), where the method can.
        shared_seconds: of a step that an earlier row did for this one: the rows that start from
            the same pose search share it.
    """

    poses: Tensor
    field: RadianceField
    novel: Callable[[Tensor], Tensor] | None = None
    shared_seconds: float = 0.0


Method = Callable[[Case], Outcome]


def _inputs(case: Case) -> list[Tensor]:
    """What a user would hand over: cut-out pictures."""
    return [image.float() / 255 for image in case.inputs]


def build_methods(
    rows: list[str],
    *,
    prior: Path | None = None,
    regressor: Path | None = None,
    settings: ReconstructSettings | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Method]:
    """The methods called ``rows``.

    Args:
        rows: among :data:`ROWS`.
        prior: file, folder or hub id of the objects prior; the packaged one by default.
        regressor: what :func:`latentdem.training.pose_free.make_pose_free` wrote, for the row
            ``feed-forward``.
        settings: of the row ``grid + EM + rendering``; the others leave steps out of it.

        device: of the prior, as in :func:`latentdem.reconstruct`; so is ``dtype``.
        dtype: None: float16 on CUDA, else as it is.

    Raises:
        ValueError: an unknown row, ``feed-forward`` without a regressor, or a device that is not
            here.
        FileNotFoundError: no such prior or regressor.
    """
    unknown = [row for row in rows if row not in ROWS]
    if unknown or not rows:
        raise ValueError(f"rows must be among {', '.join(ROWS)}, found {', '.join(unknown)!r}")
    methods: dict[str, Method] = {}
    if "feed-forward" in rows:
        if regressor is None:
            raise ValueError("the row 'feed-forward' needs a regressor (latentdem train-pose-free)")
        methods["feed-forward"] = _feed_forward(regressor)
    if rows != ["feed-forward"]:
        place, number_format = placement(device, dtype, torch.device("cpu"))
        loaded = load_objects_prior(prior).to(place, number_format)
        methods |= _diffusion_methods(loaded, settings)
    return {row: methods[row] for row in ROWS if row in rows}


def _feed_forward(path: Path) -> Method:
    net = load_pose_free(path)

    def run(case: Case) -> Outcome:
        result = net.reconstruct(on_white(case.inputs))
        return Outcome(result.poses, result.field)

    return run


def _diffusion_methods(
    prior: ObjectsPrior, settings: ReconstructSettings | None
) -> dict[str, Method]:
    from latentdem.em.novel_views import sample_views
    from latentdem.em.reconstruct import reconstruct
    from latentdem.em.reconstruct_settings import ReconstructSettings

    full = settings or ReconstructSettings()
    searches: dict[tuple[str, int, int], tuple[PoseEstimate | None, float]] = {}

    def solve(
        case: Case,
        views: int,
        poses: Tensor | None,
        options: ReconstructSettings,
        estimate: PoseEstimate | None = None,
    ) -> ReconstructResult:
        return reconstruct(
            _inputs(case)[:views],
            prior=prior,
            poses=poses,
            estimate=estimate,
            seed=case.seed,
            settings=options,
        )

    def outcome(
        case: Case, result: ReconstructResult, options: ReconstructSettings, seconds: float = 0.0
    ) -> Outcome:
        @torch.no_grad()
        def novel(wanted: Tensor) -> Tensor:
            images, poses, targets = (
                part.to(prior.device) for part in (result.views.images, result.poses, wanted)
            )
            sampler = options.sampler
            found = sample_views(
                prior, prior.embed(images), poses, targets, settings=sampler, seed=case.seed
            )
            return found.views.cpu()

        return Outcome(result.poses, result.field, novel, seconds)

    def free(options: ReconstructSettings) -> Method:
        return lambda case: outcome(case, solve(case, len(case.inputs), None, options), options)

    def searched(options: ReconstructSettings) -> Method:
        """Rows with one and the same search: done once a case, its seconds count in each."""

        def run(case: Case) -> Outcome:
            key = (case.name, len(case.inputs), case.seed)
            estimate, seconds = searches.get(key, (None, 0.0))
            result = solve(case, len(case.inputs), None, options, estimate)
            if estimate is None:
                searches.clear()  # rows of a case follow each other
                searches[key] = result.estimate, result.report["seconds_by_phase"]["poses"]
            return outcome(case, result, options, seconds)

        return run

    def one_view(case: Case) -> Outcome:
        """Zero123's way: the first view alone conditions every sample the field is fitted to."""
        with torch.no_grad():
            given = prior.embed(on_white(case.inputs[:1]).to(prior.device))
        azimuth = torch.zeros_like(given.radius)
        pose = torch.stack((given.elevation, azimuth, given.radius), 1).cpu()
        return outcome(case, solve(case, 1, pose, full), full)

    def true_poses(case: Case) -> Outcome:
        return outcome(case, solve(case, len(case.inputs), case.poses, full), full)

    return {
        "one view": one_view,
        "random start": free(replace(full, start="random")),
        "grid": searched(replace(full, m_step=False, rendering=False)),
        "grid + EM": searched(replace(full, rendering=False)),
        "grid + EM + rendering": searched(full),
        "true poses": true_poses,
    }
