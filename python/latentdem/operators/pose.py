"""Camera poses of the 3D task: three numbers a view, wrapped on the sphere.

A pose is ``[...,3]``: elevation and azimuth in degrees, radius in world units, of a camera that
looks at the origin (:func:`latentdem_ext.pose_from_spherical`).  The object sits at the origin, z
is up, and the first input view has azimuth zero: the world's turn about z is a gauge, fixed so.
"""

from __future__ import annotations

import torch
from torch import Tensor

import latentdem_ext as ext


def wrap_degrees(angle: Tensor) -> Tensor:
    """The same angle in [-180, 180).

    >>> import torch
    >>> wrap_degrees(torch.tensor([190.0, -190.0, 180.0])).tolist()
    [-170.0, 170.0, -180.0]
    """
    return torch.remainder(angle + 180, 360) - 180


def relative_pose(source: Tensor, target: Tensor) -> Tensor:
    """``target - source`` ``[...,3]``, its azimuth wrapped: what the prior is conditioned on.

    >>> import torch
    >>> a, b = torch.tensor([10.0, 170.0, 2.5]), torch.tensor([30.0, -170.0, 2.5])
    >>> relative_pose(a, b).tolist()
    [20.0, 20.0, 0.0]
    """
    elevation, azimuth, radius = (target - source).unbind(-1)
    return torch.stack((elevation, wrap_degrees(azimuth), radius), -1)


def wrap_pose(pose: Tensor, *, elevation: float = 89.0, radius: tuple[float, float]) -> Tensor:
    """A pose brought back onto the sphere: azimuth wrapped, the other two held in their ranges.

    Args:
        pose: ``[...,3]``.
        elevation: its largest magnitude in degrees; a camera cannot climb over the pole, where
            its up direction would flip.
        radius: smallest and largest.
    """
    e, a, r = pose.unbind(-1)
    return torch.stack((e.clamp(-elevation, elevation), wrap_degrees(a), r.clamp(*radius)), -1)


def camera_to_world(pose: Tensor) -> Tensor:
    """``[...,3]`` -> ``[...,4,4]`` camera-to-world with OpenCV axes, differentiable."""
    elevation, azimuth, radius = pose.unbind(-1)
    return ext.pose_from_spherical(elevation, azimuth, radius)


def rotation_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """Angle in degrees ``[...]`` between two relative rotations ``[...,3,3]``.

    Source: the geodesic distance on SO(3), ``|R_e - R_t|_F = 2 sqrt(2) sin(angle / 2)``, which
    keeps its precision near zero where the trace does not.
    """
    half = (estimate - truth).flatten(-2).norm(dim=-1) / 8**0.5
    return torch.rad2deg(2 * torch.asin(half.clamp(max=1.0)))


def relative_rotation(source: Tensor, target: Tensor) -> Tensor:
    """Rotation ``[...,3,3]`` that takes the source camera's axes to the target's, from poses."""
    a, b = camera_to_world(source)[..., :3, :3], camera_to_world(target)[..., :3, :3]
    return a.transpose(-1, -2) @ b
