"""The suite that measures the priors by themselves."""

import json
import math
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from latentdem import evaluate_prior
from latentdem.cli import app
from latentdem.evaluate_prior import (
    measure_autoencoder,
    measure_denoising,
    measure_initialization,
    measure_m_step,
    measure_ranking,
    run_prior_suite,
    sample,
)
from latentdem.priors import load_prior
from latentdem.priors.kernel import load_kernel_prior

NAMES = ["astronaut"]


@pytest.fixture(scope="module")
def prior():
    return load_prior()


@pytest.fixture(scope="module")
def kernel_prior():
    return load_kernel_prior()


def test_round_trip(prior):
    found = measure_autoencoder(prior, NAMES, repeats=1)
    assert 28 < found["psnr_noisy_latents"] < found["psnr"] < 40
    assert found["milliseconds"] > 0


def test_denoising_beside_bm3d(prior, monkeypatch):
    pytest.importorskip("bm3d")
    monkeypatch.setattr(evaluate_prior, "NOISE_STDS", (0.1, 0.2))
    # A smaller picture: BM3D takes seconds.
    monkeypatch.setattr(evaluate_prior, "SIDE", 128)
    rows = measure_denoising(prior, NAMES)
    assert [row["noise_std"] for row in rows] == [0.1, 0.2]
    assert rows[0]["timestep"] < rows[1]["timestep"]
    for row in rows:
        # A little above: values beyond black and white are clipped before they are compared.
        expected = -20 * math.log10(row["noise_std"])
        assert expected - 0.1 < row["identity"] < expected + 2
        assert row["prior"] > row["identity"] + 3
        assert row["bm3d"] > row["identity"] + 6


def test_without_bm3d_its_row_is_empty(prior, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_prior, "NOISE_STDS", (0.1,))
    monkeypatch.setitem(sys.modules, "bm3d", None)
    assert measure_denoising(prior, NAMES)[0]["bm3d"] is None


def test_the_label_tells_sharp_from_blurred(prior, monkeypatch):
    monkeypatch.setattr(evaluate_prior, "RANKING_TIMESTEPS", (200, 400))
    found = measure_ranking(prior, NAMES, kernels=2)
    assert found["pairs"] == 2
    assert found["label"] == 1
    assert 0 <= found["plain"] <= 1


def test_a_prior_without_labels_ranks_by_its_loss_alone(prior, monkeypatch):
    monkeypatch.setattr(evaluate_prior, "RANKING_TIMESTEPS", (300,))
    stripped = type(prior)(**{**vars(prior), "classes": ()})
    stripped.conditioning = {"class_labels": torch.zeros(1, dtype=torch.long)}
    found = measure_ranking(stripped, NAMES, kernels=1)
    assert found["label"] is None and found["pairs"] == 1


def test_m_step_with_and_without_priors(prior, kernel_prior, monkeypatch):
    monkeypatch.setattr(evaluate_prior, "M_STEP_LEVELS", (50,))
    (row,) = measure_m_step(prior, kernel_prior, NAMES, kernels=1)
    assert row["timestep"] == 50
    mixed = {"l1, then kernel prior", "l2, then kernel prior"}
    assert set(row) == {"timestep", "kernel prior", "none", "l1", "l2"} | mixed
    assert all(0.4 < row[key] <= 1 for key in row if key != "timestep")
    assert row["kernel prior"] > 0.8


def test_first_kernels(kernel_prior):
    found = measure_initialization(kernel_prior, NAMES, kernels=1)
    assert found["edges and kernel prior"] > found["box of 5 pixels"]
    assert all(0 < value <= 1 for value in found.values())


def test_samples_are_pictures_and_depend_on_the_seed_alone(prior):
    one, again, other = (sample(prior, 2, side=64, steps=3, seed=s) for s in (0, 0, 1))
    assert one.shape == (2, 3, 64, 64)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert 0 <= float(one.min()) < float(one.max()) <= 1
    assert float(one.std()) > 0.05


def test_a_killed_run_goes_on(prior, tmp_path, monkeypatch):
    calls = []

    def part(name):
        def measure(*_, **__):
            calls.append(name)
            if name == "ranking" and calls.count(name) == 1:
                raise KeyboardInterrupt
            return stand_in[name]

        return measure

    row = {"identity": 20.0, "prior": 25.0, "bm3d": None}
    stand_in = {
        "autoencoder": {"psnr": 31.0, "psnr_noisy_latents": 30.0, "milliseconds": 100.0},
        "denoising": [{"noise_std": 0.1, "timestep": 3} | row],
        "ranking": {"pairs": 2, "plain": 0.5, "label": None},
        "m_step": [{"timestep": 50, "none": 0.8}],
        "initialization": {"edges": 0.8},
    }
    for name in stand_in:
        monkeypatch.setattr(evaluate_prior, f"measure_{name}", part(name))
    output = tmp_path / "prior.json"
    console = Console(record=True, width=120)
    with pytest.raises(KeyboardInterrupt):
        run_prior_suite(output, images=1, console=console)
    document = run_prior_suite(output, images=1, console=console)
    assert calls == ["autoencoder", "denoising", "ranking", "ranking", "m_step", "initialization"]
    assert json.loads(output.read_text()) == document
    assert document["ranking"] == stand_in["ranking"]
    text = console.export_text()
    assert "pip install bm3d" in text and "31.00 dB" in text
    with pytest.raises(ValueError, match="another setup"):
        run_prior_suite(output, images=2, console=console)


def test_command_says_what_is_wrong(tmp_path):
    arguments = ["evaluate", "--suite", "prior", "-o", str(tmp_path / "x.json")]
    result = CliRunner().invoke(app, [*arguments, "--images", "0"])
    assert result.exit_code != 0
    assert "images must lie between 1 and 8, found 0" in result.output
    missing = CliRunner().invoke(app, [*arguments, "--prior", str(tmp_path / "no.safetensors")])
    assert missing.exit_code != 0 and "no prior at" in missing.output
    assert not (tmp_path / "x.json").exists()
