"""A compiler that links its own libstdc++ is refused before anything is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cmake"), reason="needs cmake on Linux"
)
def test_a_static_runtime_is_refused(tmp_path):
    python = f"-DPython_EXECUTABLE={sys.executable}"
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), python, "-DLATENTDEM_CUDA=off"]
    environment = os.environ | {"CXX": "g++", "CXXFLAGS": "-static-libstdc++"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "links libstdc++ statically" in message and "CXX=/usr/bin/g++" in message
