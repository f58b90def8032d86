"""The evaluation suite: honest observations, resumable, refuses to mix setups."""

import json

import pytest
import torch
from rich.console import Console

import latentdem_ext as ext
from latentdem.evaluate import TEST_PHOTOGRAPHS, observe, photograph_crop, run_suite
from latentdem.metrics import psnr
from latentdem.operators.motion import random_motion_kernel

QUIET = Console(quiet=True)


@pytest.mark.parametrize("name", TEST_PHOTOGRAPHS)
def test_photographs_are_packaged_and_not_flat(name):
    crop = photograph_crop(name, 280)
    assert crop.shape == (1, 3, 280, 280)
    assert float(crop.std()) > 0.08


def test_observation_is_a_valid_convolution_of_the_scene():
    kernel = random_motion_kernel(25, seed=1)
    observed, truth = observe("coffee", kernel, 1e-9, seed=0)
    assert observed.shape == truth.shape == (1, 3, 256, 256)
    inner = ext.blur_conv2d(truth, kernel, boundary="valid")
    assert (observed[..., 12:-12, 12:-12] - inner).abs().max() < 0.003
    noisy, _ = observe("coffee", kernel, 0.01, seed=0)
    assert float((noisy - observed).std()) == pytest.approx(0.01, rel=0.02)


def test_suite_runs_resumes_and_refuses_another_setup(tmp_path):
    output = tmp_path / "quality.json"
    options = {
        "images": 1,
        "kernel_size": 9,
        "noise_std": 0.01,
        "method": "prox",
        "steps": 1,
        "pictures": tmp_path / "pictures",
        "console": QUIET,
    }
    first = run_suite(output, kernels=1, **options)
    assert first["summary"]["pairs"] == 1
    assert first["summary"]["psnr_round_trip"] > 25
    assert (tmp_path / "pictures" / "astronaut-0.png").exists()
    marked = json.loads(output.read_text())
    marked["rows"][0]["seconds"] = 123.0
    output.write_text(json.dumps(marked))
    second = run_suite(output, kernels=2, **options)
    assert [row["kernel"] for row in second["rows"]] == [0, 1]
    assert second["rows"][0]["seconds"] == 123.0
    with pytest.raises(ValueError, match="holds another setup"):
        run_suite(output, kernels=1, **(options | {"steps": 2}))


def test_aligned_floor_is_the_degraded_image():
    observed, truth = observe("china", random_motion_kernel(25, seed=2), 0.01, seed=0)
    assert 10 < float(psnr(observed, truth)) < 30
    assert torch.isfinite(observed).all()
