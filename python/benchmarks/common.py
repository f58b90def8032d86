"""Interleaved timing: every round runs each candidate once, and medians are compared."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import latentdem_ext as ext

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 11) -> dict[str, float]:
    """Median milliseconds of each candidate; one warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(rounds + 1):
        for name, function in candidates.items():
            started = time.perf_counter()
            function()
            elapsed = (time.perf_counter() - started) * 1e3
            if round_index > 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def store(name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``results/<name>.json`` and print a table."""
    document = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": ext.build_info(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        figures = "  ".join(f"{k} {v:.2f} ms" for k, v in row["milliseconds"].items())
        ratios = "  ".join(f"{k} {v:.2f}x" for k, v in row["ratios"].items())
        print(f"{row['case']}: {figures}  |  {ratios}")
