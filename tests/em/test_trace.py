"""Pictures of the course of a run."""

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import latentdem
from latentdem.cli import app
from latentdem.em.settings import ProxSettings
from latentdem.em.steps import StepReport
from latentdem.io import to_pil
from latentdem.trace import Trace


def report(step, image, kernel):
    return StepReport(step, 2, 400 - 100 * step, 0.02, float(kernel.max()), image, kernel)


def test_frames_show_image_and_kernel(tmp_path):
    kernel = torch.zeros(1, 1, 9, 9)
    kernel[..., 4, 4] = 1
    image = torch.full((1, 3, 200, 100), 0.5)
    preview = tmp_path / "preview.png"
    trace = Trace(preview, side=100)
    trace.add(report(0, image, kernel))
    with Image.open(preview) as first:
        assert first.size == (50, 116)  # shrunk, a line of text below
        assert first.getpixel((45, 95)) == (128, 128, 128)
        assert first.getpixel((2, 2)) == (0, 0, 0)  # the kernel's corner
    trace.add(report(1, 1 - 0 * image, kernel))
    with Image.open(trace.save(tmp_path / "trace.webp")) as animation:
        assert animation.n_frames == 2
    assert {path.name for path in tmp_path.iterdir()} == {"preview.png", "trace.webp"}


def test_long_runs_are_thinned():
    trace = Trace()
    image, kernel = torch.zeros(1, 3, 8, 8), torch.ones(1, 1, 3, 3)
    for step in range(250):
        trace.add(StepReport(step, 250, 0, 0.0, 0.1, image, kernel))
    assert len(trace.frames) == 126  # every second one, and the last


def test_nothing_drawn():
    with pytest.raises(ValueError, match="no step has been drawn"):
        Trace().save("unused.webp")


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (1, 1, 48, 64)])
def test_reports_hold_the_image_under_the_observation(shape):
    seen = []
    result = latentdem.deblur(
        torch.rand(shape),
        kernel_size=9,
        settings=ProxSettings(steps=2, chains=1),
        progress=lambda index, count, step: seen.append(step),
    )
    assert [step.image.shape for step in seen] == [(1, 3, *shape[2:])] * 2
    assert seen[-1].kernel.shape == (1, 1, 9, 9)
    torch.testing.assert_close(seen[-1].kernel, result.kernel)
    assert "tensor" not in repr(seen[-1])


def test_command(tmp_path):
    torch.manual_seed(0)
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    to_pil(torch.rand(3, 64, 64)).save(photo)
    command = ["deblur", str(photo), "-o", str(out), "--kernel-size", "9", "--steps", "2"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert not (out / "trace.webp").exists()
    # What is there has no trace: it is computed again, once.
    found = [CliRunner().invoke(app, [*command, "--trace"]) for _ in range(2)]
    assert "trace.webp" in found[0].output and "already done" in found[1].output
    with Image.open(out / "trace.webp") as animation:
        assert animation.n_frames == 2
    assert not (out / "preview.png").exists()
