"""Blur kernels of known shape: camera shake, straight motion, defocus, Gaussian.

A tap is the integral of the point spread over its pixel, and all kernels sum to one.  The
integrals are exact for strokes (polylines) and discs, to the rounding of float64; those of a
Gaussian too if its axes are the image's, and otherwise to 1e-6 of the sum for standard
deviations of at least 0.3 pixels.  ``center`` shifts the whole point spread by a fraction of a
pixel or more from the kernel's centre ``(size // 2, size // 2)``.  Lengths are in pixels,
coordinates are (row, column), angles in radians from the column axis towards the rows.

All functions compute in float64 and return ``[B,1,size,size]``; parameters are numbers or
tensors ``[B]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TAU = 2 * torch.pi


def camera_shake_kernel(
    size: int,
    batch: int = 1,
    *,
    generator: torch.Generator,
    reach: tuple[float, float] = (0.5, 0.9),
    components: int = 6,
    center: tuple[float, float] = (0.0, 0.0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random camera shake: a drift and a few sinusoids, seen for one exposure.

    Hands tremble at a few frequencies with amplitudes that fall with frequency: the path is
    ``v t + sum_n a_n cos(2 pi f_n t + phi_n)`` in each coordinate, with f_n between 0.2 and 6
    cycles per exposure and a_n of standard deviation ``f_n^-1.5``.  Time is sampled evenly, so the
    stroke is bright where the camera was slow.  (Neither the splines that this project
    evaluates on nor the random walks that its kernel prior was trained on.)

    Args:
        size: side of the kernel.
        batch: B, how many to draw.
        generator: source of all random numbers.
        reach: range of the larger extent of the path as a share of the support; it is smaller
            where the path would leave the support otherwise.
        components: number of sinusoids.
        center: where the path's mean lies.
        dtype: of the result.
        device: of the result.

    Returns:
        ``[B,1,size,size]``.

    Raises:
        ValueError: ``size`` < 3, ``center`` not well inside, ``reach`` out of (0, 1].

    >>> k = camera_shake_kernel(25, 2, generator=torch.Generator().manual_seed(0))
    >>> k.shape, bool(k.min() >= 0), round(float(k[0].sum()), 5)
    (torch.Size([2, 1, 25, 25]), True, 1.0)
    """
    if size < 3:
        raise ValueError(f"size must be at least 3 pixels, found {size}")
    if not 0 < reach[0] <= reach[1] <= 1:
        raise ValueError(f"reach must satisfy 0 < low <= high <= 1, found {reach}")
    limit = (size - 1) // 2 + 0.5 - max(abs(c) for c in center)
    if limit < 1:
        raise ValueError(f"center must leave a pixel on every side of size {size}, found {center}")
    place = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=place)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=place)

    time = torch.linspace(0, 1, 65 + 4 * size, dtype=torch.float64, device=place)
    frequency = 0.2 * 30 ** uniform(batch, 1, components, 1)
    amplitude = normal(batch, 2, components, 1) * frequency**-1.5
    waves = amplitude * torch.cos(_TAU * (frequency * time + uniform(batch, 2, components, 1)))
    path = normal(batch, 2, 1) * time + waves.sum(2)  # [B,2,N]
    extent = (path.amax(-1) - path.amin(-1)).amax(-1)
    share = reach[0] + (reach[1] - reach[0]) * uniform(batch)
    path = path * (share * (size - 1) / extent)[:, None, None]
    path = path - 0.5 * (path[..., 1:] + path[..., :-1]).mean(-1, keepdim=True)
    path = path * (limit / path.abs().amax((1, 2))).clamp_max(1)[:, None, None]
    path = path + torch.tensor(center, dtype=torch.float64, device=place)[:, None]
    kernels = torch.stack([rasterize_path(p.T, size) for p in path])
    return _finish(kernels, dtype, device)


def linear_motion_kernel(
    size: int,
    length: float | Tensor,
    angle: float | Tensor,
    *,
    center: tuple[float, float] = (0.0, 0.0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Straight stroke of ``length`` pixels under ``angle``, its middle at ``center``.

    Raises:
        ValueError: a negative length, or a stroke that leaves the support.

    >>> linear_motion_kernel(3, 2.0, 0.0)[0, 0, 1]
    tensor([0.2500, 0.5000, 0.2500])
    """
    lengths, angles = _parameters(length=length, angle=angle)
    if bool((lengths < 0).any()):
        raise ValueError(f"length must be non-negative, found {float(lengths.min())}")
    half = 0.5 * lengths[:, None] * torch.stack([angles.sin(), angles.cos()], -1)
    middle = torch.tensor(center, dtype=torch.float64)
    _check_inside("length", size, half.abs() + middle, half.abs() - middle)
    ends = torch.stack([middle - half, middle + half], 1)  # [B,2,2]
    return _finish(torch.stack([rasterize_path(e, size) for e in ends]), dtype, device)


def defocus_kernel(
    size: int,
    radius: float | Tensor,
    *,
    center: tuple[float, float] = (0.0, 0.0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform disc: every tap is the exact area that disc and pixel share.

    Raises:
        ValueError: a radius that is not positive, or a disc that leaves the support.

    >>> round(float(defocus_kernel(5, 2.0)[0, 0, 2, 2]) * 4 * torch.pi, 4)
    1.0
    """
    (radii,) = _parameters(radius=radius)
    if not bool((radii > 0).all()):
        raise ValueError(f"radius must be positive, found {float(radii.min())}")
    middle = torch.tensor(center, dtype=torch.float64)
    _check_inside("radius", size, radii[:, None] + middle, radii[:, None] - middle)
    rows, columns = (_edges(size) - c for c in middle)
    corner = _quadrant_area(columns[None, None, :], rows[None, :, None], radii[:, None, None])
    area = corner.diff(dim=1).diff(dim=2).clamp_min(0)
    return _finish(area, dtype, device)


def gaussian_kernel(
    size: int,
    sigma: float | Tensor | None = None,
    *,
    covariance: Tensor | None = None,
    center: tuple[float, float] = (0.0, 0.0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gaussian of standard deviation ``sigma``, or of a 2 x 2 ``covariance``, cut to the support.

    Args:
        size: side of the kernel.
        sigma: in pixels; exactly one of ``sigma`` and ``covariance`` must be given.
        covariance: ``[2,2]`` or ``[B,2,2]`` of (row, column), positive definite.
        center: of the point spread.
        dtype: of the result.
        device: of the result.

    Raises:
        ValueError: both or none given, not positive (definite), wrong shape.

    >>> k = gaussian_kernel(9, 1.5)
    >>> torch.allclose(k, gaussian_kernel(9, covariance=2.25 * torch.eye(2)))
    True
    """
    if (sigma is None) == (covariance is None):
        raise ValueError("exactly one of sigma and covariance must be given")
    if sigma is not None:
        (sigmas,) = _parameters(sigma=sigma)
        if not bool((sigmas > 0).all()):
            raise ValueError(f"sigma must be positive, found {float(sigmas.min())}")
        matrix = sigmas.square()[:, None, None] * torch.eye(2, dtype=torch.float64)
    else:
        assert covariance is not None
        matrix = covariance.detach().double().cpu()
        if matrix.dim() == 2:
            matrix = matrix[None]
        if matrix.shape[1:] != (2, 2):
            raise ValueError(
                f"covariance must have shape [2,2] or [B,2,2], found {list(covariance.shape)}"
            )
        spread = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
        symmetric = torch.equal(matrix, matrix.mT)
        if not symmetric or not bool(((spread > 0) & (matrix[:, 0, 0] > 0)).all()):
            raise ValueError(f"covariance must be symmetric positive definite, found {covariance}")
    rows, columns = (_edges(size) - c for c in center)
    rows, columns = rows[None], columns[None]
    sd_row = matrix[:, 0, 0].sqrt()[:, None]
    slope = (matrix[:, 0, 1] / matrix[:, 0, 0])[:, None]
    sd_column = (matrix[:, 1, 1] - slope[:, 0] * matrix[:, 0, 1]).sqrt()[:, None]
    if not bool((slope != 0).any()):
        row_mass = torch.special.ndtr(rows / sd_row).diff(dim=-1)
        column_mass = torch.special.ndtr(columns / sd_column).diff(dim=-1)
        return _finish(row_mass[:, :, None] * column_mass[:, None, :], dtype, device)
    # Given its row, a point's column is Gaussian; over the rows of a pixel by quadrature.
    nodes, weights = _gauss_legendre(16)
    at = rows[:, :-1, None] + 0.5 * (nodes + 1)  # [1,size,Q]
    density = torch.exp(-0.5 * (at / sd_row[..., None]).square()) * weights
    offset = columns[:, None, None, :] - (slope[..., None] * at)[..., None]
    mass = torch.special.ndtr(offset / sd_column[..., None, None]).diff(dim=-1)
    return _finish((density[..., None] * mass).sum(2), dtype, device)


def rasterize_path(points: Tensor, size: int, dwell: Tensor | None = None) -> Tensor:
    """Draw an infinitely thin polyline: each tap is the exact time spent over its pixel.

    Args:
        points: ``[N,2]`` rows and columns, N >= 2, the kernel's centre being zero.
        size: side of the kernel.
        dwell: ``[N-1]`` time spent on each segment; equal by default.

    Returns:
        ``[size,size]`` float64, summing to one; what lies outside the support is dropped.

    Raises:
        ValueError: wrong shapes, or a path wholly outside.
    """
    if points.dim() != 2 or points.shape[0] < 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape [N,2] with N >= 2, found {list(points.shape)}")
    start, end = points[:-1].double(), points[1:].double()
    share = torch.ones_like(start[:, 0]) if dwell is None else dwell.double()
    if share.shape != start.shape[:1]:
        raise ValueError(f"dwell must have shape [{len(start)}], found {list(share.shape)}")
    edges = _edges(size).to(start.device)
    low: list[Tensor] = []
    high: list[Tensor] = []
    for axis in (0, 1):
        a, delta = start[:, axis, None], (end - start)[:, axis, None]
        still = delta.abs() < 1e-12
        times = (edges - a) / torch.where(still, torch.ones_like(delta), delta)  # [N-1,size+1]
        enter = torch.minimum(times[:, :-1], times[:, 1:])
        leave = torch.maximum(times[:, :-1], times[:, 1:])
        inside = ((a >= edges[:-1]) & (a < edges[1:])).double()
        low.append(torch.where(still, 1 - inside, enter))
        high.append(torch.where(still, inside, leave))
    enter = torch.maximum(low[0][:, :, None], low[1][:, None, :]).clamp_min(0)
    leave = torch.minimum(high[0][:, :, None], high[1][:, None, :]).clamp_max(1)
    taps = ((leave - enter).clamp_min(0) * share[:, None, None]).sum(0)
    total = taps.sum()
    if not float(total) > 0:
        raise ValueError("points must touch the support, found none inside")
    return taps / total


def _finish(kernels: Tensor, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    kernels = kernels / kernels.sum((-2, -1), keepdim=True)
    return kernels[:, None].to(dtype=dtype, device=device)


def _edges(size: int) -> Tensor:
    """Pixel borders ``[size+1]`` relative to the kernel's centre."""
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, found {size}")
    return torch.arange(size + 1, dtype=torch.float64) - size // 2 - 0.5


def _parameters(**values: float | Tensor) -> list[Tensor]:
    """The parameters as float64 vectors of one length."""
    vectors = []
    for name, value in values.items():
        vector = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        if vector.dim() > 1:
            raise ValueError(f"{name} must be a number or [B], found {list(vector.shape)}")
        vectors.append(vector.reshape(-1))
    lengths = {len(v) for v in vectors if len(v) != 1}
    if len(lengths) > 1:
        raise ValueError(f"{' and '.join(values)} must have one length, found {sorted(lengths)}")
    return list(torch.broadcast_tensors(*vectors))


def _check_inside(name: str, size: int, after: Tensor, before: Tensor) -> None:
    edges = _edges(size)
    excess = max(float((after - edges[-1]).max()), float((before + edges[0]).max()))
    if excess > 1e-9:
        raise ValueError(
            f"{name} must keep the point spread inside size {size}, found {excess:.3g} pixels "
            "beyond"
        )


def _quadrant_area(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Area of a disc at the origin to the left of x and above y (at smaller values)."""
    x, y = (torch.minimum(torch.maximum(t, -radius), radius) for t in (x, y))
    reach = (radius.square() - y.square()).sqrt()  # where the chord at y ends

    def integral(u: Tensor) -> Tensor:
        chord = (radius.square() - u.square()).clamp_min(0).sqrt()
        return 0.5 * (u * chord + radius.square() * torch.asin((u / radius).clamp(-1, 1)))

    within = torch.minimum(torch.maximum(x, -reach), reach)
    arc = integral(within) - integral(-reach)
    strip = y * (within + reach)
    below = 2 * (integral(x) - integral(-radius)) - arc + strip
    return torch.where(y >= 0, below, arc + strip)


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [-1, 1] (Golub and Welsch 1969)."""
    n = torch.arange(1, count, dtype=torch.float64)
    beta = n / (4 * n.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, 2 * vectors[0].square()
