"""Meshes of radiance fields: marching cubes, vertex colours, glTF; and how far off they are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes
from torch import Tensor

from latentdem.operators.radiance_field import RadianceField


class EmptyFieldError(ValueError):
    """A field without a surface at the level asked for."""


# Share of the light that one voxel of the surface absorbs.  Fitted surfaces have about one half,
# and fall apart above it; below it they grow fat.
_SURFACE_ALPHA = 0.45


def surface_level(field: RadianceField) -> float:
    """The density of which one voxel absorbs 45 % of the light, ``-log(0.55) / voxel``.

    A field that never becomes so dense is cut at half of its highest density.
    """
    level = -math.log(1 - _SURFACE_ALPHA) / field.voxel
    return min(level, 0.5 * float(field.density.max()))


def _surface_color(field: RadianceField) -> Tensor:
    """Colour averaged over each voxel's neighbours with their density as weight ``[3,D,H,W]``.

    Where nothing is, no view says what colour it has; the surface must not take that colour.
    """
    weight = field.density + 1e-6

    def blur(grid: Tensor) -> Tensor:
        return F.avg_pool3d(grid[None], 3, stride=1, padding=1)[0]

    return blur(field.color * weight) / blur(weight)


def extract_mesh(
    field: RadianceField, level: float | None = None, *, smallest_part: float = 0.02
) -> trimesh.Trimesh:
    """Surface of a field in world units (z up), with vertex colours.

    Args:
        field: the field.
        level: density of the surface; :func:`surface_level` by default.
        smallest_part: parts with less than this share of all faces are left out.

    Raises:
        EmptyFieldError: density stays below ``level`` everywhere.

    >>> grid = torch.linspace(-1, 1, 24)
    >>> z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    >>> ball = (200 * (0.5 - (x * x + y * y + z * z).sqrt())).clamp(0, 100)[None]
    >>> mesh = extract_mesh(RadianceField(ball, torch.ones(3, 24, 24, 24)))
    >>> bool(mesh.is_watertight)
    True
    """
    density = field.density.detach()
    highest = float(density.max())
    level = surface_level(field) if level is None else level
    if not 0 < level < highest:
        raise EmptyFieldError(
            f"the field has no surface: its density reaches {highest:.3g} and the level is "
            f"{level:.3g}"
        )
    # A border of zeros closes the surface where the object touches the grid's border.
    volume = F.pad(density[0], (1,) * 6).cpu().double().numpy()
    # No ray looks into what is closed all around; a fit leaves it empty, and an object is not.
    solid = volume > level
    volume[ndimage.binary_fill_holes(solid) & ~solid] = 2 * level
    vertices, faces, _, _ = marching_cubes(volume, level)
    # Array order z, y, x; reading it backwards mirrors, so the faces turn over too.
    size = torch.tensor(density.shape[1:]).flip(0).double().numpy()
    unit = 2 * (vertices[:, ::-1] - 1) / np.maximum(size - 1, 1) - 1
    points = torch.from_numpy(np.ascontiguousarray(unit)).float().to(density.device)
    color = F.grid_sample(
        _surface_color(field).detach().float()[None],
        points[None, None, None],
        padding_mode="border",
        align_corners=True,
    )[0, :, 0, 0].T
    rgba = np.full((len(unit), 4), 255, dtype=np.uint8)
    rgba[:, :3] = (color.clamp(0, 1) * 255).round().byte().cpu().numpy()
    mesh = trimesh.Trimesh(unit * field.extent, faces, vertex_colors=rgba, process=False)
    if mesh.volume < 0:
        mesh.invert()
    return _without_specks(mesh, smallest_part)


def _without_specks(mesh: trimesh.Trimesh, smallest: float) -> trimesh.Trimesh:
    labels = trimesh.graph.connected_component_labels(
        mesh.face_adjacency, node_count=len(mesh.faces)
    )
    counts = np.bincount(labels)
    large = counts >= max(smallest * len(mesh.faces), 1)
    large[counts.argmax()] = True
    if not large.all():
        mesh.update_faces(large[labels])
        mesh.remove_unreferenced_vertices()
    return mesh


def save_mesh(mesh: trimesh.Trimesh, path: Path) -> Path:
    """Write a mesh with z up as binary glTF, which wants y up: ``(x, y, z) -> (x, z, -y)``."""
    turned = mesh.copy()
    turned.apply_transform(
        np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=float)
    )
    turned.export(path, file_type="glb")
    return path


def chamfer_distance(
    mesh: trimesh.Trimesh, points: Tensor, *, samples: int = 10_000, seed: int = 0
) -> float:
    """Mean distance from surface to ``points`` and back, averaged, in world units.

    Args:
        mesh: its surface is sampled evenly.
        points: ``[M,3]`` on the true surface.
        samples: points on the mesh.
        seed: of the samples.
    """
    if points.dim() != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"points must have shape [M,3], M >= 1, found {list(points.shape)}")
    ours = trimesh.sample.sample_surface(mesh, samples, seed=seed)[0]
    theirs = points.detach().cpu().double().numpy()
    there = cKDTree(theirs).query(ours)[0].mean()
    back = cKDTree(ours).query(theirs)[0].mean()
    return float(there + back) / 2
