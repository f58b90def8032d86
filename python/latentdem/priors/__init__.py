"""Priors: latent diffusion models of images and of objects, and a denoiser of blur kernels."""

from latentdem.priors.kernel import KernelDenoiserNet, load_kernel_prior
from latentdem.priors.latent import LatentPrior, load_prior
from latentdem.priors.objects import ObjectsPrior, load_objects_prior

__all__ = [
    "KernelDenoiserNet",
    "LatentPrior",
    "ObjectsPrior",
    "load_kernel_prior",
    "load_objects_prior",
    "load_prior",
]
