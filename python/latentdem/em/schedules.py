"""Annealing and skipping: how strongly, and how often, the data term pulls.

Both are functions of the noise level ``t / T`` of the training schedule and of the share of
the run that is done, never of a step index, so a run of 50 steps anneals as one of 1000 does.
"""

from __future__ import annotations

import math

ANNEALINGS = ("paper", "linear", "exponential", "cosine", "adaptive", "constant")


def annealing(name: str, level: float, residual: float = 1.0) -> float:
    """Relative weight s_t of the data term, in (0, 1] (``adaptive`` may exceed it).

    Args:
        name: ``paper``: 0.1 at level 1 rising linearly to 1 at level 0.6, then constant
            (the paper's 1 / zeta_t); ``linear``: 0.1 to 0.8; ``exponential``: 0.1 to 1,
            geometric; ``cosine``: 0.1 to 1, half a cosine; ``adaptive``: 2 / residual;
            ``constant``: 1, no annealing.
        level: noise level t / T, from 1 (pure noise) to 0.
        residual: root mean square residual over the noise's standard deviation, at least 1;
            read by ``adaptive`` only.

    >>> annealing("paper", 1.0), annealing("paper", 0.3)
    (0.1, 1.0)
    """
    progress = 1 - min(max(level, 0.0), 1.0)
    if name == "paper":
        return 0.1 + 0.9 * min(progress / 0.4, 1.0)
    if name == "linear":
        return 0.1 + 0.7 * progress
    if name == "exponential":
        return 0.1 ** (1 - progress)
    if name == "cosine":
        return 0.1 + 0.9 * 0.5 * (1 - math.cos(math.pi * progress))
    if name == "adaptive":
        return 2.0 / max(residual, 1.0)
    if name == "constant":
        return 1.0
    raise ValueError(f"annealing must be one of {', '.join(ANNEALINGS)}, found '{name}'")


def takes_gradient(step: int, steps: int, *, every: int, last: int) -> bool:
    """Skip-gradient: whether the E- and M-step run at ``step`` of ``steps`` (from zero).

    They run at every ``every``-th step, and at each of the ``last`` ones.
    """
    return step % every == 0 or step >= steps - last


def descending(start: int, steps: int) -> list[int]:
    """``steps`` descending timesteps from ``start`` to 0, evenly spaced.

    >>> descending(600, 4)
    [600, 400, 200, 0]
    """
    if steps == 1:
        return [start]
    return [round(start * (1 - i / (steps - 1))) for i in range(steps)]
