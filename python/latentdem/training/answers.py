"""What the kernel prior is really asked: the evidence of EM's steps, beside the true kernels.

Training photographs are blurred by training kernels and deblurred blindly by the method itself,
with an earlier version of the kernel prior; all evidence that it was shown, at every scale of
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
SIZES = tuple(range(9, 37, 2))
LARGE_SIZES = tuple(range(37, 67, 4))
LARGE_SHARE = 0.3
CROPS = {False: (192, 288), True: (288, 384)}
"""Sides of the photographs' crops, for large kernels or not; the observation loses the kernel's
size less one."""
SHARE_TO_EM = 0.6
"""Of the blurs, those that EM goes on with after the first estimate."""


@dataclass
class Answers:
    """Pairs of one kernel size k."""

    evidence: Tensor  # [N,5,k,k], see latentdem.priors.kernel.kernel_evidence
    truth: Tensor  # [N,1,k,k]


class _Recorder(KernelDenoiserNet):
    """The kernel prior, keeping the evidence that it is shown."""

    def __init__(self, prior: KernelDenoiserNet) -> None:
        super().__init__()
        self.prior = prior
        self.seen: list[Tensor] = []

    def forward(self, kernel: Tensor, evidence: Tensor | None = None) -> Tensor:
        if evidence is not None:
            self.seen.append(evidence)
        return self.prior(kernel, evidence)


def answers_of_one_blur(
    samplers: dict[int, CropSampler],
    prior: LatentPrior,
    kernel_prior: KernelDenoiserNet,
    rng: np.random.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """Blur one crop, run the method, return its ``(evidence, truth)`` pairs.

    ``samplers``: of crops, by their sides.
    """
    large = bool(rng.random() < LARGE_SHARE)
    size = int(rng.choice(LARGE_SIZES if large else SIZES))
    kernel = ext.recenter_kernel(training_kernel(rng, size)[None, None], subpixel=False)
    sigma = 10 ** rng.uniform(-2.6, -1.5)
    sharp = (samplers[int(rng.choice(CROPS[large]))].batch(1) + 1) / 2
    observed = ext.blur_conv2d(sharp, kernel, boundary="valid")
    observed = observed + sigma * torch.from_numpy(rng.normal(size=observed.shape)).float()
    recorder = _Recorder(kernel_prior)
    first = estimate_kernel(
        observed,
        size,
        kernel_prior=recorder,
        edge_weight=EDGE_WEIGHT * 2 ** rng.uniform(-1, 1),
    )
    if rng.random() < SHARE_TO_EM:
        model = BlurModel(observed, kernel_size=size, noise_std=sigma, kernel_prior=recorder)
        settings = ProxSettings(chains=1, steps=6, total_variation=0.0, sparse_share=0.0)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        run_prox(prior, model, settings, generator, first_kernel=first)
    pairs = []
    for evidence in recorder.seen:
        side = evidence.shape[-1]
        if float(evidence[:, 0].max()) <= 0:
            continue  # flat: nothing is known
        small = F.interpolate(kernel, (side, side), mode="bilinear", antialias=True)
        small = small / small.sum()
        pairs.append((evidence, align(small, evidence[:, :1])))
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
        sides = {side for pair in CROPS.values() for side in pair}
        samplers = {side: CropSampler(images, side, seed=1000 + shard) for side in sides}
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for _ in range(BLURS_PER_SHARD):
            for pair in answers_of_one_blur(samplers, prior, kernel_prior, rng):
                found.setdefault(pair[0].shape[-1], []).append(pair)
        tensors = {
            f"{size}.{name}": torch.cat([pair[i] for pair in pairs]).half()
            for size, pairs in found.items()
            for i, name in enumerate(("evidence", "truth"))
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
            names = ("evidence", "truth")
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
        self.sizes = list(answers)
        # A batch of larger kernels is smaller, and comes less often: its pixels cost the same.
        cost = np.array([max(1.0, size / 28) for size in self.sizes])
        weight = np.array([len(a.truth) for a in answers.values()]) / cost
        self.probability = weight / weight.sum()

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Evidence ``[n,5,k,k]`` and truth ``[n,1,k,k]``, n being ``count`` for 27 pixels.

        In one of seven batches the kernel before is not told.
        """
        rng = self.rng
        size = self.sizes[int(rng.choice(len(self.sizes), p=self.probability))]
        found = self.answers[size]
        number = min(max(count * 27**2 // size**2, 4), 2 * count)
        index = torch.from_numpy(rng.integers(0, len(found.truth), number))
        evidence, truth = found.evidence[index], found.truth[index]
        if rng.random() < 1 / 7:
            evidence[:, 4] = evidence[:, 0]
        return augment(evidence, truth, rng)


def mean_cosine(model: nn.Module, answers: dict[int, Answers]) -> tuple[float, float]:
    """Mean cosine to the aligned truth, of the least squares kernels and of the answers."""
    before, after = [], []
    with torch.no_grad():
        for found in answers.values():
            if found.truth.shape[-1] < SIZES[0]:
                continue
            truth = found.truth.flatten(1)
            first = found.evidence[:, 0].flatten(1)
            before.append(F.cosine_similarity(first, truth))
            parts = found.evidence.split(32)
            replies = torch.cat([model(part[:, :1], part) for part in parts])
            after.append(F.cosine_similarity(replies.flatten(1), truth))
    return float(torch.cat(before).mean()), float(torch.cat(after).mean())
