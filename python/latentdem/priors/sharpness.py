"""The packaged sharpness classifier: is there any blur to take away?

A blind method that is given a sharp photograph finds a small kernel nevertheless and invents
detail.  A small network that has learned from photographs with and without blur says which it is,
from how quickly the picture changes from pixel to pixel.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdem.priors.weights import load_network

PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "sharpness.safetensors"

DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1))
"""Down and to the right: half a turn in eight steps."""
DISTANCES = (1, 2, 4, 7, 12)
"""In pixels, of the differences."""
QUANTILES = (0.5, 0.8, 0.95, 0.99, 0.998)
FLOOR = 2e-3
"""Half a step of 8 bits: smaller differences say nothing."""
RANKS = (0, 1, 3, 4, 6, 7)
"""Of the directions, which are sorted: a motion blur leaves the edges along it as they are."""
HIDDEN = (96, 48)
SMALLEST = 32
"""Sides below it have too few pixels for an answer."""
WINDOW = 256
"""Side in pixels of the windows that a photograph is looked at through, at its own scale."""
WINDOWS = 9
"""At most so many of them, those of the highest contrast."""


def difference_statistics(image: Tensor) -> Tensor:
    """How much the grey picture differs over some pixels, in every direction: ``[B,150]``.

    Logarithms of quantiles of ``|x(p) - x(p + d)|`` over the pixels p, for five lengths of d,
    sorted over its eight directions.  An edge that no blur has touched differs as much over two
    pixels as over twelve, and does so in every direction.

    Args:
        image: ``[B,3,H,W]`` in [0, 1], of 32 pixels and more.
    """
    grey = image.mean(1)
    height, width = grey.shape[-2:]
    found = []
    for down, right in DIRECTIONS:
        length = (down * down + right * right) ** 0.5
        for distance in DISTANCES:
            dy, dx = (round(part * distance / length) or part for part in (down, right))
            first = grey[:, dy:, max(dx, 0) : width + min(dx, 0)]
            second = grey[:, : height - dy, max(-dx, 0) : width - max(dx, 0)]
            values = (first - second)[:, ::2, ::2].abs().flatten(1).sort(1).values
            places = [int(q * (values.shape[1] - 1)) for q in QUANTILES]
            found.append(values[:, places])
    shape = (len(grey), len(DIRECTIONS), len(DISTANCES), len(QUANTILES))
    ranked = (torch.stack(found, 1).reshape(shape) + FLOOR).log().sort(1).values
    return ranked[:, RANKS].flatten(1)


class SharpnessNet(nn.Module):
    """Two hidden layers on :func:`difference_statistics`, 19 thousand parameters."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        inputs = len(RANKS) * len(DISTANCES) * len(QUANTILES)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.layers = nn.Sequential(
            nn.Linear(inputs, HIDDEN[0]),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Linear(HIDDEN[0], HIDDEN[1]),
            nn.SiLU(),
            nn.Linear(HIDDEN[1], 1),
        )

    def forward(self, statistics: Tensor) -> Tensor:
        """Log-odds ``[B]`` that the pictures of these statistics ``[B,150]`` are sharp."""
        return self.layers((statistics - self.mean) / self.std)[:, 0]


def windows(image: Tensor) -> Tensor:
    """The windows ``[N,3,h,w]`` of ``image [1,3,H,W]`` that the network looks at."""
    height, width = image.shape[-2:]
    tall, wide = min(height, WINDOW), min(width, WINDOW)
    down = F.pad(image.diff(dim=-2).abs(), (0, 0, 0, 1))
    gradient = down + F.pad(image.diff(dim=-1).abs(), (0, 1))
    places = [(top, left) for top in _starts(height, tall) for left in _starts(width, wide)]
    contrast = [
        float(gradient[..., top : top + tall, left : left + wide].mean()) for top, left in places
    ]
    best = sorted(range(len(places)), key=lambda index: -contrast[index])[:WINDOWS]
    return torch.cat([
        image[..., top : top + tall, left : left + wide]
        for top, left in (places[index] for index in best)
    ])  # fmt: skip


def _starts(side: int, window: int) -> list[int]:
    """Where windows side by side begin, spread evenly."""
    count = max(1, side // window)
    return [round(i * (side - window) / max(count - 1, 1)) for i in range(count)]


@torch.no_grad()
def sharp_log_odds(image: Tensor, network: SharpnessNet) -> float:
    """Log-odds that ``image [1,3,H,W]`` in [0, 1] is sharp: the mean over its windows.

    >>> sharp_log_odds(torch.rand(1, 3, 64, 64), SharpnessNet()) != 0
    True
    """
    if min(image.shape[-2:]) < SMALLEST:
        return 0.0
    return float(network(difference_statistics(windows(image))).mean())


def load_sharpness(path: Path | str | None = None) -> SharpnessNet:
    """Load the packaged classifier, or one written by ``latentdem train-sharpness``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    path = PACKAGED if path is None else Path(path)
    return load_network(SharpnessNet(), path, "train-sharpness", "sharpness classifier")
