"""Blind deblurring over conditions: kernel sizes, noise, boundaries, and wrong settings.

``synthetic``: photographs and kernels that no training has seen, over kernel sizes, noise levels
and both boundaries.  ``misspecified``: one condition, with the kernel's size or the noise told
wrongly.  Photographs, kernels and the way they are measured are those of :mod:`latentdem.evaluate`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import latentdem_ext as ext
from latentdem.em.driver import deblur, versions
from latentdem.evaluate import SEARCH, SIDE, TEST_PHOTOGRAPHS, photograph_crop
from latentdem.evaluate_model import ModelUnderTest
from latentdem.figures_table import Column, figure, figures_table
from latentdem.html_report import Entry, write_page
from latentdem.io import comparison_picture
from latentdem.metrics import (
    NO_BLUR,
    aligned_psnr,
    bootstrap_interval,
    kernel_rmse,
    maximum_normalized_correlation,
    psnr,
    structural_similarity,
    translate,
    visual_information,
)
from latentdem.operators.motion import random_motion_kernel
from latentdem.results import machine, store_results, stored_results

FAILURE_RATIO = 3.0
"""Levin's error ratio from which a result counts as failed (Levin et al., CVPR 2009)."""


@dataclass(frozen=True)
class Condition:
    """What is done to a photograph, and what the method is told of it.

    Args:
        kernel_size: of the true kernel, odd.
        noise_std: sigma of the noise.
        boundary: ``valid`` or ``circular``.
        told_size: the kernel size that the method is given.
        told_noise: the noise that it is given; None: it estimates it.
    """

    kernel_size: int
    noise_std: float
    boundary: str
    told_size: int
    told_noise: float | None

    @property
    def name(self) -> str:
        """For tables: what is not as it is said is said."""
        text = f"{self.kernel_size} px, noise {self.noise_std:g}, {self.boundary}"
        if self.told_size != self.kernel_size:
            text += f", told {self.told_size} px"
        if self.told_noise is None:
            # Of no noise nothing can be told.
            text += ", noise not told" if self.noise_std > 0 else ""
        elif self.told_noise != self.noise_std:
            text += f", told noise {self.told_noise:g}"
        return text


def _odd(size: float) -> int:
    return 2 * round((size - 1) / 2) + 1


def synthetic(
    sizes: Iterable[int] = (15, 25, 33, 65),
    noises: Iterable[float] = (0.0, 0.01, 0.02, 0.05),
    boundaries: Iterable[str] = ("valid", "circular"),
) -> list[Condition]:
    """Every combination; the noise is told as it is, none is left to be estimated."""
    return [
        Condition(size, noise, boundary, size, noise if noise > 0 else None)
        for boundary in boundaries
        for size in sizes
        for noise in noises
    ]


def misspecified(size: int = 25, noise: float = 0.01) -> list[Condition]:
    """Kernel size and noise told as 0.5 to 2 times what they are, and the noise not at all."""
    conditions = [Condition(size, noise, "valid", size, None)]
    for factor in (0.5, 0.75, 1.0, 1.5, 2.0):
        conditions.append(Condition(size, noise, "valid", _odd(factor * size), noise))
    for factor in (0.5, 0.75, 1.5, 2.0):
        conditions.append(Condition(size, noise, "valid", size, factor * noise))
    return conditions


def suite_conditions(
    suite: str, kernel_size: int | None = None, noise_std: float | None = None
) -> list[Condition]:
    """Conditions of ``synthetic`` or ``misspecified``, for one kernel size or noise if given."""
    given: dict[str, Any] = {}
    if suite == "synthetic":
        given |= {} if kernel_size is None else {"sizes": (kernel_size,)}
        given |= {} if noise_std is None else {"noises": (noise_std,)}
    else:
        given |= {} if kernel_size is None else {"size": kernel_size}
        given |= {} if noise_std is None else {"noise": noise_std}
    return SUITES[suite](**given)


SUITES: dict[str, Callable[..., list[Condition]]] = {
    "synthetic": synthetic,
    "misspecified": misspecified,
}


def observe(name: str, true: Tensor, condition: Condition, seed: int) -> tuple[Tensor, Tensor]:
    """A 256 x 256 observation, 8 bits, and the sharp image under it, both ``[1,3,256,256]``."""
    half = true.shape[-1] // 2
    if condition.boundary == "circular":
        scene = photograph_crop(name, SIDE)
        blurred, sharp = ext.blur_conv2d(scene, true, boundary="circular"), scene
    else:
        scene = photograph_crop(name, SIDE + 2 * half)
        blurred = ext.blur_conv2d(scene, true, boundary="valid")
        sharp = scene[..., half : half + SIDE, half : half + SIDE]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(blurred.shape, generator=generator)
    return ((blurred + condition.noise_std * noise) * 255).round() / 255, sharp


def figures(
    observed: Tensor, sharp: Tensor, blind: Tensor, known: Tensor, estimate: Tensor, true: Tensor
) -> dict[str, float]:
    """What is measured of one result; images ``[1,3,H,W]``, kernels ``[1,1,k,k]``.

    PSNR, SSIM and VIF are taken after the best shift, on the crop that is inset by half a true
    kernel and the search range, for all images alike.
    """
    margin = true.shape[-1] // 2
    inset = margin + SEARCH
    area = (..., slice(inset, -inset), slice(inset, -inset))
    found: dict[str, float] = {}
    for name, image in (("input", observed), ("blind", blind), ("true_kernel", known)):
        value, (dy, dx) = aligned_psnr(image, sharp, margin=margin, search=SEARCH)
        moved = translate(image, dy, dx)[area]
        found[f"psnr_{name}"] = value
        found[f"ssim_{name}"] = float(structural_similarity(moved, sharp[area]))
        found[f"vif_{name}"] = visual_information(moved, sharp[area])
    found["psnr_blind_raw"] = float(psnr(blind, sharp))
    found["error_ratio"] = 10 ** ((found["psnr_true_kernel"] - found["psnr_blind"]) / 10)
    found["mnc"] = float(maximum_normalized_correlation(estimate, true))
    found["kernel_rmse"] = float(kernel_rmse(estimate, true))
    found["kernel_peak"] = float(estimate.max())
    return found


def _case(
    name: str, index: int, seed: int, condition: Condition, options: dict[str, Any],
    picture: Path,
) -> dict[str, Any]:  # fmt: skip
    true = random_motion_kernel(condition.kernel_size, seed=1000 * index + 7)
    observed, sharp = observe(name, true, condition, seed=index)
    told: dict[str, Any] = {
        "noise_std": condition.told_noise,
        "boundary": condition.boundary,
        "seed": seed,
    }
    started = time.perf_counter()
    blind = deblur(observed, kernel_size=condition.told_size, **told, **options)
    seconds = time.perf_counter() - started
    known = deblur(observed, kernel=true, **told, **options)
    picture.parent.mkdir(parents=True, exist_ok=True)
    comparison_picture(observed[0], blind.image[0], blind.kernel[0, 0]).save(picture)
    return {
        **figures(observed, sharp, blind.image, known.image, blind.kernel, true),
        "seconds": seconds,
        "network_evaluations": blind.report["network_evaluations"],
        "backward_passes": blind.report["backward_passes"],
        "picture": str(picture),
    }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of one condition's rows; the gain with its 95 % bootstrap interval over pairs."""

    def mean(key: str) -> float:
        return statistics.fmean(row[key] for row in rows)

    pairs: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        gain = row["psnr_blind"] - row["psnr_input"]
        pairs.setdefault((row["image"], row["kernel"]), []).append(gain)
    gains = [statistics.fmean(values) for values in pairs.values()]
    spread = [statistics.stdev(values) for values in pairs.values() if len(values) > 1]
    low, high = bootstrap_interval(gains)
    names = [f"{kind}_{name}" for kind in ("psnr", "ssim", "vif")
             for name in ("input", "blind", "true_kernel")]  # fmt: skip
    return {
        "pairs": len(pairs),
        "runs": len(rows),
        **{name: mean(name) for name in names},
        "gain": statistics.fmean(gains),
        "gain_low": low,
        "gain_high": high,
        "gain_std_over_seeds": statistics.fmean(spread) if spread else None,
        "mnc": mean("mnc"),
        "kernel_rmse": mean("kernel_rmse"),
        "share_no_blur": statistics.fmean(row["kernel_peak"] > NO_BLUR for row in rows),
        "share_failed": statistics.fmean(row["error_ratio"] > FAILURE_RATIO for row in rows),
        "seconds_median": statistics.median(row["seconds"] for row in rows),
    }


def run_conditions(
    output: Path,
    *,
    suite: str,
    images: int,
    kernels: int,
    seeds: int = 1,
    method: str = "prox",
    steps: int | None = None,
    pictures: Path | None = None,
    console: Console,
    conditions: list[Condition] | None = None,
    model: ModelUnderTest | None = None,
) -> dict[str, Any]:
    """Run a suite; write ``output`` (JSON) and a page beside it after each run.

    Runs that are in ``output`` are kept.  Seeds change the method's random numbers alone.

    Args:
        output: JSON file; the page has its name, ending in ``.html``.
        suite: ``synthetic`` or ``misspecified``.
        images: how many of the eight test photographs.
        kernels: random motion kernels an image.
        seeds: runs of a pair.
        method: ``prox`` or ``paper``.
        steps: by default the method's own.
        pictures: folder of comparison pictures; by default beside ``output``.
        console: for progress and the table.
        conditions: instead of the suite's.
        model: what restores them; the packaged prior by default.

    Raises:
        ValueError: ``output`` holds another setup, or a number makes no sense.
    """
    if not 1 <= images <= len(TEST_PHOTOGRAPHS) or kernels < 1 or seeds < 1:
        raise ValueError(
            f"images must lie between 1 and {len(TEST_PHOTOGRAPHS)}, kernels and seeds be "
            f"positive, found {images}, {kernels} and {seeds}"
        )
    model = model or ModelUnderTest()
    chosen = suite_conditions(suite) if conditions is None else conditions
    names = list(TEST_PHOTOGRAPHS)[:images]
    setup = {
        "suite": suite,
        "method": method,
        "steps": steps,
        **model.setup(),
        "versions": versions(),
    }
    stored = stored_results(output, setup)
    rows: list[dict[str, Any]] = [] if stored is None else stored["rows"]
    place = output.parent / f"{output.stem}-pictures" if pictures is None else pictures
    done = {(row["condition"], row["kernel"], row["image"], row["seed"]) for row in rows}
    # Conditions change fastest, so that a stopped run compares them on the same pairs.
    plan = [
        (seed, index, name, condition)
        for seed in range(seeds)
        for index in range(kernels)
        for name in names
        for condition in chosen
    ]
    options = {"method": method, "steps": steps, **model.options()}
    document = _store(output, setup, chosen, rows)
    for position, (seed, index, name, condition) in enumerate(plan, 1):
        if (condition.name, index, name, seed) in done:
            continue
        slug = condition.name.replace(", ", "-").replace(" ", "_")
        picture = place / f"{slug}-{name}-{index}-{seed}.png"
        row = {
            "condition": condition.name,
            "image": name,
            "kernel": index,
            "seed": seed,
            **asdict(condition),
            **_case(name, index, seed, condition, options, picture),
        }
        rows.append(row)
        document = _store(output, setup, chosen, rows)
        console.print(
            f"{position:4d}/{len(plan)} {condition.name}: {name}, kernel {index}, seed {seed}: "
            f"{row['psnr_input']:.2f} -> {row['psnr_blind']:.2f} dB "
            f"(true kernel {row['psnr_true_kernel']:.2f}), MNC {row['mnc']:.3f}, "
            f"{row['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(figures_table(suite, COLUMNS, document["summary"], width=console.width))
    console.print(f"look at {output.with_suffix('.html')}", soft_wrap=True)
    return document


def _store(
    output: Path, setup: dict[str, Any], conditions: list[Condition], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    by_condition = {
        condition.name: [row for row in rows if row["condition"] == condition.name]
        for condition in conditions
    }
    summaries = {name: summarize(found) for name, found in by_condition.items() if found}
    document = {
        "setup": setup,
        "machine": machine(),
        "summary": summaries,
        "rows": rows,
    }
    store_results(output, document)
    entries = [
        Entry(
            f"{row['condition']}: {row['image']}, kernel {row['kernel']}, seed {row['seed']}",
            {
                "PSNR": f"{row['psnr_input']:.2f} -> {row['psnr_blind']:.2f} dB",
                "with the true kernel": f"{row['psnr_true_kernel']:.2f} dB",
                "MNC": f"{row['mnc']:.3f}",
                "seconds": f"{row['seconds']:.1f}",
            },
            Path(row["picture"]),
        )
        for row in sorted(rows, key=lambda row: row["psnr_blind"] - row["psnr_input"])
    ]
    summary = {
        name: f"{s['gain']:+.2f} dB ({s['gain_low']:+.2f} to {s['gain_high']:+.2f}), "
        f"MNC {s['mnc']:.3f}, {s['pairs']} pairs"
        for name, s in summaries.items()
    }
    write_page(
        output.with_suffix(".html"),
        title=f"Blind deblurring, {setup['suite']}",
        introduction="Gain over the observation in aligned PSNR with its 95 % interval over pairs. "
        "Pictures: observation with the estimated kernel, and restoration; smallest gain first.",
        summary=summary,
        entries=entries,
    )
    return document


COLUMNS = (
    figure("pairs", "pairs", "d", main=False),
    figure("input", "psnr_input", ".2f"),
    figure("blind", "psnr_blind", ".2f"),
    figure("gain", "gain", "+.2f"),
    Column("95 %", lambda row: f"{row['gain_low']:+.2f} to {row['gain_high']:+.2f}", main=False),
    figure("true kernel", "psnr_true_kernel", ".2f"),
    figure("SSIM", "ssim_blind", ".3f", main=False),
    figure("VIF", "vif_blind", ".3f", main=False),
    figure("MNC", "mnc", ".3f"),
    figure("no blur", "share_no_blur", ".0%", main=False),
    figure("s", "seconds_median", ".1f"),
)
