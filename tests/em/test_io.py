import numpy as np
import pytest
import torch
from PIL import Image

from latentdem.io import InputError, to_batch


def test_every_kind_of_input(tmp_path):
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8))
    path = tmp_path / "grey.png"
    grey.save(path)
    assert to_batch(path).shape == to_batch(str(path)).shape == (1, 1, 6, 8)
    assert to_batch(grey.convert("RGB")).shape == (1, 3, 6, 8)
    assert to_batch(grey.convert("RGBA")).shape == (1, 4, 6, 8)
    assert to_batch(grey.convert("P")).shape == (1, 3, 6, 8)
    assert to_batch(grey.convert("1")).shape == (1, 1, 6, 8)
    assert to_batch(np.zeros((6, 8, 3), np.uint8)).shape == (1, 3, 6, 8)
    assert to_batch(np.zeros((2, 6, 8, 3), np.float64)).shape == (2, 3, 6, 8)
    assert to_batch(torch.zeros(3, 6, 8)).shape == (1, 3, 6, 8)
    assert to_batch(torch.full((2, 3, 6, 8), 255, dtype=torch.uint8)).max() == 1


def test_sixteen_bit_grey_keeps_its_precision(tmp_path):
    values = np.array([[0, 1, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    expected = torch.tensor([0, 1, 32768, 65535]) / 65535
    torch.testing.assert_close(to_batch(tmp_path / "deep.png")[0, 0, 0], expected)
    torch.testing.assert_close(to_batch(values)[0, 0, 0], expected)


def test_exif_rotation(tmp_path):
    image = Image.fromarray(np.zeros((4, 10, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert to_batch(tmp_path / "turned.jpg").shape == (1, 3, 10, 4)


def test_bad_input(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    whole = tmp_path / "whole.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    half = tmp_path / "half.png"
    half.write_bytes(whole.read_bytes()[:2000])
    for value, message in [
        (tmp_path / "missing.png", "no such file"),
        (tmp_path, "is a folder"),
        (text, "not an image"),
        (half, "damaged or truncated"),
        (np.full((4, 4), np.nan), "not finite"),
        (np.full((4, 4), 200.0), r"must lie in \[0, 1\]"),
        (np.zeros((0, 4, 3)), "empty"),
        (np.zeros((4, 4, 7)), "1, 3 or 4 channels"),
        (np.zeros((2,)), "an array must be"),
        (3, "cannot read an image from int"),
    ]:
        with pytest.raises(InputError, match=message):
            to_batch(value)
