"""What the packaged priors know, apart from the method that uses them.

The image prior: its autoencoder, its denoising beside BM3D, and whether it knows sharp pictures
from blurred ones.  The kernel prior: what it adds to one M-step and to the first estimate.  All on
photographs and kernels that no training has seen (:mod:`latentdem.evaluate`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import latentdem_ext as ext
from latentdem.em.driver import versions
from latentdem.em.schedules import descending
from latentdem.em.sharp import SHARP_LOG_ODDS
from latentdem.evaluate import SIDE, TEST_PHOTOGRAPHS, observe, photograph_crop
from latentdem.metrics import maximum_normalized_correlation, psnr
from latentdem.operators.blur import BlurModel, EdgeStepSettings
from latentdem.operators.edges import l0_deconvolution
from latentdem.operators.initialization import estimate_kernel
from latentdem.operators.motion import random_motion_kernel
from latentdem.pictures import sheet
from latentdem.priors import kernel, latent
from latentdem.priors.kernel import KernelDenoiserNet
from latentdem.priors.latent import LatentPrior
from latentdem.priors.sharpness import load_sharpness, sharp_log_odds
from latentdem.priors.weights import source_digest
from latentdem.results import machine, store_results, stored_results

NOISE_STDS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Pixel noise of the denoising comparison, in the image's units."""

KERNEL_SIZE = 25
OBSERVATION_NOISE = 0.01
M_STEP_LEVELS = (50, 200, 400, 600)
"""Timesteps whose estimates D(z_0) the M-step is given; the method's run starts at 400."""

RANKING_TIMESTEPS = (100, 200, 300, 400, 500, 600)
SAMPLE_SIDE = 128

PRIOR_WEIGHTS = {"l1": (0.002, 0.005, 0.01, 0.02), "l2": (0.1, 1.0, 10.0)}
"""lambda / beta of the classical kernel priors; each row takes the best for itself."""

Rows = dict[str, Any]


def _noise(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _photographs(names: list[str]) -> list[Tensor]:
    return [photograph_crop(name, SIDE) for name in names]


@torch.no_grad()
def measure_autoencoder(prior: LatentPrior, names: list[str], repeats: int = 7) -> Rows:
    """Round trip in dB, with and without noise of 0.05 in the latents, and its seconds."""
    plain, noisy, seconds = [], [], []
    for index, image in enumerate(_photographs(names)):
        latents = prior.encode(image)
        disturbed = latents + 0.05 * _noise(latents.shape, index)
        plain.append(float(psnr(prior.decode(latents, (SIDE, SIDE)), image)))
        noisy.append(float(psnr(prior.decode(disturbed, (SIDE, SIDE)), image)))
    for _ in range(repeats):
        started = time.perf_counter()
        prior.decode(prior.encode(image), (SIDE, SIDE))
        seconds.append(time.perf_counter() - started)
    return {
        "psnr": _mean(plain),
        "psnr_noisy_latents": _mean(noisy),
        "milliseconds": 1e3 * statistics.median(seconds),
    }


def _bm3d(image: Tensor, noise_std: float) -> Tensor | None:
    """BM3D (Dabov et al. 2007) of ``[1,3,H,W]`` in opponent colours, if the package is there."""
    try:
        from bm3d import bm3d_rgb
    except ImportError:
        return None
    array = bm3d_rgb(image[0].permute(1, 2, 0).double().numpy(), noise_std)
    return torch.from_numpy(array).permute(2, 0, 1)[None].float()


@torch.no_grad()
def measure_denoising(prior: LatentPrior, names: list[str]) -> list[Rows]:
    """White pixel noise taken off in one evaluation of the network, in dB, beside BM3D.

    The noisy picture is encoded as it is; the level t is the one whose noise in the latents,
    ``(1 - abar) / abar``, is what the pixel noise became, the mean over all photographs.  In the
    latents it is not white, so this is no more than a view of the prior: the method never asks it
    this question.
    """
    ratio = (1 - prior.alphas_cumprod) / prior.alphas_cumprod
    images = _photographs(names)
    clean = [prior.encode(image) for image in images]
    rows = []
    for noise_std in NOISE_STDS:
        observed = [x + noise_std * _noise(x.shape, i) for i, x in enumerate(images)]
        encoded = [prior.encode(y) for y in observed]
        variance = _mean([float((a - b).square().mean()) for a, b in zip(encoded, clean)])
        timestep = int((ratio - variance).abs().argmin())
        abar = float(prior.alphas_cumprod[timestep])
        found: dict[str, list[float]] = {"identity": [], "prior": [], "bm3d": []}
        for image, noisy, latents in zip(images, observed, encoded, strict=True):
            z0, _ = prior.predict(abar**0.5 * latents, timestep)
            found["identity"].append(float(psnr(noisy, image)))
            found["prior"].append(float(psnr(prior.decode(z0, (SIDE, SIDE)).clamp(0, 1), image)))
            classical = _bm3d(noisy, noise_std)
            if classical is not None:
                found["bm3d"].append(float(psnr(classical.clamp(0, 1), image)))
        means = {name: _mean(values) if values else None for name, values in found.items()}
        rows.append({"noise_std": noise_std, "timestep": timestep, **means})
    return rows


def _pairs(names: list[str], kernels: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sharp crops and their twins, blurred by 5 to 25 pixels, 8 bits both."""
    for number in range(kernels):
        size = 5 + 2 * (number * 10 // max(kernels - 1, 1))
        for index, name in enumerate(names):
            blur = random_motion_kernel(size, seed=5000 + 100 * number + index)
            blurred, sharp = observe(name, blur, 0.0, seed=0)
            yield (sharp * 255).round() / 255, blurred


@torch.no_grad()
def measure_ranking(prior: LatentPrior, names: list[str], kernels: int = 6) -> Rows:
    """How often a sharp picture is told from its blurred twin.

    ``plain``: by the denoising loss alone, lower for the sharp one.  ``label``: by the loss under
    the label "blurred" less that under "sharp", larger for the sharp one.
    """

    def losses(image: Tensor, label: str | None) -> Tensor:
        latents = prior.encode(image)
        values = []
        for timestep in RANKING_TIMESTEPS:
            abar = float(prior.alphas_cumprod[timestep])
            noise = _noise(latents.shape, timestep)
            noisy = abar**0.5 * latents + (1 - abar) ** 0.5 * noise
            _, epsilon = prior.predict(noisy, timestep, label)
            values.append((epsilon - noise).square().mean())
        return torch.stack(values)

    plain: list[float] = []
    labelled: list[float] = []
    unlabelled = "unknown" if "unknown" in prior.classes else None
    for pair in _pairs(names, kernels):
        sharp, blurred = (float(losses(image, unlabelled).sum()) for image in pair)
        plain.append(sharp < blurred)
        if {"sharp", "blurred"} <= set(prior.classes):
            sharp, blurred = (
                float((losses(image, "blurred") - losses(image, "sharp")).sum()) for image in pair
            )
            labelled.append(sharp > blurred)
    return {
        "pairs": len(plain),
        "plain": _mean(plain),
        "label": _mean(labelled) if labelled else None,
    }


def _classical(model: BlurModel, edges: Tensor, prior: str, weight: float) -> Tensor:
    """Half-quadratic splitting on the same edges, as the method's own least squares."""
    penalty = EdgeStepSettings().kernel_weight
    return ext.kernel_map_update(
        model.crop(edges),
        model.grey,
        model.initial_kernel(),
        noise_std=1.0,
        penalty=penalty,
        regularization=weight * penalty,
        iterations=20,
        prior=prior,
        domain="gradient",
        window=model.window,
        solver_steps=25,
    )


@torch.no_grad()
def measure_m_step(
    prior: LatentPrior, kernel_prior: KernelDenoiserNet, names: list[str], kernels: int = 2
) -> list[Rows]:
    """MNC of one M-step from D(z_0), the true image degraded as the E-step's estimate is.

    Rows by noise level: with the kernel prior, with none, with l1 or l2 (their weight chosen on
    these very cases, in their favour), and with the kernel prior after either.
    """
    settings = EdgeStepSettings()
    rows = []
    for timestep in M_STEP_LEVELS:
        abar = float(prior.alphas_cumprod[timestep])
        found: dict[tuple[str, float], list[float]] = {}
        for index in range(kernels):
            true = random_motion_kernel(KERNEL_SIZE, seed=1000 * index + 7)
            for name in names:
                observed, sharp = observe(name, true, OBSERVATION_NOISE, seed=index)
                model = BlurModel(
                    observed,
                    kernel_size=KERNEL_SIZE,
                    noise_std=OBSERVATION_NOISE,
                    kernel_prior=kernel_prior,
                )
                canvas = model.padded.clone()
                model.crop(canvas).copy_(sharp)
                latents = prior.encode(canvas)
                noise = _noise(latents.shape, index)
                z0, _ = prior.predict(abar**0.5 * latents + (1 - abar) ** 0.5 * noise, timestep)
                image = prior.decode(z0, model.canvas)
                grey = image.mean(1, keepdim=True)
                edges = l0_deconvolution(grey, None, weight=settings.edge_weight)
                start = model.initial_kernel()
                fit = model.fit_edges(edges, start, weight=settings.kernel_weight)
                # No other kernel was there before: the image is the true one.
                fit = replace(fit, before=fit.kernel)
                answers = {
                    ("kernel prior", 0.0): model.answer(fit, 1.0),
                    ("none", 0.0): fit.kernel,
                }
                for kind, weights in PRIOR_WEIGHTS.items():
                    for weight in weights:
                        found_kernel = _classical(model, edges, kind, weight)
                        answers[kind, weight] = found_kernel
                        answers[f"{kind}, then kernel prior", weight] = model.mix(found_kernel, 1.0)
                for key, answer in answers.items():
                    mnc = float(maximum_normalized_correlation(answer, true))
                    found.setdefault(key, []).append(mnc)
        best: dict[str, float] = {}
        for (kind, _), values in found.items():
            best[kind] = max(best.get(kind, 0.0), _mean(values))
        rows.append({"timestep": timestep, **best})
    return rows


@torch.no_grad()
def measure_initialization(
    kernel_prior: KernelDenoiserNet, names: list[str], kernels: int = 2
) -> dict[str, float]:
    """MNC of the first kernel, before EM: from edges with and without the prior, and of a box."""
    found: dict[str, list[float]] = {}
    for index in range(kernels):
        true = random_motion_kernel(KERNEL_SIZE, seed=1000 * index + 7)
        for name in names:
            observed, _ = observe(name, true, OBSERVATION_NOISE, seed=index)
            model = BlurModel(observed, kernel_size=KERNEL_SIZE, noise_std=OBSERVATION_NOISE)
            answers = {
                "edges and kernel prior": estimate_kernel(
                    observed, KERNEL_SIZE, kernel_prior=kernel_prior
                ),
                "edges": estimate_kernel(observed, KERNEL_SIZE),
                "box of 5 pixels": model.initial_kernel(),
            }
            for key, answer in answers.items():
                mnc = float(maximum_normalized_correlation(answer, true))
                found.setdefault(key, []).append(mnc)
    return {key: _mean(values) for key, values in found.items()}


@torch.no_grad()
def measure_sharpness(names: list[str], kernels: int = 4) -> list[Rows]:
    """Shares of pictures that are taken for sharp and left as they are, by noise.

    ``sharp``: of the photographs themselves; ``blurred N``: of those blurred by N-pixel motion
    kernels, where each is one too many.  All are 8 bits.
    """
    network = load_sharpness()

    def share(pictures: Iterable[Tensor]) -> float:
        return _mean([sharp_log_odds(each, network) >= SHARP_LOG_ODDS for each in pictures])

    rows = []
    for noise_std in (0.0, 0.01, 0.02, 0.05):
        row: Rows = {"noise_std": noise_std}
        delta = torch.ones(1, 1, 1, 1)
        row["sharp"] = share(observe(name, delta, noise_std, seed=0)[0] for name in names)
        for size in (5, 9, 15, 25, 33):
            row[f"blurred {size}"] = share(
                observe(name, random_motion_kernel(size, seed=9000 + k), noise_std, seed=k)[0]
                for name in names
                for k in range(kernels)
            )
        rows.append(row)
    return rows


@torch.no_grad()
def sample(prior: LatentPrior, count: int, *, side: int, steps: int = 50, seed: int = 0) -> Tensor:
    """``count`` pictures ``[count,3,side,side]`` from pure noise: DDIM (Song et al. 2021), eta = 0.

    >>> sample(load_prior(), 16, side=128)  # doctest: +SKIP
    """
    z = _noise(prior.encode(torch.zeros(1, 3, side, side)).expand(count, -1, -1, -1).shape, seed)
    schedule = descending(prior.timesteps - 1, steps)
    for step, timestep in enumerate(schedule):
        z0, epsilon = prior.predict(z, timestep)
        z = z0
        if step + 1 < len(schedule):
            abar = float(prior.alphas_cumprod[schedule[step + 1]])
            z = abar**0.5 * z0 + (1 - abar) ** 0.5 * epsilon
    return prior.decode(z, (side, side)).clamp(0, 1)


def run_prior_suite(
    output: Path,
    *,
    images: int = 8,
    prior: Path | None = None,
    kernel_prior: Path | None = None,
    pictures: Path | None = None,
    console: Console,
) -> dict[str, Any]:
    """Measure both priors and write ``output`` after each part; parts that are in it are kept.

    Args:
        output: JSON file.
        images: how many of the eight test photographs.
        prior: image prior; the packaged one by default.
        kernel_prior: likewise.
        pictures: folder for a sheet of samples.
        console: for progress and the tables.

    Raises:
        ValueError: ``output`` holds another setup, or ``images`` makes no sense.
        FileNotFoundError: no such prior.
    """
    if not 1 <= images <= len(TEST_PHOTOGRAPHS):
        raise ValueError(f"images must lie between 1 and {len(TEST_PHOTOGRAPHS)}, found {images}")
    names = list(TEST_PHOTOGRAPHS)[:images]
    net, kernels = latent.load_prior(prior), kernel.load_kernel_prior(kernel_prior)
    paths = (prior or latent.PACKAGED, kernel_prior or kernel.PACKAGED)
    document: dict[str, Any] = {
        "setup": {
            "suite": "prior",
            "images": names,
            "priors": [source_digest(path) for path in paths],
            "versions": versions(),
        },
        "machine": machine(),
    }
    document = stored_results(output, document["setup"]) or document
    parts: dict[str, Callable[[], Any]] = {
        "autoencoder": lambda: measure_autoencoder(net, names),
        "denoising": lambda: measure_denoising(net, names),
        "ranking": lambda: measure_ranking(net, names),
        "m_step": lambda: measure_m_step(net, kernels, names),
        "initialization": lambda: measure_initialization(kernels, names),
        "sharpness": lambda: measure_sharpness(names),
    }
    for part, measure in parts.items():
        if part in document:
            continue
        started = time.perf_counter()
        with console.status(f"{part} ..."):
            document[part] = measure()
        store_results(output, document)
        console.print(f"{part}: {time.perf_counter() - started:.1f} s", highlight=False)
    if document["denoising"][0]["bm3d"] is None:
        console.print("without BM3D's row: pip install bm3d (its licence: non-commercial use)")
    for table in _tables(document):
        console.print(table)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        drawn = sample(net, 16, side=SAMPLE_SIDE)
        sheet(drawn, 8, tile=SAMPLE_SIDE).save(pictures / "samples.webp", quality=85)
        console.print(f"look at {pictures / 'samples.webp'}", soft_wrap=True)
    return document


def _tables(document: dict[str, Any]) -> Iterator[Table]:
    code = document["autoencoder"]
    yield _table(
        "autoencoder",
        {"round trip": f"{code['psnr']:.2f} dB",
         "with 0.05 noise in the latents": f"{code['psnr_noisy_latents']:.2f} dB",
         "encode and decode": f"{code['milliseconds']:.0f} ms"},
    )  # fmt: skip
    for title, key, head in (
        ("denoising, dB", "denoising", "noise_std"),
        ("one M-step, MNC", "m_step", "timestep"),
        ("taken for sharp, share", "sharpness", "noise_std"),
    ):
        table = Table(title=title)
        columns = [name for name in document[key][0] if name != head]
        for name in (head, *columns):
            table.add_column(name, justify="right")
        for row in document[key]:
            cells = ("" if row[c] is None else f"{row[c]:.3g}" for c in columns)
            table.add_row(f"{row[head]:g}", *cells)
        yield table
    ranking = document["ranking"]
    shares = {k: "" if ranking[k] is None else f"{ranking[k]:.0%}" for k in ("plain", "label")}
    yield _table(f"sharp before blurred, {ranking['pairs']} pairs", shares)
    first = {name: f"{value:.3f}" for name, value in document["initialization"].items()}
    yield _table("first kernel, MNC", first)


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
