"""Blind deblurring by this package and by others' methods, on the same observations.

Photographs, kernels, noise and border are those of :mod:`latentdem.evaluate`, the figures those of
:mod:`latentdem.evaluate_synthetic`; the methods are in :mod:`latentdem.baselines`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from latentdem.baselines.rows import ROWS, Row, choose_rows, restore
from latentdem.em.driver import versions
from latentdem.em.steps import EMState
from latentdem.evaluate import SIDE, TEST_PHOTOGRAPHS, observe
from latentdem.evaluate_synthetic import FAILURE_RATIO, figures
from latentdem.figures_table import Column, figure, figures_table
from latentdem.html_report import Entry, write_page
from latentdem.io import comparison_picture
from latentdem.metrics import NO_BLUR, bootstrap_interval
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors.packaged import prior_digests
from latentdem.results import (
    machine,
    peak_memory,
    reset_peak_memory,
    store_results,
    stored_results,
)

OURS = "prox"
"""The row that the others' differences are taken to."""
REFERENCE = "prox, true kernel"
"""The known kernel's result in Levin's error ratio."""


class Pair:
    """One photograph under one kernel, and what the reference makes of it.

    Args:
        name: of the photograph.
        index: of the kernel.
        seed: of the methods; the observation does not depend on it.
        kernel_size: odd side.
        noise_std: sigma.
        reference: the row that is told the kernel.
    """

    def __init__(
        self,
        name: str,
        index: int,
        seed: int,
        *,
        kernel_size: int,
        noise_std: float,
        reference: Row,
    ) -> None:
        self.true = random_motion_kernel(kernel_size, seed=1000 * index + 7)
        self.observed, self.sharp = observe(name, self.true, noise_std, seed=index)
        self.seed, self.kernel_size, self.noise_std = seed, kernel_size, noise_std
        self._reference = reference
        self._known: tuple[EMState, dict[str, Any]] | None = None

    def known(self) -> tuple[EMState, dict[str, Any]]:
        """The reference's result and its cost, computed once."""
        if self._known is None:
            self._known = self._restore(self._reference)
        return self._known

    def _restore(self, row: Row) -> tuple[EMState, dict[str, Any]]:
        reset_peak_memory()
        started = time.perf_counter()
        (state,) = restore(
            row,
            self.observed,
            kernel_size=self.kernel_size,
            noise_std=self.noise_std,
            seed=self.seed,
            true_kernel=self.true,
        )
        return state, {
            "seconds": round(time.perf_counter() - started, 3),
            "peak_mb": peak_memory(),
            "network_evaluations": state.evaluations,
            "backward_passes": state.backward_passes,
        }

    def measure(self, row: Row, picture: Path) -> dict[str, Any]:
        """Figures and cost of one row; draws ``picture``."""
        known, cost = self.known()
        state = known
        if row != self._reference:
            state, cost = self._restore(row)
        picture.parent.mkdir(parents=True, exist_ok=True)
        comparison_picture(self.observed[0], state.image[0], state.kernel[0, 0]).save(picture)
        found = figures(
            self.observed, self.sharp, state.image, known.image, state.kernel, self.true
        )
        return found | cost | {"picture": str(picture)}


def summarize(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means of each row over its runs, and its difference to ``prox`` on the pairs of both.

    The 95 % bootstrap interval of the difference runs over pairs, each the mean of its seeds.
    """
    by_row = {name: [r for r in records if r["row"] == name] for name in ROWS}
    ours = _by_pair(by_row[OURS])
    return {name: _summary(rows, ours) for name, rows in by_row.items() if rows}


def _by_pair(records: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Mean PSNR over the seeds of each pair."""
    pairs: dict[tuple[str, int], list[float]] = {}
    for record in records:
        pairs.setdefault((record["image"], record["kernel"]), []).append(record["psnr_blind"])
    return {pair: statistics.fmean(values) for pair, values in pairs.items()}


def _summary(records: list[dict[str, Any]], ours: dict[tuple[str, int], float]) -> dict[str, Any]:
    def mean(key: str) -> float:
        return statistics.fmean(record[key] for record in records)

    own = _by_pair(records)
    differences = [own[pair] - ours[pair] for pair in own if pair in ours]
    low, high = bootstrap_interval(differences) if differences else (None, None)
    memory = [record["peak_mb"] for record in records if record["peak_mb"] is not None]
    return {
        "pairs": len(own),
        "runs": len(records),
        "psnr_input": mean("psnr_input"),
        "psnr": mean("psnr_blind"),
        "psnr_raw": mean("psnr_blind_raw"),
        "gain": mean("psnr_blind") - mean("psnr_input"),
        "ssim": mean("ssim_blind"),
        "vif": mean("vif_blind"),
        "mnc": mean("mnc"),
        "kernel_rmse": mean("kernel_rmse"),
        "share_no_blur": statistics.fmean(r["kernel_peak"] > NO_BLUR for r in records),
        "error_ratio_median": statistics.median(r["error_ratio"] for r in records),
        "share_failed": statistics.fmean(r["error_ratio"] > FAILURE_RATIO for r in records),
        "difference": statistics.fmean(differences) if differences else None,
        "difference_low": low,
        "difference_high": high,
        "network_evaluations": mean("network_evaluations"),
        "backward_passes": mean("backward_passes"),
        "seconds_median": statistics.median(record["seconds"] for record in records),
        "peak_mb": max(memory, default=None),
    }


def _plan(
    names: list[str], kernels: int, seeds: int, rows: dict[str, Row]
) -> Iterator[tuple[int, int, str, str]]:
    """Seeds, kernels, photographs, rows: whenever it stops, all rows saw the same pairs."""
    for seed in range(seeds):
        for index in range(kernels):
            for name in names:
                for row, method in rows.items():
                    # Another seed would change nothing.
                    if seed == 0 or method.random:
                        yield seed, index, name, row


def run_baselines(
    output: Path,
    *,
    images: int = len(TEST_PHOTOGRAPHS),
    kernels: int = 4,
    seeds: int = 1,
    kernel_size: int = 25,
    noise_std: float = 0.01,
    names: list[str] | None = None,
    pictures: Path | None = None,
    console: Console,
    rows: dict[str, Row] | None = None,
) -> dict[str, Any]:
    """Run all methods on all pairs; write ``output`` (JSON) and a page beside it after each run.

    Runs that are in ``output`` are kept.

    Args:
        output: JSON file; the page has its name, ending in ``.html``.
        images: how many of the eight test photographs.
        kernels: random motion kernels an image.
        seeds: runs of each pair, of the methods that draw random numbers.
        kernel_size: odd side of the kernels.
        noise_std: sigma of the noise; all methods are told it.
        names: of the methods, among :data:`~latentdem.baselines.rows.ROWS`; all by default.
        pictures: folder of comparison pictures; by default beside ``output``.
        console: for progress and the table.
        rows: instead of those called ``names``; the names must be in ``ROWS`` all the same.

    Raises:
        ValueError: an unknown method, ``output`` holds another setup, or a number makes no sense.
    """
    if not 1 <= images <= len(TEST_PHOTOGRAPHS) or kernels < 1 or seeds < 1:
        raise ValueError(
            f"images must lie between 1 and {len(TEST_PHOTOGRAPHS)}, kernels and seeds be "
            f"positive, found {images}, {kernels} and {seeds}"
        )
    if kernel_size < 3 or kernel_size % 2 == 0 or not 0 < noise_std < 1:
        raise ValueError(
            "kernel_size must be odd and at least 3, noise_std lie between 0 and 1, "
            f"found {kernel_size} and {noise_std}"
        )
    chosen = choose_rows(names) if rows is None else rows
    reference = (ROWS | chosen)[REFERENCE]
    photographs = list(TEST_PHOTOGRAPHS)[:images]
    setup = {
        "suite": "baselines",
        "kernel_size": kernel_size,
        "noise_std": noise_std,
        "side": SIDE,
        "rows": {name: asdict(row) for name, row in (ROWS | chosen).items()},
        "priors": prior_digests(),
        "versions": versions(),
    }
    stored = stored_results(output, setup)
    records: list[dict[str, Any]] = [] if stored is None else stored["rows"]
    place = output.parent / f"{output.stem}-pictures" if pictures is None else pictures
    done = {(r["seed"], r["kernel"], r["image"], r["row"]) for r in records}
    plan = list(_plan(photographs, kernels, seeds, chosen))
    document = _store(output, setup, records)
    pair: Pair | None = None
    at: tuple[int, int, str] | None = None
    for position, key in enumerate(plan, 1):
        if key in done:
            continue
        seed, index, name, row = key
        if pair is None or at != key[:3]:
            at = key[:3]
            pair = Pair(
                name,
                index,
                seed,
                kernel_size=kernel_size,
                noise_std=noise_std,
                reference=reference,
            )
        slug = row.replace(", ", "-").replace(" + ", "+").replace(" ", "_")
        found = pair.measure(chosen[row], place / f"{name}-{index}-{seed}-{slug}.png")
        records.append({"row": row, "image": name, "kernel": index, "seed": seed} | found)
        document = _store(output, setup, records)
        console.print(
            f"{position:4d}/{len(plan)} {name}, kernel {index}, seed {seed}, {row}: "
            f"{found['psnr_input']:.2f} -> {found['psnr_blind']:.2f} dB, MNC {found['mnc']:.3f}, "
            f"{found['seconds']:.1f} s",
            highlight=False,
            soft_wrap=True,
        )
    console.print(figures_table("baselines", COLUMNS, document["summary"], width=console.width))
    console.print(f"look at {output.with_suffix('.html')}", soft_wrap=True)
    return document


def _store(output: Path, setup: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    summary = summarize(records)
    document = {"setup": setup, "machine": machine(), "summary": summary, "rows": records}
    store_results(output, document)
    order = {name: place for place, name in enumerate(ROWS)}
    pairs = list(dict.fromkeys((r["image"], r["kernel"], r["seed"]) for r in records))
    entries = [
        Entry(
            f"{r['image']}, kernel {r['kernel']}, seed {r['seed']}: {r['row']}",
            {
                "PSNR": f"{r['psnr_input']:.2f} -> {r['psnr_blind']:.2f} dB",
                "SSIM": f"{r['ssim_blind']:.3f}",
                "MNC": f"{r['mnc']:.3f}",
                "error ratio": f"{r['error_ratio']:.1f}",
                "seconds": f"{r['seconds']:.1f}",
            },
            Path(r["picture"]),
        )
        for r in sorted(
            records,
            key=lambda r: (pairs.index((r["image"], r["kernel"], r["seed"])), order[r["row"]]),
        )
    ]
    write_page(
        output.with_suffix(".html"),
        title="Blind deblurring, methods compared",
        introduction="Aligned PSNR, its difference to prox with the 95 % interval over pairs, and "
        "the similarity of the kernel. Pictures: observation with the kernel, and restoration, "
        "pair by pair.",
        summary={
            name: f"{s['psnr']:.2f} dB, {difference(s)}, MNC {s['mnc']:.3f}, "
            f"{s['seconds_median']:.1f} s, {s['pairs']} pairs"
            for name, s in summary.items()
        },
        entries=entries,
    )
    return document


def difference(summary: dict[str, Any]) -> str:
    """The paired difference to ``prox`` of one row's summary, for tables.

    >>> difference({"difference": -1.0, "difference_low": -1.5, "difference_high": -0.5})
    '-1.00 (-1.50 to -0.50)'
    """
    if summary["difference"] is None:
        return ""
    return (
        f"{summary['difference']:+.2f} ({summary['difference_low']:+.2f} to "
        f"{summary['difference_high']:+.2f})"
    )


COLUMNS = (
    figure("pairs", "pairs", "d", main=False),
    figure("PSNR", "psnr", ".2f"),
    figure("gain", "gain", "+.2f"),
    Column("to prox", difference),
    figure("SSIM", "ssim", ".3f", main=False),
    figure("VIF", "vif", ".3f", main=False),
    figure("MNC", "mnc", ".3f"),
    figure("no blur", "share_no_blur", ".0%", main=False),
    figure("failed", "share_failed", ".0%", main=False),
    figure("s", "seconds_median", ".1f"),
)
