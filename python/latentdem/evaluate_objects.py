"""Quality of pose-free reconstruction on objects that no training has seen.

Held-out objects are generated shapes with seeds of their own, pybullet's last 100 block objects
and its textured meshes (:mod:`latentdem.training.object_views`).  A case is two or three views of
one of them; 8 others of its views are never shown to any method.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from latentdem.devices import dtype_name
from latentdem.em.driver import versions
from latentdem.em.options import placement
from latentdem.evaluate_model import device_name
from latentdem.evaluate_object_methods import ROWS, Case, Method, Outcome, build_methods
from latentdem.figures_table import figure, figures_table
from latentdem.metrics import psnr, silhouette_iou, structural_similarity
from latentdem.operators.mesh import EmptyFieldError, chamfer_distance, extract_mesh
from latentdem.operators.pose import relative_rotation, rotation_error, wrap_degrees
from latentdem.pictures import sheet
from latentdem.priors.objects import PACKAGED_OBJECTS, CameraModel
from latentdem.priors.weights import source_digest
from latentdem.results import (
    machine,
    peak_memory,
    reset_peak_memory,
    store_results,
    stored_results,
)
from latentdem.training.object_views import on_white, read_shards

UNSEEN = 8
NEAR = 90.0
"""Degrees of azimuth between two views of the subset where they share much of the object."""

SUBSETS = ("pairs", "pairs within 90 degrees", "triples")
TEXTURED_EVERY = 10
ROTATION_SHARES = (5, 15, 30)


class HeldOutObjects:
    """The held-out objects in ``folder``, in a fixed order that mixes the kinds.

    Every tenth is one of pybullet's textured meshes until they are used up; the rest alternate
    between generated shapes and block objects.

    Raises:
        FileNotFoundError: no held-out views there.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, dict[str, Tensor]] = {}
        kinds: dict[str, list[str]] = {"procedural": [], "block": [], "textured": []}
        for names, shard in read_shards(folder, "heldout"):
            for index, name in enumerate(names):
                self.tensors[name] = {key: value[index] for key, value in shard.items()}
                kinds[object_kind(name)].append(name)
        self.names: list[str] = []
        while any(kinds.values()):
            turn = len(self.names)
            order = ["procedural", "block"] if turn % 2 == 0 else ["block", "procedural"]
            order.insert(0 if turn % TEXTURED_EVERY == TEXTURED_EVERY - 1 else 2, "textured")
            kind = next(k for k in order if kinds[k])
            self.names.append(kinds[kind].pop(0))

    def case(self, name: str, views: int, seed: int) -> Case:
        """``views`` inputs and 8 unseen views of an object, a function of the arguments."""
        tensors = self.tensors[name]
        images, poses = tensors["images"], tensors["poses"].clone()
        if len(images) < views + UNSEEN:
            raise ValueError(f"{name} has {len(images)} views, {views + UNSEEN} are needed")
        digest = hashlib.sha256(f"{name} {views} {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(len(images), generator=generator)
        chosen, unseen = order[:views], order[views : views + UNSEEN]
        turn = poses[chosen[0], 1].clone()
        poses[:, 1] = wrap_degrees(poses[:, 1] - turn)
        surface = tensors.get("surface", poses.new_zeros(0, 3))
        return Case(
            name,
            seed,
            images[chosen],
            poses[chosen],
            images[unseen],
            poses[unseen],
            turn_about_z(surface, -turn),
        )


def object_kind(name: str) -> str:
    """``procedural``, ``block`` or ``textured``."""
    kind = name.partition("-")[0]
    return kind if kind in ("procedural", "block") else "textured"


def turn_about_z(points: Tensor, degrees: Tensor) -> Tensor:
    """Points ``[P,3]`` turned by ``degrees`` from x towards y."""
    angle = torch.deg2rad(degrees)
    x, y, z = points.unbind(-1)
    c, s = angle.cos(), angle.sin()
    return torch.stack((c * x - s * y, s * x + c * y, z), -1)


def seen_from(estimate: Tensor, truth: Tensor, wanted: Tensor) -> Tensor:
    """Where to look from in an estimated world, ``[M,3]``.

    Unseen poses are known relative to the first view, as the prior is conditioned on them: they
    keep their differences of elevation, azimuth and radius from it.

    Args:
        estimate: ``[3]`` pose of the first view in the estimated world.
        truth: ``[3]`` its true pose.
        wanted: ``[M,3]`` true poses of the views to draw.
    """
    elevation, azimuth, radius = (estimate + wanted - truth).unbind(-1)
    return torch.stack((elevation.clamp(-89, 89), wrap_degrees(azimuth), radius), -1)


@torch.no_grad()
def measure(case: Case, outcome: Outcome, fov: float) -> tuple[dict[str, Any], Tensor]:
    """Figures of merit of an outcome, and its field's views ``[M,3,s,s]`` at the unseen poses."""
    truth, mask = on_white(case.unseen), case.unseen[:, 3:].float() / 255
    poses = outcome.poses.cpu()
    targets = seen_from(poses[0], case.poses[0], case.unseen_poses)
    size = truth.shape[-1]
    views, opacity, _ = outcome.field.render(targets, fov=fov, image_size=size)
    used = len(poses)
    figures: dict[str, Any] = {
        "rotation": [],
        "radius": (poses[:, 2] - case.poses[:used, 2]).abs().tolist(),
        "first_elevation": float((poses[0, 0] - case.poses[0, 0]).abs()),
        "psnr": float(psnr(views, truth).mean()),
        "ssim": float(structural_similarity(views, truth).mean()),
        "iou": float(silhouette_iou(opacity, mask).mean()),
        "psnr_sampled": None,
        "chamfer": None,
    }
    if used > 1:
        estimated = relative_rotation(poses[:1], poses[1:])
        true = relative_rotation(case.poses[:1], case.poses[1:])
        figures["rotation"] = rotation_error(estimated, true).tolist()
    if len(case.surface):
        try:
            mesh = extract_mesh(outcome.field)
            figures["chamfer"] = chamfer_distance(mesh, case.surface)
        except EmptyFieldError:
            figures["no_surface"] = True
    if outcome.novel is not None:
        figures["psnr_sampled"] = float(psnr(outcome.novel(targets), truth).mean())
    return figures, views


def _run(case: Case, method: Method, fov: float) -> tuple[dict[str, Any], Tensor | None]:
    reset_peak_memory()
    started = time.perf_counter()
    try:
        outcome = method(case)
    except ValueError as error:
        return {"failed": str(error)}, None
    seconds, memory = time.perf_counter() - started, peak_memory()
    seconds += outcome.shared_seconds
    figures, views = measure(case, outcome, fov)
    return figures | {"seconds": round(seconds, 2), "peak_mb": memory}, views


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    good = [record for record in records if "failed" not in record]

    def every(key: str) -> list[float]:
        return [record[key] for record in good if record.get(key) is not None]

    rotation = [angle for record in good for angle in record["rotation"]]
    # Views that got no pose because the method gave up count as missed.
    lost = sum(len(record["relative_azimuth"]) for record in records if "failed" in record)
    shares = {
        f"below_{limit}": sum(angle < limit for angle in rotation) / (len(rotation) + lost)
        for limit in ROTATION_SHARES
        if rotation or lost
    }
    return {
        "cases": len(records),
        "failed": len(records) - len(good),
        "no_surface": sum(record.get("no_surface", False) for record in good),
        "rotation_median": _median(rotation),
        **shares,
        "radius": _mean([error for record in good for error in record["radius"]]),
        "first_elevation": _mean(every("first_elevation")),
        "psnr": _mean(every("psnr")),
        "psnr_std_over_seeds": _spread_over_seeds(good),
        "psnr_sampled": _mean(every("psnr_sampled")),
        "ssim": _mean(every("ssim")),
        "iou": _mean(every("iou")),
        "chamfer": _mean(every("chamfer")),
        "seconds": _median(every("seconds")),
        "peak_mb": max(every("peak_mb"), default=None),
    }


def _spread_over_seeds(records: list[dict[str, Any]]) -> float | None:
    """Standard deviation over seeds of the mean PSNR over the objects that all seeds have."""
    by_seed: dict[int, dict[str, float]] = {}
    for record in records:
        by_seed.setdefault(record["seed"], {})[record["object"]] = record["psnr"]
    common = set.intersection(*map(set, by_seed.values())) if by_seed else set()
    if len(by_seed) < 2 or not common:
        return None
    return statistics.stdev(
        statistics.fmean(values[name] for name in common) for values in by_seed.values()
    )


def in_subset(record: dict[str, Any], subset: str) -> bool:
    """Whether a stored record counts in ``subset``, one of :data:`SUBSETS`."""
    if subset == "triples":
        return record["views"] == 3
    near = subset == "pairs" or abs(record["relative_azimuth"][0]) <= NEAR
    return record["views"] == 2 and near


def summarize(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by subset and row; rows are compared on the cases that all of them have."""
    rows = [row for row in ROWS if any(record["row"] == row for record in records)]
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for subset in SUBSETS:
        by_row = {
            row: {
                (r["object"], r["views"], r["seed"]): r
                for r in records
                if r["row"] == row and in_subset(r, subset)
            }
            for row in rows
        }
        common = set.intersection(*map(set, by_row.values())) if by_row else set()
        if common:
            summary[subset] = {
                row: _summarize([found[key] for key in sorted(common)])
                for row, found in by_row.items()
            }
    return summary


COLUMNS = (
    figure("rotation", "rotation_median", ".1f"),
    *(figure(f"< {limit}", f"below_{limit}", ".0%", main=limit != 5) for limit in ROTATION_SHARES),
    figure("radius", "radius", ".3f", main=False),
    figure("PSNR", "psnr", ".2f"),
    figure("sampled", "psnr_sampled", ".2f", main=False),
    figure("SSIM", "ssim", ".3f", main=False),
    figure("IoU", "iou", ".3f", main=False),
    figure("chamfer", "chamfer", ".4f", main=False),
    figure("s", "seconds", ".1f"),
    figure("MB", "peak_mb", ".0f", main=False),
    figure("failed", "failed", "d", main=False),
)


def summary_table(title: str, rows: dict[str, dict[str, Any]], width: int) -> Table:
    """One subset's rows for a terminal of ``width`` columns."""
    title = f"{title}, {max(row['cases'] for row in rows.values())} cases"
    return figures_table(title, COLUMNS, rows, width=width)


def _plan(
    names: list[str], counts: list[int], seeds: int, methods: dict[str, Method]
) -> Iterator[tuple[int, int, str, str]]:
    """Seeds, numbers of views, objects, rows: whenever it stops, all rows saw the same."""
    for seed in range(seeds):
        for views in counts:
            for name in names:
                for row in methods:
                    yield seed, views, name, row


def run_objects_suite(
    output: Path,
    *,
    data: Path,
    prior: Path | None = None,
    regressor: Path | None = None,
    rows: list[str] | None = None,
    objects: int = 20,
    counts: list[int] | None = None,
    seeds: int = 3,
    pictures: Path | None = None,
    console: Console,
    methods: dict[str, Method] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Run all cases, write ``output`` after each; cases that are already in it are kept.

    Args:
        output: JSON file.
        data: folder of the held-out views.
        prior: see :func:`~latentdem.evaluate_object_methods.build_methods`, as are ``regressor``
            and ``rows`` (all of them by default).
        objects: how many of the held-out ones.
        counts: numbers of input views; pairs and triples by default.
        seeds: choices of views for every object and number.
        pictures: folder for sheets: inputs, true unseen views, the field's.
        console: for progress and the tables.
        methods: instead of those of ``rows``.
        device: of the prior, as in :func:`latentdem.reconstruct`; so is ``dtype``.
        dtype: None: float16 on CUDA, else as it is.

    Raises:
        ValueError: ``output`` holds another setup, or an option that makes no sense.
        FileNotFoundError: no held-out views, prior or regressor.
    """
    counts = [2, 3] if counts is None else counts
    if not counts or not set(counts) <= {2, 3}:
        raise ValueError(f"the numbers of views must be 2, 3 or both, found {counts}")
    if objects < 1 or seeds < 1:
        raise ValueError(f"objects and seeds must be positive, found {objects} and {seeds}")
    held_out = HeldOutObjects(data)
    names = held_out.names[:objects]
    setup = {
        "suite": "objects",
        "unseen": UNSEEN,
        "prior": source_digest(prior or PACKAGED_OBJECTS),
        "regressor": None if regressor is None else source_digest(regressor),
        "versions": versions(),
    }
    # Results from before there were these stay what was asked for.
    if (device, dtype) != ("cpu", None):
        place, number_format = placement(device, dtype, torch.device("cpu"))
        setup |= {"device": device_name(place)}
        setup |= {} if number_format is None else {"dtype": dtype_name(number_format)}
    stored = stored_results(output, setup)
    records: list[dict[str, Any]] = [] if stored is None else stored["rows"]
    if methods is None:
        chosen = list(ROWS) if rows is None else rows
        methods = build_methods(
            chosen, prior=prior, regressor=regressor, device=device, dtype=dtype
        )
    fov = CameraModel().fov
    done = {(r["seed"], r["views"], r["object"], r["row"]) for r in records}
    plan = list(_plan(names, counts, seeds, methods))
    for position, key in enumerate(plan, 1):
        if key in done:
            continue
        seed, views, name, row = key
        case = held_out.case(name, views, seed)
        figures, drawn = _run(case, methods[row], fov)
        identity = {
            "object": name,
            "kind": object_kind(name),
            "views": views,
            "seed": seed,
            "relative_azimuth": case.poses[1:, 1].tolist(),
            "row": row,
        }
        records.append(identity | figures)
        _store(output, setup, records)
        if pictures is not None and drawn is not None:
            _picture(pictures, case, row, drawn)
        console.print(
            f"{position:4d}/{len(plan)} {_line(records[-1])}", highlight=False, soft_wrap=True
        )
    document: dict[str, Any] = _store(output, setup, records)
    for subset, summary in document["summary"].items():
        console.print(summary_table(subset, summary, console.width))
    return document


def _store(output: Path, setup: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    document = {
        "setup": setup,
        "machine": machine(),
        "summary": summarize(records),
        "rows": records,
    }
    store_results(output, document)
    return document


def _line(record: dict[str, Any]) -> str:
    head = f"{record['object']} {record['views']} views, seed {record['seed']}, {record['row']}: "
    if "failed" in record:
        return head + f"failed: {record['failed']}"
    rotation = ", ".join(f"{angle:.1f}" for angle in record["rotation"]) or "-"
    return head + (
        f"rotation {rotation} degrees, {record['psnr']:.2f} dB, IoU {record['iou']:.3f}, "
        f"{record['seconds']:.1f} s"
    )


def _picture(folder: Path, case: Case, row: str, views: Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inputs = on_white(case.inputs)
    blank = torch.ones(UNSEEN - len(inputs), *inputs.shape[1:])
    images = torch.cat((inputs, blank, on_white(case.unseen), views.clamp(0, 1)))
    stem = f"{case.name}-{len(inputs)}-{case.seed}-{row.replace(' + ', '+').replace(' ', '_')}"
    sheet(images, UNSEEN, tile=64).save(folder / f"{stem}.png")
