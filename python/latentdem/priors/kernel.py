"""The packaged kernel prior: a small convolutional denoiser of blur kernels."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "kernel.safetensors"

CHANNELS = 40
DILATIONS = (1, 1, 2, 2, 4, 4, 8, 1)


class KernelDenoiserNet(nn.Module):
    """Eight residual dilated blocks (receptive field 47 pixels), about 0.25 M parameters.

    Input and output ``[B,1,k,k]``, any k; the output is non-negative and sums to one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Conv2d(CHANNELS, CHANNELS, 3, padding=d, dilation=d),
                    nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                ]
            )
            for d in DILATIONS
        )
        self.tail = nn.Conv2d(CHANNELS, 1, 3, padding=1)

    def forward(self, kernel: Tensor) -> Tensor:
        """Denoise; the scale of the input does not matter, its peak is set to one first."""
        peak = kernel.amax((-2, -1), keepdim=True).clamp_min(1e-12)
        features = self.head(kernel / peak)
        for block in self.blocks:
            first, second = cast(nn.ModuleList, block)
            features = features + second(F.silu(first(F.silu(features))))
        # Shifted so that an untrained pixel is near zero.
        positive = F.softplus(4 * (kernel / peak + self.tail(F.silu(features))) - 3)
        positive = torch.where(positive > 0.06, positive - 0.06, 0.01 * positive)
        return positive / positive.sum((-2, -1), keepdim=True)


def save_kernel_prior(path: Path, model: nn.Module) -> None:
    """Write the denoiser's weights as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)


def load_kernel_prior(path: Path | str | None = None) -> KernelDenoiserNet:
    """Load the packaged kernel denoiser, or one written by ``latentdem train-kernel-prior``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    path = PACKAGED if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no kernel prior at {path}; train one with: latentdem train-kernel-prior"
        )
    model = KernelDenoiserNet()
    try:
        model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except Exception as error:
        raise ValueError(f"{path} is not a kernel prior of latentdem: {error}") from error
    return model.eval().requires_grad_(False)
