"""What the kernel prior is really asked: kernels that EM found, beside the true ones.

Training photographs are blurred by training kernels and deblurred blindly by the method itself,
with an earlier version of the kernel prior; every kernel that it was shown, at every scale of
the first estimate and at every step of EM, is kept with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import latentdem_ext as ext
from latentdem.em.settings import ProxSettings
from latentdem.em.steps import run_prox
from latentdem.operators.blur import BlurModel
from latentdem.operators.initialization import EDGE_WEIGHT, estimate_kernel
from latentdem.priors.kernel import KernelDenoiserNet
from latentdem.priors.latent import LatentPrior
from latentdem.training.data import CropSampler, load_images
from latentdem.training.kernels import align, augment, training_kernel

BLURS_PER_SHARD = 10
CROPS = (192, 288)
"""Sides of the photographs' crops; the observation loses the kernel's size less one."""
SIZES = tuple(range(9, 37, 2))


@dataclass
class Answers:
    """Pairs of one kernel size k."""

    answer: Tensor  # [N,1,k,k]
    truth: Tensor  # [N,1,k,k]


class _Recorder(KernelDenoiserNet):
    """The kernel prior, keeping what it is asked."""

    def __init__(self, prior: KernelDenoiserNet) -> None:
        super().__init__()
        self.prior = prior
        self.seen: list[Tensor] = []

    def forward(self, kernel: Tensor) -> Tensor:
        self.seen.append(kernel)
        return self.prior(kernel)


def answers_of_one_blur(
    sampler: CropSampler,
    prior: LatentPrior,
    kernel_prior: KernelDenoiserNet,
    rng: np.random.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Blur one crop, run the method, return its ``(answer, truth)`` pairs."""
    size = int(rng.choice(SIZES))
    kernel = ext.recenter_kernel(training_kernel(rng, size)[None, None], subpixel=False)
    sigma = 10 ** rng.uniform(-2.6, -1.5)
    sharp = (sampler.batch(1) + 1) / 2
    observed = ext.blur_conv2d(sharp, kernel, boundary="valid")
    observed = observed + sigma * torch.from_numpy(rng.normal(size=observed.shape)).float()
    recorder = _Recorder(kernel_prior)
    first = estimate_kernel(
        observed,
        size,
        kernel_prior=recorder,
        edge_weight=EDGE_WEIGHT * 2 ** rng.uniform(-1, 1),
    )
    if rng.random() < 0.5:
        model = BlurModel(observed, kernel_size=size, noise_std=sigma, kernel_prior=recorder)
        settings = ProxSettings(chains=1, steps=6)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        run_prox(prior, model, settings, generator, first_kernel=first)
    pairs = []
    for answer in recorder.seen:
        side = answer.shape[-1]
        small = F.interpolate(kernel, (side, side), mode="bilinear", antialias=True)
        small = small / small.sum()
        pairs.append((answer, align(small, answer)))
    return pairs


@torch.no_grad()
def collect_answers(
    data: Path,
    folder: Path,
    prior: LatentPrior,
    kernel_prior: KernelDenoiserNet,
    *,
    split: str,
    shards: int,
) -> None:
    """Write ``shards`` files of answers on the photographs of ``split`` to ``folder``.

    A shard depends on its number alone and files that exist are kept, so that a killed
    collection goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = load_images(data, split)
    for shard in track(range(shards), f"collecting answers ({split})"):
        path = folder / f"{split}-{shard:04d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([shard, split == "train"])
        samplers = [CropSampler(images, crop, seed=1000 + shard) for crop in CROPS]
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for _ in range(BLURS_PER_SHARD):
            sampler = samplers[int(rng.integers(len(samplers)))]
            for pair in answers_of_one_blur(sampler, prior, kernel_prior, rng):
                found.setdefault(pair[0].shape[-1], []).append(pair)
        tensors = {
            f"{size}.{name}": torch.cat([pair[i] for pair in pairs]).half()
            for size, pairs in found.items()
            for i, name in enumerate(("answer", "truth"))
        }
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(path)


def load_answers(folder: Path, split: str) -> dict[int, Answers]:
    """All shards of ``split``, by kernel size."""
    parts: dict[int, list[dict[str, Tensor]]] = {}
    for path in sorted(folder.glob(f"{split}-*.safetensors")):
        tensors = load_file(path)
        for size in sorted({int(name.split(".")[0]) for name in tensors}):
            names = ("answer", "truth")
            parts.setdefault(size, []).append({n: tensors[f"{size}.{n}"].float() for n in names})
    if not parts:
        raise ValueError(f"no answers of the {split} photographs in {folder}")
    return {
        size: Answers(**{n: torch.cat([part[n] for part in found]) for n in found[0]})
        for size, found in parts.items()
    }


class AnswerSampler:
    """Endless batches of answers, turned and mirrored together with their truth."""

    def __init__(self, answers: dict[int, Answers], seed: int) -> None:
        self.answers = answers
        self.rng = np.random.default_rng(seed)
        counts = np.array([len(a.answer) for a in answers.values()], dtype=float)
        self.sizes = list(answers)
        self.probability = counts / counts.sum()

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """``(answer, truth)``, both ``[count,1,k,k]``."""
        rng = self.rng
        found = self.answers[self.sizes[int(rng.choice(len(self.sizes), p=self.probability))]]
        index = torch.from_numpy(rng.integers(0, len(found.answer), count))
        return augment(found.answer[index], found.truth[index], rng)


def mean_cosine(model: nn.Module, answers: dict[int, Answers]) -> tuple[float, float]:
    """Mean cosine to the aligned truth, of the answers and of the denoised answers."""
    before, after = [], []
    with torch.no_grad():
        for found in answers.values():
            if found.truth.shape[-1] < SIZES[0]:
                continue
            denoised = model(found.answer)
            truth = found.truth.flatten(1)
            before.append(F.cosine_similarity(found.answer.flatten(1), truth))
            after.append(F.cosine_similarity(denoised.flatten(1), truth))
    return float(torch.cat(before).mean()), float(torch.cat(after).mean())
