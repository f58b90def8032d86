"""Blur loss with both gradients, against autograd through plain torch FFTs.

``complex fft2``: the published formulation, complex transforms under autograd.
``rfft2``: the same with real transforms, written as well as plain torch allows.
``ffts alone``: the real transforms that no spectral method avoids (image and observation
forward, image gradient back; the kernel's own are small change).
"""

from __future__ import annotations

from typing import Any

import torch
from common import interleaved, store
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


def main() -> None:
    """Time all cases and store ``results/blur.json``."""
    rows = []
    for shape, k in CASES:
        image, observation = torch.rand(2, *shape)
        kernel = torch.rand(1, 1, k, k)
        kernel /= kernel.sum()
        native = ext.blur_gradients(image, kernel, observation)
        plain = real_autograd(image, kernel, observation)
        for a, b in zip(native, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.detach().abs().max()))
        times = interleaved(
            {
                "native": lambda: ext.blur_gradients(image, kernel, observation),  # noqa: B023
                "complex fft2": lambda: complex_autograd(image, kernel, observation),  # noqa: B023
                "rfft2": lambda: real_autograd(image, kernel, observation),  # noqa: B023
                "ffts alone": lambda: ffts_alone(image, observation),  # noqa: B023
            }
        )
        rows.append(
            {
                "case": f"{list(shape)}, kernel {k}",
                "milliseconds": times,
                "ratios": {
                    "complex fft2 / native": times["complex fft2"] / times["native"],
                    "rfft2 / native": times["rfft2"] / times["native"],
                    "native / ffts alone": times["native"] / times["ffts alone"],
                },
            }
        )
    store("blur", rows)


if __name__ == "__main__":
    main()
