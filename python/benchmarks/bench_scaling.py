"""How the cost of the operators grows with the size of image, kernel and batch.

Stores ``results/scaling.json``; ``plots.py`` draws it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bench_blur import real_autograd
from bench_kernel_map import rfft2_once
from common import interleaved, store

import latentdem_ext as ext


def blur_candidates(batch: int, side: int, k: int) -> dict[str, Callable[[], Any]]:
    """Loss and both gradients."""
    image, observation = torch.rand(2, batch, 3, side, side)
    kernel = torch.rand(1, 1, k, k)
    kernel /= kernel.sum()
    return {
        "native": lambda: ext.blur_gradients(image, kernel, observation),
        "rfft2 autograd": lambda: real_autograd(image, kernel, observation),
    }


def kernel_map_candidates(batch: int, side: int, k: int) -> dict[str, Callable[[], Any]]:
    """Twenty iterations of the kernel's MAP estimate."""
    image, observation = torch.rand(2, batch, 3, side, side)
    start = torch.full((batch, 1, k, k), 1 / k**2)
    return {
        "native": lambda: ext.kernel_map_update(
            image,
            observation,
            start,
            noise_std=0.02,
            penalty=5e6,
            regularization=0.0,
            iterations=20,
            prior="none",
        ),
        "rfft2 once": lambda: rfft2_once(image, observation, start),
    }


OPERATORS = {"blur_gradients": blur_candidates, "kernel_map_update": kernel_map_candidates}
SWEEPS = {
    "image side": [(1, side, 25) for side in (64, 128, 256, 512, 1024, 2048)],
    "kernel side": [(1, 512, k) for k in (5, 9, 17, 33, 65, 129)],
    "batch": [(batch, 256, 25) for batch in (1, 2, 4, 8, 16)],
}


def main() -> None:
    """Time every sweep."""
    rows = []
    for operator, candidates in OPERATORS.items():
        for sweep, points in SWEEPS.items():
            for batch, side, k in points:
                times = interleaved(candidates(batch, side, k), rounds=5)
                value = {"image side": side, "kernel side": k, "batch": batch}[sweep]
                rows.append(
                    {
                        "case": f"{operator} [{batch},3,{side},{side}], kernel {k}",
                        "operator": operator,
                        "sweep": sweep,
                        "value": value,
                        "milliseconds": times,
                        "ratios": {},
                    }
                )
    store("scaling", rows)


if __name__ == "__main__":
    main()
