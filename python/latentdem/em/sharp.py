"""A photograph that is sharp already comes back as it is."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from latentdem.em.steps import EMState
from latentdem.priors.sharpness import SharpnessNet, load_sharpness, sharp_log_odds

SHARP_LOG_ODDS = 3.0
"""Above it nothing is done.  To deblur a sharp photograph costs detail, to leave a blurred one
costs all: the classifier must be sure."""

SHARP = (
    "the photograph looks sharp, so it is left as it is; deblur it all the same with "
    "assume_blurred=True (--assume-blurred)"
)


@lru_cache(maxsize=1)
def _packaged() -> SharpnessNet:
    return load_sharpness()


def untouched(image: Tensor, kernel_size: int, patches: int) -> tuple[float, EMState | None]:
    """Log-odds that ``image [1,3,H,W]`` is sharp, and if they are high, the state that it ends in.

    That is the image itself and kernels ``[1,patches,k,k]`` of one pixel.
    """
    started = time.perf_counter()
    odds = sharp_log_odds(image.cpu(), _packaged())
    if odds < SHARP_LOG_ODDS:
        return odds, None
    kernel = torch.zeros(1, patches, kernel_size, kernel_size)
    kernel[..., kernel_size // 2, kernel_size // 2] = 1
    history = [{"step": 0, "timestep": 0, "residual_std": 0.0, "kernel_peak": 1.0}]
    seconds = {"sharpness": time.perf_counter() - started}
    return odds, EMState(image, kernel, seconds=seconds, history=history)
