"""Blind inversion with latent diffusion priors (LatentDEM).

>>> import latentdem
>>> result = latentdem.deblur("blurred.jpg", kernel_size=25)  # doctest: +SKIP
>>> result.image.shape, result.kernel.shape  # doctest: +SKIP
"""

from latentdem.em import DeblurResult, PaperSettings, ProxSettings, deblur
from latentdem.priors import LatentPrior, load_kernel_prior, load_prior

__all__ = [
    "DeblurResult",
    "LatentPrior",
    "PaperSettings",
    "ProxSettings",
    "deblur",
    "load_kernel_prior",
    "load_prior",
]
