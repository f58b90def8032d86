"""``latentdem prior info``, and the device of ``latentdem train-prior``."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from latentdem.cli import app
from latentdem.priors.latent import ASSETS


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("name", ["natural", "kernel", "sharpness", "objects"])
def test_card_of_a_packaged_prior(name):
    result = run("prior", "info", name)
    assert result.exit_code == 0
    assert result.stdout.strip() == (ASSETS / f"{name}.md").read_text().strip()


def test_contents_of_a_file(tmp_path):
    path = tmp_path / "mine.safetensors"
    tensors = {
        "denoiser.weight": torch.zeros(3, 4, dtype=torch.half),
        "denoiser.bias": torch.zeros(3),
        "latent_mean": torch.zeros(2, 1, 1),
    }
    denoiser = {"sample_size": 8, "_class_name": "UNet2DModel", "dropout": None}
    metadata = {
        "name": "mine",
        "classes": json.dumps(["sharp", "blurred"]),
        "denoiser": json.dumps(denoiser),
    }
    save_file(tensors, path, metadata)
    result = run("prior", "info", path)
    assert result.exit_code == 0
    lines = {" ".join(line.split()) for line in result.stdout.splitlines()}
    assert {"denoiser 15 parameters, F16/F32", "name mine", "classes sharp, blurred"} <= lines
    assert "sample_size 8" in lines
    assert "_class_name" not in result.stdout
    assert "dropout" not in result.stdout
    assert "latent_mean" not in result.stdout


def test_packaged_file_can_be_looked_into():
    result = run("prior", "info", ASSETS / "natural.safetensors")
    assert result.exit_code == 0
    assert "AutoencoderKL" not in result.stdout
    assert "parameters, F16" in result.stdout


def test_errors_are_one_line(tmp_path):
    missing = run("prior", "info", "supernatural")
    assert missing.exit_code == 1
    assert (
        "supernatural is neither one of natural, kernel, sharpness, objects nor a file"
        in missing.output
    )
    text = tmp_path / "card.md"
    text.write_text("no prior")
    broken = run("prior", "info", text)
    assert broken.exit_code == 1
    assert "is not a safetensors file" in broken.output
    assert "Traceback" not in broken.output


def test_train_prior_refuses_an_unknown_device_before_it_fetches(tmp_path):
    result = run("train-prior", "--data", tmp_path / "data", "--device", "abacus")
    assert result.exit_code == 1
    assert "device 'abacus' cannot be used" in result.output
    assert not (tmp_path / "data").exists()
