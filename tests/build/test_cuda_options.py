"""The build says why it gives no CUDA kernels when they were asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def configure(folder, *options):
    return subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options],
        capture_output=True,
        text=True,
    )


def flat(text):
    return re.sub(r"\s+", " ", text)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA")
def test_on_fails_beside_a_cpu_torch(tmp_path):
    done = configure(tmp_path, "-DLATENTDEM_CUDA=on")
    assert done.returncode != 0
    assert f"LATENTDEM_CUDA=on: torch {torch.__version__} was built without CUDA" in flat(
        done.stderr
    )


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("-DLATENTDEM_CUDA=maybe", "LATENTDEM_CUDA must be auto, on or off, found 'maybe'"),
        ("-DLATENTDEM_CUDA_ARCHS=80 ampere", "must look like 80, 9.0 or 90+PTX, found 'ampere'"),
    ],
)
def test_wrong_options_are_named(tmp_path, option, text):
    done = configure(tmp_path, option)
    assert done.returncode != 0
    assert text in flat(done.stderr)
