"""Throughput of ``latentdem batch`` by engine and workers, beside ``deblur`` called in a loop.

Every run has the same cores: two workers have half the threads each.  Stores
``results/batch.json``; the plan for a million images in ``python/latentdem/batch/README.md`` takes
its parts from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import store

import latentdem
import latentdem_ext as ext
from latentdem.batch import Item, Manifest, Options, run_batch
from latentdem.evaluate import photograph_crop
from latentdem.io import to_pil
from latentdem.operators.motion import random_motion_kernel

CORES = len(os.sched_getaffinity(0))


def make_photos(folder: Path, count: int, side: int, kernel_size: int) -> list[Path]:
    """Blurred crops of one photograph, each with a blur and noise of its own."""
    folder.mkdir()
    paths = []
    for seed in range(count):
        kernel = random_motion_kernel(kernel_size, seed=seed)
        sharp = photograph_crop("coffee", side + kernel_size - 1)
        noise = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
        blurred = ext.blur_conv2d(sharp, kernel, boundary="valid") + 0.01 * noise
        paths.append(folder / f"{seed:04d}.png")
        to_pil(blurred[0].clamp(0, 1)).save(paths[-1])
    return paths


def loop_seconds(paths: list[Path], output: Path, options: dict[str, Any]) -> float:
    """Seconds of one thread of Python that deblurs and saves one image after the other."""
    torch.set_num_threads(CORES)
    latentdem.deblur(paths[0], **options)
    started = time.perf_counter()
    for path in paths:
        latentdem.deblur(path, **options).save(output / path.stem)
    return time.perf_counter() - started


def manifest_milliseconds(folder: Path, rows: int) -> dict[str, float]:
    """Milliseconds of one image's visits to the manifest, commits included."""

    def items() -> Iterator[Item]:
        for number in range(rows):
            name = f"folder/{number:08d}"
            yield Item(name, f"{name}.png", f"/photos/{name}.png", stamp="1000000:1700000000000000")

    def timed(function: Any) -> float:
        started = time.perf_counter()
        function()
        return (time.perf_counter() - started) * 1e3 / rows

    def enter() -> None:
        manifest = Manifest(folder / "manifest.sqlite")
        manifest.register(items(), lambda _: "a" * 64, lambda _: True)
        manifest.close()

    def work() -> None:
        manifest = Manifest(folder / "manifest.sqlite")
        for item in items():
            manifest.mark_running(item.id, "c" * 64)
            manifest.commit()
            manifest.mark_done(item.id, "c" * 64, 1.0)
            manifest.commit()
        manifest.close()

    first = timed(enter)
    return {"enter": first, "run and done": timed(work), "enter again": timed(enter)}


def main() -> None:
    """Time the loop, and each engine with each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--kernel-size", type=int, default=15)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--rows", type=int, default=20000, help="of the manifest alone")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", default=["local", "processes", "ray"])
    arguments = parser.parse_args()
    absent = [] if importlib.util.find_spec("ray") else ["ray"]
    options = {"kernel_size": arguments.kernel_size, "steps": arguments.steps}
    what = f"{arguments.images} images {arguments.side} x {arguments.side}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_photos(
            folder / "photos", arguments.images, arguments.side, arguments.kernel_size
        )
        alone = loop_seconds(paths, folder / "loop", options)
        for engine in arguments.engines:
            for workers in arguments.workers:
                if engine in absent or (engine == "local" and workers > 1):
                    continue
                started = time.perf_counter()
                summary = run_batch(
                    [folder / "photos"],
                    folder / f"{engine}-{workers}",
                    Options(**options),
                    engine=engine,
                    workers=workers,
                    threads=max(1, CORES // workers),
                )
                whole = time.perf_counter() - started
                if summary.done != arguments.images:
                    raise RuntimeError(f"{engine}: {summary.failed} images failed")
                figures = asdict(summary.figures)
                per_image = {
                    "loop": alone * 1e3 / arguments.images,
                    "batch": summary.seconds * 1e3 / arguments.images,
                }
                rows.append(
                    {
                        "case": f"{engine}, workers {workers}, {what}",
                        "engine": engine,
                        "workers": workers,
                        "threads_each": max(1, CORES // workers),
                        "images_per_second": arguments.images / summary.seconds,
                        "start_seconds": whole - summary.seconds,
                        "milliseconds": per_image
                        | {k: v * 1e3 / arguments.images for k, v in figures.items()},
                        "overhead_milliseconds": per_image["batch"] - per_image["loop"],
                        "ratios": {"loop / batch": per_image["loop"] / per_image["batch"]},
                    }
                )
        parts = manifest_milliseconds(folder, arguments.rows)
        rows.append(
            {"case": f"manifest, {arguments.rows} images", "milliseconds": parts, "ratios": {}}
        )
    store("batch", rows, absent)


if __name__ == "__main__":
    main()
