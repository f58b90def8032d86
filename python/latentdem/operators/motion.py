"""Random motion blur kernels, for evaluation.

A camera shake is drawn as a cubic spline through a few random control points, traversed at a
varying speed, and rasterised bilinearly.  The generator that the packaged kernel prior was
trained on (:mod:`latentdem.training.kernels`) is another one, an inertial random walk, so
that no test kernel comes from the training distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rasterize(points: Tensor, weights: Tensor, size: int) -> Tensor:
    """Draw weighted points as a kernel by bilinear splatting.

    Args:
        points: ``[P,2]`` rows and columns in pixels, the kernel's centre being zero.
        weights: ``[P]``, how long the camera dwells at each point.
        size: side of the kernel in pixels.

    Returns:
        ``[size,size]`` float32, non-negative, summing to one; points outside are dropped.
    """
    position = points.double() + size // 2
    corner = position.floor()
    fraction = position - corner
    kernel = torch.zeros(size, size, dtype=torch.float64)
    for dy in (0, 1):
        for dx in (0, 1):
            row, column = (corner + torch.tensor([dy, dx])).long().unbind(-1)
            share = (fraction[:, 0] if dy else 1 - fraction[:, 0]) * (
                fraction[:, 1] if dx else 1 - fraction[:, 1]
            )
            inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
            kernel.index_put_(
                (row[inside], column[inside]), (share * weights)[inside], accumulate=True
            )
    return (kernel / kernel.sum()).float()


def _catmull_rom(control: Tensor, samples: int) -> Tensor:
    """Points of the cubic spline through ``control [N,2]``, ``samples`` for each segment."""
    padded = torch.cat([2 * control[:1] - control[1:2], control, 2 * control[-1:] - control[-2:-1]])
    t = torch.linspace(0, 1, samples + 1, dtype=torch.float64)[:-1, None]
    pieces = []
    for i in range(len(control) - 1):
        a, b, c, d = padded[i : i + 4]
        pieces.append(
            0.5
            * (
                2 * b
                + (c - a) * t
                + (2 * a - 5 * b + 4 * c - d) * t**2
                + (3 * b - a - 3 * c + d) * t**3
            )
        )
    return torch.cat(pieces)


def random_motion_kernel(size: int, seed: int) -> Tensor:
    """A random camera-shake kernel ``[1,1,size,size]``, centred by its centre of mass.

    The path spans between 60 and 90 % of the support, so that a 25-pixel kernel is a
    25-pixel blur and not a small one in a large frame.

    >>> k = random_motion_kernel(25, seed=0)
    >>> k.shape, bool((k >= 0).all()), round(float(k.sum()), 5)
    (torch.Size([1, 1, 25, 25]), True, 1.0)
    """
    if size < 3:
        raise ValueError(f"size must be at least 3 pixels, found {size}")
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    turns = int(torch.randint(2, 6, (), generator=generator))
    heading = uniform(0, 2 * torch.pi)
    point = torch.zeros(2, dtype=torch.float64)
    control = [point]
    for _ in range(turns):
        heading += uniform(-1.2, 1.2)
        stride = uniform(0.5, 1.5)
        direction = torch.tensor(heading, dtype=torch.float64)
        point = point + stride * torch.stack([direction.sin(), direction.cos()])
        control.append(point)
    path = _catmull_rom(torch.stack(control), 400)
    speed = torch.rand(turns + 1, generator=generator, dtype=torch.float64) + 0.35
    position = torch.linspace(0, turns, len(path), dtype=torch.float64)
    index = position.floor().clamp_max(turns - 1).long()
    weights = torch.lerp(1 / speed[index], 1 / speed[index + 1], position - index)
    length = (path.diff(dim=0, append=path[-1:]) ** 2).sum(-1).sqrt()
    weights = weights * length + 1e-9
    extent = (path.amax(0) - path.amin(0)).max().clamp_min(1e-9)
    path = path * (uniform(0.6, 0.9) * (size - 1) / extent)
    centre = (path * weights[:, None]).sum(0) / weights.sum()
    # Keep the whole stroke inside the frame even where its centre of mass is lopsided.
    offset = path - centre
    reach = (size - 1) / 2
    offset = offset * min(1.0, float(reach / offset.abs().max()))
    return rasterize(offset, weights, size)[None, None]
