"""Builds the emulator and the emulated CUDA path, once, under build/emulation."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Launch:
    kernel: str  # with template arguments and parameters
    blocks: int
    threads: int
    shared_bytes: int  # dynamic


class Emulated:
    """``torch.ops.latentdem_emulated``, with the seed of the order of threads and blocks."""

    ordered = True

    def __init__(self) -> None:
        library = build("latentdem_emulated")
        torch.ops.load_library(library)
        loaded = ctypes.CDLL(str(library))
        self._seed, self._plan = loaded.latentdem_emulation_seed, loaded.latentdem_emulation_plan
        self._planned = loaded.latentdem_emulation_planned
        self._seed.argtypes, self._plan.argtypes = [ctypes.c_uint64], [ctypes.c_bool]
        self._planned.restype = ctypes.c_char_p
        self._library = library
        self.operators = torch.ops.latentdem_emulated

    def seed(self, value: int) -> None:
        self._seed(value)

    def plan(self, call: Callable[[], object]) -> list[Launch]:
        """Return what ``call`` would launch; nothing runs, and results are not filled."""
        symbols = subprocess.run(
            ["nm", "-C", self._library], capture_output=True, text=True, check=True
        ).stdout
        names = {
            int(line.split()[0], 16): line.split(maxsplit=2)[2]
            for line in symbols.splitlines()
            if line[0] != " "
        }
        self._plan(True)
        try:
            call()
        finally:
            self._plan(False)
        lines = self._planned().decode().splitlines()
        numbers = [[int(word) for word in line.split()] for line in lines]
        return [Launch(names[address], *rest) for address, *rest in numbers]
