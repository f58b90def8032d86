"""Files of results that a stopped run goes on from, shared by all suites."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def stored_results(output: Path, setup: dict[str, Any]) -> dict[str, Any] | None:
    """What is in ``output`` already, or nothing.

    Raises:
        ValueError: it was made with another setup.
    """
    if not output.exists():
        return None
    stored: dict[str, Any] = json.loads(output.read_text())
    if stored.get("setup") != setup:
        raise ValueError(f"{output} holds another setup; choose another file or delete it")
    return stored


def store_results(output: Path, document: dict[str, Any]) -> None:
    """Write ``document``; whole at every moment."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(output)


def machine() -> str:
    """What figures of time were measured on."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def reset_peak_memory() -> None:
    """Let the kernel count this process's peak anew (Linux; elsewhere the peak only grows)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory() -> float | None:
    """Largest resident size in MB since the reset."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("VmHWM")]
    return round(int(found[0].split()[1]) / 1024, 1) if found else None
