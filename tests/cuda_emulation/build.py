"""Builds the emulator and the emulated CUDA path, once, under build/emulation."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

import latentdem_ext  # noqa: F401  the emulated operators take their schemas from it

ROOT = Path(__file__).resolve().parents[2]


@cache
def build(target: str) -> Path:
    """Return the path of the library ``planted``, ``fft`` or ``latentdem_emulated``."""
    folder = ROOT / "build" / "emulation"
    if not (folder / "build.ninja").exists():
        run(
            "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DLATENTDEM_CUDA=off",
            "-DLATENTDEM_EMULATE_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}",
        )  # fmt: skip
    run("cmake", "--build", folder, "--target", target)
    return folder / "tests" / "cuda_emulation" / f"{target}.so"


def run(*command: str | Path) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}")


class Emulated:
    """``torch.ops.latentdem_emulated``, with the seed of the order of threads and blocks."""

    def __init__(self) -> None:
        library = build("latentdem_emulated")
        torch.ops.load_library(library)
        self._seed = ctypes.CDLL(str(library)).latentdem_emulation_seed
        self._seed.argtypes = [ctypes.c_uint64]
        self.operators = torch.ops.latentdem_emulated

    def seed(self, value: int) -> None:
        self._seed(value)
