"""Blind deblurring of a user's own folder, with figures where the truth is there.

A folder holds blurred pictures; ``truth/NAME.*`` beside them the sharp one of the same size,
``kernels/NAME.npy`` or ``.png`` the blur kernel, either or both for any of them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from latentdem.em.driver import deblur, versions
from latentdem.evaluate_model import ModelUnderTest
from latentdem.html_report import Entry, write_page
from latentdem.io import InputError, comparison_picture, file_digest, to_batch
from latentdem.metrics import NO_BLUR, aligned_psnr, maximum_normalized_correlation, psnr
from latentdem.noise import coding_noise_std
from latentdem.results import machine, store_results, stored_results

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SEARCH = 8
"""Largest shift in pixels that the aligned PSNR searches."""


@dataclass(frozen=True)
class FolderCase:
    """One blurred picture and what is known of it."""

    blurred: Path
    truth: Path | None
    kernel: Path | None


def find_cases(folder: Path) -> list[FolderCase]:
    """The pictures directly in ``folder``, in the order of their names.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
    if not pictures:
        raise FileNotFoundError(f"no picture ({', '.join(PICTURES)}) in {folder}")

    def beside(place: str, stem: str, suffixes: tuple[str, ...]) -> Path | None:
        found = [folder / place / f"{stem}{suffix}" for suffix in suffixes]
        return next((path for path in found if path.is_file()), None)

    return [
        FolderCase(
            path,
            beside("truth", path.stem, PICTURES),
            beside("kernels", path.stem, (".npy", ".png")),
        )
        for path in pictures
    ]


def read_kernel(path: Path) -> Tensor:
    """``[1,1,k,k]``, non-negative, summing to one, from an array or a grey picture.

    Raises:
        InputError: not square, or nothing positive in it.
    """
    if path.suffix == ".npy":
        array = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    else:
        array = to_batch(path)[0, :3].mean(0)
    if array.dim() != 2 or array.shape[0] != array.shape[1]:
        raise InputError(f"{path}: a kernel must be square, found {list(array.shape)}")
    if not bool(torch.isfinite(array).all()) or float(array.clamp_min(0).sum()) <= 0:
        raise InputError(f"{path}: a kernel must be finite and positive somewhere")
    array = array.clamp_min(0)
    return (array / array.sum())[None, None]


def _measure(
    case: FolderCase, pictures: Path, options: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    observed = to_batch(case.blurred)
    truth = None if case.truth is None else to_batch(case.truth)
    true_kernel = None if case.kernel is None else read_kernel(case.kernel)
    if truth is not None and truth.shape[-2:] != observed.shape[-2:]:
        raise InputError(
            f"{case.truth}: is {truth.shape[-2]} x {truth.shape[-1]}, the blurred picture "
            f"{observed.shape[-2]} x {observed.shape[-1]}"
        )
    started = time.perf_counter()
    options = {"coding_noise_std": coding_noise_std(case.blurred), **options}
    result = deblur(observed, **options)
    size = int(result.report["kernel_size"])
    row: dict[str, Any] = {
        "seconds": round(time.perf_counter() - started, 2),
        "kernel_size": size,
        "noise_std": result.report["noise_std"][0],
        "residual_std": result.report["residual_std"][0],
        "kernel_peak": float(result.kernel.max()),
    }
    if truth is not None:
        sharp = truth[:, :3].expand(-1, 3, -1, -1)

        def aligned(image: Tensor) -> float:
            colour = image[:, :3].expand(-1, 3, -1, -1)
            return aligned_psnr(colour, sharp, margin=size // 2, search=SEARCH)[0]

        row["psnr_input"] = aligned(observed)
        row["psnr_blind"] = aligned(result.image)
        row["psnr_blind_raw"] = float(psnr(result.image[:, :3].expand(-1, 3, -1, -1), sharp))
        if true_kernel is not None and true_kernel.shape[-1] % 2:
            known = {key: value for key, value in options.items() if key != "kernel_size"}
            given = deblur(observed, kernel=true_kernel, **known)
            row["psnr_true_kernel"] = aligned(given.image)
    if true_kernel is not None:
        row["mnc"] = float(maximum_normalized_correlation(result.kernel, true_kernel))
    pictures.mkdir(parents=True, exist_ok=True)
    picture = pictures / f"{case.blurred.name}.png"
    comparison_picture(observed[0], result.image[0], result.kernel[0, 0]).save(picture)
    return row, picture


def run_folder_suite(
    output: Path,
    *,
    data: Path,
    kernel_size: int | None = None,
    noise_std: float | None = None,
    method: str = "prox",
    steps: int | None = None,
    pictures: Path | None = None,
    console: Console,
    model: ModelUnderTest | None = None,
) -> dict[str, Any]:
    """Deblur every picture of ``data``; write ``output`` (JSON) and a page beside it (HTML).

    Both are written after each picture; pictures that are in it are kept, unless their files have
    changed.  One that cannot be read or restored is kept with its reason, and tried again by the
    next run.

    Args:
        output: JSON file; the page has its name, ending in ``.html``.
        data: see the module.
        kernel_size: see :func:`latentdem.deblur`, as are ``noise_std``, ``method`` and ``steps``.
        noise_std: by default estimated.
        method: ``prox`` or ``paper``.
        steps: by default the method's own.
        pictures: folder for comparison pictures; by default beside ``output``.
        console: for progress.
        model: what restores them; the packaged prior by default.

    Raises:
        FileNotFoundError: nothing to do.
        ValueError: ``output`` holds another setup.
    """
    model = model or ModelUnderTest()
    cases = find_cases(data)
    options: dict[str, Any] = {
        "kernel_size": kernel_size, "noise_std": noise_std, "method": method, "steps": steps,
    }  # fmt: skip
    setup = {
        "suite": "folder",
        **options,
        **model.setup(),
        "versions": versions(),
    }
    options |= model.options()
    rows: dict[str, dict[str, Any]] = {}
    stored = stored_results(output, setup)
    if stored is not None:
        rows = {row["image"]: row for row in stored["rows"] if "failed" not in row}
    place = output.parent / f"{output.stem}-pictures" if pictures is None else pictures
    document: dict[str, Any] = {}
    for position, case in enumerate(cases, 1):
        name = case.blurred.name
        files = [path for path in (case.blurred, case.truth, case.kernel) if path is not None]
        identity = {"image": name, "files": [file_digest(path) for path in files]}
        if rows.get(name, {}).get("files") != identity["files"]:
            try:
                row, picture = _measure(case, place, options)
                rows[name] = identity | row | {"picture": str(picture)}
            except ValueError as error:
                rows[name] = identity | {"failed": str(error)}
            console.print(
                f"{position:3d}/{len(cases)} {_line(rows[name])}", highlight=False, soft_wrap=True
            )
        found = [rows[c.blurred.name] for c in cases if c.blurred.name in rows]
        document = {
            "setup": setup,
            "machine": machine(),
            "summary": summarize(found),
            "rows": found,
        }
        store_results(output, document)
        _page(output.with_suffix(".html"), data, document)
    console.print(f"look at {output.with_suffix('.html')}", soft_wrap=True)
    return document


def summarize(rows: list[dict[str, Any]]) -> dict[str, float | int | None]:
    """Means over what could be measured, and how many that were."""
    good = [row for row in rows if "failed" not in row]

    def mean(key: str) -> float | None:
        values = [row[key] for row in good if key in row]
        return statistics.fmean(values) if values else None

    gains = [row["psnr_blind"] - row["psnr_input"] for row in good if "psnr_blind" in row]
    return {
        "pictures": len(rows),
        "failed": len(rows) - len(good),
        "with_truth": len(gains),
        "psnr_input": mean("psnr_input"),
        "psnr_blind": mean("psnr_blind"),
        "gain": statistics.fmean(gains) if gains else None,
        "share_worse_than_input": statistics.fmean(g < 0 for g in gains) if gains else None,
        "psnr_true_kernel": mean("psnr_true_kernel"),
        "mnc": mean("mnc"),
        "share_no_blur": (
            statistics.fmean(row["kernel_peak"] > NO_BLUR for row in good) if good else None
        ),
        "seconds_median": statistics.median(row["seconds"] for row in good) if good else None,
    }


def _figures(row: dict[str, Any]) -> dict[str, str]:
    """What a row says, as a reader would want it."""
    figures = {}
    if "psnr_blind" in row:
        gain = row["psnr_blind"] - row["psnr_input"]
        figures["PSNR"] = f"{row['psnr_input']:.2f} -> {row['psnr_blind']:.2f} dB ({gain:+.2f})"
    if "psnr_true_kernel" in row:
        figures["with the true kernel"] = f"{row['psnr_true_kernel']:.2f} dB"
    if "mnc" in row:
        figures["MNC"] = f"{row['mnc']:.3f}"
    figures["kernel"] = f"{row['kernel_size']} px, peak {row['kernel_peak']:.2f}"
    figures["noise"] = f"{row['noise_std']:.4f}"
    figures["residual"] = f"{row['residual_std']:.4f}"
    figures["seconds"] = f"{row['seconds']:.1f}"
    return figures


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['image']}: failed: {row['failed']}"
    return f"{row['image']}: " + ", ".join(f"{k} {v}" for k, v in _figures(row).items())


def _page(path: Path, data: Path, document: dict[str, Any]) -> None:
    def gain(row: dict[str, Any]) -> float:
        return row["psnr_blind"] - row["psnr_input"] if "psnr_blind" in row else float("inf")

    rows = sorted(document["rows"], key=lambda row: ("failed" not in row, gain(row)))
    entries = [
        Entry(row["image"], failure=f"failed: {row['failed']}")
        if "failed" in row
        else Entry(row["image"], _figures(row), Path(row["picture"]))
        for row in rows
    ]
    shown = {
        key.replace("_", " "): f"{value:.3f}".rstrip("0").rstrip(".")
        for key, value in document["summary"].items()
        if value is not None
    }
    write_page(
        path,
        title=f"Blind deblurring of {data.name}",
        introduction="Observation with the estimated kernel, and restoration; failures first, then "
        "by gain, the smallest first. PSNR after the best shift, on the same crop for both.",
        summary=shown,
        entries=entries,
    )
