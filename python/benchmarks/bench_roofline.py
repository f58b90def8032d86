"""What bounds each kernel: its time beside the operations and bytes that it cannot do without.

Both are counted from shapes (see the functions below), not measured, and are what the *algorithm*
needs: each input read once, each output written once, every transform at its nominal cost.
A copy and a matrix product, timed in the same run, say what the machine could do at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, seeded, store
from torch import Tensor

import latentdem_ext as ext

FLOAT = 4  # bytes


def real_transform(height: int, width: int) -> float:
    """Floating-point operations of a real transform: ``2.5 N log2 N``, the usual count."""
    points = height * width
    return 2.5 * points * math.log2(max(points, 2))


def kernel_transform(side: int, height: int, width: int) -> float:
    """A kernel's: the columns that hold nothing are left out of the vertical half."""
    return real_transform(height, width) * (0.5 + 0.5 * side / width)


def row(
    kernel: str, case: str, function: Callable[[], Any], operations: float, floats: float
) -> dict[str, Any]:
    """Time one kernel."""
    times = interleaved({"native": function})
    return {
        "kernel": kernel,
        "case": case,
        "milliseconds": times,
        "flop": operations,
        "bytes": floats * FLOAT,
        "ratios": {},
    }


def blur(shape: tuple[int, int, int, int], k: int, gradients: bool) -> dict[str, Any]:
    """Loss with both gradients, or the blur alone; up to nine taps directly."""
    batch, channels, height, width = shape
    planes, points = batch * channels, height * width
    image, observation = torch.rand(2, *shape)
    kernel = torch.rand(1, 1, k, k)
    kernel /= kernel.sum()
    case = f"{list(shape)}, kernel {k}"
    if gradients:
        # Image and observation there, the image's gradient back; residual, both products and
        # the loss are 15 operations a point. The kernel there, its gradient back.
        operations = planes * (3 * real_transform(height, width) + 15 * points)
        operations += 2 * kernel_transform(k, height, width)
        return row(
            "`blur_gradients`",
            case,
            lambda: ext.blur_gradients(image, kernel, observation),
            operations,
            3 * planes * points,
        )
    if k * k <= 9:
        name, operations = "`blur_conv2d`, direct", 2.0 * k * k * planes * points
    else:
        name = "`blur_conv2d`, spectral"
        # A complex product for each of N/2 frequencies.
        operations = planes * (2 * real_transform(height, width) + 3 * points)
        operations += kernel_transform(k, height, width)
    return row(name, case, lambda: ext.blur_conv2d(image, kernel), operations, 2 * planes * points)


def kernel_map(
    shape: tuple[int, int, int, int], k: int, iterations: int, steps: int
) -> dict[str, Any]:
    """Two transforms a channel and two back; then conjugate gradients at twice the kernel size."""
    batch, channels, height, width = shape
    points = height * width
    image, observation = torch.rand(2, *shape)
    start = torch.full((batch, 1, k, k), 1 / k**2)
    # Power and cross-correlation of a channel: 7 operations for each of N/2 frequencies.
    setup = (2 * channels + 2) * real_transform(height, width) + 3.5 * channels * points
    # A product is a pair of transforms at twice the kernel size, one a step and one to start;
    # a step has five dot products and updates besides.
    product = 2 * kernel_transform(k, 2 * k, 2 * k)
    loop = iterations * ((steps + 1) * product + steps * 10 * k * k)
    return row(
        "`kernel_map_update`",
        f"{list(shape)}, kernel {k}, {iterations} iterations",
        lambda: ext.kernel_map_update(
            image,
            observation,
            start,
            noise_std=0.02,
            penalty=5e6,
            regularization=0.0,
            iterations=iterations,
            prior="none",
            solver_steps=steps,
        ),
        batch * (setup + loop),
        2 * batch * channels * points,
    )


def wiener(shape: tuple[int, int, int, int], k: int, passes: int) -> dict[str, Any]:
    """Three transforms a plane; under a mask two for each pass and two more."""
    batch, channels, height, width = shape
    planes, points = batch * channels, height * width
    image, observation = torch.rand(2, *shape)
    kernel = torch.rand(1, 1, k, k)
    kernel /= kernel.sum()
    mask = None
    if passes > 1:
        mask = torch.zeros(1, 1, height, width)
        mask[..., k:-k, k:-k] = 1
    transforms = 3 if mask is None else 2 * passes + 2
    operations = planes * (transforms * real_transform(height, width) + 6 * passes * points)
    what = "no mask" if mask is None else f"masked, {passes} passes"
    return row(
        "`wiener_deconv2d`",
        f"{list(shape)}, kernel {k}, {what}",
        lambda: ext.wiener_deconv2d(image, observation, kernel, 0.1, mask=mask, passes=passes),
        operations + kernel_transform(k, height, width),
        3 * planes * points + (0 if mask is None else points),
    )


def samples_inside(pose: Tensor, lens: Tensor, options: dict[str, Any]) -> int:
    """How many samples fall into the cube."""
    (height, width), count = options["image_size"], options["samples_per_ray"]
    step = (options["far"] - options["near"]) / count
    t = options["near"] + (torch.arange(count) + 0.5) * step
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    total = 0
    for matrix, (fx, fy, cx, cy) in zip(pose, lens.tolist(), strict=True):
        direction = torch.stack([(u - cx) / fx, (v - cy) / fy, torch.ones_like(u)], -1)
        direction = torch.nn.functional.normalize(direction @ matrix[:3, :3].T, dim=-1)
        points = matrix[:3, 3] + direction[..., None, :] * t[:, None]
        total += int((points.abs().amax(-1) <= 1).sum())
    return total


def volume_render(side: int, views: int, view: int, samples: int) -> list[dict[str, Any]]:
    """A haze that fills the cube: no sample can be skipped."""
    generator = seeded(0)
    density = 0.5 * torch.rand(1, side, side, side, generator=generator)
    color = torch.rand(3, side, side, side, generator=generator)
    azimuth = torch.arange(views) * (360 / views) + 10
    pose = ext.pose_from_spherical(torch.full((views,), 20.0), azimuth, 2.5)
    lens = ext.intrinsics_from_fov(torch.full((views,), 45.0), (view, view))
    options: dict[str, Any] = {
        "image_size": (view, view),
        "near": 0.8,
        "far": 4.2,
        "samples_per_ray": samples,
    }
    inside = samples_inside(pose, lens, options)
    case = f"dense, {side}^3, {views} views {view}x{view}, {samples} samples"
    # Per sample: eight corners of four values, their weights, an exponential, the compositing.
    look_up, march = 8 * 4 * 2 + 20, 20 + 16
    grid, pixels = 4 * side**3, views * view * view
    inputs = [density, color, pose, lens]
    forward = row(
        "`volume_render`, forward",
        case,
        lambda: ext.volume_render(*inputs, **options),
        inside * (look_up + march),
        grid + 5 * pixels,
    )
    tracked = [t.clone().requires_grad_() for t in inputs]
    outputs = ext.volume_render(*tracked, **options)
    weights = [torch.rand_like(o) for o in outputs]
    # Marched again; four gradients go to eight corners, and the position's takes three weighted
    # sums over corners and values.
    backward = row(
        "`volume_render`, backward",
        case,
        lambda: torch.autograd.grad(outputs, tracked, weights, retain_graph=True),
        inside * (look_up + 2 * march + 8 * 4 * 2 + 3 * 8 * 4 * 2),
        2 * grid + 5 * pixels,
    )
    return [forward, backward]


def main() -> None:
    """Time all kernels and store ``results/roofline.json``."""
    store(
        "roofline",
        [
            blur((8, 3, 256, 256), 33, gradients=True),
            blur((1, 3, 1024, 1024), 65, gradients=True),
            blur((8, 3, 256, 256), 3, gradients=False),
            blur((8, 3, 256, 256), 33, gradients=False),
            kernel_map((1, 3, 512, 512), 64, 20, 6),
            kernel_map((1, 3, 256, 256), 25, 20, 6),
            wiener((1, 3, 1024, 1024), 65, 1),
            wiener((4, 3, 320, 320), 25, 3),
            *volume_render(128, 4, 128, 128),
        ],
    )


if __name__ == "__main__":
    main()
