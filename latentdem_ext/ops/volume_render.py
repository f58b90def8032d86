"""Volume rendering of a voxel grid, differentiable in the grid and in the cameras.

Letters: D H W grid, N views, h w view size, S samples per ray.

The grid fills the cube ``[-1, 1]^3``, with x along W, y along H and z along D; values between
voxels are trilinear as in ``torch.nn.functional.grid_sample(align_corners=True,
padding_mode="zeros")``, border included (an axis of one voxel is constant everywhere).  Cameras
look along OpenCV axes: x right, y down, z forward; the centre of pixel (row i, column j) is at
``u = j + 0.5, v = i + 0.5``.

A ray is ``x(t) = o + t d`` with a **unit** direction d, the rotated
``((u - cx) / fx, (v - cy) / fy, 1)``; near, far and depth are distances along it, in world
units, not z-depths.  Samples lie at the midpoints of S equal intervals of ``[near, far]``::

    step    = (far - near) / S          t_k = near + (k + 1/2) step
    alpha_k = 1 - exp(-density(x(t_k)) step)
    w_k     = alpha_k prod_{j < k} (1 - alpha_j)
    color   = sum_k w_k color(x(t_k))   opacity = sum_k w_k     depth = sum_k w_k t_k

Depth is not divided by opacity.  Nothing is clamped: a negative density gives a negative alpha,
as the equations say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdem_ext.ops._transforms import call, differentiable

_ops = torch.ops.latentdem


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
    """Render N views of a voxel grid by emission and absorption (NeRF's quadrature).

    Args:
        density: ``[1,D,H,W]``, per world unit of length.
        color: ``[3,D,H,W]``.
        camera_to_world: ``[N,3|4,4]``; only the upper three rows are read.  The left block
            need not be a rotation.
        intrinsics: ``[N,4]``: fx, fy, cx, cy in pixels.
        image_size: ``(h, w)``.
        near: distance where the first interval starts, at least zero.
        far: distance where the last one ends, beyond ``near``.
        samples_per_ray: S.
        background: ``[3]``, seen where the grid is transparent:
            ``color + (1 - opacity) background``.
        early_stop_eps: a ray ends once less than this reaches beyond a sample.  By default the
            machine epsilon of the compute dtype, which changes results by rounding only if
            density is not negative and colours are of order one; 0 never stops.

    Returns:
        ``color [N,3,h,w]``, ``opacity [N,1,h,w]`` and ``depth [N,1,h,w]``, float64 if either
        grid is float64, else float32 (float16 and bfloat16 grids are computed in float32).
        Differentiable once in all five tensors.  The backward pass marches again and keeps no
        samples, so memory does not grow with S; results do not depend on the number of threads.
        (On CUDA, gradients in the grids are summed by atomics in any order, unless
        ``torch.use_deterministic_algorithms(True)`` asks for the same bits every time.)
        A camera that is not finite gives NaN.

    Raises:
        ValueError: wrong shape, empty grid, views that do not match, ``image_size`` or
            ``samples_per_ray`` not positive, ``near`` or ``far`` out of order or not finite,
            ``early_stop_eps`` outside [0, 1).
        TypeError: unsupported dtype.
        NotImplementedError: on differentiating twice.

    >>> import torch, latentdem_ext as ext
    >>> pose = ext.pose_from_spherical(torch.tensor([20.0]), torch.tensor([30.0]), 3.0)
    >>> lens = ext.intrinsics_from_fov(torch.tensor([50.0]), (24, 32))
    >>> color, opacity, depth = ext.volume_render(
    ...     torch.ones(1, 8, 8, 8), torch.ones(3, 8, 8, 8), pose, lens,
    ...     image_size=(24, 32), near=1.0, far=5.0, samples_per_ray=64)
    >>> color.shape, depth.shape
    (torch.Size([1, 3, 24, 32]), torch.Size([1, 1, 24, 32]))
    """
    if background is not None and background.shape != (3,):
        raise ValueError(f"background must have shape [3], found {list(background.shape)}")
    rendered, opacity, depth = call(
        _ops.volume_render.default,
        density,
        color,
        camera_to_world,
        intrinsics,
        list(image_size),
        near,
        far,
        samples_per_ray,
        early_stop_eps,
    )
    if background is not None:
        rendered = rendered + (1 - opacity) * background.to(rendered.dtype).view(1, 3, 1, 1)
    return rendered, opacity, depth


@torch.library.register_fake("latentdem::volume_render")
def _(
    density: Tensor,
    color: Tensor,
    camera_to_world: Tensor,
    intrinsics: Tensor,
    image_size: list[int],
    near: float,
    far: float,
    samples_per_ray: int,
    early_stop_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    double = torch.float64 in (density.dtype, color.dtype)
    dtype = torch.float64 if double else torch.float32
    views = camera_to_world.shape[0]
    rendered = density.new_empty([views, 3, *image_size], dtype=dtype)
    opacity = density.new_empty([views, 1, *image_size], dtype=dtype)
    return rendered, opacity, torch.empty_like(opacity)


@torch.library.register_fake("latentdem::volume_render_backward")
def _(
    grad_color: Tensor,
    grad_opacity: Tensor,
    grad_depth: Tensor,
    density: Tensor,
    color: Tensor,
    camera_to_world: Tensor,
    intrinsics: Tensor,
    near: float,
    far: float,
    samples_per_ray: int,
    early_stop_eps: float | None,
    need_density: bool,
    need_color: bool,
    need_cameras: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(of: Tensor, needed: bool) -> Tensor:
        return of.new_empty(of.shape if needed else [0])

    return (
        gradient(density, need_density),
        gradient(color, need_color),
        gradient(camera_to_world, need_cameras),
        gradient(intrinsics, need_cameras),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    found = call(
        _ops.volume_render_backward.default,
        *grads,
        *ctx.saved_tensors,
        *ctx.settings,
        needs[0],
        needs[1],
        needs[2] or needs[3],
    )
    wanted = [grad if need else None for grad, need in zip(found, needs[:4], strict=True)]
    return *wanted, None, None, None, None, None


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The second derivative keeps nothing, since there is none."""


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError("volume_render can be differentiated once, not twice")


differentiable("volume_render", _backward, _setup)
differentiable("volume_render_backward", _no_second_derivative, _no_setup)
