"""The packaged finishing network: the last image from what two priors and the observation say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdem.priors.kernel import Residual

PACKAGED = Path(__file__).resolve().parent.parent / "assets" / "finishing.safetensors"

CHANNELS = 48
COARSE_CHANNELS = 80
COARSE_DILATIONS = (1, 2, 4, 1)
MULTIPLE = 4
"""Image sides are padded to a multiple of this many pixels."""
CONTRAST = 4.0
"""Differences of the candidates are small against the picture."""


@dataclass(frozen=True)
class Candidates:
    """What is known of the image after the last E-step; all ``[1,C,H,W]``, images in [0, 1].

    Args:
        base: what is to be improved, three channels.
        estimate: the chains' mean x*.
        sparse: a deconvolution with the same kernel under a hyper-Laplacian prior of the gradients.
        detail: the proximal step from ``base`` under a weak prior: all that the data say, noise
            amplified.
        observation: y.
        deviation: standard deviation between the chains, mean over colours, one channel.
        noise_std: sigma.
    """

    base: Tensor
    estimate: Tensor
    sparse: Tensor
    detail: Tensor
    observation: Tensor
    deviation: Tensor
    noise_std: float

    def stack(self) -> Tensor:
        """``[1,17,H,W]``: three channels each of the images in the order above, then the rest."""
        noise = torch.full_like(self.deviation, self.noise_std)
        images = (self.base, self.estimate, self.sparse, self.detail, self.observation)
        return torch.cat([*images, self.deviation, noise], 1)


class FinishingNet(nn.Module):
    """Residual blocks on a half and on a quarter of the size, 0.75 M parameters.

    It corrects the base image, which it gives back as it is before it is trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(17 * 4, CHANNELS, 3, padding=1)
        self.before = nn.Sequential(*(Residual(CHANNELS, 1) for _ in range(3)))
        self.down = nn.Conv2d(CHANNELS, COARSE_CHANNELS, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(Residual(COARSE_CHANNELS, d) for d in COARSE_DILATIONS))
        self.up = nn.Conv2d(COARSE_CHANNELS, CHANNELS, 1)
        self.after = nn.Sequential(*(Residual(CHANNELS, 1) for _ in range(3)))
        self.tail = nn.Conv2d(CHANNELS, 3 * 4, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(cast(Tensor, self.tail.bias))

    def forward(self, stack: Tensor) -> Tensor:
        """The finished images ``[B,3,H,W]`` of :meth:`Candidates.stack` ``[B,17,H,W]``."""
        height, width = stack.shape[-2:]
        pad = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
        padded = F.pad(stack, pad, mode="replicate") if any(pad) else stack
        base = padded[:, :3]
        others = [CONTRAST * (padded[:, i : i + 3] - base) for i in (3, 6, 9)]
        misfit = padded[:, 12:15] - base
        spread = CONTRAST * padded[:, 15:17]
        features = F.pixel_unshuffle(torch.cat([base - 0.5, *others, misfit, spread], 1), 2)
        fine = self.before(self.head(features))
        coarse = self.up(self.coarse(self.down(F.silu(fine))))
        fine = self.after(fine + F.interpolate(coarse, fine.shape[-2:], mode="bilinear"))
        finished = base + F.pixel_shuffle(self.tail(F.silu(fine)), 2) / CONTRAST
        return finished[..., :height, :width]


def save_finishing(path: Path, model: nn.Module) -> None:
    """Write the network's weights as float16 safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path)


def load_finishing(path: Path | str | None = None) -> FinishingNet:
    """Load the packaged finishing network, or one written by ``latentdem train-finishing``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else.
    """
    path = PACKAGED if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no finishing network at {path}; train one with: latentdem train-finishing"
        )
    model = FinishingNet()
    try:
        model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except Exception as error:
        raise ValueError(f"{path} is not a finishing network of latentdem: {error}") from error
    return model.eval().requires_grad_(False)
