"""What is known of the CUDA kernels without a GPU: registers, occupancy, time by the roofline.

nvcc's assembler tells each kernel's registers, shared memory and spills; the emulator's plan of
a call (no kernel runs) tells which kernels it launches with how many blocks, threads and bytes of
dynamic shared memory; occupancy follows from both.  Bytes and operations are counted from shapes,
in ``cuda_cases.py``.  Stored in ``results/cuda.json``, unless a kernel spills.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cuda_cases import cases

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
RESULTS = Path(__file__).resolve().parent / "results"
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))

ASSUMPTIONS = (
    "Datasheets: A100 SXM 80 GB 2039 GB/s, 19.5 TFLOP/s fp32; H100 SXM 3350 GB/s, 67 TFLOP/s fp32.",
    "First-level cache: 128 bytes per clock and multiprocessor (108 at 1.41 GHz, 132 at 1.98 GHz).",
    "Each input is read and each output written once from memory; packed grids stay in the "
    "second-level cache (40 and 50 MB).",
    "All samples lie in the grid, none in empty space, and no ray ends early.",
    "Launches, address arithmetic, conversions and the throughput of atomics are not counted: a "
    "bound, not a forecast.",
)


@dataclass(frozen=True)
class Device:
    """Limits of one device, from its datasheet."""

    architecture: int
    bytes_per_second: float
    cached_bytes_per_second: float
    operations_per_second: float  # fp32
    shared_bytes: int  # per multiprocessor

    def seconds(self, memory: float, cached: float, operations: float) -> float:
        """Time that the scarcest of the three takes."""
        return max(
            memory / self.bytes_per_second,
            cached / self.cached_bytes_per_second,
            operations / self.operations_per_second,
        )

    def blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks that fit on a multiprocessor: 64 warps, 32 blocks, 65536 registers."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = 65536 // per_warp // 4 * 4 // warps if registers else 32
        by_shared = self.shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
        return min(64 // warps, 32, by_registers, by_shared)


DEVICES = {
    "A100": Device(80, 2039e9, 108 * 1.41e9 * 128, 19.5e12, 164 * 1024),
    "H100": Device(90, 3350e9, 132 * 1.98e9 * 128, 67e12, 228 * 1024),
}


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of one instantiation."""

    name: str
    architecture: int
    registers: int
    shared_bytes: int  # static
    spilled_bytes: int
    stack_bytes: int


def demangle(text: str) -> str:
    """Text with C++ names instead of symbols."""
    run = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return run.stdout


def short(name: str) -> str:
    """``kernel<template arguments>`` of a demangled name, alike from nvcc and g++."""
    name = name.replace("(anonymous namespace)::", "").replace("latentdem::", "")
    name = re.sub(r"^void ", "", re.sub(r"\((\w+)\)(\d+)", r"\1:\2", name))
    return name.split("(")[0].replace(", ", ",")


def assemble() -> list[Kernel]:
    """Every kernel of every file for every architecture, from ``ptxas -v``."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise SystemExit("cuda_report needs nvcc")
    kernels = []
    for source in SOURCES:
        codes = [f"-gencode=arch=compute_{d.architecture},code=sm_{d.architecture}"
                 for d in DEVICES.values()]  # fmt: skip
        run = subprocess.run(
            [nvcc, "-std=c++17", "-O3", *codes, "-Xptxas", "-v", "-I", str(ROOT / "csrc"), "-c",
             str(source), "-o", "/dev/null"],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode != 0:
            raise SystemExit(run.stderr[-4000:])
        pattern = (
            r"Compiling entry function '([^']+)' for 'sm_(\d+)'.*?"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers([^\n]*)"
        )
        for match in re.findall(pattern, demangle(run.stderr), flags=re.S):
            name, architecture, stack, stores, loads, registers, rest = match
            shared = re.search(r"(\d+) bytes smem", rest)
            kernels.append(
                Kernel(short(name), int(architecture), int(registers),
                       int(shared[1]) if shared else 0, int(stores) + int(loads), int(stack))
            )  # fmt: skip
    heads = r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)"
    expected = {name for source in SOURCES for name in re.findall(heads, source.read_text())}
    found = {kernel.name.split("<")[0] for kernel in kernels}
    if found != expected:
        raise SystemExit(f"the assembler names other kernels than csrc: {found ^ expected}")
    return kernels


def analyse(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """Launches with occupancy, and the bound on each device, of every case."""
    from cuda_emulation.build import Emulated

    emulated = Emulated()
    by_name = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    rows = []
    for case in cases():
        launches = emulated.plan(lambda case=case: case.call(emulated.operators))
        row: dict[str, Any] = {
            "case": case.name, "memory_bytes": case.memory, "cached_bytes": case.cached,
            "operations": case.operations, "launches": [], "milliseconds": {},
        }  # fmt: skip
        for launch in launches:
            entry = asdict(launch) | {"kernel": short(launch.kernel), "occupancy": {}}
            for name, device in DEVICES.items():
                kernel = by_name[entry["kernel"], device.architecture]
                blocks = device.blocks(
                    launch.threads, kernel.registers, kernel.shared_bytes + launch.shared_bytes
                )
                entry["occupancy"][name] = blocks * -(-launch.threads // 32) / 64
            row["launches"].append(entry)
        for name, device in DEVICES.items():
            bound = device.seconds(case.memory, case.cached, case.operations)
            row["milliseconds"][name] = 1e3 * bound
        rows.append(row)
    return rows


def main() -> None:
    """Assemble, refuse spills, store."""
    kernels = assemble()
    spilled = [f"{k.name} (sm_{k.architecture})" for k in kernels if k.spilled_bytes]
    if spilled:
        raise SystemExit("registers are spilled by " + ", ".join(spilled))
    document = {
        "assumptions": ASSUMPTIONS,
        "devices": {name: asdict(device) for name, device in DEVICES.items()},
        "kernels": [asdict(kernel) for kernel in kernels],
        "rows": analyse(kernels),
    }
    (RESULTS / "cuda.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(kernels)} kernels, none spills; results/cuda.json written")


if __name__ == "__main__":
    main()
