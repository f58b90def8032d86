"""Priors: latent diffusion models of images, and a denoiser of blur kernels."""

from latentdem.priors.kernel import KernelDenoiserNet, load_kernel_prior
from latentdem.priors.latent import LatentPrior, load_prior

__all__ = ["KernelDenoiserNet", "LatentPrior", "load_kernel_prior", "load_prior"]
