"""The result of :func:`latentdem.reconstruct`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trimesh
from torch import Tensor

import latentdem_ext as ext
from latentdem.em.poses import PoseEstimate
from latentdem.io import atomic_folder
from latentdem.operators.mesh import save_mesh
from latentdem.operators.pose import camera_to_world
from latentdem.operators.radiance_field import RadianceField
from latentdem.pictures import sheet, turntable
from latentdem.views import Views

_CONVENTIONS = {
    "world": "right-handed, z up, object at the origin within a ball of radius 0.7; the first "
    "view has azimuth 0: it looks from +x",
    "elevation": "degrees above the xy plane",
    "azimuth": "degrees from +x towards +y",
    "radius": "distance of the camera from the origin, world units",
    "camera_to_world": "4 x 4, OpenCV camera axes: x right, y down, z forward",
    "intrinsics": "fx, fy, cx, cy in pixels of an image of image_size; pixel centres at + 0.5",
    "uncertainty": "standard deviation of the azimuth against the first view's, degrees",
    "residual": "root mean square difference of the view from the field's rendering, of [0, 1]",
}


@dataclass
class ReconstructResult:
    """What was recovered, and how.

    Attributes:
        poses: ``[K,3]`` elevation and azimuth in degrees, radius; the first azimuth is zero.
        uncertainty: ``[K]`` standard deviation of the azimuth, degrees.
        residual: ``[K]`` root mean square difference of each view from the field's rendering.
        novel_poses: ``[N,3]`` of the sampled views.
        novel_views: ``[N,3,S,S]`` in [0, 1], as sampled.
        field: the radiance field.
        mesh: its surface with vertex colours, z up; None if the field has none.
        views: the given views as used, with their masks and names.
        fov: angle of view in degrees.
        history: one dictionary a phase.
        estimate: where the poses started, with its other modes; None if they were given.
        report: settings, seed, seconds by phase, warnings, versions; JSON-ready.
    """

    poses: Tensor
    uncertainty: Tensor
    residual: Tensor
    novel_poses: Tensor
    novel_views: Tensor
    field: RadianceField
    mesh: trimesh.Trimesh | None
    views: Views
    fov: float
    history: list[dict[str, Any]]
    estimate: PoseEstimate | None
    report: dict[str, Any]

    @property
    def camera_to_world(self) -> Tensor:
        """``[K,4,4]``, OpenCV camera axes."""
        return camera_to_world(self.poses)

    @torch.no_grad()
    def render(self, poses: Tensor, *, image_size: int | None = None) -> Tensor:
        """Views ``[N,3,s,s]`` of the field at ``poses [N,3]``."""
        size = self.novel_views.shape[-1] if image_size is None else image_size
        return self.field.render(poses, fov=self.fov, image_size=size)[0]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write everything to ``folder``.

        Files: ``poses.json``, ``novel_views.png`` (given views and their renderings above, sampled
        views and theirs below), ``turntable.webp``, ``field.safetensors``, ``mesh.glb`` (y up, as
        glTF wants it; left out if there is no surface) and, last, ``report.json``.
        """
        target = Path(folder)
        with atomic_folder(target) as partial:
            (partial / "poses.json").write_text(json.dumps(self._poses(), indent=2) + "\n")
            self._sheet().save(partial / "novel_views.png")
            mean = self.poses.mean(0)
            turntable(
                self.field,
                partial / "turntable.webp",
                fov=self.fov,
                elevation=float(mean[0]),
                radius=float(mean[2]),
            )
            self.field.save(partial / "field.safetensors")
            if self.mesh is not None:
                save_mesh(self.mesh, partial / "mesh.glb")
            report = self.report | {"history": self.history}
            (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        if self.mesh is None:  # that of an earlier run does not belong to this one
            (target / "mesh.glb").unlink(missing_ok=True)
        return target

    def _sheet(self) -> Any:
        """Given views beside their renderings, then the sampled views in a ring."""
        drawn = self.render(self.poses)
        pairs = torch.stack((self.views.images, drawn), 1).flatten(0, 1)
        labels = [text for name in self.views.names for text in (name, "field")]
        columns = 6
        # Whole rows of given views, so that the ring starts on its own row.
        blank = -len(pairs) % columns
        pairs = torch.cat((pairs, pairs.new_ones(blank, *pairs.shape[1:])))
        labels += [""] * blank
        ring = [f"az {a:.0f} el {e:.0f}" for e, a, _ in self.novel_poses.tolist()]
        return sheet(torch.cat((pairs, self.novel_views)), columns, labels + ring)

    def _poses(self) -> dict[str, Any]:
        size = self.novel_views.shape[-1]
        lens = ext.intrinsics_from_fov(torch.tensor(self.fov), (size, size))
        views = [
            {
                "name": name,
                "elevation": elevation,
                "azimuth": azimuth,
                "radius": radius,
                "uncertainty": float(self.uncertainty[k]),
                "residual": float(self.residual[k]),
                "camera_to_world": self.camera_to_world[k].tolist(),
            }
            for k, (name, (elevation, azimuth, radius)) in enumerate(
                zip(self.views.names, self.poses.tolist(), strict=True)
            )
        ]
        return {
            "conventions": _CONVENTIONS,
            "fov": self.fov,
            "image_size": [size, size],
            "intrinsics": lens.tolist(),
            "views": views,
        }
