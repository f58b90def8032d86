"""Volume rendering in plain torch; see :mod:`latentdem_ext.ops.volume_render` for the rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _rays(
    camera_to_world: Tensor, intrinsics: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Origins ``[N,1,1,3]`` and unit directions ``[N,h,w,3]``."""
    height, width = image_size
    v = torch.arange(height).to(intrinsics)[:, None] + 0.5  # [h,1]
    u = torch.arange(width).to(intrinsics)[None, :] + 0.5  # [1,w]
    fx, fy, cx, cy = intrinsics[:, :, None, None].unbind(1)  # each [N,1,1]
    x, y = torch.broadcast_tensors((u - cx) / fx, (v - cy) / fy)  # each [N,h,w]
    pinhole = torch.stack((x, y, torch.ones_like(x)), -1)  # [N,h,w,3]
    direction = torch.einsum("nij,nhwj->nhwi", camera_to_world[:, :3, :3], pinhole)
    return camera_to_world[:, None, None, :3, 3], direction / direction.norm(dim=-1, keepdim=True)


def volume_render(
    density: Tensor,
    color: Tensor,
    camera_to_world: Tensor,
    intrinsics: Tensor,
    *,
    image_size: tuple[int, int],
    near: float,
    far: float,
    samples_per_ray: int,
    background: Tensor | None = None,
    early_stop_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every sample of every ray by ``grid_sample``; ``early_stop_eps`` never stops a ray."""
    grid = torch.cat((density, color))  # [4,D,H,W]
    step = (far - near) / samples_per_ray
    t = near + (torch.arange(samples_per_ray).to(grid) + 0.5) * step  # [S]
    origin, direction = _rays(camera_to_world.to(grid), intrinsics.to(grid), image_size)
    points = origin[..., None, :] + t[:, None] * direction[..., None, :]  # [N,h,w,S,3]
    samples = F.grid_sample(
        grid[None],
        points.reshape(1, -1, 1, samples_per_ray, 3),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=True,
    )
    samples = samples.reshape(4, *points.shape[:-1])  # [4,N,h,w,S]
    optical_depth = samples[0] * step
    before = F.pad(torch.cumsum(optical_depth, -1)[..., :-1], (1, 0))
    weights = torch.exp(-before) * (1 - torch.exp(-optical_depth))  # [N,h,w,S]
    rendered = (weights * samples[1:]).sum(-1).transpose(0, 1)  # [N,3,h,w]
    opacity = weights.sum(-1)[:, None]
    depth = (weights * t).sum(-1)[:, None]
    if background is not None:
        rendered = rendered + (1 - opacity) * background.to(rendered).view(1, 3, 1, 1)
    return rendered, opacity, depth
