"""Everything runs on a second device as it does on the CPU, shown without a GPU."""

import dataclasses

import pytest
import torch
from em.diffusers_stand_in import save_stable_diffusion, save_xl, tiny_autoencoder
from em.test_zero123 import Parts
from typer.testing import CliRunner

import latentdem
import latentdem_ext as ext
from latentdem.cli import app
from latentdem.em.reconstruct_settings import PoseSettings, ReconstructSettings, SamplerSettings
from latentdem.em.settings import PaperSettings, ProxSettings
from latentdem.evaluate import photograph_crop
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors import load_prior
from latentdem.priors.objects import load_objects_prior
from latentdem.priors.weights import weights_digest
from latentdem.priors.zero123 import load_zero123_prior
from latentdem.serve.page import EXAMPLES

QUICK = ProxSettings(steps=2, chains=2)
COARSE = ReconstructSettings(
    rounds=1,
    iterations=6,
    resolution=12,
    samples_per_ray=12,
    poses=PoseSettings(azimuth_step=90.0, levels=(0.5, 0.8), modes=2, iterations=1),
    sampler=SamplerSettings(targets=2),
)
VIEWS = [EXAMPLES / "object_front.png", EXAMPLES / "object_side.png"]
KERNEL = random_motion_kernel(7, seed=3)


@pytest.fixture(scope="module")
def blurred():
    return ext.blur_conv2d(photograph_crop("coffee", 70), KERNEL, boundary="valid")


def tensors(value):
    """The tensors of a result, in dataclasses within it, too."""
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            yield part
        elif dataclasses.is_dataclass(part):
            yield from tensors(part)


def test_the_stand_in_refuses_what_a_gpu_would(device):
    here, there = torch.ones(3), torch.arange(3.0).to(device)
    assert there.device.type == device.type and (2 * there).cpu().tolist() == [0, 2, 4]
    assert torch.full((2,), 3.0, device=device).sum().item() == 6
    assert there[torch.tensor([1])].tolist() == [1] == there[[1]].tolist()
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    variable = there.clone().requires_grad_()
    (variable**2).sum().backward()
    assert variable.grad.device.type == device.type and variable.grad.tolist() == [0, 2, 4]
    for misplaced in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: torch.where(there > 0, here, there),
        lambda: there[:2].add_(here[:2]),
        lambda: ext.recenter_kernel(there[None, None, None]) * here,
    ):
        with pytest.raises(RuntimeError, match="tensors of the CPU beside those of the device"):
            misplaced()


CASES = {
    "motion": {},
    "known": {"kernel": KERNEL},
    "circular": {"kernel": KERNEL, "boundary": "circular"},
    "defocus": {"blur": "defocus", "kernel_size": 7},
    "perhaps sharp": {"blur": "gaussian", "kernel_size": 7, "assume_blurred": False},
    "super-resolution": {"scale": 2, "kernel": KERNEL},
    "varying": {"grid": (1, 2), "kernel": KERNEL.expand(-1, 2, -1, -1)},
    "linear light": {"kernel": KERNEL, "linear_light": True},
    "tiles": {"kernel": KERNEL, "tile": 64},
    "economical": {"kernel": KERNEL, "slicing": True, "tiling": True},
    "paper": {"kernel_size": 7, "method": "paper", "settings": PaperSettings(steps=2)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_deblurring_keeps_to_its_device(blurred, device, case):
    picture = blurred.repeat(1, 1, 2, 2) if "tile" in case else blurred.repeat(2, 1, 1, 1)
    picture = picture[: 1 if case == {} else 2]  # the search takes its time
    asked = {"noise_std": 0.01, "settings": QUICK, "assume_blurred": True} | case
    found = latentdem.deblur(picture, device=device, **asked)
    assert found.report["device"] == device.type and found.report["dtype"] == "float32"
    assert {type(t) for t in tensors(found)} == {torch.Tensor}
    here = latentdem.deblur(picture, **asked)
    # Sums in another order are others by a rounding, which an M-step's thresholds enlarge.
    assert float((found.image - here.image).abs().max()) < (1e-4 if "kernel" in case else 0.1)


def test_reconstruction_keeps_to_its_device(device):
    found = latentdem.reconstruct(VIEWS, settings=COARSE, device=device)
    assert found.report["device"] == device.type and found.report["dtype"] == "float32"
    assert {type(t) for t in tensors(found)} == {torch.Tensor}
    here = latentdem.reconstruct(VIEWS, settings=COARSE)
    assert here.report["device"] == "cpu"
    assert torch.allclose(found.poses, here.poses, atol=0.1)
    assert torch.allclose(found.novel_views, here.novel_views, atol=0.02)
    assert torch.allclose(found.field.density, here.field.density, atol=0.1)
    # What an earlier run found, on the CPU, goes on there.
    again = latentdem.reconstruct(VIEWS, settings=COARSE, device=device, estimate=here.estimate)
    assert torch.allclose(again.poses, here.poses, atol=0.1)
    one = latentdem.reconstruct(VIEWS[:1], settings=COARSE, device=device, poses=here.poses[:1])
    assert {type(t) for t in tensors(one)} == {torch.Tensor}


@pytest.mark.parametrize("save", [save_stable_diffusion, save_xl])
def test_a_prior_that_takes_text_keeps_to_its_device(tmp_path, device, save):
    folder, _ = save(tmp_path)
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    prior = load_prior(folder, prompt="a cat", guidance=3.0, fast_decoder=tmp_path / "tiny")
    asked = {"kernel": KERNEL, "noise_std": 0.01, "settings": QUICK}
    picture = photograph_crop("coffee", 64)
    found = latentdem.deblur(picture, prior=prior, device=device, **asked)
    here = latentdem.deblur(picture, prior=prior, **asked)
    assert {type(t) for t in tensors(found)} == {torch.Tensor}
    assert float((found.image - here.image).abs().max()) < 1e-3


def test_zero123_keeps_to_its_device(tmp_path, device):
    prior = load_zero123_prior(Parts(tmp_path).folder)
    assert prior.to(dtype="bf16").stable is prior.stable is False
    found = latentdem.reconstruct(VIEWS, prior=prior, settings=COARSE, device=device)
    assert {type(t) for t in tensors(found)} == {torch.Tensor}
    here = latentdem.reconstruct(VIEWS, prior=prior, settings=COARSE)
    assert torch.allclose(found.novel_views, here.novel_views, atol=0.02)


def test_an_objects_prior_in_half_precision():
    prior = load_objects_prior()
    assert prior.to() is prior.to("cpu", "fp32") is prior
    moved = prior.to(dtype="bf16")
    assert moved.dtype == torch.bfloat16 and prior.dtype == torch.float32
    assert weights_digest(moved.denoiser) != weights_digest(prior.denoiser)
    views = photograph_crop("coffee", 64)
    given = moved.embed(views)
    pose = torch.tensor([[10.0, 40.0, 0.1]])
    z0, epsilon = moved.predict(given.latents, 300, given, pose)
    found = (given.latents, given.tokens, given.elevation, z0, epsilon, moved.decode(z0))
    assert {t.dtype for t in found} == {torch.float32}
    exact = prior.predict(given.latents, 300, prior.embed(views), pose)[1]
    assert 0 < float((epsilon - exact).abs().mean()) < 0.05 * float(exact.abs().mean())


def test_a_reconstruction_in_half_precision_gives_nearly_the_same():
    found = latentdem.reconstruct(VIEWS, settings=COARSE, dtype="bf16")
    assert found.report["dtype"] == "bfloat16" and found.poses.dtype == torch.float32
    here = latentdem.reconstruct(VIEWS, settings=COARSE)
    assert torch.allclose(found.poses[:, :2], here.poses[:, :2], atol=6.0)


def test_options_of_reconstruct(tmp_path):
    command = ["reconstruct", *map(str, VIEWS), "-o", str(tmp_path / "out")]
    for extra, reason in (
        (["--dtype", "fp8"], "dtype must be fp32, fp16 or bf16, found 'fp8'"),
        (["--device", "meta"], "device 'meta' cannot be used: the operators run on cpu and cuda"),
    ):
        result = CliRunner().invoke(app, command + extra)
        assert result.exit_code == 1 and reason in result.output
        assert not (tmp_path / "out").exists()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", ["fp32", None])
def test_reconstruction_on_cuda(dtype):
    found = latentdem.reconstruct(VIEWS, settings=COARSE, device="cuda", dtype=dtype)
    assert found.report["dtype"] == ("float16" if dtype is None else "float32")
    here = latentdem.reconstruct(VIEWS, settings=COARSE)
    assert {t.device.type for t in tensors(found)} == {"cpu"}
    assert torch.allclose(found.poses[:, :2], here.poses[:, :2], atol=3.0)
