"""Suite ``operators``: every forward model that ``deblur`` knows, beside one kernel of any shape.

Defocus and Gaussian blur of unknown size, blind super-resolution, a blur that turns over the
photograph, and blur in linear light.  Photographs are those of :mod:`latentdem.evaluate`, which no
training has seen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import latentdem_ext as ext
from latentdem.em.driver import deblur, versions
from latentdem.evaluate import SIDE, TEST_PHOTOGRAPHS, photograph_crop
from latentdem.evaluate_synthetic import figures
from latentdem.figures_table import figure, figures_table
from latentdem.html_report import Entry, write_page
from latentdem.io import comparison_picture, kernel_sheet
from latentdem.metrics import bootstrap_interval, maximum_normalized_correlation
from latentdem.operators.blur_families import family_kernels
from latentdem.operators.linear_light import to_display, to_light
from latentdem.operators.motion import random_motion_kernel
from latentdem.operators.super_resolution import upsample
from latentdem.priors.packaged import prior_digests
from latentdem.results import machine, store_results, stored_results

NOISE = 0.01
TURN = 20.0
"""Degrees by which the kernels of the varying blur are turned to either side."""


@dataclass(frozen=True)
class Case:
    """One way to spoil a photograph.

    Args:
        name: for tables.
        size: side of the kernels in pixels of the sharp image.
        kernels: true kernels ``[1,P,k,k]`` of a photograph, by its number.
        options: of ``deblur`` that say which forward model it is.
        free: whether a uniform kernel of any shape, in display values, is tried, too.
    """

    name: str
    size: int
    kernels: Callable[[int], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    free: bool = True

    @property
    def scale(self) -> int:
        """Of super-resolution; else one."""
        return int(self.options.get("scale", 1))

    def observe(self, name: str, kernels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Observation ``[1,3,256/f,256/f]`` in 8 bits, the sharp image under it."""
        half = self.size // 2
        sharp = photograph_crop(name, SIDE + 2 * half)
        light = bool(self.options.get("linear_light"))
        scene = to_light(sharp) if light else sharp
        if kernels.shape[1] > 1:
            side = scene.shape[-1]
            rows, columns = self.options["grid"]
            overlap = side // max(rows, columns) // 2
            weights = ext.blend_windows(side, side, rows, columns, overlap)
            blurred = ext.varying_blur2d(scene, kernels[0], weights, boundary="valid")
        else:
            blurred = ext.blur_conv2d(scene, kernels, boundary="valid")
        blurred = to_display(blurred) if light else blurred
        offset = (self.scale - 1) // 2
        blurred = blurred[..., offset :: self.scale, offset :: self.scale]
        # What the whole coarse pixels cover: 256 is no multiple of three.
        count = SIDE // self.scale
        blurred = blurred[..., :count, :count]
        generator = torch.Generator().manual_seed(seed)
        noisy = blurred + NOISE * torch.randn(blurred.shape, generator=generator)
        end = half + count * self.scale
        return (noisy * 255).round() / 255, sharp[..., half:end, half:end]


def _family(family: str, size: float) -> Callable[[int], Tensor]:
    return lambda index: family_kernels(family, 21, torch.tensor([size]))


def turned(kernel: Tensor, degrees: float) -> Tensor:
    """``kernel [1,1,k,k]`` turned about its centre, summing to one."""
    angle = torch.deg2rad(torch.tensor(degrees))
    cosine, sine = float(angle.cos()), float(angle.sin())
    matrix = torch.tensor([[[cosine, -sine, 0.0], [sine, cosine, 0.0]]])
    grid = F.affine_grid(matrix, list(kernel.shape), align_corners=False)
    moved = F.grid_sample(kernel, grid, mode="bilinear", align_corners=False)
    return moved / moved.sum()


def _turning(index: int) -> Tensor:
    base = random_motion_kernel(17, seed=1000 * index + 7)
    angles = torch.linspace(-TURN, TURN, 4).tolist()
    return torch.cat([turned(base, angle) for angle in angles], 1)


CASES: tuple[Case, ...] = (
    Case("defocus, radius 2.5", 21, _family("defocus", 2.5), {"blur": "defocus"}),
    Case("defocus, radius 5", 21, _family("defocus", 5.0), {"blur": "defocus"}),
    Case("Gaussian, 1.2 pixels", 21, _family("gaussian", 1.2), {"blur": "gaussian"}),
    Case("Gaussian, 2.4 pixels", 21, _family("gaussian", 2.4), {"blur": "gaussian"}),
    Case("2 x 2 turning kernels", 17, _turning, {"grid": (2, 2)}),
    Case(
        "motion in linear light",
        25,
        lambda index: random_motion_kernel(25, seed=1000 * index + 7),
        {"linear_light": True},
    ),
    *(
        Case(
            f"super-resolution x{scale}, Gaussian",
            21,
            _family("gaussian", 0.6 * scale),
            {"scale": scale},
            free=False,
        )
        for scale in (2, 3, 4)
    ),
    Case(
        "super-resolution x2, motion",
        21,
        lambda index: random_motion_kernel(21, seed=1000 * index + 7),
        {"scale": 2},
        free=False,
    ),
)


def _similarity(found: Tensor, true: Tensor) -> float:
    """Mean MNC over the patches; a single kernel stands for all of them."""
    planes = found.expand(-1, true.shape[1], -1, -1)[0, :, None]
    pairs = zip(planes.split(1), true[0, :, None].split(1), strict=True)
    return statistics.fmean(float(maximum_normalized_correlation(a, b)) for a, b in pairs)


def _run(case: Case, name: str, index: int, steps: int | None, picture: Path) -> dict[str, Any]:
    true = case.kernels(index)
    observed, sharp = case.observe(name, true, index)
    common: dict[str, Any] = {"noise_std": NOISE, "steps": steps}
    started = time.perf_counter()
    blind = deblur(observed, kernel_size=case.size, **common, **case.options)
    seconds = time.perf_counter() - started
    known = deblur(observed, kernel=true, **common, **case.options)
    picture.parent.mkdir(parents=True, exist_ok=True)
    comparison_picture(observed[0], blind.image[0], kernel_sheet(blind.kernel[0])).save(picture)
    shown = upsample(observed, case.scale)
    one = true[:, :1]
    row = figures(shown, sharp, blind.image, known.image, blind.kernel[:, :1], one)
    row["mnc"] = _similarity(blind.kernel, true)
    row |= {"seconds": seconds}
    if case.free:
        free = deblur(observed, kernel_size=case.size, **common)
        measured = figures(shown, sharp, free.image, known.image, free.kernel, one)
        row |= {"psnr_free": measured["psnr_blind"], "mnc_free": _similarity(free.kernel, true)}
    return row


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of one case's rows, the gain with its 95 % interval over photographs."""

    def mean(key: str) -> float | None:
        return statistics.fmean(row[key] for row in rows) if key in rows[0] else None

    gains = [row["psnr_blind"] - row["psnr_input"] for row in rows]
    low, high = bootstrap_interval(gains)
    keys = ("psnr_input", "psnr_blind", "psnr_free", "psnr_true_kernel", "ssim_input",
            "ssim_blind", "mnc", "mnc_free")  # fmt: skip
    return {
        "photographs": len(rows),
        **{key: mean(key) for key in keys},
        "gain": statistics.fmean(gains),
        "gain_low": low,
        "gain_high": high,
        "seconds_median": statistics.median(row["seconds"] for row in rows),
    }


def run_operators_suite(
    output: Path,
    *,
    images: int,
    steps: int | None = None,
    pictures: Path | None = None,
    console: Console,
    cases: tuple[Case, ...] = CASES,
) -> dict[str, Any]:
    """Run all cases; write ``output`` (JSON) and a page beside it after each.

    Args:
        output: JSON file; what is in it is kept.
        images: how many of the eight test photographs.
        steps: of the method; by default its own.
        pictures: folder of comparison pictures; by default beside ``output``.
        console: for progress and the table.
        cases: which.

    Raises:
        ValueError: ``output`` holds another setup, or there are not so many photographs.
    """
    if not 1 <= images <= len(TEST_PHOTOGRAPHS):
        raise ValueError(f"images must lie between 1 and {len(TEST_PHOTOGRAPHS)}, found {images}")
    setup = {
        "suite": "operators",
        "steps": steps,
        "noise_std": NOISE,
        "priors": prior_digests(),
        "versions": versions(),
    }
    stored = stored_results(output, setup)
    rows: list[dict[str, Any]] = [] if stored is None else stored["rows"]
    done = {(row["case"], row["image"]) for row in rows}
    place = output.parent / f"{output.stem}-pictures" if pictures is None else pictures
    plan = [(index, name, case) for index, name in enumerate(list(TEST_PHOTOGRAPHS)[:images])
            for case in cases]  # fmt: skip
    document = _store(output, setup, rows, cases)
    for position, (index, name, case) in enumerate(plan, 1):
        if (case.name, name) in done:
            continue
        slug = case.name.replace(", ", "-").replace(" ", "_")
        picture = place / f"{slug}-{name}.png"
        row = _run(case, name, index, steps, picture)
        rows.append({"case": case.name, "image": name, **row, "picture": str(picture)})
        document = _store(output, setup, rows, cases)
        free = f", any kernel {row['psnr_free']:.2f}" if case.free else ""
        console.print(
            f"{position:3d}/{len(plan)} {case.name}: {name}: {row['psnr_input']:.2f} -> "
            f"{row['psnr_blind']:.2f} dB{free}, true kernel {row['psnr_true_kernel']:.2f}, "
            f"MNC {row['mnc']:.3f}, {row['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
    table = figures_table("forward models", COLUMNS, document["summary"], width=console.width)
    console.print(table)
    console.print(f"look at {output.with_suffix('.html')}", soft_wrap=True)
    return document


def _store(
    output: Path, setup: dict[str, Any], rows: list[dict[str, Any]], cases: tuple[Case, ...]
) -> dict[str, Any]:
    found = {case.name: [row for row in rows if row["case"] == case.name] for case in cases}
    summary = {name: summarize(part) for name, part in found.items() if part}
    document = {"setup": setup, "machine": machine(), "summary": summary, "rows": rows}
    store_results(output, document)
    write_page(
        output.with_suffix(".html"),
        title="Forward models",
        introduction="Observation with the estimated kernel (enlarged where it is smaller), and "
        "restoration; smallest gain first.",
        summary={
            name: f"{s['gain']:+.2f} dB ({s['gain_low']:+.2f} to {s['gain_high']:+.2f})"
            for name, s in summary.items()
        },
        entries=[
            Entry(
                f"{row['case']}: {row['image']}",
                {
                    "PSNR": f"{row['psnr_input']:.2f} -> {row['psnr_blind']:.2f} dB",
                    "with the true kernel": f"{row['psnr_true_kernel']:.2f} dB",
                    "MNC": f"{row['mnc']:.3f}",
                },
                Path(row["picture"]),
            )
            for row in sorted(rows, key=lambda row: row["psnr_blind"] - row["psnr_input"])
        ],
    )
    return document


COLUMNS = (
    figure("input", "psnr_input", ".2f", main=False),
    figure("its model", "psnr_blind", ".2f"),
    figure("any kernel", "psnr_free", ".2f"),
    figure("true kernel", "psnr_true_kernel", ".2f"),
    figure("MNC", "mnc", ".3f"),
    figure("s", "seconds_median", ".1f"),
)
