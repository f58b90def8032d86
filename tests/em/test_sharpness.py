"""Sharp photographs come back as they are."""

import json

import numpy as np
import pytest
import torch
from em.test_deblur import invoke
from em.test_natural_training import pictures
from PIL import Image
from safetensors.torch import load_file

import latentdem
import latentdem_ext as ext
from latentdem.batch import Options, run_batch
from latentdem.em.settings import ProxSettings
from latentdem.em.sharp import SHARP
from latentdem.evaluate import photograph_crop
from latentdem.io import to_pil
from latentdem.operators.motion import random_motion_kernel
from latentdem.priors.sharpness import (
    DISTANCES,
    FLOOR,
    WINDOW,
    WINDOWS,
    SharpnessNet,
    difference_statistics,
    load_sharpness,
    sharp_log_odds,
    windows,
)
from latentdem.priors.weights import save_network
from latentdem.training import sharpness as training
from latentdem.training.data import CropSampler

SHARP_ONE = "motorcycle"
QUICK = ProxSettings(steps=1, chains=1)


@pytest.fixture(scope="module")
def sharp():
    return photograph_crop(SHARP_ONE, 256)


def test_a_sharp_photograph_comes_back_as_it_is(sharp):
    result = latentdem.deblur(sharp, settings=QUICK)
    assert torch.equal(result.image, sharp)
    assert float(result.kernel.max()) == 1 and float(result.kernel.sum()) == 1
    assert result.kernel[0, 0, result.kernel.shape[-1] // 2, result.kernel.shape[-1] // 2] == 1
    assert result.report["warnings"] == [[SHARP]]
    assert result.report["network_evaluations"] == 0
    assert result.report["sharp_log_odds"][0] > 3


def test_unless_it_is_said_to_be_blurred(sharp):
    result = latentdem.deblur(
        sharp[..., :96, :96], settings=QUICK, kernel_size=9, assume_blurred=True
    )
    assert not torch.equal(result.image, sharp[..., :96, :96])
    assert SHARP not in result.report["warnings"][0]
    assert result.report["sharp_log_odds"] == []


@pytest.mark.parametrize("size", [9, 25])
def test_blurred_ones_are_deblurred(size):
    network = load_sharpness()
    for name in (SHARP_ONE, "china", "camera"):
        scene = photograph_crop(name, 256)
        kernel = random_motion_kernel(size, seed=size)
        blurred = ext.blur_conv2d(scene, kernel, boundary="valid")
        assert sharp_log_odds(blurred, network) < 0, name


def test_batches_grey_alpha_and_grids(sharp):
    scene = photograph_crop(SHARP_ONE, 256)
    blurred = ext.blur_conv2d(scene, random_motion_kernel(13, seed=2), boundary="valid")
    crop = sharp[..., 6:-6, 6:-6]
    pair = torch.cat([crop, blurred])[..., :112, :112]
    result = latentdem.deblur(pair, settings=QUICK, kernel_size=13)
    assert torch.equal(result.image[:1], pair[:1])
    assert not torch.equal(result.image[1:], pair[1:])
    assert [SHARP in found for found in result.report["warnings"]] == [True, False]
    grey = crop.mean(1, keepdim=True)
    assert torch.equal(latentdem.deblur(grey, settings=QUICK).image, grey)
    clear = torch.cat([crop, torch.rand(1, 1, *crop.shape[-2:])], 1)
    found = latentdem.deblur(clear, settings=QUICK, grid=2)
    assert torch.equal(found.image, clear)
    assert found.kernel.shape[1] == 4


def test_a_known_kernel_or_an_enlargement_is_not_questioned(sharp):
    small = sharp[..., :64, :64]
    kernel = random_motion_kernel(5, seed=1)
    for options in ({"kernel": kernel}, {"scale": 2}):
        result = latentdem.deblur(small, settings=QUICK, **options)
        assert result.report["sharp_log_odds"] == []
        assert result.report["network_evaluations"] > 0


def test_the_command_says_so_and_takes_no_for_an_answer(sharp, tmp_path):
    photo = tmp_path / "sharp.png"
    to_pil(sharp[0]).save(photo)
    result = invoke("deblur", str(photo), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "looks sharp" in " ".join(result.output.split())
    assert "--assume-blurred" in result.output
    before, after = (Image.open(p).convert("RGB") for p in (photo, tmp_path / "out/restored.png"))
    assert before.tobytes() == after.tobytes()
    again = invoke("deblur", str(photo), "-o", str(tmp_path / "out"))
    assert "already done" in " ".join(again.output.split())
    small = tmp_path / "small.png"
    to_pil(sharp[0, :, :64, :64]).save(small)
    forced = invoke("deblur", str(small), "-o", str(tmp_path / "forced"), "--steps", "1",
                    "--kernel-size", "5", "--assume-blurred")  # fmt: skip
    assert forced.exit_code == 0, forced.output
    assert json.loads((tmp_path / "forced/report.json").read_text())["assume_blurred"] is True


def test_in_a_batch_of_files(sharp, tmp_path):
    (tmp_path / "in").mkdir()
    to_pil(sharp[0]).save(tmp_path / "in/sharp.png")
    summary = run_batch([tmp_path / "in"], tmp_path / "out", Options(steps=1))
    assert (summary.done, summary.failed) == (1, 0)
    report = json.loads((tmp_path / "out/sharp/report.json").read_text())
    assert report["warnings"] == [[SHARP]]


@pytest.mark.parametrize("size", [(32, 32), (33, 300), (256, 256), (700, 1000)])
def test_windows_are_few_and_within(size):
    image = torch.rand(1, 3, *size)
    found = windows(image)
    assert 1 <= len(found) <= WINDOWS
    assert found.shape[-2:] == (min(size[0], WINDOW), min(size[1], WINDOW))
    assert SharpnessNet()(difference_statistics(found)).shape == (len(found),)


def test_statistics_of_a_ramp():
    """Differences over d pixels, to the right and down, are d times the slope."""
    ramp = 0.01 * torch.arange(64.0).expand(64, 64)
    found = difference_statistics(ramp.expand(1, 3, -1, -1)).reshape(6, 5, 5)
    steepest = found[-1].exp() - FLOOR
    assert torch.allclose(steepest, 0.01 * torch.tensor(DISTANCES)[:, None], atol=1e-5)
    assert torch.allclose(found[0].exp(), torch.tensor(FLOOR), atol=1e-5)  # along the lines


def test_statistics_do_not_know_the_side_that_a_motion_came_from():
    image = photograph_crop(SHARP_ONE, 256)
    found = difference_statistics(image)
    for turned in (image.flip(-1), image.flip(-2), image.transpose(-1, -2)):
        # Every second pixel is looked at, and not the same ones.
        assert float((difference_statistics(turned) - found).abs().mean()) < 0.05


def test_windows_are_where_there_is_something_to_see():
    image = torch.zeros(1, 3, 1280, 1280)
    image[..., 530:750, 530:750] = torch.rand(1, 3, 220, 220)
    assert float(windows(image)[0].std()) > 0.1


@pytest.mark.parametrize("size", [(1, 1), (31, 200)])
def test_too_small_to_say(size):
    assert sharp_log_odds(torch.rand(1, 3, *size), load_sharpness()) == 0


def test_loading_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="latentdem train-sharpness"):
        load_sharpness(tmp_path / "none.safetensors")
    path = tmp_path / "text.safetensors"
    path.write_text("no weights")
    with pytest.raises(ValueError, match="not a sharpness classifier"):
        load_sharpness(path)
    save_network(path, SharpnessNet())
    assert not load_sharpness(path).training


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(training, "SIZES", (5, 9))
    monkeypatch.setattr(training, "SIDE", 48)
    monkeypatch.setattr(training, "PAIRS_PER_SHARD", 4)
    monkeypatch.setattr(training, "load_images", lambda folder, split: pictures())
    monkeypatch.setattr(training, "fetch", lambda folder, manifest: None)


def test_the_command_collects_trains_and_goes_on(small, tmp_path):
    output = tmp_path / "own.safetensors"
    arguments = ["train-sharpness", "-o", str(output), "--data", str(tmp_path), "--runs",
                 str(tmp_path / "runs"), "--shards", "2", "--minutes", "0.01"]  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "held-out loss" in result.output
    assert isinstance(load_sharpness(output), SharpnessNet)
    shard = tmp_path / "runs" / "statistics" / "train-0001.safetensors"
    first = load_file(shard)["statistics"]
    shard.unlink()
    assert "resumed at step" in invoke(*arguments).output
    assert torch.equal(load_file(shard)["statistics"], first)


def test_pairs_show_one_scene():
    crops = CropSampler([(torch.randint(0, 256, (3, 320, 320)).byte(), 1.0)], 260, seed=1)
    rng = np.random.default_rng(1)
    for _ in range(3):
        sharp, blurred = training.sharp_and_blurred(crops, rng)
        assert sharp.shape == blurred.shape == (3, training.SIDE, training.SIDE)
        assert abs(float(sharp.mean() - blurred.mean())) < 0.05
        assert sharp.diff(dim=-1).abs().mean() > blurred.diff(dim=-1).abs().mean()


def test_kernels_do_blur_and_lenses_do_not():
    rng = np.random.default_rng(2)
    assert all(float(training.blur_kernel(rng).max()) < 0.4 for _ in range(50))
    lenses = [training.lens_kernel(rng) for _ in range(50)]
    assert all(float(lens.sum()) == pytest.approx(1) for lens in lenses)
    assert sum(float(lens.max()) > 0.99 for lens in lenses) > 15
