"""Training of the finishing network on what the method itself leaves on training photographs.

Training photographs are blurred by training kernels, made 8 bits (and some JPEG), and deblurred
by the method; the candidates of its last step are kept with the truth, moved to where the blind
estimate is: image and kernel may drift in opposite directions, and a network that is shown the
drift would learn to blur.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file
from scipy.ndimage import fourier_shift
from skimage.registration import phase_cross_correlation
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.em.driver import estimate_noise_std
from latentdem.em.settings import ProxSettings
from latentdem.em.steps import run_prox
from latentdem.io import to_pil
from latentdem.operators.blur import BlurModel
from latentdem.priors.finishing import FinishingNet, save_finishing
from latentdem.priors.kernel import KernelDenoiserNet, load_kernel_prior
from latentdem.priors.latent import LatentPrior, load_prior
from latentdem.training.common import TrainingPlan, round_to_half, train
from latentdem.training.data import CropSampler, fetch, load_images, read_manifest
from latentdem.training.kernels import training_kernel

BLURS_PER_SHARD = 10
SIZES = (9, 13, 17, 17, 21, 21, 25, 25, 25, 31, 37, 49)
OBSERVED = {9: 128, 13: 128, 17: 128, 21: 128, 25: 144, 31: 144, 37: 160, 49: 192}
"""Side of the observation by the kernel's size."""
KNOWN_SHARE = 0.2
"""Of the blurs, those whose kernel is given."""
JPEG_SHARE = 0.25
STACKED = 17
"""Channels of the candidates; three more are the truth's."""


class _Recorder(FinishingNet):
    """Keeps the candidates that it is shown, and corrects nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.empty(0)

    def forward(self, stack: Tensor) -> Tensor:
        self.seen = stack
        return stack[:, :3]


def stored(image: Tensor, rng: np.random.Generator) -> Tensor:
    """``image [1,3,H,W]`` as a camera would store it: in 8 bits, some as JPEG."""
    if rng.random() >= JPEG_SHARE:
        return (image.clamp(0, 1) * 255).round() / 255
    buffer = io.BytesIO()
    to_pil(image[0].clamp(0, 1)).save(buffer, "JPEG", quality=int(rng.integers(75, 97)))
    pixels = np.asarray(Image.open(buffer).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def move(image: Tensor, down: float, right: float) -> Tensor:
    """``image [1,C,H,W]`` moved by a part of a pixel in Fourier space, its border mirrored."""
    mirrored = torch.cat([image, image.flip(-1)], -1)
    mirrored = torch.cat([mirrored, mirrored.flip(-2)], -2)
    planes = [
        np.fft.ifft2(fourier_shift(np.fft.fft2(plane), (down, right))).real
        for plane in mirrored[0].double().numpy()
    ]
    height, width = image.shape[-2:]
    return torch.from_numpy(np.stack(planes))[None, :, :height, :width].to(image)


def candidates_of_one_blur(
    samplers: dict[int, CropSampler],
    prior: LatentPrior,
    kernel_prior: KernelDenoiserNet,
    rng: np.random.Generator,
) -> Tensor:
    """Blur one crop, run the method; the last step's candidates and the truth ``[1,20,H,W]``."""
    size = int(rng.choice(SIZES))
    kernel = ext.recenter_kernel(training_kernel(rng, size)[None, None], subpixel=False)
    sigma = 10 ** rng.uniform(-2.8, -1.4)
    sharp = (samplers[size].batch(1) + 1) / 2
    observed = ext.blur_conv2d(sharp, kernel, boundary="valid")
    noise = torch.from_numpy(rng.normal(size=observed.shape)).float()
    observed = stored(observed + sigma * noise, rng)
    model = BlurModel(
        observed,
        kernel_size=size,
        noise_std=estimate_noise_std(observed),
        kernel_prior=kernel_prior,
    )
    settings = ProxSettings(chains=int(rng.integers(1, 3)), steps=int(rng.integers(4, 8)))
    recorder = _Recorder()
    run_prox(
        prior,
        model,
        settings,
        torch.Generator().manual_seed(int(rng.integers(2**31))),
        kernel=kernel if rng.random() < KNOWN_SHARE else None,
        finishing=recorder,
    )
    seen = model.crop(recorder.seen)
    half = size // 2
    inner = slice(half, sharp.shape[-1] - half)
    truth = sharp[..., inner, inner]
    shift, _, _ = phase_cross_correlation(
        seen[0, :3].mean(0).numpy(), truth[0].mean(0).numpy(), upsample_factor=20
    )
    if max(abs(shift)) > half:
        shift = np.zeros(2)  # no drift is as large: the estimate has failed
    truth = move(sharp, float(shift[0]), float(shift[1]))[..., inner, inner]
    return torch.cat([seen, truth], 1)


@torch.no_grad()
def collect_candidates(
    data: Path,
    folder: Path,
    prior: LatentPrior,
    kernel_prior: KernelDenoiserNet,
    *,
    split: str,
    shards: int,
    first: int = 0,
) -> None:
    """Write shards ``first`` to ``shards`` of the photographs of ``split`` to ``folder``.

    A shard depends on its number alone and files that exist are kept, so that a killed
    collection goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = load_images(data, split)
    for shard in track(range(first, shards), f"collecting candidates ({split})"):
        path = folder / f"{split}-{shard:04d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([shard, split == "train", 5])
        samplers = {
            size: CropSampler(images, side + size - 1, seed=7000 + shard)
            for size, side in OBSERVED.items()
        }
        found = [
            candidates_of_one_blur(samplers, prior, kernel_prior, rng)
            for _ in range(BLURS_PER_SHARD)
        ]
        partial = path.with_suffix(".partial")
        save_file({f"{i:02d}": blur.half().contiguous() for i, blur in enumerate(found)}, partial)
        partial.replace(path)


def load_candidates(folder: Path, split: str) -> list[Tensor]:
    """All blurs of ``split``, each ``[20,H,W]`` in float16.

    Raises:
        ValueError: there are none.
    """
    found = [
        blur[0]
        for path in sorted(folder.glob(f"{split}-*.safetensors"))
        for blur in load_file(path).values()
    ]
    if not found:
        raise ValueError(f"no candidates of the {split} photographs in {folder}")
    return found


@dataclass
class CandidateSampler:
    """Endless batches of crops of the candidates, turned, mirrored, their colours permuted."""

    blurs: list[Tensor]
    seed: int
    side: int = 96

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def crop(self) -> Tensor:
        """``[20,side,side]``."""
        rng, side = self.rng, self.side
        blur = self.blurs[int(rng.integers(len(self.blurs)))]
        top, left = (int(rng.integers(length - side + 1)) for length in blur.shape[-2:])
        crop = blur[:, top : top + side, left : left + side].float()
        crop = torch.rot90(crop, int(rng.integers(4)), (-2, -1))
        crop = crop.flip(-1) if rng.random() < 0.5 else crop
        order = torch.from_numpy(rng.permutation(3))
        images = [crop[i : i + 3][order] for i in (0, 3, 6, 9, 12)]
        return torch.cat([*images, crop[15:STACKED], crop[STACKED:][order]])

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Stacks ``[count,17,side,side]`` and truths ``[count,3,side,side]``."""
        crops = torch.stack([self.crop() for _ in range(count)])
        return crops[:, :STACKED], crops[:, STACKED:]


MARGIN = 4
"""Pixels at a crop's border that do not count: the network sees no further."""


def negative_psnr(output: Tensor, truth: Tensor) -> Tensor:
    """Minus the mean PSNR of a batch, in dB: every image counts alike, however hard it is."""
    error = (output - truth)[..., MARGIN:-MARGIN, MARGIN:-MARGIN].square().mean((1, 2, 3))
    return 10 * torch.log10(error + 1e-5).mean()


def make_finishing(
    data: Path,
    runs: Path,
    output: Path,
    *,
    shards: int,
    minutes: float,
    prior: LatentPrior | None = None,
    kernel_prior: KernelDenoiserNet | None = None,
) -> None:
    """Collect candidates, train (or go on training) the finishing network, write it to ``output``.

    ``shards``: files of ten blurs each.
    """
    fetch(data, read_manifest())
    folder = runs / "candidates"
    prior = load_prior() if prior is None else prior
    kernel_prior = load_kernel_prior() if kernel_prior is None else kernel_prior
    for split, count in (("validation", max(1, shards // 10)), ("train", shards)):
        collect_candidates(data, folder, prior, kernel_prior, split=split, shards=count)
    torch.manual_seed(0)
    sampler = CandidateSampler(load_candidates(folder, "train"), seed=21)
    held_out = load_candidates(folder, "validation")

    def loss(model: nn.Module, step: int) -> Tensor:
        stack, truth = sampler.batch(8)
        return negative_psnr(model(stack), truth)

    def report(model: nn.Module) -> str:
        before, after = [], []
        with torch.no_grad():
            for blur in held_out:
                stack, truth = blur[None, :STACKED].float(), blur[None, STACKED:].float()
                before.append(-float(negative_psnr(stack[:, :3], truth)))
                after.append(-float(negative_psnr(model(stack), truth)))
        return f"held-out PSNR {np.mean(before):.2f} -> {np.mean(after):.2f} dB"

    trained = train(
        "finishing network",
        FinishingNet(),
        loss,
        TrainingPlan(minutes=minutes, learning_rate=5e-4),
        runs / "finishing.safetensors",
        resume=True,
        validate=report,
    )
    save_finishing(output, round_to_half(trained))
    print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB)")
