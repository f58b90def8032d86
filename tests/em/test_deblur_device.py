"""Where and in what precision EM computes."""

import pytest
import torch
from typer.testing import CliRunner

import latentdem
import latentdem_ext as ext
from latentdem.cli import app
from latentdem.em import driver
from latentdem.em.options import check_device
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.evaluate import photograph_crop
from latentdem.io import to_pil
from latentdem.metrics import psnr
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors import load_prior
from latentdem.priors.latent import weights_digest

QUICK = ProxSettings(steps=3, chains=2)


@pytest.fixture(scope="module")
def blurred():
    kernel = random_motion_kernel(9, seed=3)
    return ext.blur_conv2d(photograph_crop("coffee", 104), kernel, boundary="valid")


@pytest.fixture(scope="module")
def in_float32(blurred):
    return latentdem.deblur(blurred, kernel_size=9, noise_std=0.01, settings=QUICK)


def test_a_moved_prior_is_a_copy():
    prior = load_prior()
    assert prior.to() is prior.to("cpu", torch.float32) is prior
    moved = prior.to(dtype=torch.bfloat16)
    assert moved.dtype == torch.bfloat16 and prior.dtype == torch.float32
    assert moved.device == prior.device == torch.device("cpu")
    image = torch.rand(1, 3, 64, 64)
    latents = moved.encode(image)
    z0, epsilon = moved.predict(latents, 200)
    assert {t.dtype for t in (latents, z0, epsilon, moved.decode(z0, (64, 64)))} == {torch.float32}
    assert moved.calibration_rmse is prior.calibration_rmse
    digests = {weights_digest(p.denoiser) for p in (prior, moved, load_prior())}
    assert len(digests) == 2
    conditioned = type(prior)(**{**vars(prior), "conditioning": {"a": torch.ones(2), "b": 3}})
    found = conditioned.to(dtype=torch.bfloat16).conditioning
    assert found["a"].dtype == torch.bfloat16 and found["b"] == 3


def test_networks_in_half_precision_give_nearly_the_same(blurred, in_float32):
    found = latentdem.deblur(
        blurred, kernel_size=9, noise_std=0.01, settings=QUICK, dtype=torch.bfloat16
    )
    assert found.report["dtype"] == "bfloat16" and found.report["device"] == "cpu"
    assert in_float32.report["dtype"] == "float32"
    assert found.image.dtype == found.kernel.dtype == torch.float32
    assert float(psnr(found.image, in_float32.image)) > 30
    assert not torch.equal(found.image, in_float32.image)
    # The packaged prior is as it was.
    again = latentdem.deblur(blurred, kernel_size=9, noise_std=0.01, settings=QUICK)
    assert torch.equal(again.image, in_float32.image)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(blurred, tmp_path):
    with pytest.raises(ValueError, match="device 'cuda' cannot be used: "):
        latentdem.deblur(blurred, kernel_size=9, device="cuda")
    with pytest.raises(ValueError, match="operators run on cpu and cuda"):
        check_device("meta")
    to_pil(blurred[0]).save(tmp_path / "x.png")
    command = ["deblur", str(tmp_path / "x.png"), "-o", str(tmp_path / "out"), "--device", "cuda"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "device 'cuda' cannot be used" in result.output


def test_a_build_without_cuda_is_said(monkeypatch):
    class Away:
        type = "cuda"

    class Empty:
        device = Away()

    monkeypatch.setattr(driver.torch, "empty", lambda *_, **__: Empty())
    monkeypatch.setattr(driver.ext, "build_info", lambda: {"cuda": None})
    with pytest.raises(ValueError, match="built without CUDA"):
        check_device("cuda")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_cuda_gives_nearly_the_same(blurred, in_float32, dtype):
    found = latentdem.deblur(
        blurred, kernel_size=9, noise_std=0.01, settings=QUICK, device="cuda", dtype=dtype
    )
    assert found.report["device"].startswith("cuda")
    assert found.report["dtype"] == ("float16" if dtype is None else "float32")
    assert found.image.device.type == found.kernel.device.type == "cpu"
    assert float(psnr(found.image, in_float32.image)) > (30 if dtype is None else 40)


@pytest.mark.needs_cuda
def test_all_of_it_runs_on_cuda(blurred):
    options = {"kernel_size": 9, "device": "cuda"}
    tiled = latentdem.deblur(blurred.repeat(1, 1, 2, 2), tile=120, settings=QUICK, **options)
    assert tiled.image.shape[-1] == 192
    paper = latentdem.deblur(
        blurred, method="paper", settings=PaperSettings(steps=3, every=1, last=1), **options
    )
    assert bool(paper.image.isfinite().all())
    circular = latentdem.deblur(blurred, boundary="circular", settings=QUICK, **options)
    assert bool(circular.image.isfinite().all())
