"""Seconds and quality of ``deblur`` by method, quality and number format, pair by pair in turn.

Each row restores the same pairs of ``latentdem evaluate``, one row after the other on each pair, so
that what else the machine does falls on all; the first row changes from pair to pair.  Stores
``results/deblur.json`` after each pair, and goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import latentdem
from latentdem.devices import fastest_dtype
from latentdem.em.driver import versions
from latentdem.em.settings import PaperSettings
from latentdem.evaluate import SEARCH, TEST_PHOTOGRAPHS, observe
from latentdem.metrics import aligned_psnr
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors.packaged import prior_digests
from latentdem.results import machine, store_results, stored_results

RESULTS = Path(__file__).resolve().parent / "results"
KERNEL_SIZE, NOISE_STD = 25, 0.01
EVERY_STEP: dict[str, Any] = {"method": "paper", "settings": PaperSettings(every=1)}
ROWS: dict[str, dict[str, Any]] = {
    "prox, float32": {"dtype": "fp32"},
    "prox, bfloat16": {"dtype": "bf16"},
    "prox --quality fast, float32": {"quality": "fast", "dtype": "fp32"},
    "prox --quality fast, bfloat16": {"quality": "fast", "dtype": "bf16"},
    "paper, every step, float32": {**EVERY_STEP, "dtype": "fp32"},
    "paper, every step, bfloat16": {**EVERY_STEP, "dtype": "bf16"},
}


def measure(name: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of one blind deblurring, and its aligned PSNR."""
    kernel = random_motion_kernel(KERNEL_SIZE, seed=7)
    observed, truth = observe(name, kernel, NOISE_STD, seed=0)
    started = time.perf_counter()
    found = latentdem.deblur(
        observed, kernel_size=KERNEL_SIZE, noise_std=NOISE_STD, assume_blurred=True, **options
    )
    seconds = time.perf_counter() - started
    value, _ = aligned_psnr(found.image, truth, margin=KERNEL_SIZE // 2, search=SEARCH)
    return {"seconds": seconds, "psnr": value}


def summarize(pairs: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of the seconds, means of the PSNR, and medians of each pair's ratio to ``prox``."""
    first = next(iter(ROWS))

    def ratio(row: str) -> float:
        return statistics.median(
            pair[row]["seconds"] / pair[first]["seconds"] for pair in pairs.values()
        )

    return {
        row: {
            "seconds": statistics.median(pair[row]["seconds"] for pair in pairs.values()),
            "psnr": statistics.fmean(pair[row]["psnr"] for pair in pairs.values()),
            "ratio": ratio(row),
        }
        for row in ROWS
    }


def main() -> None:
    """Measure all rows on ``--pairs`` photographs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="photographs, at most 8")
    parser.add_argument("--output", type=Path, default=RESULTS / "deblur.json")
    arguments = parser.parse_args()
    setup = {"priors": prior_digests(), "versions": versions(), "rows": list(ROWS)}
    stored = stored_results(arguments.output, setup)
    pairs: dict[str, Any] = {} if stored is None else stored["pairs"]
    console = Console()
    # Its caches, and what is set up once.
    latentdem.deblur(observe("camera", random_motion_kernel(9, seed=0), 0.01, seed=1)[0],
                     kernel_size=9, noise_std=0.01, steps=1)  # fmt: skip
    with Progress(console=console) as progress:
        names = list(TEST_PHOTOGRAPHS)[: arguments.pairs]
        task = progress.add_task("deblurring", total=len(names) * len(ROWS))
        for turn, name in enumerate(names):
            if name in pairs:
                progress.advance(task, len(ROWS))
                continue
            order = list(ROWS)[turn % len(ROWS) :] + list(ROWS)[: turn % len(ROWS)]
            found = {}
            for row in order:
                found[row] = measure(name, ROWS[row])
                progress.advance(task)
            pairs[name] = found
            document = {
                "setup": setup,
                "machine": machine(),
                "bfloat16_instructions": fastest_dtype(latentdem.load_prior().device) is not None,
                "summary": summarize(pairs),
                "pairs": pairs,
            }
            store_results(arguments.output, document)
            console.print(json.dumps(document["summary"], indent=1), highlight=False)


if __name__ == "__main__":
    main()
