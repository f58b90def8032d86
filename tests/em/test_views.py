"""Input views: masks, framing, and one clear line for each input that cannot be used."""

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import astronaut

from latentdem.io import InputError
from latentdem.views import load_views

RED = torch.tensor([0.8, 0.1, 0.1])


def picture(height=96, width=96, box=(30, 66, 24, 60), ground=1.0, noise=0.0, seed=0):
    """A red box on a plain ground ``[3,H,W]``."""
    image = torch.full((3, height, width), ground)
    top, bottom, left, right = box
    image[:, top:bottom, left:right] = RED[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    return (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def other(**kwargs):
    return picture(box=(36, 60, 24, 72), **kwargs)


def extent(mask):
    rows, columns = torch.nonzero(mask[0] > 0.5).unbind(1)
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def test_alpha_is_the_mask_and_the_ground_becomes_white():
    rgba = torch.cat((picture(ground=0.0), torch.zeros(1, 96, 96)))
    rgba[3, 30:66, 24:60] = 1
    views = load_views([rgba, other()], size=96)
    assert torch.equal(views.masks[0], rgba[3:])
    assert torch.equal(views.images[0], torch.where(rgba[3:] > 0, rgba[:3], torch.ones(())))
    assert views.images.shape == (2, 3, 96, 96)


@pytest.mark.parametrize("ground", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_border_colour_tells_the_ground(ground, noise):
    truth = picture()[:1] < 0.9
    views = load_views([picture(ground=ground, noise=noise), other(ground=ground)], size=96)
    assert torch.equal(views.masks[0] > 0.5, truth)
    outside = views.images[0][:, ~truth[0]]
    assert torch.equal(outside, torch.ones_like(outside))


def test_holes_are_filled_and_specks_dropped():
    image = picture()
    image[:, 40:50, 34:44] = 1.0  # of the ground's colour, inside
    image[:, 5:8, 80:83] = 0.0
    views = load_views([image, other()], size=96)
    assert torch.equal(views.masks[0] > 0.5, picture()[:1] < 0.9)


def test_given_masks_win_and_may_be_given_for_some_views_only():
    mask = torch.zeros(1, 96, 96)
    mask[:, 20:70, 20:70] = 1
    views = load_views([picture(), other()], masks=[mask, None], size=96)
    assert torch.equal(views.masks[0], mask)
    assert extent(views.masks[1]) == (24, 48)


def test_square_views_keep_their_framing():
    views = load_views([picture(), other()], size=48)
    assert extent(views.masks[0]) == (18, 18)
    assert extent(views.masks[1]) == (12, 24)
    rows, columns = torch.nonzero(views.masks[0, 0] > 0.5).unbind(1)
    assert (int(rows.min()), int(columns.min())) == (15, 12)


def test_resizing_is_antialiased():
    stripes = picture()
    stripes[:, 30:66:2, 24:60] = 0.0
    views = load_views([stripes, other()], size=24)
    inside = views.images[0][0, 9:15, 8:13]
    assert float((inside - 0.4).abs().max()) < 0.02


def test_photographs_are_centred_and_share_one_scale():
    near = picture(120, 160, box=(60, 110, 20, 90))  # 70 wide
    far = picture(120, 160, box=(10, 35, 100, 135))  # 35 wide
    views = load_views([near, far], size=64)
    assert extent(views.masks[0])[1] == pytest.approx(48, abs=1)
    assert extent(views.masks[1])[1] == pytest.approx(24, abs=1)
    for mask in views.masks:
        rows, columns = torch.nonzero(mask[0] > 0.5).double().mean(0)
        assert float(rows) == pytest.approx(31.5, abs=0.6)
        assert float(columns) == pytest.approx(31.5, abs=0.6)


def test_one_camera_held_upright_and_another_resolution_are_one_scale():
    wide = picture(120, 160, box=(40, 80, 60, 100))
    tall = picture(320, 240, box=(130, 210, 70, 150))
    views = load_views([wide, tall], size=64)
    assert extent(views.masks[0]) == pytest.approx((48, 48), abs=1)
    assert extent(views.masks[1]) == pytest.approx((48, 48), abs=1)


def test_files_arrays_and_pictures_are_read_and_named(tmp_path):
    array = (picture().permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "front.png")
    views = load_views([tmp_path / "front.png", other(), Image.fromarray(array[::-1, ::-1])])
    assert views.names == ["front.png", "view 2", "view 3"]
    assert len(views) == 3
    torch.testing.assert_close(views.images[0], views.images[2].flip(1, 2))


EMPTY = torch.zeros(1, 96, 96)


@pytest.mark.parametrize(
    ("inputs", "masks", "text"),
    [
        ([], None, "at least two views of the object are needed, found 0"),
        ([picture()], None, "found 1; add a picture from another side"),
        ("front.png", None, "views must be a list of two or more images, found one image"),
        (picture(), None, "views must be a list of two or more images, found one image"),
        ([picture(), picture()], None, "view 1 and view 2 are the same picture"),
        ([picture(), other()], [EMPTY, EMPTY], "view 1: the mask is empty"),
        ([picture(), other()], [EMPTY], "one mask for each view is needed, found 1 for 2 views"),
        (
            [picture(), other()],
            [EMPTY[:, :50], None],
            "view 1: its mask is 96 x 50 pixels, the view 96 x 96; they must be the same",
        ),
        (
            [picture(), picture(60, 96, box=(20, 40, 30, 60))],
            None,
            "view 1 is 96 x 96 pixels and view 2 96 x 60: views of different shapes",
        ),
        ([picture(), torch.ones(3, 96, 96)], None, "view 2: no object stands out from the back"),
        (
            [picture(), astronaut()[:96, :96]],
            None,
            "view 2: the background is too uneven to tell the object from it",
        ),
        (
            [picture(), picture(box=(30, 96, 0, 96))],
            None,
            "view 2: the object cannot be told from its background",
        ),
        ([picture(), picture(box=(40, 43, 40, 44))], None, "view 2: the object covers only 0.13 %"),
        ([picture().expand(2, 3, 96, 96), other()], None, "view 1: one image for each view"),
    ],
)
def test_bad_input_gets_one_clear_line(inputs, masks, text):
    with pytest.raises(InputError) as caught:
        load_views(inputs, masks=masks)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
