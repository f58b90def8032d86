"""gpu-check says what it needs before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "python" / "benchmarks" / "gpu_check.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_names_what_is_missing(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, "-o", tmp_path / "out"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert f"a GPU that torch {torch.__version__} can use" in run.stderr
    assert not (tmp_path / "out").exists()
