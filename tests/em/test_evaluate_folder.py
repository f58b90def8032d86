"""A user's own folder: what is measured, kept, failed and shown."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import latentdem_ext as ext
from latentdem import evaluate_folder
from latentdem.cli import app
from latentdem.evaluate import photograph_crop
from latentdem.evaluate_folder import find_cases, read_kernel, run_folder_suite
from latentdem.html_report import Entry, write_page
from latentdem.io import to_pil
from latentdem.operators.motion import random_motion_kernel

QUIET = Console(quiet=True)
OPTIONS = {"kernel_size": 9, "steps": 1, "console": QUIET}


@pytest.fixture
def folder(tmp_path):
    """One picture with truth and kernel, a grey one without, and one that is none."""
    data = tmp_path / "mine & yours"
    for place in ("truth", "kernels"):
        (data / place).mkdir(parents=True)
    kernel = random_motion_kernel(9, seed=3)
    scene = photograph_crop("coffee", 104)
    blurred = ext.blur_conv2d(scene, kernel, boundary="valid")
    to_pil(blurred[0]).save(data / "a <b>.png")
    to_pil(scene[0, :, 4:-4, 4:-4]).save(data / "truth" / "a <b>.png")
    np.save(data / "kernels" / "a <b>.npy", kernel[0, 0].numpy())
    to_pil(blurred[0, :1]).save(data / "grey.jpg")
    (data / "none.png").write_text("not a picture")
    (data / "notes.txt").write_text("is left alone")
    return data


def test_cases_are_found_with_what_is_known(folder):
    cases = find_cases(folder)
    assert [case.blurred.name for case in cases] == ["a <b>.png", "grey.jpg", "none.png"]
    assert cases[0].truth is not None and cases[0].kernel is not None
    assert cases[1].truth is None and cases[1].kernel is None
    with pytest.raises(FileNotFoundError, match="no picture"):
        find_cases(folder / "kernels")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_cases(folder / "nowhere")


def test_kernels_are_read_from_arrays_and_pictures(tmp_path):
    kernel = random_motion_kernel(9, seed=3)
    np.save(tmp_path / "k.npy", 7 * kernel[0, 0].numpy())
    torch.testing.assert_close(read_kernel(tmp_path / "k.npy"), kernel)
    to_pil((kernel / kernel.max())[0]).save(tmp_path / "k.png")
    assert float((read_kernel(tmp_path / "k.png") - kernel).abs().max()) < 0.01
    np.save(tmp_path / "wide.npy", np.ones((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"must be square, found \[3, 5\]"):
        read_kernel(tmp_path / "wide.npy")
    np.save(tmp_path / "zero.npy", np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match="positive somewhere"):
        read_kernel(tmp_path / "zero.npy")


def test_run_measures_keeps_and_shows(folder, tmp_path, monkeypatch):
    output = tmp_path / "out" / "mine.json"
    document = run_folder_suite(output, data=folder, **OPTIONS)
    first, grey, broken = document["rows"]
    assert {"psnr_input", "psnr_blind", "psnr_true_kernel", "mnc", "seconds"} <= set(first)
    assert 15 < first["psnr_input"] < 45 and 0 < first["mnc"] <= 1
    assert "psnr_blind" not in grey and "residual_std" in grey
    assert "not an image" in broken["failed"]
    assert document["summary"]["pictures"] == 3
    assert document["summary"]["failed"] == document["summary"]["with_truth"] == 1
    page = output.with_suffix(".html").read_text()
    assert "mine &amp; yours" in page and "<b>a &lt;b&gt;.png</b>" in page
    assert page.index("none.png") < page.index("a &lt;b&gt;") < page.index("grey.jpg")
    assert 'src="mine-pictures/a%20%3Cb%3E.png.png"' in page
    with Image.open(output.parent / "mine-pictures" / "a <b>.png.png") as picture:
        assert picture.height == 96

    # Again: nothing is computed but what failed or has changed.
    asked = []
    real = evaluate_folder.deblur
    monkeypatch.setattr(
        evaluate_folder, "deblur", lambda image, **o: asked.append(1) or real(image, **o)
    )
    to_pil(torch.rand(3, 64, 64)).save(folder / "none.png")
    again = run_folder_suite(output, data=folder, **OPTIONS)
    assert len(asked) == 1 and again["summary"]["failed"] == 0
    assert again["rows"][0] == first
    with pytest.raises(ValueError, match="another setup"):
        run_folder_suite(output, data=folder, **(OPTIONS | {"steps": 2}))


def test_a_truth_of_another_size_is_said(folder, tmp_path):
    to_pil(torch.rand(3, 50, 40)).save(folder / "truth" / "grey.png")
    document = run_folder_suite(tmp_path / "x.json", data=folder, **OPTIONS)
    assert "is 50 x 40, the blurred picture 96 x 96" in document["rows"][1]["failed"]


def test_command(folder, tmp_path):
    output = tmp_path / "x.json"
    command = ["evaluate", "--suite", "folder", "-o", str(output)]
    missing = CliRunner().invoke(app, command)
    assert missing.exit_code == 1 and "--data FOLDER" in missing.output
    options = ["--data", str(folder), "--kernel-size", "9", "--steps", "1"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["setup"]["noise_std"] is None
    assert output.with_suffix(".html").exists()


def test_page_of_nothing(tmp_path):
    path = write_page(
        tmp_path / "page.html", title="<T>", introduction="", summary={}, entries=[Entry("x")]
    )
    assert "&lt;T&gt;" in path.read_text() and "<img" not in path.read_text()
