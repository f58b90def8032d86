"""The EM driver: schedules, the two E-steps, and :func:`deblur`."""

from latentdem.em.driver import deblur
from latentdem.em.result import DeblurResult
from latentdem.em.settings import PaperSettings, ProxSettings

__all__ = ["DeblurResult", "PaperSettings", "ProxSettings", "deblur"]
