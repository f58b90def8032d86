"""Camera poses and intrinsics in plain, differentiable torch.

World axes are right-handed with **z up**; objects sit at the origin.  Unless said otherwise a
pose is camera-to-world, ``[...,4,4]``, with OpenCV camera axes (x right, y down, z forward): what
:func:`latentdem_ext.volume_render` takes.

Spherical coordinates of a camera that looks at the origin are its elevation above the xy plane,
its azimuth from +x towards +y, and its distance::

    position = radius (cos(elevation) cos(azimuth), cos(elevation) sin(azimuth), sin(elevation))

Angles are in degrees unless ``degrees=False``.  Zero123 (Liu et al., ICCV 2023) measures the
polar angle from +z, ``90 - elevation``, and stores poses as world-to-camera ``[...,3,4]`` with
Blender's, that is OpenGL's, camera axes (x right, y up, z backward).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CONVENTIONS = ("opencv", "opengl", "zero123")


def _radians(angle: Tensor, degrees: bool) -> Tensor:
    return torch.deg2rad(angle) if degrees else angle


def _angle(radians: Tensor, degrees: bool) -> Tensor:
    return torch.rad2deg(radians) if degrees else radians


def _check_pose(pose: Tensor, name: str, rows: tuple[int, ...] = (4,)) -> None:
    if pose.dim() < 2 or pose.shape[-1] != 4 or pose.shape[-2] not in rows:
        wanted = "|".join(map(str, rows))
        raise ValueError(f"{name} must have shape [...,{wanted},4], found {list(pose.shape)}")


def _homogeneous(rotation: Tensor, translation: Tensor) -> Tensor:
    """``[...,3,3]`` and ``[...,3]`` -> ``[...,4,4]``."""
    upper = torch.cat((rotation, translation[..., None]), -1)
    last = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*upper.shape[:-2], 1, 4)
    return torch.cat((upper, last), -2)


def invert_pose(pose: Tensor) -> Tensor:
    """Inverse of a rigid transform ``[...,4,4]``: ``(R, t) -> (R', -R' t)``.

    Raises:
        ValueError: wrong shape.

    >>> import torch
    >>> torch.equal(invert_pose(torch.eye(4)), torch.eye(4))
    True
    """
    _check_pose(pose, "pose")
    rotation = pose[..., :3, :3].transpose(-1, -2)
    return _homogeneous(rotation, -(rotation @ pose[..., :3, 3:])[..., 0])


def pose_from_spherical(
    elevation: Tensor, azimuth: Tensor, radius: Tensor | float, *, degrees: bool = True
) -> Tensor:
    """Pose of a camera on a sphere that looks at the origin, its right side level.

    Args:
        elevation: above the xy plane, any shape.  At the poles the image's up direction is the
            limit along the meridian, so poses and gradients stay finite.
        azimuth: from +x towards +y, broadcast against ``elevation``.
        radius: distance from the origin, broadcast too.
        degrees: unit of both angles; radians otherwise.

    Returns:
        ``[...,4,4]`` camera-to-world, OpenCV axes.

    >>> import torch
    >>> pose = pose_from_spherical(torch.tensor(0.0), torch.tensor(0.0), 2.0)
    >>> pose[:3, 3].tolist(), pose[:3, 2].abs().tolist()
    ([2.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    """
    distance = torch.as_tensor(radius, dtype=elevation.dtype, device=elevation.device)
    e, a, r = torch.broadcast_tensors(
        _radians(elevation, degrees), _radians(azimuth, degrees), distance
    )
    ce, se, ca, sa = e.cos(), e.sin(), a.cos(), a.sin()
    zero = torch.zeros_like(e)
    right = torch.stack((-sa, ca, zero), -1)
    down = torch.stack((se * ca, se * sa, -ce), -1)
    forward = -torch.stack((ce * ca, ce * sa, se), -1)
    return _homogeneous(torch.stack((right, down, forward), -1), -r[..., None] * forward)


def spherical_from_pose(pose: Tensor, *, degrees: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Elevation, azimuth and radius of a camera's position: the inverse of looking at the origin.

    Args:
        pose: ``[...,3|4,4]``, camera-to-world; only its position is read.
        degrees: unit of the returned angles.

    Returns:
        Elevation in [-90, 90], azimuth in (-180, 180] and radius, each ``[...]``.  At the poles
        azimuth is zero; it has no derivative there.

    Raises:
        ValueError: wrong shape.

    >>> import torch
    >>> pose = pose_from_spherical(torch.tensor(30.0), torch.tensor(45.0), 2.0)
    >>> [round(float(v), 3) for v in spherical_from_pose(pose)]
    [30.0, 45.0, 2.0]
    """
    _check_pose(pose, "pose", (3, 4))
    x, y, z = pose[..., :3, 3].unbind(-1)
    level = torch.hypot(x, y)
    elevation, azimuth = torch.atan2(z, level), torch.atan2(y, x)
    return _angle(elevation, degrees), _angle(azimuth, degrees), torch.hypot(level, z)


def relative_spherical(
    source: Tensor, target: Tensor, *, degrees: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Change of elevation, azimuth and radius from one camera to another.

    Args:
        source: ``[...,3|4,4]``, camera-to-world.
        target: the same, broadcast.
        degrees: unit of the returned angles.

    Returns:
        ``target - source`` of each coordinate; the azimuth is wrapped into a half turn either
        way.

    >>> import torch
    >>> poses = pose_from_spherical(torch.tensor([10.0, 40.0]), torch.tensor([170.0, -170.0]), 2.0)
    >>> [round(float(v), 3) for v in relative_spherical(poses[0], poses[1])]
    [30.0, 20.0, 0.0]
    """
    e0, a0, r0 = spherical_from_pose(source, degrees=False)
    e1, a1, r1 = spherical_from_pose(target, degrees=False)
    turn = torch.atan2((a1 - a0).sin(), (a1 - a0).cos())
    return _angle(e1 - e0, degrees), _angle(turn, degrees), r1 - r0


def zero123_condition(source: Tensor, target: Tensor) -> Tensor:
    """The four numbers that Zero123 is conditioned on (its ``get_T``).

    Args:
        source: pose of the given view, ``[...,3|4,4]``, camera-to-world.
        target: pose of the wanted view.

    Returns:
        ``[...,4]``: difference of polar angles in radians (positive is **downward**, the
        opposite of an elevation), sine and cosine of the difference of azimuths, difference of
        radii.

    >>> import torch
    >>> pose = pose_from_spherical(torch.tensor(10.0), torch.tensor(20.0), 1.5)
    >>> torch.allclose(zero123_condition(pose, pose), torch.tensor([0.0, 0.0, 1.0, 0.0]))
    True
    """
    elevation, azimuth, radius = relative_spherical(source, target, degrees=False)
    return torch.stack((-elevation, azimuth.sin(), azimuth.cos(), radius), -1)


def convert_pose(pose: Tensor, source: str, target: str) -> Tensor:
    """Convert poses between conventions.

    Args:
        pose: in convention ``source``.
        source: ``"opencv"`` (camera-to-world, y down, z forward), ``"opengl"`` (camera-to-world,
            y up, z backward: Blender, NeRF) or ``"zero123"`` (world-to-camera with OpenGL axes).
        target: likewise.

    Returns:
        ``[...,4,4]`` for opencv and opengl, ``[...,3,4]`` for zero123 (which are accepted as
        ``[...,3|4,4]``).

    Raises:
        ValueError: unknown convention or wrong shape.

    >>> import torch
    >>> convert_pose(torch.eye(4), "opencv", "opengl").diagonal().tolist()
    [1.0, -1.0, -1.0, 1.0]
    """
    for name, value in (("source", source), ("target", target)):
        if value not in CONVENTIONS:
            raise ValueError(f"{name} must be one of {', '.join(CONVENTIONS)}, found {value!r}")
    _check_pose(pose, "pose", (3, 4))
    pose = _homogeneous(pose[..., :3, :3], pose[..., :3, 3])
    if source == "zero123":
        pose = invert_pose(pose)
    if (source == "opencv") != (target == "opencv"):
        pose = pose * pose.new_tensor([1.0, -1.0, -1.0, 1.0])
    return invert_pose(pose)[..., :3, :] if target == "zero123" else pose


def intrinsics_from_fov(
    fov: Tensor, image_size: tuple[int, int], *, axis: str = "y", degrees: bool = True
) -> Tensor:
    """Intrinsics of a centred camera with square pixels.

    Args:
        fov: full angle of view along ``axis``, any shape.
        image_size: ``(h, w)``.
        axis: ``"x"`` (across the width) or ``"y"`` (across the height).
        degrees: unit of ``fov``.

    Returns:
        ``[...,4]``: fx, fy, cx, cy in pixels, with the principal point at ``(w / 2, h / 2)``.

    Raises:
        ValueError: unknown axis, or sizes that are not positive.

    >>> import torch
    >>> intrinsics_from_fov(torch.tensor(90.0), (100, 200)).round().tolist()
    [50.0, 50.0, 100.0, 50.0]
    """
    height, width = image_size
    if height <= 0 or width <= 0:
        raise ValueError(f"image_size must be two positive sizes (h, w), found {image_size}")
    if axis not in ("x", "y"):
        raise ValueError(f"axis must be x or y, found {axis!r}")
    extent = width if axis == "x" else height
    focal = 0.5 * extent / torch.tan(0.5 * _radians(fov, degrees))
    centre = (torch.full_like(focal, 0.5 * width), torch.full_like(focal, 0.5 * height))
    return torch.stack((focal, focal, *centre), -1)


# Rigid motions ----------------------------------------------------------------------------
# The coefficients are even functions of the angle, written in its square: a series near zero,
# the closed form elsewhere. Both branches are finite everywhere, so that derivatives of any
# order pass through torch.where without a NaN.

_SERIES_BELOW = 0.05  # of the square: 10 terms then reach double precision


def _even_function(
    square: Tensor, first: float, ratio: Callable[[int], float], closed: Callable[[Tensor], Tensor]
) -> Tensor:
    """``sum_k c_k square^k`` with ``c_0 = first, c_k = ratio(k) c_{k-1}``, or its closed form."""
    small = square < _SERIES_BELOW
    near = torch.where(small, square, torch.zeros_like(square))
    total = torch.zeros_like(square)
    for k in range(9, 0, -1):
        total = ratio(k) * near * (1 + total)
    return torch.where(
        small, first * (1 + total), closed(torch.where(small, torch.ones_like(square), square))
    )


def _sine_ratio(square: Tensor) -> Tensor:
    """sin(a) / a."""
    return _even_function(
        square, 1.0, lambda k: -1 / (2 * k * (2 * k + 1)), lambda s: s.sqrt().sin() / s.sqrt()
    )


def _cosine_ratio(square: Tensor) -> Tensor:
    """(1 - cos(a)) / a^2."""
    return _even_function(
        square, 0.5, lambda k: -1 / ((2 * k + 1) * (2 * k + 2)), lambda s: (1 - s.sqrt().cos()) / s
    )


def _cubic_ratio(square: Tensor) -> Tensor:
    """(a - sin(a)) / a^3."""
    return _even_function(
        square,
        1 / 6,
        lambda k: -1 / ((2 * k + 2) * (2 * k + 3)),
        lambda s: (1 - s.sqrt().sin() / s.sqrt()) / s,
    )


def _quartic_ratio(square: Tensor) -> Tensor:
    """(a^2 / 2 - 1 + cos(a)) / a^4."""
    return _even_function(
        square,
        1 / 24,
        lambda k: -1 / ((2 * k + 3) * (2 * k + 4)),
        lambda s: (0.5 - (1 - s.sqrt().cos()) / s) / s,
    )


def _arcsine_ratio(square: Tensor, cosine: Tensor) -> Tensor:
    """2 a / sin(a), from sin(a)^2 and cos(a) of an angle of at most a quarter turn."""
    return _even_function(
        square,
        2.0,
        lambda k: (2 * k - 1) ** 2 / (2 * k * (2 * k + 1)),
        lambda s: 2 * torch.atan2(s.sqrt(), cosine) / s.sqrt(),
    )


def _cross_matrix(v: Tensor) -> Tensor:
    """``[...,3]`` -> ``[...,3,3]``, the matrix of ``v x``."""
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    rows = (zero, -z, y, z, zero, -x, -y, x, zero)
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def se3_exp(twist: Tensor) -> Tensor:
    """Rigid motion of a twist: the matrix exponential of se(3), in closed form.

    Args:
        twist: ``[...,6]``: translational part, then rotation vector in radians.

    Returns:
        ``[...,4,4]``; differentiable to any order, at zero too.

    Raises:
        ValueError: wrong shape.

    >>> import torch
    >>> torch.equal(se3_exp(torch.zeros(6)), torch.eye(4))
    True
    """
    if twist.shape[-1:] != (6,):
        raise ValueError(f"twist must have shape [...,6], found {list(twist.shape)}")
    translation, rotation = twist[..., :3], twist[..., 3:]
    square = rotation.square().sum(-1)[..., None, None]
    cross = _cross_matrix(rotation)
    cross2 = cross @ cross
    eye = torch.eye(3, dtype=twist.dtype, device=twist.device)
    turn = eye + _sine_ratio(square) * cross + _cosine_ratio(square) * cross2
    left = eye + _cosine_ratio(square) * cross + _cubic_ratio(square) * cross2
    return _homogeneous(turn, (left @ translation[..., None])[..., 0])


def _rotation_vector(rotation: Tensor) -> Tensor:
    """Logarithm of ``[...,3,3]`` by way of a quaternion, whose largest entry divides."""
    rows = rotation.unbind(-2)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rows)
    one = torch.ones_like(xx)
    # Four times the outer product of the quaternion (w, x, y, z) with itself.
    outer = (
        (one + xx + yy + zz, zy - yz, xz - zx, yx - xy),
        (zy - yz, one + xx - yy - zz, xy + yx, xz + zx),
        (xz - zx, xy + yx, one - xx + yy - zz, yz + zy),
        (yx - xy, xz + zx, yz + zy, one - xx - yy + zz),
    )
    products = torch.stack([torch.stack(row, -1) for row in outer], -2)
    best = products.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    row = products.gather(-2, best.expand(*best.shape[:-1], 4))[..., 0, :]
    quaternion = row / row.norm(dim=-1, keepdim=True)
    quaternion = torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)
    cosine, axis = quaternion[..., :1], quaternion[..., 1:]
    return _arcsine_ratio(axis.square().sum(-1, keepdim=True), cosine) * axis


def se3_log(pose: Tensor) -> Tensor:
    """Twist of a rigid motion: the inverse of :func:`se3_exp`.

    Args:
        pose: ``[...,4,4]``, rigid.

    Returns:
        ``[...,6]``, with a rotation of at most half a turn; differentiable below that, at the
        identity too.

    Raises:
        ValueError: wrong shape.

    >>> import torch
    >>> twist = torch.tensor([0.1, 0.2, 0.3, 0.4, -0.5, 0.6])
    >>> torch.allclose(se3_log(se3_exp(twist)), twist, atol=1e-6)
    True
    """
    _check_pose(pose, "pose")
    rotation = _rotation_vector(pose[..., :3, :3])
    square = rotation.square().sum(-1)[..., None, None]
    cross = _cross_matrix(rotation)
    eye = torch.eye(3, dtype=pose.dtype, device=pose.device)
    # (1 - (a / 2) cot(a / 2)) / a^2, from ratios so that nothing cancels near zero.
    factor = (_cubic_ratio(square) - 2 * _quartic_ratio(square)) / (2 * _cosine_ratio(square))
    inverse = eye - 0.5 * cross + factor * (cross @ cross)
    translation = (inverse @ pose[..., :3, 3:])[..., 0]
    return torch.cat((translation, rotation), -1)
