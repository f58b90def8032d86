"""nvcc compiles every kernel, whatever torch is installed, where there is an nvcc."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(NVCC is None, reason="no nvcc: the CUDA kernels were not compiled")
def test_every_kernel_compiles_for_every_architecture():
    folder = ROOT / "build" / "check-cuda"
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DLATENTDEM_CUDA=off",
        "-DLATENTDEM_CHECK_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", str(folder), "--target", "check_cuda"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    sources = (ROOT / "csrc").rglob("*.cu")
    objects = {path.name for path in (folder / "cuda").glob("*.o")}
    assert objects == {path.with_suffix(".o").name for path in sources}
