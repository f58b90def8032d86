"""Quality of blind deblurring on photographs and kernels that no training has seen.

Test photographs come with scikit-image and scikit-learn; test kernels from
:func:`latentdem.operators.motion.random_motion_kernel`.  Neither is in the training manifest.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import latentdem_ext as ext
from latentdem.em.driver import deblur, versions
from latentdem.em.options import solver_settings
from latentdem.evaluate_model import ModelUnderTest
from latentdem.io import comparison_picture
from latentdem.metrics import NO_BLUR, aligned_psnr, maximum_normalized_correlation, psnr
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors import LatentPrior
from latentdem.results import machine, store_results, stored_results

SIDE = 256
SEARCH = 4
"""Largest shift in pixels that the aligned PSNR searches."""


def _skimage(name: str) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        from skimage import data

        return getattr(data, name)()

    return load


def _sklearn(name: str) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        from sklearn.datasets import load_sample_image

        return load_sample_image(name)

    return load


# Name, loader, and the top left corner of the crop, chosen once to show something.
TEST_PHOTOGRAPHS: dict[str, tuple[Callable[[], np.ndarray], int, int]] = {
    "astronaut": (_skimage("astronaut"), 20, 100),
    "chelsea": (_skimage("chelsea"), 10, 90),
    "coffee": (_skimage("coffee"), 60, 160),
    "rocket": (_skimage("rocket"), 120, 180),
    "camera": (_skimage("camera"), 60, 120),
    "motorcycle": (lambda: _skimage("stereo_motorcycle")()[0], 150, 300),
    "china": (_sklearn("china.jpg"), 120, 220),
    "flower": (_sklearn("flower.jpg"), 90, 240),
}


def photograph_crop(name: str, side: int) -> Tensor:
    """``[1,3,side,side]`` in [0, 1] around the listed corner, mirrored beyond its border."""
    load, top, left = TEST_PHOTOGRAPHS[name]
    array = load()
    if array.ndim == 2:
        array = np.stack([array] * 3, -1)
    # One photograph is lower than what the largest kernels blur into a crop.
    missing = [max(0, side - length) for length in array.shape[:2]]
    if any(missing):
        margins = [(lack // 2, lack - lack // 2) for lack in missing]
        array = np.pad(array, [*margins, (0, 0)], mode="symmetric")
        top, left = top + margins[0][0], left + margins[1][0]
    extra = (side - SIDE) // 2
    top = min(max(top - extra, 0), array.shape[0] - side)
    left = min(max(left - extra, 0), array.shape[1] - side)
    crop = array[top : top + side, left : left + side, :3]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 255


def observe(name: str, kernel: Tensor, noise_std: float, seed: int) -> tuple[Tensor, Tensor]:
    """A 256 x 256 observation through a valid convolution, and the sharp image under it."""
    half = kernel.shape[-1] // 2
    scene = photograph_crop(name, SIDE + 2 * half)
    blurred = ext.blur_conv2d(scene, kernel, boundary="valid")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(blurred.shape, generator=generator)
    # Quantised to 8 bits, as a file is; not clipped, so that the noise model holds.
    observed = ((blurred + noise_std * noise) * 255).round() / 255
    return observed, scene[..., half : half + SIDE, half : half + SIDE]


def _measure(restored: Tensor, truth: Tensor, kernel_size: int) -> float:
    value, _ = aligned_psnr(restored, truth, margin=kernel_size // 2, search=SEARCH)
    return value


def _one(
    name: str, index: int, kernel_size: int, noise_std: float, options: dict[str, Any],
    pictures: Path | None,
) -> dict[str, Any]:  # fmt: skip
    true_kernel = random_motion_kernel(kernel_size, seed=1000 * index + 7)
    observed, truth = observe(name, true_kernel, noise_std, seed=index)
    started = time.perf_counter()
    blind = deblur(observed, kernel_size=kernel_size, noise_std=noise_std, **options)
    seconds = time.perf_counter() - started
    known = deblur(observed, kernel=true_kernel, noise_std=noise_std, **options)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        picture = comparison_picture(observed[0], blind.image[0], blind.kernel[0, 0])
        picture.save(pictures / f"{name}-{index}.png")
    return {
        "image": name,
        "kernel": index,
        "psnr_input": _measure(observed, truth, kernel_size),
        "psnr_blind": _measure(blind.image, truth, kernel_size),
        "psnr_blind_raw": float(psnr(blind.image, truth)),
        "psnr_true_kernel": _measure(known.image, truth, kernel_size),
        "mnc": float(maximum_normalized_correlation(blind.kernel, true_kernel)),
        "kernel_peak": float(blind.kernel.max()),
        "residual_std": blind.report["residual_std"][0],
        "seconds": seconds,
        "network_evaluations": blind.report["network_evaluations"],
        "backward_passes": blind.report["backward_passes"],
    }


def _round_trip(prior: LatentPrior, names: list[str]) -> dict[str, float]:
    with torch.no_grad():
        return {
            name: float(psnr(prior.decode(prior.encode(image), (SIDE, SIDE)), image))
            for name in names
            for image in [photograph_crop(name, SIDE).to(prior.device)]
        }


def summarize(rows: list[dict[str, Any]], round_trip: dict[str, float]) -> dict[str, float]:
    """Means over all pairs, and the shares that tell how often it fails."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    gains = [row["psnr_blind"] - row["psnr_input"] for row in rows]
    return {
        "pairs": len(rows),
        "psnr_input": mean("psnr_input"),
        "psnr_blind": mean("psnr_blind"),
        "gain": statistics.fmean(gains),
        "gain_std": statistics.pstdev(gains),
        "share_worse_than_input": statistics.fmean(gain < 0 for gain in gains),
        "psnr_true_kernel": mean("psnr_true_kernel"),
        "gain_true_kernel": mean("psnr_true_kernel") - mean("psnr_input"),
        "mnc": mean("mnc"),
        "share_no_blur": statistics.fmean(row["kernel_peak"] > NO_BLUR for row in rows),
        "seconds_median": statistics.median(row["seconds"] for row in rows),
        "seconds_max": max(row["seconds"] for row in rows),
        "psnr_round_trip": statistics.fmean(round_trip.values()),
    }


def run_suite(
    output: Path,
    *,
    images: int,
    kernels: int,
    kernel_size: int,
    noise_std: float,
    method: str,
    steps: int | None,
    quality: str = "standard",
    pictures: Path | None,
    console: Console,
    model: ModelUnderTest | None = None,
) -> dict[str, Any]:
    """Run all pairs and write ``output``; pairs that are already in it are kept.

    ``model``: what restores them; the packaged prior by default.
    """
    model = model or ModelUnderTest()
    names = list(TEST_PHOTOGRAPHS)[:images]
    setup = {
        "kernel_size": kernel_size,
        "noise_std": noise_std,
        "method": method,
        "steps": steps,
        "side": SIDE,
        **model.setup(),
        "versions": versions(),
    }
    # Results from before there was this stay what was asked for.
    setup |= {"quality": quality} if quality != "standard" else {}
    solver_settings(method, steps, quality=quality)
    stored = stored_results(output, setup)
    rows: list[dict[str, Any]] = [] if stored is None else stored["rows"]
    round_trip = _round_trip(model.loaded(), names)
    options = {"method": method, "steps": steps, "quality": quality, **model.options()}
    done = {(row["image"], row["kernel"]) for row in rows}
    for index in range(kernels):
        for name in names:
            if (name, index) in done:
                continue
            row = _one(name, index, kernel_size, noise_std, options, pictures)
            rows.append(row)
            summary = summarize(rows, round_trip)
            document = {
                "setup": setup,
                "machine": machine(),
                "summary": summary,
                "round_trip": round_trip,
                "rows": rows,
            }
            store_results(output, document)
            console.print(
                f"{len(rows):3d}/{len(names) * kernels} {name:10} kernel {index}: "
                f"{row['psnr_input']:.2f} -> {row['psnr_blind']:.2f} dB "
                f"(true kernel {row['psnr_true_kernel']:.2f}), MNC {row['mnc']:.3f}, "
                f"{row['seconds']:.1f} s; mean gain {summary['gain']:+.2f} dB, "
                f"MNC {summary['mnc']:.3f}",
                highlight=False,
            )
    return json.loads(output.read_text())
