"""Noise of an observation: of the sensor, and of a JPEG's coding."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from em.test_deblur import invoke
from PIL import Image

import latentdem
import latentdem_ext as ext
from latentdem import noise
from latentdem.batch import Options, run_batch
from latentdem.evaluate import photograph_crop
from latentdem.io import InputError, to_batch, to_pil
from latentdem.noise import coding_noise_std, estimate_noise_std
from latentdem.operators.motion import random_motion_kernel
from latentdem.serve import tasks
from latentdem.serve.jobs import Limits

FAST = {"kernel_size": 5, "steps": 1, "assume_blurred": True}


def blurred(side=128, noise_std=0.005):
    kernel = random_motion_kernel(9, seed=1)
    image = ext.blur_conv2d(photograph_crop("coffee", side + 8), kernel, boundary="valid")
    generator = torch.Generator().manual_seed(0)
    return (image + noise_std * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def as_jpeg(image, quality, **options):
    stream = BytesIO()
    to_pil(image[0]).save(stream, "JPEG", quality=quality, **options)
    stream.seek(0)
    return stream


def brightness(image):
    return (image * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(1)


@pytest.mark.parametrize("std", [0.005, 0.02, 0.05])
def test_noise_of_the_sensor(std):
    image = 0.5 + std * torch.randn(1, 3, 128, 128)
    assert estimate_noise_std(image) == pytest.approx(std, rel=0.05)
    assert estimate_noise_std(torch.full((1, 3, 16, 16), 0.5)) == 0.002
    assert estimate_noise_std(torch.rand(1, 1, 1, 9)) == 0.01


@pytest.mark.parametrize("quality", [95, 85, 75, 50])
@pytest.mark.parametrize("noise_std", [0.0, 0.01])
def test_tables_tell_the_error(quality, noise_std):
    image = blurred(noise_std=noise_std)
    coded = as_jpeg(image, quality)
    error = brightness(to_batch(Image.open(coded)) - image).std()
    found = coding_noise_std(coded)
    assert 0.7 < found / float(error) < 2.1
    # The finest detail, which coding has taken, does not.
    assert estimate_noise_std(to_batch(Image.open(coded))) < max(0.003, noise_std)


def test_what_knows_its_tables(tmp_path):
    image = blurred()
    stream = as_jpeg(image, 75)
    path = tmp_path / "photo.jpg"
    path.write_bytes(stream.getvalue())
    opened = Image.open(path)
    known = coding_noise_std(path)
    assert known > 0.003
    assert coding_noise_std(str(path)) == coding_noise_std(stream) == known
    assert coding_noise_std(opened) == known
    for unknown in (np.asarray(opened), image, opened.convert("RGB"), opened.resize((64, 64))):
        assert coding_noise_std(unknown) == 0
    opened.save(tmp_path / "same.png")
    assert coding_noise_std(tmp_path / "same.png") == 0


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours(mode):
    stream = BytesIO()
    to_pil(blurred()[0]).convert(mode).save(stream, "JPEG", quality=75)
    assert coding_noise_std(stream) == pytest.approx(coding_noise_std(as_jpeg(blurred(), 75)), 0.3)


def test_a_turned_photograph_is_judged_as_it_is_stored(tmp_path):
    image = blurred()[..., :96, :]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(as_jpeg(image, 75, exif=exif.tobytes()).getvalue())
    assert to_batch(turned).shape[-2:] == (128, 96)
    assert coding_noise_std(turned) == coding_noise_std(as_jpeg(image, 75))


def test_of_a_large_picture_some_blocks_are_enough(monkeypatch):
    coded = as_jpeg(blurred(256, noise_std=0.01), 75)
    whole = coding_noise_std(coded)
    monkeypatch.setattr(noise, "MOST_BLOCKS", 12)
    assert coding_noise_std(coded) == pytest.approx(whole, rel=0.15)


def test_best_quality_changes_nothing():
    for image in (blurred(), torch.rand(1, 3, 7, 5)):
        coded = as_jpeg(image, 100)
        observed = to_batch(Image.open(coded))
        assert coding_noise_std(coded) < 1e-6
        assert estimate_noise_std(observed, coding_noise_std(coded)) == estimate_noise_std(observed)


def test_deblur_takes_it_from_paths_and_pictures(tmp_path):
    image = blurred(48)
    path = tmp_path / "photo.jpg"
    path.write_bytes(as_jpeg(image, 50).getvalue())
    known = coding_noise_std(path)
    for source in (path, Image.open(path)):
        report = latentdem.deblur(source, **FAST).report
        assert report["coding_noise_std"] == [known]
        assert report["noise_std"] == [estimate_noise_std(to_batch(path), known)]
    report = latentdem.deblur(to_batch(path), **FAST).report
    assert report["coding_noise_std"] == [0] and report["noise_std"] < [known]
    report = latentdem.deblur(path, noise_std=0.004, **FAST).report
    assert report["noise_std"] == [0.004]


def test_deblur_is_told_of_each_image():
    image = blurred(48)
    both = latentdem.deblur(torch.cat([image, image]), coding_noise_std=[0.0, 0.03], **FAST)
    assert both.report["noise_std"][0] < 0.01 < both.report["noise_std"][1]
    assert [one.report["coding_noise_std"] for one in both.split()] == [[0.0], [0.03]]
    for std, message in [
        ([0.1, 0.1], "be one number or 1, found 2"),
        (1.5, "lie between 0 and 1"),
        (float("nan"), "lie between 0 and 1"),
    ]:
        with pytest.raises(InputError, match=f"coding_noise_std must {message}"):
            latentdem.deblur(image, coding_noise_std=std, **FAST)


def test_commands_and_batches_read_the_tables(tmp_path):
    (tmp_path / "in").mkdir()
    for name, quality in (("a", 50), ("b", 90)):
        (tmp_path / f"in/{name}.jpg").write_bytes(as_jpeg(blurred(48), quality).getvalue())
    options = Options(kernel_size=5, steps=1, assume_blurred=True)
    summary = run_batch([tmp_path / "in"], tmp_path / "many", options, batch_size=2)
    assert (summary.done, summary.failed) == (2, 0)
    for name in ("a", "b"):
        report = json.loads((tmp_path / f"many/{name}/report.json").read_text())
        assert report["coding_noise_std"] == [coding_noise_std(tmp_path / f"in/{name}.jpg")]
    result = invoke("deblur", tmp_path / "in/a.jpg", "-o", tmp_path / "out", "--kernel-size", 5,
                    "--steps", 1, "--assume-blurred")  # fmt: skip
    assert result.exit_code == 0, result.output
    one = json.loads((tmp_path / "out/report.json").read_text())
    many = json.loads((tmp_path / "many/a/report.json").read_text())
    assert one["noise_std"] == many["noise_std"] > [0.0]


class Job:
    """Of the page's worker, what the work asks of it."""

    def report(self, update):
        pass

    def check(self):
        pass


@pytest.mark.parametrize("side", [None, 40])
def test_the_page_reads_the_tables_of_what_it_does_not_shrink(tmp_path, side):
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(as_jpeg(blurred(48), 50).getvalue())
    request = tasks.DeblurRequest(photo, side=side, kernel_size=5, steps=1, assume_blurred=True)
    tasks.deblur(request, tmp_path / "out", Limits())(Job())
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["coding_noise_std"] == [coding_noise_std(photo) if side is None else 0]
