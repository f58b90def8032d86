"""``reconstruct``: two or more views of one object, without poses, to poses and a 3D object."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from latentdem.devices import dtype_name
from latentdem.em.denoising_score import DenoisingScore
from latentdem.em.driver import versions
from latentdem.em.novel_views import ring_poses, sample_views
from latentdem.em.object_field import contradictions, fit_object, uncertain_views
from latentdem.em.options import placement
from latentdem.em.poses import PoseEstimate, estimate_poses
from latentdem.em.reconstruct_result import ReconstructResult
from latentdem.em.reconstruct_settings import ReconstructSettings
from latentdem.io import ImageLike, InputError
from latentdem.operators.field import FieldFit
from latentdem.operators.mesh import EmptyFieldError, extract_mesh
from latentdem.operators.pose import relative_rotation, rotation_error, wrap_pose
from latentdem.operators.radiance_field import RadianceField
from latentdem.priors.objects import ObjectsPrior, load_objects_prior
from latentdem.views import load_views

Progress = Callable[[str, float], None]
"""Called as ``progress(phase, share of the whole run that is done)``."""


@lru_cache(maxsize=1)
def _packaged() -> ObjectsPrior:
    return load_objects_prior()


class _Phases:
    """Seconds by phase, and the share of the run that is done, from the phases' usual costs."""

    def __init__(self, plan: list[tuple[str, float]], progress: Progress | None) -> None:
        self.plan, self.progress = plan, progress
        self.total = sum(cost for _, cost in plan)
        self.before, self.position = 0.0, -1
        self.seconds: dict[str, float] = {}
        self.clock = time.perf_counter()

    def begin(self, phase: str) -> None:
        """Go on to the next planned ``phase``; what lies between is left out."""
        self.end()
        while True:
            self.position += 1
            if self.plan[self.position][0] == phase:
                break
            self.before += self.plan[self.position][1]
        self.step(0, 1)

    def end(self) -> None:
        """Book the seconds of the present phase."""
        now = time.perf_counter()
        if self.position >= 0:
            phase, cost = self.plan[self.position]
            self.before += cost
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.clock
        self.clock = now

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` steps of the present phase."""
        phase, cost = self.plan[self.position]
        if self.progress is not None:
            share = (self.before + cost * done / total) / self.total
            self.progress(phase, min(share, 1.0))


def reconstruct(
    views: Sequence[ImageLike],
    *,
    prior: ObjectsPrior | None = None,
    masks: Sequence[ImageLike] | None = None,
    poses: Tensor | None = None,
    estimate: PoseEstimate | None = None,
    elevation: float | None = None,
    seed: int = 0,
    rounds: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    settings: ReconstructSettings | None = None,
    progress: Progress | None = None,
) -> ReconstructResult:
    """Recover camera poses, novel views and a 3D object from a few views without poses.

    1. Poses from a grid, scored by the denoising loss with fixed noise, refined by Gauss-Newton.
    2. E-step: novel views around the object, each drawn with all given views' predictions fused;
       M-step within: the given views' poses.
    3. A radiance field is fitted to the sampled and the given views; the given views' poses move
       with it through the renderer.
    4. Again from 2, from the field's renders, until no pose moves by a degree.

    Args:
        views: two or more pictures of one object: paths, PIL images, arrays ``[H,W(,C)]`` or
            tensors ``[(1,)C,H,W]``.
        prior: objects prior; by default the packaged one.
        masks: one for each view, white where the object is; by default the alpha channel, or
            what differs from the border's colour.
        poses: ``[K,3]`` elevation and azimuth in degrees, radius, if they are known; they stay as
            they are but for the gauge: azimuths are counted from the first view's.  A single view
            is allowed then.
        estimate: of an earlier run on the same views (``result.estimate``): step 1, the longest, is
            left out, to try other settings of the rest.
        elevation: of the first view in degrees, if it is known.
        seed: of all random numbers; the same seed gives the same result.
        rounds: alternations of sampler and field, at most.
        device: where to compute: ``cpu``, ``cuda``, ``cuda:1`` ...; by default where the prior is
            (the packaged one: on the CPU).  The result is on the CPU.
        dtype: of the networks, ``fp16``, ``bf16`` or ``fp32`` (or torch's own); by default float16
            on CUDA and the prior's own elsewhere.  Poses and field are float32.
        settings: everything else.
        progress: see :data:`Progress`.

    Returns:
        See :class:`ReconstructResult`.

    Raises:
        ValueError: input or option that cannot be used; one line that says why.

    >>> import latentdem
    >>> result = latentdem.reconstruct(["front.png", "side.png"])  # doctest: +SKIP
    >>> result.poses, result.mesh, result.save("out")  # doctest: +SKIP
    """
    options = settings or ReconstructSettings()
    if rounds is not None:
        options = replace(options, rounds=rounds)
    used = prior or _packaged()
    place, dtype = placement(device, dtype, used.device)
    least = 2 if poses is None else 1
    loaded = load_views(views, masks=masks, size=used.image_size, at_least=least).to(place)
    known = None if poses is None else _known_poses(poses, len(loaded)).to(place)
    _check_elevation(elevation)
    if estimate is not None and (known is not None or len(estimate.poses) != len(loaded)):
        raise InputError(
            f"estimate must be of the same {len(loaded)} views and come without poses, found one "
            f"of {len(estimate.poses)}" + ("" if known is None else " and poses")
        )
    estimate = None if estimate is None else estimate.to(place)
    used = used.to(place, dtype)
    # Seconds on two cores: all pairs of views are compared, each view is asked for every target.
    pairs = len(loaded) * (len(loaded) - 1) / 2
    searching = 20 * pairs if known is None and estimate is None else 0.1
    plan = [("poses", searching)] + [("views", 1.5 * len(loaded)), ("field", 7)] * options.rounds
    plan.append(("mesh", 0.6))
    phases = _Phases(plan, progress)
    started = time.perf_counter()
    with torch.no_grad():
        given = used.embed(loaded.images)
    score = DenoisingScore(used, given, options.poses, seed, elevation=elevation)
    history: list[dict[str, Any]] = []
    if known is None and estimate is None:
        phases.begin("poses")
        estimate = estimate_poses(
            score,
            start=options.start,
            seed=seed,
            callback=lambda phase, done, total: phases.step(
                done + (total if phase == "refinement" else 0), 2 * total
            ),
        )
    if estimate is not None:
        current, uncertainty = estimate.poses, estimate.uncertainty
    else:
        assert known is not None
        current, uncertainty = known, torch.zeros_like(known[:, 0])
    history.append({"phase": "poses", "poses": current.tolist()})
    free = torch.zeros(len(loaded), 3, dtype=torch.bool)
    if options.rendering and known is None:
        free[:] = True
        free[0, 1] = False  # the gauge
        free[0, 0] = elevation is None
    # The ring stands still over the rounds, so that its views can be drawn again and again.
    targets = ring_poses(
        current, options.sampler.targets, options.sampler.spread, used.camera.elevation
    )
    fit: FieldFit | None = None
    evaluations = 0
    for turn in range(options.rounds):
        before = current
        phases.begin("views")
        sampled = sample_views(
            used,
            given,
            current,
            targets,
            settings=options.sampler,
            uncertainty=uncertainty,
            score=score if options.m_step and known is None else None,
            start=None if fit is None else _renders(used, fit.field, targets),
            seed=seed + turn,
            callback=phases.step,
        )
        current = sampled.poses
        evaluations += sampled.evaluations
        phases.begin("field")
        fit = fit_object(loaded, sampled, targets, score, options, fit, free, seed, phases.step)
        current = fit.poses[: len(loaded)]
        moved = _largest_turn(before, current)
        uncertainty = uncertainty.clamp(max=max(moved, 1.0))
        history.append(
            {
                "phase": f"round {turn + 1}",
                "poses": current.tolist(),
                "turned": moved,
                "disagreement": sampled.disagreement.tolist(),
                "residual": fit.residual[: len(loaded)].tolist(),
                "steps": sampled.history,
            }
        )
        if moved < options.tolerance and turn > 0:
            break
    assert fit is not None
    phases.begin("mesh")
    residual = fit.residual[: len(loaded)]
    evidence = score.evidence(current)
    warnings = contradictions(loaded.names, residual, evidence, options)
    if estimate is not None:
        warnings += uncertain_views(loaded.names, estimate.uncertainty)
    try:
        mesh = extract_mesh(fit.field)
    except EmptyFieldError as error:
        mesh = None
        warnings.append(f"no mesh: {error}")
    phases.end()
    if progress is not None:
        progress("mesh", 1.0)
    estimate = None if estimate is None else estimate.to("cpu")
    return ReconstructResult(
        poses=current.cpu(),
        uncertainty=_final_uncertainty(estimate, len(loaded)),
        residual=residual.cpu(),
        novel_poses=targets.cpu(),
        novel_views=sampled.views.cpu(),
        field=fit.field.to("cpu"),
        mesh=mesh,
        views=loaded.to("cpu"),
        fov=used.camera.fov,
        history=history,
        estimate=estimate,
        report={
            "seed": seed,
            "poses_given": known is not None,
            "elevation_given": elevation,
            "settings": asdict(options),
            "prior": used.name,
            "device": str(place),
            "dtype": dtype_name(used.dtype),
            "views": loaded.names,
            "poses": current.tolist(),
            "uncertainty": None if estimate is None else estimate.uncertainty.tolist(),
            "margin": None if estimate is None or len(estimate.modes) < 2 else estimate.margin,
            "other_poses": [] if estimate is None else estimate.modes[1:].tolist(),
            "residual": residual.tolist(),
            "evidence": evidence.tolist(),
            "warnings": warnings,
            "seconds": round(time.perf_counter() - started, 3),
            "seconds_by_phase": {k: round(v, 3) for k, v in phases.seconds.items()},
            "network_evaluations": evaluations + score.evaluations,
            "versions": versions(),
        },
    )


def _known_poses(poses: Tensor, count: int) -> Tensor:
    poses = torch.as_tensor(poses, dtype=torch.float32)
    if poses.shape != (count, 3):
        raise InputError(
            f"poses must have shape [K,3] for K = {count} views, found {list(poses.shape)}"
        )
    if not bool(torch.isfinite(poses).all()) or bool((poses[:, 2] <= 0).any()):
        raise InputError("poses must be finite, their radii positive")
    gauge = poses[0] * poses.new_tensor([0.0, 1.0, 0.0])
    return wrap_pose(poses - gauge, radius=(0.0, float("inf")))


def _check_elevation(elevation: float | None) -> None:
    if elevation is not None and not -90 < elevation < 90:
        raise InputError(f"elevation must lie between -90 and 90 degrees, found {elevation}")


def _renders(prior: ObjectsPrior, field: RadianceField, targets: Tensor) -> Tensor:
    """Latents of the field at the targets, where the next trajectory starts."""
    with torch.no_grad():
        color, _, _ = field.render(targets, fov=prior.camera.fov, image_size=prior.image_size)
        return prior.encode(color.clamp(0, 1))


def _largest_turn(before: Tensor, after: Tensor) -> float:
    """Largest change in degrees of a view's rotation relative to the first's."""
    if len(before) < 2:
        return 0.0
    turns = [
        relative_rotation(poses[:1].expand_as(poses[1:]), poses[1:]) for poses in (before, after)
    ]
    return float(rotation_error(turns[0], turns[1]).max())


def _final_uncertainty(estimate: PoseEstimate | None, count: int) -> Tensor:
    return torch.zeros(count) if estimate is None else estimate.uncertainty
