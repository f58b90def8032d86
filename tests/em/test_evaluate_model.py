"""The suites with a prior of one's own, in another number format, on another device."""

import json

import pytest
import torch
from em.diffusers_stand_in import save_stable_diffusion
from em.test_evaluate_object_methods import QUICK
from rich.console import Console
from typer.testing import CliRunner

from latentdem import evaluate
from latentdem.cli import app
from latentdem.evaluate import run_suite
from latentdem.evaluate_model import ModelUnderTest
from latentdem.evaluate_object_methods import Case, build_methods
from latentdem.io import to_pil
from latentdem.priors.packaged import prior_digests

SUITE = {
    "images": 1, "kernels": 1, "kernel_size": 5, "noise_std": 0.01, "method": "prox", "steps": 1,
    "pictures": None, "console": Console(quiet=True),
}  # fmt: skip


def test_the_packaged_prior_needs_no_more_words():
    model = ModelUnderTest.load()
    assert model.prior is None and model.options() == {}
    assert model.setup() == {"priors": prior_digests()}
    half = ModelUnderTest.load(dtype="bf16")
    assert half.setup()["dtype"] == "bfloat16" and half.setup()["device"] == "cpu"
    assert half.loaded().dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError):
        ModelUnderTest.load("no/such/prior.safetensors")
    with pytest.raises(ValueError, match="dtype must be"):
        ModelUnderTest.load(dtype="fp8")


def test_the_command_measures_a_prior_of_ones_own(tmp_path):
    prior, _ = save_stable_diffusion(tmp_path)
    (tmp_path / "photos").mkdir()
    to_pil(torch.rand(3, 64, 64)).save(tmp_path / "photos" / "x.png")
    output = tmp_path / "x.json"
    command = ["evaluate", "--suite", "folder", "--data", str(tmp_path / "photos")]
    command += ["-o", str(output), "--kernel-size", "5", "--steps", "1", "--noise-std", "0.01"]
    result = CliRunner().invoke(app, [*command, "--prior", str(prior)])
    assert result.exit_code == 0, result.output
    assert "1/1" in result.output
    setup = json.loads(output.read_text())["setup"]
    assert setup["prior"]["name"] == "pipeline (StableDiffusionPipeline)"
    assert (setup["device"], setup["dtype"]) == ("cpu", "float32")
    other = CliRunner().invoke(app, command)
    assert other.exit_code == 1 and "holds another setup" in other.output
    same = CliRunner().invoke(app, [*command, "--prior", str(prior)])
    assert same.exit_code == 0 and "1/1" not in same.output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--suite", "baselines", "--dtype", "bf16"], "on the packaged prior, on the CPU"),
        (["--suite", "operators", "--device", "cuda"], "on the packaged prior, on the CPU"),
        (["--suite", "prior", "--device", "cuda"], "measures on the CPU"),
        (["--device", "meta"], "the operators run on cpu and cuda"),
        (["--suite", "objects", "--dtype", "fp8"], "dtype must be"),
    ],
)
def test_what_a_suite_does_not_take_is_said(tmp_path, words, reason):
    result = CliRunner().invoke(app, ["evaluate", "-o", str(tmp_path / "x.json"), *words])
    assert result.exit_code == 1 and reason in result.output.replace("\n", " ")
    assert not (tmp_path / "x.json").exists()


def test_photographs_on_another_device(tmp_path, device, monkeypatch):
    monkeypatch.setattr(evaluate, "SIDE", 48)
    prior, _ = save_stable_diffusion(tmp_path)
    model = ModelUnderTest.load(str(prior), device.type)
    found = run_suite(tmp_path / "there.json", model=model, **SUITE)
    here = run_suite(tmp_path / "here.json", model=ModelUnderTest.load(str(prior)), **SUITE)
    assert found["setup"]["device"] == device.type
    for key in ("psnr_input", "psnr_round_trip", "psnr_true_kernel"):
        assert found["summary"][key] == pytest.approx(here["summary"][key], abs=0.01)


def test_objects_on_another_device(device):
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(2, 4, 64, 64, dtype=torch.uint8)
    images[:, :, 16:48, 20:44] = torch.randint(256, (2, 4, 32, 24), generator=generator).byte()
    images[:, 3, 16:48, 20:44] = 255
    poses = torch.tensor([[20.0, 0.0, 2.5], [20.0, 60.0, 2.5]])
    case = Case("noise", 0, images, poses, images, poses, torch.zeros(0, 3))
    rows = ["one view", "true poses"]
    there = build_methods(rows, settings=QUICK, device=device.type)
    here = build_methods(rows, settings=QUICK)
    for row in rows:
        found, expected = there[row](case), here[row](case)
        assert torch.allclose(found.poses, expected.poses, atol=1e-3)
        assert type(found.field.density) is torch.Tensor
        assert torch.allclose(found.novel(poses), expected.novel(poses), atol=0.01)
