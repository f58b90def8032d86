"""The calls that ``cuda_report.py`` plans, with what each must move and compute at least.

Counted from shapes, in float32.  A transform by the library reads its input and writes its output
once (``TRANSFORM``, in images); passes between transforms read and write spectra, which are as
large as their images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_roofline import kernel_transform, real_transform
from torch import Tensor

import latentdem_ext as ext

FLOAT = 4  # bytes
TRANSFORM = 2  # images read and written by one


@dataclass(frozen=True)
class Case:
    """One call: what it must move and compute at least."""

    name: str
    call: Callable[[Any], object]  # gets the emulated operators
    memory: float  # bytes from and to memory
    cached: float  # bytes from the first-level cache
    operations: float


def render_case(backward: bool) -> Case:
    """Grid 128^3, one view of 512 x 512, 256 samples per ray, float32."""
    side, pixels, samples = 128, 512, 256
    grid = [torch.empty(channels, side, side, side) for channels in (1, 3)]
    cameras = [torch.empty(1, 4, 4), torch.empty(1, 4)]
    images = [torch.empty(1, channels, pixels, pixels) for channels in (3, 1, 1)]
    marched = pixels * pixels * samples
    packed, image = 16 * (side + 2) ** 3, 20 * pixels * pixels
    # A lookup: eight corners of 16 bytes; linear in y (48 operations), z (24), x (12); position
    # and fraction 12; the exponential about 10, compositing 12.
    lookup = 118
    if not backward:
        return Case(
            "volume_render, 128^3, 512 x 512 x 256, forward",
            lambda ops: ops.volume_render(
                *grid, *cameras, [pixels, pixels], 1.0, 5.0, samples, None
            ),
            2 * packed + image, 128 * marched, lookup * marched,
        )  # fmt: skip
    # Two marches; worth and careful sums 20 each; in the second slopes 44, their products 42, and
    # per corner and channel one product and one sum over the warp.
    operations = (2 * lookup + 2 * 20 + 44 + 42 + 2 * 32) * marched
    return Case(
        "volume_render, 128^3, 512 x 512 x 256, backward",
        lambda ops: ops.volume_render_backward(
            *images, *grid, *cameras, 1.0, 5.0, samples, None, True, True, True
        ),
        5 * packed + image + 2 * 12 * pixels * pixels, 2 * 128 * marched, operations,
    )  # fmt: skip


def photographs(*shape: int) -> tuple[Tensor, Tensor, float]:
    """Two batches of images, and the bytes of one."""
    return torch.rand(shape), torch.rand(shape), FLOAT * math.prod(shape)


def taps(side: int, count: int = 1) -> Tensor:
    """Kernels that sum to one."""
    return torch.full((count, 1, side, side), side**-2.0)


def direct_blur() -> Case:
    """Few taps: the image is read once, the result written once."""
    image, _, size = photographs(8, 3, 256, 256)
    kernel, operations = taps(3), 2 * 9 * image.numel()
    return Case(
        "blur_conv2d, [8, 3, 256, 256], kernel 3",
        lambda ops: ops.blur_conv2d(image, kernel, "circular"),
        2 * size, FLOAT * 9 * image.numel(), operations,
    )  # fmt: skip


def blur_gradients() -> Case:
    """Image and observation there, the image's gradient back; a pass over two spectra between."""
    image, observation, size = photographs(8, 3, 256, 256)
    kernel, planes = taps(33), 24
    operations = planes * 3 * real_transform(256, 256) + 15 * image.numel()
    return Case(
        "blur_gradients, [8, 3, 256, 256], kernel 33",
        lambda ops: ops.blur_gradients(image, kernel, observation, None, "circular"),
        (3 * TRANSFORM + 3) * size, 0, operations,
    )  # fmt: skip


def kernel_map() -> Case:
    """Transforms of image size once; then conjugate gradients that leave shared memory never."""
    image, observation, size = photographs(16, 1, 512, 512)
    start, side, iterations, steps = taps(33, 16), 33, 10, 6
    setup = 4 * 16 * real_transform(512, 512) + 3.5 * image.numel()
    product = 2 * kernel_transform(side, 2 * side, 2 * side)
    loop = 16 * iterations * ((steps + 1) * product + steps * 10 * side**2)
    return Case(
        "kernel_map_update, [16, 1, 512, 512], kernel 33, 10 iterations",
        lambda ops: ops.kernel_map_update(
            image, observation, start, None, 0.02, 1e5, 0.0, iterations, "none", "image", True,
            0.0, steps, None,
        ),
        (4 * TRANSFORM + 4) * size, 0, setup + loop,
    )  # fmt: skip


def wiener() -> Case:
    """Three transforms a plane around one pass."""
    image, observation, size = photographs(8, 3, 256, 256)
    kernel, ratio = taps(25), torch.tensor(0.1)
    operations = 24 * 3 * real_transform(256, 256) + 6 * image.numel()
    return Case(
        "wiener_deconv2d, [8, 3, 256, 256], kernel 25",
        lambda ops: ops.wiener_deconv2d(image, observation, kernel, ratio, None, 1),
        (3 * TRANSFORM + 3) * size, 0, operations,
    )  # fmt: skip


def richardson_lucy() -> Case:
    """Four transforms an iteration, a product after each forward one, a ratio and an update."""
    image, observation, size = photographs(8, 3, 256, 256)
    kernel, iterations = taps(25), 20
    operations = iterations * (24 * 4 * real_transform(256, 256) + 10 * image.numel())
    return Case(
        "richardson_lucy, [8, 3, 256, 256], kernel 25, 20 iterations",
        lambda ops: ops.richardson_lucy(
            observation, kernel, image, None, "circular", iterations, 0.0, 1e-7
        ),
        iterations * (4 * TRANSFORM + 2 * 2 + 3 + 3) * size, 0, operations,
    )  # fmt: skip


def varying_blur() -> Case:
    """Sixteen kernels: every pixel under four windows, so four times the taps."""
    image, _, size = photographs(1, 3, 512, 512)
    kernels = torch.full((1, 16, 9, 9), 81**-1.0)
    weights = ext.blend_windows(512, 512, 4, 4, 32)
    return Case(
        "varying_blur2d, [1, 3, 512, 512], 4 x 4 kernels 9",
        lambda ops: ops.varying_blur2d(image, kernels, weights, "zero"),
        2 * size, 0, 2 * 81 * 4 * image.numel(),
    )  # fmt: skip


def cases() -> list[Case]:
    """The calls that are planned: one or two of each family."""
    return [
        direct_blur(),
        blur_gradients(),
        kernel_map(),
        wiener(),
        richardson_lucy(),
        varying_blur(),
        render_case(backward=False),
        render_case(backward=True),
    ]
