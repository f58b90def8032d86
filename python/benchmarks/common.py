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
GPU_ROUND = 5.0  # milliseconds
LOAD_BEFORE = os.getloadavg()[0]  # other work, which makes the figures worse


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that is measured."""
    return torch.Generator(DEVICE).manual_seed(seed)


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], calls: int) -> float:
    """Milliseconds of one of ``calls`` calls in a row; a GPU's own clock, if that is measured."""
    synchronize()
    if DEVICE.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        synchronize()
        return begin.elapsed_time(end) / calls
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) * 1e3 / calls


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int = 11) -> dict[str, float]:
    """Median milliseconds of each candidate; one warm-up round is not counted.

    On a GPU a round is as many calls in a row as take some milliseconds, so that what a launch
    costs the host does not show where the device is the slower of the two.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    calls = dict.fromkeys(candidates, 1)
    for name, function in candidates.items():
        timed(function, 1)
        if DEVICE.type == "cuda":
            calls[name] = max(1, min(200, int(GPU_ROUND / max(timed(function, 1), 1e-3))))
    for _ in range(rounds):
        for name, function in candidates.items():
            times[name].append(timed(function, calls[name]))
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


def separate_peak(function: Callable[[], Any], script: str, *arguments: str) -> float:
    """:func:`peak_mebibytes` of ``function``, as ``script arguments`` prints it.

    A GPU's allocator counts for itself: there this process will do.
    """
    if DEVICE.type == "cuda":
        return peak_mebibytes(function)
    command = [sys.executable, script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    if run.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{run.stderr[-4000:]}")
    return float(run.stdout)


def machine_limits() -> dict[str, float]:
    """Measured copy bandwidth (read and write, GB/s) and matrix product rate (GFLOP/s).

    Both in float32, without TF32, and so large that a GPU has no idle parts.
    """
    side, count = (8192, 1 << 28) if DEVICE.type == "cuda" else (1536, 1 << 26)
    source, product = torch.rand(count), torch.rand(side, side)
    target = torch.empty_like(source)
    times = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: product @ product}, rounds=7
    )
    return {
        "copy_gb_per_s": 2 * source.nbytes / times["copy"] / 1e6,
        "matmul_gflop_per_s": 2 * side**3 / times["matmul"] / 1e6,
    }


def machine() -> str:
    """The device that is measured."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def store(name: str, rows: list[dict[str, Any]], absent: list[str] | None = None) -> None:
    """Write ``results/<name>.json`` and print a table; ``absent``: packages that were not there."""
    document = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "load_before": LOAD_BEFORE,
        "torch": torch.__version__,
        "build": ext.build_info(),
        "limits": machine_limits(),
        "rows": rows,
    }
    if absent:
        document["absent"] = absent
        print("not measured, for want of:", ", ".join(absent))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        figures = "  ".join(f"{k} {v:.2f} ms" for k, v in row["milliseconds"].items())
        figures += "".join(f"  {k} {v:.1f} MiB" for k, v in row.get("peak_mebibytes", {}).items())
        ratios = "  ".join(f"{k} {v:.2f}x" for k, v in row["ratios"].items())
        print(f"{row['case']}: {figures}  |  {ratios}")
