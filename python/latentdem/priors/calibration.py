"""Pictures to calibrate a prior on when its owner gives none."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def dead_leaves(count: int, side: int, *, seed: int = 0) -> Tensor:
    """``[count,3,side,side]`` in [0, 1]: discs that cover each other, sharp at every edge.

    Radii follow ``r^-3`` between one pixel and a third of the side, which gives the statistics of
    natural pictures at every scale (Lee, Mumford and Huang, IJCV 2001).  Discs are laid from the
    front backwards until nothing shows through.

    >>> dead_leaves(2, 32).shape
    torch.Size([2, 3, 32, 32])
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    smallest, largest = 1.0, side / 3
    pictures = []
    for _ in range(count):
        picture = np.zeros((side, side, 3))
        empty = np.ones((side, side), bool)
        while empty.any():
            share = rng.random()
            radius = (smallest**-2 - share * (smallest**-2 - largest**-2)) ** -0.5
            if (~empty).mean() > 0.97:  # the last gaps are closed by a large one
                radius = largest
            y, x = rng.uniform(-radius, side + radius, 2)
            disc = ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2) & empty
            picture[disc] = rng.random(3)
            empty &= ~disc
        pictures.append(picture)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
