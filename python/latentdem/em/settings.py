"""Settings of the two methods, with the defaults that the README's tables were made with."""

from __future__ import annotations

from dataclasses import dataclass, field

from latentdem.em.schedules import ANNEALINGS, descending
from latentdem.operators.blur import MStepSettings


@dataclass(frozen=True)
class ProxSettings:
    """``prox``: proximal E-step without back-propagation (the default method)."""

    steps: int = 60
    """Steps of one reverse trajectory."""
    start: float = 0.6
    """Noise level t / T that the trajectory starts from, at the noised observation."""
    refinement_steps: int = 0
    """How many of the steps belong to a second, shorter trajectory from the first's result."""
    refinement_start: float = 0.3
    """Noise level that the second trajectory starts from."""
    error_scale: float = 0.5
    """r_t as a share of the prior's measured pixel RMSE at t."""
    excess_weight: float = 0.1
    """Share of the excess residual that counts as error of the kernel, in s^2."""
    fresh_noise: float = 0.7
    """Share of new noise, against the predicted one, when going to the next level."""
    imputations: int = 3
    """Passes that fill in the unobserved margin of the canvas."""
    m_step: MStepSettings = field(default_factory=MStepSettings)

    def __post_init__(self) -> None:
        _check(self.steps > 0, "steps must be positive", self.steps)
        _check(0 < self.start < 1, "start must lie between 0 and 1", self.start)

    def schedule(self, timesteps: int) -> list[int]:
        """Timesteps of the whole run, for a prior with ``timesteps`` training timesteps."""
        second = min(self.refinement_steps, self.steps - 1)
        top = timesteps - 1
        first = descending(round(self.start * top), self.steps - second)
        return first + (descending(round(self.refinement_start * top), second) if second else [])


@dataclass(frozen=True)
class PaperSettings:
    """``paper``: the published method, gradients through decoder, encoder and denoiser."""

    steps: int = 250
    """DDIM steps from pure noise (the paper takes 1000)."""
    annealing: str = "exponential"
    """See :func:`latentdem.em.schedules.annealing`."""
    step_size: float = 1.0
    """Factor of the annealed step along the gradient."""
    gluing: float = 0.1
    """gamma, weight of the gluing term."""
    gluing_adjoint: bool = True
    """Glue with the exact adjoint (PSLD), or with the paper's y + x - k * x."""
    every: int = 4
    """Skip-gradient: the E- and M-step run at every K-th step ..."""
    last: int = 40
    """... and at each of the last ones."""
    m_step: MStepSettings = field(default_factory=MStepSettings)

    def __post_init__(self) -> None:
        _check(self.steps > 0, "steps must be positive", self.steps)
        _check(self.every > 0, "every must be positive", self.every)
        _check(
            self.annealing in ANNEALINGS,
            f"annealing must be one of {', '.join(ANNEALINGS)}",
            self.annealing,
        )


def _check(condition: bool, rule: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, found {found!r}")
