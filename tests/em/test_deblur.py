"""The whole EM loop on small images, through the API and the command line."""

import json

import numpy as np
import pytest
import torch
from em.test_blur_model import scene
from typer.testing import CliRunner

import latentdem
import latentdem_ext as ext
from latentdem.cli import app
from latentdem.em.driver import kernel_warnings
from latentdem.io import open_image, to_pil
from latentdem.operators.motion import random_motion_kernel

RUNNER = CliRunner()
FAST = {"kernel_size": 9, "noise_std": 0.01, "steps": 3}


@pytest.fixture(scope="module")
def blurred():
    kernel = random_motion_kernel(9, seed=2)
    observed = ext.blur_conv2d(scene(72), kernel, boundary="valid")
    return (observed + 0.01 * torch.randn(observed.shape)).clamp(0, 1)


@pytest.fixture(scope="module")
def photo(blurred, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    to_pil(blurred[0]).save(path)
    return path


def invoke(*arguments):
    return RUNNER.invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("method", ["prox", "paper"])
@pytest.mark.parametrize("boundary", ["auto", "circular"])
def test_result(blurred, method, boundary):
    result = latentdem.deblur(blurred, method=method, boundary=boundary, **FAST)
    assert result.image.shape == blurred.shape
    assert result.kernel.shape == (1, 1, 9, 9)
    assert 0 <= float(result.image.min()) <= float(result.image.max()) <= 1
    assert float(result.kernel.sum()) == pytest.approx(1, abs=1e-5)
    assert result.kernel.min() >= 0
    assert len(result.history[0]) == 3
    chains = latentdem.em.settings.ProxSettings().chains if method == "prox" else 1
    assert result.report["network_evaluations"] == 3 * chains
    assert result.report["backward_passes"] == (3 if method == "paper" else 0)
    phases = result.report["seconds_by_phase"]
    expected = {"prior", "e_step", "m_step"}
    expected |= {"first_kernel", "encoder", "finish"} if method == "prox" else set()
    assert set(phases) == expected
    assert 0 < sum(phases.values()) <= result.report["seconds"] + 0.01
    json.dumps(result.report)


def test_same_seed_same_result_and_batch_mates_do_not_matter(blurred):
    other = blurred.flip(-1)
    alone = latentdem.deblur(blurred, **FAST)
    again = latentdem.deblur(blurred, **FAST)
    together = latentdem.deblur(torch.cat([other, blurred]), **FAST)
    assert torch.equal(alone.image, again.image)
    assert torch.equal(alone.kernel, again.kernel)
    assert torch.equal(alone.image, together.image[1:])
    assert torch.equal(alone.kernel, together.kernel[1:])
    different = latentdem.deblur(blurred, seed=1, **FAST)
    assert not torch.equal(alone.image, different.image)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(33, 50), (9, 9), (64, 15)])
def test_any_size_and_channels(channels, size):
    image = torch.rand(1, channels, *size)
    result = latentdem.deblur(image, **FAST)
    assert result.image.shape == image.shape
    assert torch.isfinite(result.image).all()
    if channels == 4:
        assert torch.equal(result.image[:, 3], image[:, 3])


def test_known_kernel_is_kept(blurred):
    kernel = random_motion_kernel(9, seed=2)
    result = latentdem.deblur(blurred, kernel=kernel, noise_std=0.01, steps=3)
    assert torch.equal(result.kernel, kernel / kernel.sum())
    assert result.report["kernel_given"]


def test_flat_image_does_not_break():
    result = latentdem.deblur(torch.full((1, 3, 32, 32), 0.5), **FAST)
    assert torch.isfinite(result.image).all()
    assert torch.isfinite(result.kernel).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of prox, paper, found 'magic'"),
        ({"boundary": "zero"}, "boundary must be one of"),
        ({"kernel_size": 8}, "kernel_size must be odd"),
        ({"kernel_size": 99}, "kernel_size 99 is larger than the image"),
        ({"noise_std": 0.0}, "noise_std must lie between"),
        ({"steps": 0}, "steps must be positive"),
        ({"settings": latentdem.PaperSettings()}, "takes ProxSettings, found PaperSettings"),
        ({"kernel": torch.zeros(3, 3)}, "kernel must be finite"),
    ],
)
def test_bad_options(blurred, options, message):
    with pytest.raises(ValueError, match=message):
        latentdem.deblur(blurred, **options)


def test_command_line(photo, tmp_path):
    out = tmp_path / "out"
    arguments = ("deblur", photo, "-o", out, "--kernel-size", 9, "--steps", 2)
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    names = {path.name for path in out.iterdir()}
    assert names == {
        "restored.png", "kernel.png", "kernel.npy", "comparison.png", "report.json",
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["seed"] == 0
    assert report["input"] == "photo.png"
    assert len(report["history"]) == 2
    assert np.load(out / "kernel.npy").shape == (9, 9)
    assert open_image(out / "restored.png").size == open_image(photo).size
    pixels = (out / "restored.png").read_bytes()
    second = invoke(*arguments)
    assert "already done" in second.output
    forced = invoke(*arguments, "--force")
    assert "already done" not in forced.output
    assert (out / "restored.png").read_bytes() == pixels
    changed = invoke(*arguments, "--seed", 3)
    assert "already done" not in changed.output


def test_command_line_takes_several(photo, tmp_path):
    other = tmp_path / "other.png"
    open_image(photo).convert("L").save(other)
    result = invoke("deblur", photo, other, "-o", tmp_path / "o", "--kernel-size", 9, "--steps", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "o" / "photo" / "report.json").exists()
    assert (tmp_path / "o" / "other" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "no such file"),
        (["{text}"], "not an image"),
        (["{photo}", "--method", "magic"], "method must be one of"),
        (["{photo}", "--kernel-size", "999"], "larger than the image"),
        (["{photo}", "--prior", "{text}"], "not a safetensors file"),
        (["{photo}", "{photo}"], "two inputs are called"),
    ],
)
def test_command_line_errors_leave_nothing(photo, tmp_path, arguments, message):
    text = tmp_path / "text.txt"
    text.write_text("no image")
    out = tmp_path / "out"
    filled = [a.format(photo=photo, text=text) for a in arguments]
    result = invoke("deblur", *filled, "-o", out)
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")
    assert not out.exists() or list(out.iterdir()) == []


def test_unwritable_output(photo, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("deblur", photo, "-o", tmp_path / "file")
    assert result.exit_code == 1
    assert "cannot write to" in result.output


def test_help_teaches():
    text = invoke("deblur", "--help").output
    assert "Examples" in text
    assert "--kernel-size" in text
    assert invoke("info").exit_code == 0


def test_result_is_the_mean_of_two_priors(blurred):
    def restore(share, weight=5e-4):
        settings = latentdem.ProxSettings(steps=2, sparse_share=share, sparse_weight=weight)
        options = {"kernel": random_motion_kernel(9, seed=2), "noise_std": 0.01}
        return latentdem.deblur(blurred, settings=settings, **options).image

    diffusion, mean, sparse = (restore(share) for share in (0.0, 0.5, 1.0))
    inside = torch.ones_like(mean, dtype=torch.bool)
    for image in (diffusion, sparse):  # where neither was clipped
        inside &= (image > 0) & (image < 1)
    assert torch.allclose(mean[inside], ((diffusion + sparse) / 2)[inside], atol=1e-5)
    # More weight, fewer edges.
    edges = [float(image.diff(dim=-1).abs().sum()) for image in (sparse, restore(1.0, 5e-2))]
    assert edges[1] < 0.8 * edges[0]
    truth = scene(72)[..., 4:-4, 4:-4]
    errors = [float((image - truth).square().mean()) for image in (diffusion, mean)]
    assert errors[1] < errors[0]


def test_a_dot_and_a_kernel_at_its_frame_are_said(photo, tmp_path):
    dot = torch.zeros(1, 1, 9, 9)
    dot[..., 4, 4] = 1
    stroke = torch.full((1, 1, 9, 9), 1 / 81)
    assert ["dot" in line for line in kernel_warnings(dot)] == [True]
    assert ["frame" in line for line in kernel_warnings(stroke)] == [True]
    assert kernel_warnings(random_motion_kernel(15, seed=4)) == []
    sharp = tmp_path / "sharp.png"
    to_pil(scene(72)[0]).save(sharp)
    done = invoke("deblur", sharp, "-o", tmp_path / "o", "--kernel-size", 9, "--steps", 1,
                  "--assume-blurred")  # fmt: skip
    assert "may be sharp already" in done.output.replace("\n", " ")
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert any("sharp" in line for line in report["warnings"][0])
