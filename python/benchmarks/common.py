"""Interleaved timing: every round runs each candidate once, and medians are compared.

``LATENTDEM_BENCH_DEVICE=cuda`` makes every script measure a GPU, and
``LATENTDEM_BENCH_RESULTS=FOLDER`` stores the figures elsewhere.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import latentdem_ext as ext

DEVICE = torch.device(os.environ.get("LATENTDEM_BENCH_DEVICE", "cpu"))
torch.set_default_device(DEVICE)
RESULTS = Path(
    os.environ.get("LATENTDEM_BENCH_RESULTS", Path(__file__).resolve().parent / "results")
)
LOAD_BEFORE = os.getloadavg()[0]  # other work, which makes the figures worse


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that is measured."""
    return torch.Generator(DEVICE).manual_seed(seed)


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 11) -> dict[str, float]:
    """Median milliseconds of each candidate; one warm-up round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(rounds + 1):
        for name, function in candidates.items():
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            elapsed = (time.perf_counter() - started) * 1e3
            if round_index > 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def high_water_mark() -> float:
    """MiB of resident memory at its highest (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def peak_mebibytes(function: Callable[[], Any]) -> float:
    """MiB that a second call adds at its peak; meant for a process of its own.

    What the first call left in the allocator goes back first, or the second would reuse it unseen.
    """
    function()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mark()
    function()
    return high_water_mark() - before


def in_own_process(script: str, *arguments: str) -> float:
    """The number that ``script`` prints."""
    command = [sys.executable, script, *arguments]
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return float(run.stdout)


def machine_limits() -> dict[str, float]:
    """Measured copy bandwidth (read and write, GB/s) and matrix product rate (GFLOP/s)."""
    source, product = torch.rand(1 << 26), torch.rand(1536, 1536)
    target = torch.empty_like(source)
    times = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: product @ product}, rounds=7
    )
    return {
        "copy_gb_per_s": 2 * source.nbytes / times["copy"] / 1e6,
        "matmul_gflop_per_s": 2 * 1536**3 / times["matmul"] / 1e6,
    }


def machine() -> str:
    """The device that is measured."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def store(name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``results/<name>.json`` and print a table."""
    document = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "load_before": LOAD_BEFORE,
        "torch": torch.__version__,
        "build": ext.build_info(),
        "limits": machine_limits(),
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        figures = "  ".join(f"{k} {v:.2f} ms" for k, v in row["milliseconds"].items())
        figures += "".join(f"  {k} {v:.1f} MiB" for k, v in row.get("peak_mebibytes", {}).items())
        ratios = "  ".join(f"{k} {v:.2f}x" for k, v in row["ratios"].items())
        print(f"{row['case']}: {figures}  |  {ratios}")
