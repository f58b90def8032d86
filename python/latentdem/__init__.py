"""Blind inversion with latent diffusion priors (LatentDEM).

>>> import latentdem
>>> result = latentdem.deblur("blurred.jpg", kernel_size=25)  # doctest: +SKIP
>>> result.image.shape, result.kernel.shape  # doctest: +SKIP
>>> result = latentdem.reconstruct(["front.png", "side.png"])  # doctest: +SKIP
>>> result.poses, result.mesh  # doctest: +SKIP
"""

from latentdem.em import (
    DeblurResult,
    PaperSettings,
    PoseSettings,
    ProxSettings,
    ReconstructResult,
    ReconstructSettings,
    SamplerSettings,
    deblur,
    invert,
    reconstruct,
)
from latentdem.operators.forward_model import ForwardModel
from latentdem.priors import (
    LatentPrior,
    ObjectsPrior,
    load_kernel_prior,
    load_objects_prior,
    load_prior,
)

__all__ = [
    "DeblurResult",
    "ForwardModel",
    "LatentPrior",
    "ObjectsPrior",
    "PaperSettings",
    "PoseSettings",
    "ProxSettings",
    "ReconstructResult",
    "ReconstructSettings",
    "SamplerSettings",
    "deblur",
    "invert",
    "load_kernel_prior",
    "load_objects_prior",
    "load_prior",
    "reconstruct",
]
