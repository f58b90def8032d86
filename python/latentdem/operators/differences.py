"""Forward differences of a periodic picture, their adjoint, and their power on its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor


def differences(image: Tensor) -> list[Tensor]:
    """``D x``: differences of ``image [...,H,W]`` to the pixels below and to the right."""
    return [image.roll(-1, -2) - image, image.roll(-1, -1) - image]


def divergence(field: list[Tensor]) -> Tensor:
    """``D^T d``, the adjoint of :func:`differences`.

    >>> x, d = torch.rand(1, 1, 5, 7), [torch.rand(1, 1, 5, 7), torch.rand(1, 1, 5, 7)]
    >>> left = sum((g * e).sum() for g, e in zip(differences(x), d))
    >>> bool(torch.isclose(left, (x * divergence(d)).sum(), atol=1e-5))
    True
    """
    down, right = field
    return down.roll(1, -2) - down + right.roll(1, -1) - right


def laplacian(size: tuple[int, int], like: Tensor) -> Tensor:
    """``|D|^2`` on the half spectrum of a picture of ``size``: ``[H,W//2+1]``.

    ``like``: a real tensor of the wanted dtype and device.

    >>> x = torch.rand(6, 8)
    >>> filtered = torch.fft.irfft2(laplacian((6, 8), x) * torch.fft.rfft2(x), s=(6, 8))
    >>> bool(torch.allclose(filtered, divergence(differences(x)), atol=1e-5))
    True
    """
    kind = {"dtype": like.dtype, "device": like.device}
    rows = torch.fft.fftfreq(size[0], **kind)[:, None]
    columns = torch.fft.rfftfreq(size[1], **kind)[None, :]
    return 4 - 2 * torch.cos(2 * torch.pi * rows) - 2 * torch.cos(2 * torch.pi * columns)
