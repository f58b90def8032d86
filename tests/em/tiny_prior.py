"""A prior of untrained networks that are as small as diffusers makes them: quick, and of no use."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

from latentdem.priors.latent import LatentPrior


def tiny_prior(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
        denoiser = UNet2DModel(
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
        )
        images = torch.rand(1, 3, 32, 32)
    return LatentPrior.from_diffusers(autoencoder, denoiser, DDIMScheduler(), images=images)
