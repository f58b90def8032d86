"""The packaged kernel prior: a small convolutional network that reads an M-step's equations."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.priors.weights import load_network

PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "kernel.safetensors"

CHANNELS = 40
DILATIONS = (1, 1, 2, 2, 4, 4, 8, 1)
COARSE_CHANNELS = 48
COARSE_DILATIONS = (1, 2, 4, 1)

RIDGES = (1e-3, 0.1, 1.0)
"""Ridges of the least squares kernels that the network sees, in units of the edges' energy."""
THRESHOLD = 0.05
"""Kernel values below this share of the peak are set to zero."""


def solve_kernel(lags: Tensor, cross: Tensor, alpha: float, *, steps: int = 25) -> Tensor:
    """``(A + alpha I) k = b`` by ``steps`` of conjugate gradients: ``[1,1,k,k]``, of any sign.

    Args:
        lags: of A, ``[1,2k-1,2k-1]``, from :func:`latentdem_ext.kernel_map_statistics`.
        cross: b, ``[1,k,k]``.
        alpha: ridge, in squared grey values summed over the image.
        steps: few; they regularise, too.
    """
    zero = torch.zeros_like(cross)
    return ext.kernel_map_solve(lags, cross, zero, zero, alpha=alpha, steps=steps)[:, None]


def kernel_evidence(lags: Tensor, cross: Tensor, before: Tensor) -> Tensor:
    """What the network sees of one M-step: ``[1,5,k,k]``.

    The least squares kernel clamped and thresholded; least squares kernels of three ridges as
    they are, negative lobes included, which tell how far to trust the first; the kernel before.

    Args:
        lags: as for :func:`solve_kernel`.
        cross: as there.
        before: the kernel ``[1,1,k,k]`` that the image was restored with.
    """
    side = cross.shape[-1]
    # In units of the edges' energy, so that the ridges are numbers and the device is not asked.
    energy = lags[0, side - 1, side - 1].clamp_min(1e-8)
    lags, cross = lags / energy, cross / energy
    solved = torch.cat([solve_kernel(lags, cross, ridge) for ridge in RIDGES], 1)
    scaled = solved / _peak(solved[:, 1:2])
    first = solved[:, :1].clamp_min(0)
    peak = _peak(first)
    first = torch.where(first >= THRESHOLD * peak, first / peak, 0.0)
    return torch.cat([first, scaled, before / _peak(before)], 1)


def _peak(kernel: Tensor) -> Tensor:
    return kernel.amax((-2, -1), keepdim=True).clamp_min(1e-12)


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """``x + second(silu(first(silu(x))))``."""
        return features + self.second(F.silu(self.first(F.silu(features))))


class KernelDenoiserNet(nn.Module):
    """Eight residual dilated blocks, and four on a quarter of the size, 0.41 M parameters.

    With ``evidence`` (:func:`kernel_evidence`) it answers an M-step; with a kernel alone it is a
    plug-and-play denoiser.  Output ``[B,1,k,k]``, any k, non-negative, summing to one, in the
    input's place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(CHANNELS, d) for d in DILATIONS)
        self.tail = nn.Conv2d(CHANNELS, 1, 3, padding=1)
        self.evidence = nn.Conv2d(4, CHANNELS, 3, padding=1)
        half = COARSE_CHANNELS // 2
        self.coarse = nn.Sequential(
            nn.Conv2d(5, half, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(half, COARSE_CHANNELS, 3, stride=2, padding=1),
            *(Residual(COARSE_CHANNELS, d) for d in COARSE_DILATIONS),
        )
        self.fine = nn.Conv2d(COARSE_CHANNELS, CHANNELS, 1)
        # What reads the evidence begins with no say.
        for layer in (self.evidence, self.fine):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, kernel: Tensor, evidence: Tensor | None = None) -> Tensor:
        """Answer for ``kernel [B,1,k,k]``, whose scale does not matter, or ``evidence [B,5,k,k]``.

        ``kernel`` is not looked at where there is evidence.
        """
        first = kernel / _peak(kernel) if evidence is None else evidence[:, :1]
        features = self.head(first)
        if evidence is not None:
            coarse = self.fine(self.coarse(evidence))
            enlarged = F.interpolate(
                coarse, evidence.shape[-2:], mode="bilinear", align_corners=False
            )
            features = features + self.evidence(evidence[:, 1:]) + enlarged
        for block in self.blocks:
            features = block(features)
        # Shifted so that an untrained pixel is near zero.
        positive = F.softplus(4 * (first + self.tail(F.silu(features))) - 3)
        positive = torch.where(positive > 0.06, positive - 0.06, 0.01 * positive)
        return positive / positive.sum((-2, -1), keepdim=True)


class SymmetricKernelPrior(nn.Module):
    """The mean of a kernel prior's answers to the eight symmetries of what it is asked.

    A turned photograph has a turned kernel, which a network knows only nearly: its errors differ.

    >>> import torch
    >>> prior, kernel = SymmetricKernelPrior(KernelDenoiserNet()), torch.rand(1, 1, 9, 9)
    >>> turned = prior(kernel.rot90(1, (-2, -1)))
    >>> bool(torch.allclose(turned, prior(kernel).rot90(1, (-2, -1)), atol=1e-6))
    True
    """

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, kernel: Tensor, evidence: Tensor | None = None) -> Tensor:
        """As :meth:`KernelDenoiserNet.forward`."""
        count = len(kernel)
        if evidence is None:
            answers = self.prior(_symmetries(kernel))
        else:
            asked = _symmetries(evidence)
            answers = self.prior(asked[:, :1], asked)
        back = [
            (part.flip(-1) if index >= 4 else part).rot90(-(index % 4), (-2, -1))
            for index, part in enumerate(answers.split(count))
        ]
        return torch.stack(back).mean(0)


def _symmetries(planes: Tensor) -> Tensor:
    """``[8 B,C,k,k]``: ``planes [B,C,k,k]`` turned by 0 to 270 degrees, then those mirrored."""
    turned = torch.cat([planes.rot90(turns, (-2, -1)) for turns in range(4)])
    return torch.cat([turned, turned.flip(-1)])


def load_kernel_prior(path: Path | str | None = None) -> KernelDenoiserNet:
    """Load the packaged kernel prior, or one written by ``latentdem train-kernel-prior``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    path = PACKAGED if path is None else Path(path)
    return load_network(KernelDenoiserNet(), path, "train-kernel-prior", "kernel prior")
