"""Everything that only a GPU can settle, in one run: ``make gpu-check``.

    python python/benchmarks/gpu_check.py -o out/gpu-check

1. build      the module with its CUDA kernels, in place, for the architecture that is there
2. tests      operators and registration with ``LATENTDEM_REQUIRE_CUDA=1``: parity with the CPU,
              CUDA graphs, no waiting for the host, reproducibility
3. sanitizer  compute-sanitizer's four tools on every operator
4. benchmarks against torch, cuFFT and nerfacc, with the achieved share of a copy and of a
              matrix product measured in the same run

Needs nothing from the network: torch with CUDA, an nvcc of the same major version, cmake, ninja,
and pytest, hypothesis and nerfacc must be there; what is missing is named at the start.  One log
for each step, the benchmarks' JSON, and ``summary.json`` lie in the output folder.  The exit code
is zero only if every step was run and passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("bench_blur", "bench_kernel_map", "bench_volume_render", "bench_roofline")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MODULES = ("torch", "pytest", "hypothesis", "nerfacc", "numpy")
PROGRAMS = ("cmake", "ninja", "nvcc")


@dataclass
class Step:
    """What one command came to."""

    name: str
    passed: bool
    seconds: float
    detail: str


def environment(folder: Path) -> dict[str, str]:
    """The variables of every step."""
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LATENTDEM_REQUIRE_CUDA": "1",
        "LATENTDEM_CUDA": "on",
        "LATENTDEM_BUILD_NAME": "cmake-gpu",
        "LATENTDEM_BENCH_DEVICE": "cuda",
        "LATENTDEM_BENCH_RESULTS": str(folder),
    }


def run(name: str, command: list[str], folder: Path, limit: float) -> Step:
    """Run one command, keep its output as ``<name>.log``, and its last line as the detail."""
    log = folder / f"{name}.log"
    started = time.perf_counter()
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(folder),
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = time.perf_counter() - started
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    detail = f"not done within {limit:.0f} s" if code == -1 else (lines or ["no output"])[-1]
    step = Step(name, code == 0, round(seconds, 1), detail[:200])
    print(
        f"{'ok    ' if step.passed else 'FAILED'} {name}  {seconds:.0f} s  {step.detail}",
        flush=True,
    )
    return step


def missing() -> list[str]:
    """What has to be installed first."""
    absent = [f"Python package {name}" for name in MODULES if not importlib.util.find_spec(name)]
    found = {name: shutil.which(name) for name in PROGRAMS}
    if found["nvcc"] is None and shutil.which("nvcc", path=f"{cuda_home()}/bin"):
        found["nvcc"] = cuda_home()
    absent += [f"program {name}" for name, path in found.items() if path is None]
    if importlib.util.find_spec("torch"):
        import torch

        if not torch.cuda.is_available():
            absent.append(f"a GPU that torch {torch.__version__} can use")
    return absent


def cuda_home() -> str:
    """Where the toolkit is."""
    return os.environ.get("CUDA_HOME") or "/usr/local/cuda"


def architecture() -> str:
    """Of the first GPU, for a build that is quicker than one for all."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def tests(folder: Path, limit: float) -> list[Step]:
    """The test files side by side, since most of them wait for one core."""
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    files += sorted((ROOT / "tests" / "registration").glob("test_*.py"))
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with ThreadPoolExecutor(workers) as pool:
        steps = pool.map(lambda f: run(f"tests-{f.stem}", [*command, str(f)], folder, limit), files)
        return list(steps)


def sanitizers(folder: Path, limit: float) -> list[Step]:
    """compute-sanitizer over one call of each operator on the device."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{cuda_home()}/bin"
    )
    if program is None:
        return [Step("sanitizer", False, 0.0, "compute-sanitizer is not installed")]
    test = ROOT / "tests" / "registration" / "test_device_parity.py"
    steps = []
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command += ["--kernel-regex", "kernel_substring=latentdem"]
        command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)]
        steps.append(run(f"sanitizer-{tool}", [*command, "-k", "as_on_the_cpu"], folder, limit))
    return steps


def main() -> None:
    """Run all steps and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out/gpu-check"))
    folder = parser.parse_args().output.resolve()
    absent = missing()
    if absent:
        raise SystemExit("gpu-check needs: " + "; ".join(absent))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LATENTDEM_CUDA_ARCHS", architecture())
    started = time.perf_counter()
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    steps = [run("build", build, folder, 300)]
    if steps[0].passed:
        steps += tests(folder, 180)
        for name in BENCHMARKS:
            script = str(ROOT / "python" / "benchmarks" / f"{name}.py")
            steps.append(run(name, [sys.executable, script], folder, 90))
        steps += sanitizers(folder, 60)
    summary = {
        "passed": all(step.passed for step in steps),
        "seconds": round(time.perf_counter() - started, 1),
        "steps": [asdict(step) for step in steps],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{'passed' if summary['passed'] else 'FAILED'} in {summary['seconds']:.0f} s: {folder}")
    raise SystemExit(0 if summary["passed"] else 1)


if __name__ == "__main__":
    main()
