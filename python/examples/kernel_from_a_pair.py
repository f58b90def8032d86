"""The operators alone: estimate a blur kernel from a sharp and a blurred picture.

    python python/examples/kernel_from_a_pair.py

Nothing here needs the diffusion half: any pair ``[1,C,H,W]`` in [0, 1] will do.
"""

import torch

import latentdem_ext as ext


def main() -> float:
    """Blur random noise with a diagonal stroke, find the stroke, return its largest error."""
    generator = torch.Generator().manual_seed(0)
    sharp = torch.rand(1, 3, 128, 128, generator=generator)
    kernel = torch.eye(9)[None, None] / 9
    blurred = ext.blur_conv2d(sharp, kernel)
    blurred = blurred + 0.01 * torch.randn(blurred.shape, generator=generator)
    found = ext.kernel_map_update(
        sharp,
        blurred,
        torch.full((1, 1, 9, 9), 1 / 81),
        noise_std=0.01,
        penalty=1e4,
        regularization=0.0,
        iterations=10,
        prior="none",
        domain="gradient",
    )
    error = float((found - kernel).abs().max())
    print(f"largest error of a kernel value: {error:.4f} (the stroke's values are {1 / 9:.4f})")
    return error


if __name__ == "__main__":
    main()
