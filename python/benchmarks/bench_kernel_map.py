"""The kernel's MAP estimate, against the published formulation and a careful plain one.

``published``: every transform of image size is computed again in each iteration.
``rfft2 once``: real transforms, the image's and the observation's computed once.
``ffts alone``: the eight real transforms of image size that any method needs: three channels of
image and observation forward, the auto- and the cross-correlation back.
``native, prepared``: the observation's transforms kept from an earlier call.
"""

from __future__ import annotations

import torch
from common import interleaved, store
from torch import Tensor

import latentdem_ext as ext

CASES = [((1, 3, 512, 512), 64), ((1, 3, 256, 256), 25)]
ITERATIONS = 20
ALPHA = 2000.0


def _clamp(kernel: Tensor) -> Tensor:
    kernel = kernel.clamp_min(0)
    return kernel / kernel.sum((-2, -1), keepdim=True)


def published(image: Tensor, observation: Tensor, start: Tensor) -> Tensor:
    """Complex transforms of everything in every iteration; channels solved apart, then averaged."""
    kh, kw = start.shape[-2:]
    split = start
    for _ in range(ITERATIONS):
        grid = torch.zeros_like(image)
        grid[..., :kh, :kw] = split
        z = torch.fft.fft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))
        x, y = torch.fft.fft2(image), torch.fft.fft2(observation)
        k = (x.conj() * y + ALPHA * z) / (x.abs().square() + ALPHA)
        field = torch.fft.ifft2(k).real.roll((kh // 2, kw // 2), (-2, -1))
        split = _clamp(field[..., :kh, :kw].mean(1, keepdim=True))
    return split


def rfft2_once(image: Tensor, observation: Tensor, start: Tensor) -> Tensor:
    """Pooled normal equations, transforms of image size only for the kernel's field."""
    kh, kw = start.shape[-2:]
    size = image.shape[-2:]
    x, y = torch.fft.rfft2(image), torch.fft.rfft2(observation)
    cross = (x.conj() * y).sum(1, keepdim=True)
    power = x.abs().square().sum(1, keepdim=True) + ALPHA
    split = start
    for _ in range(ITERATIONS):
        grid = torch.nn.functional.pad(split, (0, size[1] - kw, 0, size[0] - kh))
        z = torch.fft.rfft2(grid.roll((-(kh // 2), -(kw // 2)), (-2, -1)))
        field = torch.fft.irfft2((cross + ALPHA * z) / power, s=size)
        split = _clamp(field.roll((kh // 2, kw // 2), (-2, -1))[..., :kh, :kw])
    return split


def ffts_alone(image: Tensor, observation: Tensor) -> Tensor:
    """Six forward transforms and two inverse ones."""
    x, y = torch.fft.rfft2(image), torch.fft.rfft2(observation)
    return torch.fft.irfft2(torch.stack([x[0, 0], y[0, 0]]), s=image.shape[-2:])


def restricted_residual(image: Tensor, observation: Tensor, kernel: Tensor) -> float:
    """``||k * x - y||`` relative to ``||y||``: what the restricted least squares minimise."""
    return float((ext.blur_conv2d(image, kernel) - observation).norm() / observation.norm())


def main() -> None:
    """Time all cases and store ``results/kernel_map.json``."""
    rows = []
    for shape, k in CASES:
        image = torch.rand(shape)
        kernel = torch.rand(1, 1, k, k) ** 8
        kernel /= kernel.sum()
        observation = ext.blur_conv2d(image, kernel)
        start = torch.full_like(kernel, 1 / k**2)

        prepared = ext.kernel_map_prepare(observation, (k, k))

        def native(image=image, observation=observation, start=start, exact=True, ready=None):  # type: ignore[no-untyped-def]
            return ext.kernel_map_update(
                image,
                observation,
                start,
                noise_std=0.02,
                penalty=ALPHA / 0.02**2,
                regularization=0.0,
                iterations=ITERATIONS,
                prior="none",
                support_exact=exact,
                prepared=ready,
            )

        times = interleaved(
            {
                "native, support exact": native,
                "native, prepared": lambda native=native, p=prepared: native(ready=p),
                "native, full grid": lambda native=native: native(exact=False),
                "published": lambda: published(image, observation, start),  # noqa: B023
                "rfft2 once": lambda: rfft2_once(image, observation, start),  # noqa: B023
                "ffts alone": lambda: ffts_alone(image, observation),  # noqa: B023
            }
        )
        noisy = observation + 0.02 * torch.randn(shape)
        residuals = {
            "support exact": restricted_residual(image, noisy, native(observation=noisy)),
            "crop and clip": restricted_residual(
                image, noisy, native(observation=noisy, exact=False)
            ),
            "true kernel": restricted_residual(image, noisy, kernel),
        }
        many = [t.expand(16, -1, -1, -1).contiguous() for t in (image, observation, start)]
        batched = interleaved({"batch of 16": lambda native=native, m=many: native(*m)}, rounds=3)
        base = times["native, support exact"]
        rows.append(
            {
                "case": f"{list(shape)}, kernel {k}, {ITERATIONS} iterations",
                "milliseconds": times,
                "relative_residuals": residuals,
                "ratios": {
                    "prepared: published / native": times["published"] / times["native, prepared"],
                    "prepared: rfft2 once / native": times["rfft2 once"]
                    / times["native, prepared"],
                    "native / ffts alone": base / times["ffts alone"],
                    "batch of 16 / 16 single": batched["batch of 16"] / (16 * base),
                    "published / native": times["published"] / base,
                    "rfft2 once / native": times["rfft2 once"] / base,
                },
            }
        )
    store("kernel_map", rows)


if __name__ == "__main__":
    main()
