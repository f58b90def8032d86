"""Everything that only a GPU can settle, in one run: ``make gpu-check``.

    python python/benchmarks/gpu_check.py -o out/gpu-check
    python python/benchmarks/gpu_check.py -o out/gpu-check --only build --only tests

1. build      the module with its CUDA kernels, in place, for the architecture that is there
2. tests      registration and the operators' device tests with ``LATENTDEM_REQUIRE_CUDA=1``:
              parity with the CPU, CUDA graphs, no waiting for the host, reproducibility; and the
              emulator's tests (tests/cuda_emulation) with the device in the emulator's place
3. benchmarks against torch, cuFFT and nerfacc, with the achieved share of a copy and of a
              matrix product measured in the same run
4. sanitizers compute-sanitizer's four tools on every operator

No step stops another.  ``--only`` takes a part of them; what an earlier run left in the output
folder's ``summary.json`` is kept, replaced by name.

Needs nothing from the network: torch with CUDA, an nvcc of the same major version, cmake, ninja,
pytest and hypothesis must be there; what is missing is named at the start.  Without nerfacc its
benchmark lacks one candidate, without diffusers and its like the EM driver's tests are left out;
it says so.  One log for each step, the benchmarks' JSON, and
``summary.json`` lie in the output folder.  The exit code is zero only if every step of this run
passed; ``complete`` in the summary says whether all have run.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ("bench_blur", "bench_kernel_map", "bench_volume_render", "bench_roofline")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
MODULES = ("torch", "pytest", "hypothesis", "numpy")
DRIVER_MODULES = ("diffusers", "jinja2", "rich", "safetensors", "skimage", "trimesh", "typer")
PROGRAMS = ("cmake", "ninja", "nvcc")
PARTS = ("build", "tests", "benchmarks", "sanitizers")
# Plugins of other packages may warn, and warnings are errors here; hypothesis' own may stay.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
PYTEST += ["-p", "_hypothesis_pytestplugin"]


@dataclass(frozen=True)
class Step:
    """What one command came to."""

    name: str
    passed: bool
    seconds: float
    detail: str


def environment(folder: Path) -> dict[str, str]:
    """The variables of every step; steps run side by side, so that none should take all cores."""
    paths = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LATENTDEM_REQUIRE_CUDA": "1",
        "LATENTDEM_CUDA": "on",
        "LATENTDEM_BUILD_NAME": "cmake-gpu",
        "LATENTDEM_BENCH_DEVICE": "cuda",
        "LATENTDEM_BENCH_RESULTS": str(folder),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def run(
    name: str, command: list[str], folder: Path, limit: float, extra: dict[str, str] | None = None
) -> Step:
    """Run one command, keep its output as ``<name>.log``, and its last line as the detail.

    Args:
        name: of the step.
        command: with its arguments.
        folder: of the log.
        limit: seconds.
        extra: variables of this step alone.
    """
    log = folder / f"{name}.log"
    started = time.perf_counter()
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(folder) | (extra or {}),
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        except OSError as error:
            stream.write(f"{command[0]}: {error}\n")
            code = 127
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


def build(folder: Path) -> list[Step]:
    """The module in place, by as many jobs as ninja takes."""
    return [run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], folder, 300)]


def tests(folder: Path) -> list[Step]:
    """The test files side by side, since most of them wait for one core."""
    files = sorted((ROOT / "tests" / "cuda_emulation").glob("test_*_cuda.py"))
    files += [ROOT / "tests" / "cuda_emulation" / "test_every_operator.py"]
    files += [ROOT / "tests" / "ops" / "test_blur_device.py"]
    files += sorted((ROOT / "tests" / "registration").glob("test_*.py"))
    absent = [name for name in DRIVER_MODULES if not importlib.util.find_spec(name)]
    if absent:
        print(f"the EM driver is left out: it needs {', '.join(absent)}")
    else:
        files += [ROOT / "tests" / "em" / "test_deblur_device.py"]
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    extra = {"LATENTDEM_EMULATION_DEVICE": "cuda", "OMP_NUM_THREADS": "2"}
    with ThreadPoolExecutor(workers) as pool:
        steps = pool.map(
            lambda f: run(f"tests-{f.stem}", [*PYTEST, str(f)], folder, 180, extra), files
        )
        return list(steps)


def benchmarks(folder: Path) -> list[Step]:
    """One after the other: they share a device."""
    scripts = ROOT / "python" / "benchmarks"
    return [
        run(name, [sys.executable, str(scripts / f"{name}.py")], folder, 90) for name in BENCHMARKS
    ]


def sanitizers(folder: Path) -> list[Step]:
    """compute-sanitizer's tools, side by side, over one float32 call of each operator.

    Without torch's cache of memory every tensor is an allocation of its own, which a kernel cannot
    leave unseen.  What torch's kernels write must be known to initcheck, so that it watches all.
    API errors that torch handles are none of ours: every launch here is checked by the launcher.
    """
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{cuda_home()}/bin"
    )
    if program is None:
        return [Step("sanitizer", False, 0.0, "compute-sanitizer is not installed")]
    test = ROOT / "tests" / "registration" / "test_device_parity.py"
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}

    def check(number: int) -> Step:
        tool, port = SANITIZERS[number], str(49152 + 100 * number)
        command = [program, "--tool", tool, "--port", port, "--error-exitcode", "9"]
        command += ["--report-api-errors", "no"]
        if tool != "initcheck":
            command += ["--kernel-name", "kernel_substring=latentdem"]
        command += [*PYTEST, str(test), "-k", "as_on_the_cpu and float32"]
        return run(f"sanitizer-{tool}", command, folder, 120, extra)

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        return list(pool.map(check, range(len(SANITIZERS))))


def merged(earlier: dict[str, Any], parts: dict[str, list[Step]], seconds: float) -> dict[str, Any]:
    """The summary of an earlier run with the parts of this one.

    A part that was run again replaces what it left before, also steps that it has no longer.
    """
    before = earlier.get("parts", {})
    now = {name: [asdict(step) for step in steps] for name, steps in parts.items()}
    both = {name: now.get(name, before.get(name)) for name in PARTS if name in before | now}
    return {
        "passed": all(step["passed"] for steps in both.values() for step in steps),
        "complete": len(both) == len(PARTS),
        "seconds": round(seconds + earlier.get("seconds", 0.0), 1),
        "parts": both,
    }


def main() -> None:
    """Run all steps and write the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("out/gpu-check"))
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    absent = missing()
    if absent:
        raise SystemExit("gpu-check needs: " + "; ".join(absent))
    if not importlib.util.find_spec("nerfacc"):
        print("nerfacc is not there: volume rendering is compared with plain torch alone")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LATENTDEM_CUDA_ARCHS", architecture())
    stored = folder / "summary.json"
    earlier = json.loads(stored.read_text()) if stored.exists() else {}
    started = time.perf_counter()
    functions = {
        "build": build, "tests": tests, "benchmarks": benchmarks, "sanitizers": sanitizers,
    }  # fmt: skip
    parts: dict[str, list[Step]] = {}
    for name in PARTS:
        if arguments.only is None or name in arguments.only:
            began = time.perf_counter()
            parts[name] = functions[name](folder)
            seconds = time.perf_counter() - started
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            # After each part, for a run that is cut short.
            stored.write_text(json.dumps(merged(earlier, parts, seconds), indent=1) + "\n")
    passed = all(step.passed for steps in parts.values() for step in steps)
    seconds = time.perf_counter() - started
    print(f"{'passed' if passed else 'FAILED'} in {seconds:.0f} s: {folder}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
