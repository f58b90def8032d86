"""The methods that the suite ``baselines`` compares, each with its settings, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from latentdem.baselines.blind_dps import BlindDPSSettings, run_blind_dps
from latentdem.baselines.classical import ClassicalSettings, run_classical
from latentdem.baselines.fast_em import FastEMSettings, run_fast_em
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.em.steps import EMState, run_paper, run_prox
from latentdem.operators.blur import BlurModel
from latentdem.operators.hyper_laplacian import HyperLaplacianSettings
from latentdem.priors.kernel import KernelDenoiserNet, load_kernel_prior
from latentdem.priors.latent import LatentPrior, load_prior

Settings = ProxSettings | PaperSettings | FastEMSettings | BlindDPSSettings | ClassicalSettings


@dataclass(frozen=True)
class Row:
    """One method of the suite.

    Args:
        settings: whose type names the method.
        kernel_prior: whether the packaged kernel prior helps.
        true_kernel: a ceiling: it is told the kernel.
    """

    settings: Settings
    kernel_prior: bool = True
    true_kernel: bool = False

    @property
    def random(self) -> bool:
        """Whether the result depends on the seed."""
        return not isinstance(self.settings, ClassicalSettings)


ROWS: dict[str, Row] = {
    "dps-em": Row(PaperSettings(annealing="constant", every=1, steps=100, step_size=22.0)),
    "paper": Row(PaperSettings()),
    "paper, every step": Row(PaperSettings(every=1)),
    "fast-em": Row(FastEMSettings()),
    "fast-em, edges": Row(
        FastEMSettings(first_kernel="edges", kernel_below=0.3, energy_weight=0.3, image_error=1.0)
    ),
    "blind-dps": Row(BlindDPSSettings()),
    "blind-dps, edges": Row(
        BlindDPSSettings(
            first_kernel="edges", kernel_below=0.5, step_size=0.1, kernel_step=0.3, denoising=0.02
        )
    ),
    "wiener": Row(ClassicalSettings("wiener"), kernel_prior=False),
    "richardson-lucy": Row(ClassicalSettings("richardson-lucy"), kernel_prior=False),
    "l0": Row(ClassicalSettings(), kernel_prior=False),
    "l0 + kernel prior": Row(
        ClassicalSettings(hyper_laplacian=HyperLaplacianSettings(weight=2e-3))
    ),
    "search": Row(
        ClassicalSettings(search=True, hyper_laplacian=HyperLaplacianSettings(weight=5e-4))
    ),
    "prox": Row(ProxSettings()),
    "hyper-laplacian, true kernel": Row(
        ClassicalSettings(hyper_laplacian=HyperLaplacianSettings(weight=5e-4)),
        kernel_prior=False,
        true_kernel=True,
    ),
    "prox, true kernel": Row(ProxSettings(), true_kernel=True),
}
"""Weaker and older methods first; ours is ``prox``, the ceilings come last.

Rows called ``edges`` start from the kernel of ``l0 + kernel prior`` and move it only at low noise.
``search`` is ``prox`` without its diffusion model.  Settings say what they were chosen on.
``dps-em``: on the two photographs of :class:`~latentdem.baselines.blind_dps.BlindDPSSettings`, 100
steps, input 21.1 dB: step sizes of 5.5, 11 and 22 give 21.8, 22.4 and 21.9 dB at 128 x 128 pixels.
A step along the gradient of a norm has to grow with the root of the number of pixels, so that 11
there is 22 at 256 x 256.
"""


@lru_cache(maxsize=1)
def _prior() -> LatentPrior:
    return load_prior()


@lru_cache(maxsize=1)
def _kernel_prior() -> KernelDenoiserNet:
    return load_kernel_prior()


def choose_rows(names: list[str] | None) -> dict[str, Row]:
    """The rows called ``names`` in the order of :data:`ROWS`; all for none.

    Raises:
        ValueError: an unknown name, or an empty list.

    >>> list(choose_rows(["prox", "l0"]))
    ['l0', 'prox']
    """
    chosen = list(ROWS) if names is None else names
    unknown = [name for name in chosen if name not in ROWS]
    if unknown or not chosen:
        raise ValueError(f"rows must be among: {'; '.join(ROWS)}; found {'; '.join(unknown)!r}")
    return {name: row for name, row in ROWS.items() if name in chosen}


def restore(
    row: Row,
    observations: Tensor,
    *,
    kernel_size: int,
    noise_std: float,
    seed: int = 0,
    boundary: str = "valid",
    true_kernel: Tensor | None = None,
) -> list[EMState]:
    """Run one method on each observation by itself, from the same seed.

    Args:
        row: the method.
        observations: ``[B,3,H,W]`` in [0, 1].
        kernel_size: odd side of the kernel in pixels.
        noise_std: sigma of the noise.
        seed: of all random numbers.
        boundary: ``valid`` or ``circular``.
        true_kernel: ``[1,1,k,k]``, which only ceilings look at.

    Returns:
        A state for each, its image ``[1,3,H,W]`` in [0, 1], its kernel ``[1,1,k,k]``.

    Raises:
        ValueError: a ceiling without the kernel.
    """
    if row.true_kernel and true_kernel is None:
        raise ValueError("this row needs the true kernel")
    known = true_kernel if row.true_kernel else None
    states = []
    for observed in observations.split(1):
        model = BlurModel(
            observed,
            kernel_size=kernel_size,
            noise_std=noise_std,
            boundary=boundary,
            kernel_prior=_kernel_prior() if row.kernel_prior else None,
        )
        state = _solve(row.settings, model, torch.Generator().manual_seed(seed), known)
        states.append(replace(state, image=model.crop(state.image).clamp(0, 1)))
    return states


def _solve(
    settings: Settings, model: BlurModel, generator: torch.Generator, kernel: Tensor | None
) -> EMState:
    if isinstance(settings, ClassicalSettings):
        return run_classical(model, settings, kernel=kernel)
    if isinstance(settings, FastEMSettings):
        return run_fast_em(_prior(), model, settings, generator, kernel=kernel)
    if isinstance(settings, BlindDPSSettings):
        return run_blind_dps(_prior(), model, settings, generator, kernel=kernel)
    if isinstance(settings, PaperSettings):
        return run_paper(_prior(), model, settings, generator, kernel=kernel)
    return run_prox(_prior(), model, settings, generator, kernel=kernel)
