"""Settings of the two methods, with the defaults that the README's tables were made with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from latentdem.em.schedules import ANNEALINGS
from latentdem.operators.blur import EdgeStepSettings, MStepSettings


@dataclass(frozen=True)
class ProxSettings:
    """``prox``: proximal E-step without back-propagation (the default method)."""

    steps: int = 16
    """Steps of the reverse trajectory.  12 lose 0.06 dB with the true kernel, on six validation
    pairs."""
    chains: int = 2
    """Trajectories with a shared kernel; their mean is the result.  Three, half as much work again,
    gain 0.01 dB with the true kernel and lose 0.02 dB blindly, on the same pairs."""
    start: float = 0.4
    """Noise level t / T that the trajectory starts from, at the noised observation."""
    error_scale: float = 2.0
    """r_t as a multiple of the prior's measured pixel RMSE at t (blur adds to the error).  Textured
    photographs want 3, smooth ones 1.4 (measured on validation photographs)."""
    excess_weight: float = 0.1
    """Share of the excess residual that counts as error of the kernel, in s^2."""
    fresh_noise: float = 0.7
    """Share of new noise, against the predicted one, when going to the next level."""
    imputations: int = 3
    """Passes that fill in the unobserved margin of the canvas."""
    total_variation: float = 0.012
    """Weight of the total variation that the last image is smoothed with; 0: as it is."""
    sparse_share: float = 0.5
    """Share, in the result, of a deconvolution with the same kernel under sparse gradients: two
    priors err differently.  On eight validation photographs the mean is 0.3 dB better than the
    diffusion model's estimate, blindly and with the true kernel; shares of 0.35 and 0.5 alike."""
    sparse_weight: float = 5e-4
    """Weight of that prior at a noise of 0.01; it goes with the noise's square, of 0.005 at least.
    2.5e-4 and 1e-3 lose 0.1 and 0 dB blindly, 0.2 and 0.4 dB with the true kernel."""
    m_step: EdgeStepSettings = field(default_factory=EdgeStepSettings)

    def __post_init__(self) -> None:
        _check(self.steps > 0, "steps must be positive", self.steps)
        _check(0 <= self.sparse_share <= 1, "sparse_share must lie in [0, 1]", self.sparse_share)
        _check(self.sparse_weight > 0, "sparse_weight must be positive", self.sparse_weight)
        _check(self.chains > 0, "chains must be positive", self.chains)
        _check(0 < self.start < 1, "start must lie between 0 and 1", self.start)
        _check(self.total_variation >= 0, "total_variation must be >= 0", self.total_variation)


QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"steps": 8, "chains": 1},
    "standard": {},
}
"""What ``quality`` changes of :class:`ProxSettings`.

More than the standard does not pay blindly: on six of ``make evaluate``'s pairs 32 steps of four
chains gain 0.1 dB with the true kernel and lose 0.2 dB without, as more M-steps move the kernel
further from the one that was searched for (MNC 0.899 for 0.906).
"""


@dataclass(frozen=True)
class PaperSettings:
    """``paper``: the published method, gradients through decoder, encoder and denoiser."""

    steps: int = 250
    """DDIM steps from pure noise (the paper takes 1000)."""
    annealing: str = "exponential"
    """See :func:`latentdem.em.schedules.annealing`."""
    step_size: float = 40.0
    """Factor of the annealed step along the gradient.  The paper's 1 belongs to Stable Diffusion's
    latents and images in [-1, 1]; this suits the packaged prior (measured with version 1 on one
    validation photograph: 3 and 150 lose 4 and 3 dB against 60)."""
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


def for_kernel_alone(settings: ProxSettings | PaperSettings) -> ProxSettings | PaperSettings:
    """``settings`` where the image is not wanted: of ``prox`` in as few steps as ``fast`` takes.

    And nothing that finishes the image.  On the eight pairs that both were measured on, ``fast``
    finds kernels nearly as good (MNC 0.926) as the standard does (0.930).

    >>> for_kernel_alone(ProxSettings()).steps
    8
    """
    if not isinstance(settings, ProxSettings):
        return settings
    fast = ProxSettings(**QUALITIES["fast"])
    return replace(
        settings,
        steps=min(settings.steps, fast.steps),
        chains=min(settings.chains, fast.chains),
        total_variation=0.0,
        sparse_share=0.0,
    )


def _check(condition: bool, rule: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, found {found!r}")
