"""The EM driver: schedules, E- and M-steps, :func:`deblur` and :func:`reconstruct`."""

from latentdem.em.driver import deblur
from latentdem.em.inversion import invert
from latentdem.em.reconstruct import reconstruct
from latentdem.em.reconstruct_result import ReconstructResult
from latentdem.em.reconstruct_settings import PoseSettings, ReconstructSettings, SamplerSettings
from latentdem.em.result import DeblurResult
from latentdem.em.settings import PaperSettings, ProxSettings

__all__ = [
    "DeblurResult",
    "PaperSettings",
    "PoseSettings",
    "ProxSettings",
    "ReconstructResult",
    "ReconstructSettings",
    "SamplerSettings",
    "deblur",
    "invert",
    "reconstruct",
]
