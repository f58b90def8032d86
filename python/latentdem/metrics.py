"""Figures of merit: shift-aligned PSNR, kernel similarity, structural similarity, silhouettes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NO_BLUR = 0.5
"""A kernel whose peak is above this has found no blur."""


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image ``[B,C,H,W]`` in [0, 1]."""
    error = (image.clamp(0, 1) - truth).square().mean((1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-12))


def maximum_normalized_correlation(kernel: Tensor, truth: Tensor) -> Tensor:
    """MNC: the largest cross-correlation over all shifts, over the product of norms.

    Args:
        kernel: ``[B,1,k,k]``.
        truth: ``[B|1,1,k',k']``; sizes may differ.

    Returns:
        ``[B]``, one for equal kernels, never above one.  Source: Hu and Yang, ECCV 2012.
    """
    height = kernel.shape[-2] + truth.shape[-2]
    width = kernel.shape[-1] + truth.shape[-1]
    a = torch.fft.rfft2(kernel.double(), s=(height, width))
    b = torch.fft.rfft2(truth.double(), s=(height, width))
    correlation = torch.fft.irfft2(a * b.conj(), s=(height, width))
    norms = kernel.double().flatten(1).norm(dim=1) * truth.double().flatten(1).norm(dim=1)
    return (correlation.amax((1, 2, 3)) / norms.clamp_min(1e-30)).clamp(0, 1)


def kernel_rmse(kernel: Tensor, truth: Tensor) -> Tensor:
    """Root mean square difference ``[B]`` of kernels after the best shift by whole pixels.

    Args:
        kernel: ``[B,1,k,k]``, summing to one.
        truth: ``[B|1,1,k',k']``, likewise; the mean runs over its ``k'^2`` values.

    >>> kernel_rmse(torch.eye(3)[None, None] / 3, torch.eye(3)[None, None] / 3)
    tensor([0.])
    """
    a, b = kernel.double(), truth.double().expand(len(kernel), -1, -1, -1)
    size = (a.shape[-2] + b.shape[-2], a.shape[-1] + b.shape[-1])
    product = torch.fft.rfft2(a, s=size) * torch.fft.rfft2(b, s=size).conj()
    best = torch.fft.irfft2(product, s=size).amax((1, 2, 3))
    # |a shifted - b|^2 = |a|^2 + |b|^2 - 2 <a shifted, b>
    energy = a.square().sum((1, 2, 3)) + b.square().sum((1, 2, 3))
    error = (energy - 2 * best).clamp_min(0)
    # What cancels to the last digits is no difference.
    error = torch.where(error > 1e-14 * energy, error, 0.0)
    return (error / (b.shape[-2] * b.shape[-1])).sqrt().float()


def visual_information(image: Tensor, truth: Tensor) -> float:
    """Visual information fidelity (Sheikh and Bovik 2006) of ``[1,C,H,W]``; one for equal images.

    A perceptual figure without a network.  Sides must be at least 41 pixels.

    Raises:
        ImportError: torchmetrics is missing.
    """
    try:
        from torchmetrics.functional.image import visual_information_fidelity
    except ImportError:
        raise ImportError(
            "this figure needs torchmetrics: pip install latentdem[evaluate]"
        ) from None
    return float(visual_information_fidelity(image.clamp(0, 1), truth))


def bootstrap_interval(
    values: Sequence[float], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, by resampling them with replacement.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data), (draws, len(data)), generator=generator)
    low, high = torch.quantile(data[index].mean(1), torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def structural_similarity(image: Tensor, truth: Tensor) -> Tensor:
    """SSIM ``[B]`` of images ``[B,C,H,W]`` in [0, 1], scikit-image's 7 x 7 windows."""
    from skimage.metrics import structural_similarity as ssim

    pairs = zip(image.clamp(0, 1).cpu().numpy(), truth.cpu().numpy(), strict=True)
    return torch.tensor([ssim(a, b, channel_axis=0, data_range=1.0) for a, b in pairs])


def silhouette_iou(opacity: Tensor, mask: Tensor) -> Tensor:
    """Intersection over union ``[B]`` of silhouettes ``[B,1,H,W]``, opaque above one half.

    >>> import torch
    >>> silhouette_iou(torch.tensor([[[[1.0, 1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0, 1.0]]]]))
    tensor([0.3333])
    """
    a, b = opacity > 0.5, mask > 0.5
    union = (a | b).flatten(1).sum(1)
    # Two empty silhouettes agree.
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp_min(1), 1.0)


def translate(image: Tensor, dy: float, dx: float) -> Tensor:
    """Shift ``[B,C,H,W]`` by (dy, dx) pixels, bicubic, borders repeated.

    ``out[y, x] = image[y - dy, x - dx]``.
    """
    height, width = image.shape[-2:]
    y = (torch.arange(height, dtype=image.dtype) - dy) * 2 / max(height - 1, 1) - 1
    x = (torch.arange(width, dtype=image.dtype) - dx) * 2 / max(width - 1, 1) - 1
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)
    grid = grid.expand(len(image), *grid.shape)
    return F.grid_sample(image, grid, mode="bicubic", padding_mode="border", align_corners=True)


def aligned_psnr(
    image: Tensor, truth: Tensor, *, margin: int, search: int
) -> tuple[float, tuple[float, float]]:
    """PSNR of one image after the best translation.

    A blind deconvolution is free to shift the image one way and the kernel the other, so the
    raw PSNR says little.  Integer shifts up to ``search`` are tried first, then quarter pixels
    around the best; every shift is compared on the same crop, ``margin + search`` pixels from
    the border.  The degraded image must be measured with the same call.

    Args:
        image: ``[1,C,H,W]`` in [0, 1].
        truth: ``[1,C,H,W]``.
        margin: pixels to leave out, half a kernel.
        search: largest shift in pixels.

    Returns:
        PSNR in dB and the shift (dy, dx) applied to ``image``.
    """
    if image.shape != truth.shape or len(image) != 1:
        raise ValueError(f"need two images [1,C,H,W], found {image.shape} and {truth.shape}")
    inset = margin + search
    height, width = image.shape[-2:]
    if min(height, width) <= 2 * inset:
        raise ValueError(f"image {height} x {width} is too small for an inset of {inset} pixels")
    target = truth[..., inset : height - inset, inset : width - inset]

    def score(dy: float, dx: float) -> float:
        if dy == int(dy) and dx == int(dx):
            y, x = inset - int(dy), inset - int(dx)
            crop = image[..., y : y + target.shape[-2], x : x + target.shape[-1]]
        else:
            moved = translate(image, dy, dx)
            crop = moved[..., inset : height - inset, inset : width - inset]
        return float(psnr(crop, target))

    best: tuple[float, float, float] = max(
        (score(dy, dx), float(dy), float(dx))
        for dy in range(-search, search + 1)
        for dx in range(-search, search + 1)
    )
    for step in (0.5, 0.25):
        _, y, x = best
        best = max(
            best,
            *((score(y + i * step, x + j * step), y + i * step, x + j * step)
              for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j),
        )  # fmt: skip
    return best[0], (best[1], best[2])
