"""Training of the packaged kernel prior, a plug-and-play denoiser of blur kernels.

First on synthetic damage alone (:mod:`latentdem.training.kernels`), then also on what the method
itself, with that first version, answers on training photographs
(:mod:`latentdem.training.answers`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdem.metrics import maximum_normalized_correlation
from latentdem.priors.kernel import KernelDenoiserNet
from latentdem.training.answers import AnswerSampler, load_answers, mean_cosine
from latentdem.training.common import TrainingPlan, train
from latentdem.training.data import CropSampler, load_images
from latentdem.training.kernels import augment, make_pairs


def mean_mnc(kernels: Tensor, truth: Tensor) -> float:
    """Mean maximum of normalised cross-correlation over ``[B,1,k,k]`` pairs."""
    return float(maximum_normalized_correlation(kernels, truth).mean())


def kernel_loss(output: Tensor, truth: Tensor) -> Tensor:
    """Squared error relative to the kernel's energy, plus what makes one minus MNC."""
    energy = truth.square().sum((-2, -1))
    error = ((output - truth).square().sum((-2, -1)) / energy).mean()
    cosine = F.cosine_similarity(output.flatten(1), truth.flatten(1)).mean()
    return error + 1 - cosine


class SyntheticSampler:
    """Endless batches of :func:`make_pairs`; old ones are seen again, turned."""

    SIZES = (13, 19, 25, 25, 33, 33, 45)

    def __init__(self, data: Path, seed: int) -> None:
        self.crops = CropSampler(load_images(data, "train"), 112, seed=seed)
        self.rng = np.random.default_rng(seed)
        self.pool: list[tuple[Tensor, Tensor]] = []
        self.drawn = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Sixteen pairs of one kernel size."""
        if self.drawn % 3 == 0:
            size = self.SIZES[int(self.rng.integers(len(self.SIZES)))]
            self.pool.append(make_pairs(self.crops, self.rng, 16, size))
            del self.pool[:-600]
        self.drawn += 1
        return augment(*self.pool[int(self.rng.integers(len(self.pool)))], self.rng)


def train_kernel_prior(
    data: Path,
    checkpoint: Path,
    *,
    minutes: float,
    resume: bool,
    start: KernelDenoiserNet | None = None,
    answers: Path | None = None,
) -> nn.Module:
    """Train the denoiser on synthetic damage and, if there are any, on collected ``answers``.

    ``start``: weights to begin with, else fresh ones.
    """
    torch.manual_seed(0)
    synthetic = SyntheticSampler(data, seed=11 + resume)
    validation = CropSampler(load_images(data, "validation"), 112, seed=98)
    held_out = make_pairs(validation, np.random.default_rng(99), 64, 25)
    real = None if answers is None else AnswerSampler(load_answers(answers, "train"), 13 + resume)
    held_out_answers = None if answers is None else load_answers(answers, "validation")

    def loss(model: nn.Module, step: int) -> Tensor:
        if real is None or step % 4 == 0:
            damaged, truth = synthetic.batch()
            return kernel_loss(model(damaged), truth)
        evidence, truth = real.batch(16)
        return kernel_loss(model(evidence[:, :1], evidence), truth)

    def report(ema: nn.Module) -> str:
        damaged, truth = held_out
        with torch.no_grad():
            after = mean_mnc(ema(damaged), truth)
        line = f"held-out MNC {mean_mnc(damaged, truth):.3f} -> {after:.3f}"
        if held_out_answers is not None:
            before, denoised = mean_cosine(ema, held_out_answers)
            line += f"; of EM's answers {before:.3f} -> {denoised:.3f}"
        return line

    model = KernelDenoiserNet()
    if start is not None:
        model.load_state_dict(start.state_dict())
    plan = TrainingPlan(minutes=minutes, learning_rate=2e-3 if start is None else 1e-3)
    return train(
        "kernel prior",
        model,
        loss,
        plan,
        checkpoint,
        resume=resume,
        validate=report,
    )
