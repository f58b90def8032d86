"""Blur loss with both gradients, against autograd through plain torch FFTs.

``complex fft2``: the published formulation, complex transforms under autograd.
``rfft2``: the same with real transforms, written as well as plain torch allows.
``ffts alone``: the real transforms that no spectral method avoids (image and observation
forward, image gradient back; the kernel's own are small change).

Peak memory is that of a second call, on a CPU in a process of its own, above what it held before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, peak_mebibytes, seeded, separate_peak, store
from torch import Tensor

import latentdem_ext as ext

CASES = [((8, 3, 256, 256), 33), ((1, 3, 1024, 1024), 65), ((8, 3, 256, 256), 7)]


def _embed(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    kh, kw = kernel.shape[-2:]
    grid = torch.nn.functional.pad(kernel, (0, size[1] - kw, 0, size[0] - kh))
    return grid.roll((-(kh // 2), -(kw // 2)), (-2, -1))


def complex_autograd(image: Tensor, kernel: Tensor, observation: Tensor) -> tuple[Any, ...]:
    """Loss and gradients by autograd through ``fft2``."""
    x, k = image.detach().requires_grad_(), kernel.detach().requires_grad_()
    size = (image.shape[-2], image.shape[-1])
    blurred = torch.fft.ifft2(torch.fft.fft2(x) * torch.fft.fft2(_embed(k, size))).real
    loss = 0.5 * (blurred - observation).square().sum((1, 2, 3))
    return loss, *torch.autograd.grad(loss.sum(), (x, k))


def real_autograd(image: Tensor, kernel: Tensor, observation: Tensor) -> tuple[Any, ...]:
    """Loss and gradients by autograd through ``rfft2``."""
    x, k = image.detach().requires_grad_(), kernel.detach().requires_grad_()
    size = (image.shape[-2], image.shape[-1])
    product = torch.fft.rfft2(x) * torch.fft.rfft2(_embed(k, size))
    loss = 0.5 * (torch.fft.irfft2(product, s=size) - observation).square().sum((1, 2, 3))
    return loss, *torch.autograd.grad(loss.sum(), (x, k))


def ffts_alone(image: Tensor, observation: Tensor) -> Tensor:
    """Two forward transforms and one inverse of the image's size."""
    torch.fft.rfft2(image)
    return torch.fft.irfft2(torch.fft.rfft2(observation), s=image.shape[-2:])


def problem(case: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, kernel and observation of a case."""
    shape, k = CASES[case]
    image, observation = torch.rand(2, *shape, generator=seeded(0))
    kernel = torch.rand(1, 1, k, k, generator=seeded(1))
    return image, kernel / kernel.sum(), observation


CANDIDATES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "native": ext.blur_gradients,
    "complex fft2": complex_autograd,
    "rfft2": real_autograd,
    "ffts alone": lambda image, kernel, observation: ffts_alone(image, observation),
}


def operations(shape: tuple[int, ...], k: int) -> tuple[float, float]:
    """Floating-point operations and bytes that the native spectral path needs at least.

    A real transform of N points counts 2.5 N log2 N; three for each plane, and two of the
    kernel's, of which the columns that hold nothing are left out. Image and observation are
    read once, the gradient is written once.
    """
    batch, channels, height, width = shape
    points = height * width
    transform = 2.5 * points * torch.tensor(float(points)).log2().item()
    planes = batch * channels
    kernel = 2 * transform * (0.5 + 0.5 * k / width)
    pointwise = 15 * points * planes
    return planes * 3 * transform + kernel + pointwise, 3.0 * planes * points * 4


def main() -> None:
    """Time all cases and store ``results/blur.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", choices=CANDIDATES)
    parser.add_argument("--case", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.memory:
        inputs = problem(arguments.case)
        print(peak_mebibytes(lambda: CANDIDATES[arguments.memory](*inputs)))
        return
    rows = []
    for index, (shape, k) in enumerate(CASES):
        inputs = problem(index)
        for a, b in zip(ext.blur_gradients(*inputs), real_autograd(*inputs), strict=True):
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.detach().abs().max()))
        times = interleaved(
            {
                name: lambda call=call: call(*inputs)  # noqa: B023
                for name, call in CANDIDATES.items()
            }
        )
        memory = {
            name: separate_peak(
                lambda call=CANDIDATES[name]: call(*inputs),  # noqa: B023
                __file__,
                "--memory",
                name,
                "--case",
                str(index),
            )
            for name in ("native", "complex fft2", "rfft2")
        }
        flop, moved = operations(shape, k)
        seconds = times["native"] / 1e3
        rows.append(
            {
                "case": f"{list(shape)}, kernel {k}",
                "milliseconds": times,
                "peak_mebibytes": memory,
                "achieved": {
                    "gflop_per_s": flop / seconds / 1e9,
                    "gb_per_s": moved / seconds / 1e9,
                },
                "ratios": {
                    "complex fft2 / native": times["complex fft2"] / times["native"],
                    "rfft2 / native": times["rfft2"] / times["native"],
                    "native / ffts alone": times["native"] / times["ffts alone"],
                    "memory, rfft2 / native": memory["rfft2"] / max(memory["native"], 0.1),
                },
            }
        )
    store("blur", rows)


if __name__ == "__main__":
    main()
