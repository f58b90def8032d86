"""``quality``: less of the same method, by one word."""

import pytest
import torch
from em.test_deblur import invoke
from rich.console import Console

import latentdem
from latentdem.batch import Options
from latentdem.em.options import solver_settings
from latentdem.em.settings import QUALITIES, PaperSettings, ProxSettings
from latentdem.evaluate import run_suite
from latentdem.io import to_pil


def work(quality):
    settings = solver_settings("prox", None, quality=quality)
    return settings.steps * settings.chains


def test_fast_is_less_work():
    assert list(QUALITIES) == ["fast", "standard"]
    assert work("fast") <= work("standard") / 3
    assert solver_settings("prox", None) == ProxSettings()
    assert solver_settings("prox", 3, quality="fast") == ProxSettings(steps=3, chains=1)


def test_what_goes_with_no_quality_is_said():
    with pytest.raises(ValueError, match="quality must be one of fast, standard, found 'x'"):
        solver_settings("prox", None, quality="x")
    with pytest.raises(ValueError, match="give no settings with it"):
        solver_settings("prox", None, ProxSettings(), "fast")
    with pytest.raises(ValueError, match="give no other method with it"):
        solver_settings("paper", None, quality="fast")
    # The default goes with everything.
    assert solver_settings("paper", None, quality="standard") == PaperSettings()
    assert solver_settings("prox", None, ProxSettings(chains=5)).chains == 5


def test_deblur_takes_it():
    image = torch.rand(1, 3, 40, 36)
    result = latentdem.deblur(
        image, quality="fast", steps=1, kernel_size=5, noise_std=0.01, assume_blurred=True
    )
    assert result.report["quality"] == "fast" and result.report["settings"]["chains"] == 1
    with pytest.raises(ValueError, match="quality must be one of"):
        Options(quality="good")


def test_an_unknown_one_is_a_line(tmp_path):
    to_pil(torch.rand(3, 40, 36)).save(tmp_path / "photo.png")
    result = invoke("deblur", tmp_path / "photo.png", "-o", tmp_path / "out", "--quality", "finest")
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "quality must be one of fast, standard, found 'finest'" in result.output


def test_an_evaluation_of_a_quality_is_another_setup(tmp_path):
    output = tmp_path / "quality.json"
    options = {"images": 1, "kernels": 1, "kernel_size": 9, "noise_std": 0.01, "method": "prox",
               "steps": 1, "pictures": None, "console": Console(quiet=True)}  # fmt: skip
    assert run_suite(output, quality="fast", **options)["setup"]["quality"] == "fast"
    with pytest.raises(ValueError, match="holds another setup"):
        run_suite(output, **options)
